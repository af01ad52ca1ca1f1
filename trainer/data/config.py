"""Where interactions and items come from, and how they are cleaned and split. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recommender.config import StrictModel

OnError = Literal["strict", "skip"]
Histories = Literal["joined", "published"]
TrainTargets = Literal["protocol", "every_position"]

_FILE = "CSV, TSV, JSONL or Parquet by its extension, `.gz` allowed; a local path or a URL such as s3://bucket/file."
_ON_ERROR = "strict: stop at rows that cannot be used; skip: leave them out and list them in stats.json."
_TRAIN_TARGETS = (
    "protocol: the split's own training targets; every_position: every position of a sequence up to its last training "
    "target, save held-out ones."
)


class InteractionColumns(StrictModel):
    """Names of the columns of an interactions file."""

    user_id: str = Field("user_id", description="Who.")
    item_id: str = Field("item_id", description="What; must be in the items file.")
    timestamp: str | None = Field(
        "timestamp", description="When: a number or ISO 8601; only its order matters. null: the rows are in order."
    )


class ItemColumns(StrictModel):
    """Names of the columns of an items file; further columns are kept as they are."""

    item_id: str = Field("item_id", description="The id that interactions use; distinct.")
    title: str = Field("title", description="The words that spell the item.")


class WindowColumns(StrictModel):
    """Names of the columns of a file with one (user, history, target) a row."""

    user_id: str = Field("user_id", description="Who.")
    history: str = Field("history_item_ids", description="Item ids before the target, oldest first: a text or a list.")
    target: str = Field("target_item_id", description="The item id to predict.")
    timestamp: str = Field("timestamp", description="When the target happened; used in the files that have it.")
    candidates: str = Field(
        "candidate_item_ids", description="Item ids of a candidate list; kept where the files have it."
    )


class InteractionsData(StrictModel):
    """One interaction a row; the split is made here."""

    format: Literal["interactions"] = Field("interactions", description="One interaction a row.")
    interactions: str = Field(description=f"Interactions file. {_FILE}")
    items: str = Field(description=f"Items file. {_FILE}")
    columns: InteractionColumns = Field(InteractionColumns(), description="Column names of the interactions file.")
    item_columns: ItemColumns = Field(ItemColumns(), description="Column names of the items file.")
    protocol: Literal["leave_one_out", "chronological"] = Field(
        "leave_one_out",
        description="leave_one_out: a user's last item is the test target, the one before it the validation target; "
        "chronological: all windows sorted by target time and cut 8:1:1, as MSL does.",
    )
    max_window: int = Field(
        11,
        ge=2,
        description="chronological: items of a window, target included. A longer sequence gives a window at each "
        "position, any other one window.",
    )
    min_user_interactions: int = Field(0, ge=0, description="k-core: drop users with fewer interactions; 0: off.")
    min_item_interactions: int = Field(
        0, ge=0, description="k-core: drop items with fewer interactions, from the catalogue too; 0: off."
    )
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="Rows that repeat user, item and timestamp: drop all but the first, or keep them."
    )
    on_error: OnError = Field("strict", description=_ON_ERROR)
    train_targets: TrainTargets = Field("protocol", description=_TRAIN_TARGETS)

    @model_validator(mode="after")
    def _has_times(self) -> InteractionsData:
        if self.protocol == "chronological" and self.columns.timestamp is None:
            raise ValueError("protocol chronological sorts by time: name the column in columns.timestamp")
        return self


class WindowsData(StrictModel):
    """Published splits: one (user, history, target) a row."""

    format: Literal["windows"] = Field(description="One (user, history, target) a row.")
    train: str = Field(description=f"Training windows. {_FILE}")
    validation: str = Field(description=f"Validation windows. {_FILE}")
    test: str = Field(description=f"Test windows. {_FILE}")
    items: str = Field(description=f"Items file. {_FILE}")
    columns: WindowColumns = Field(WindowColumns(), description="Column names of the three windows files.")
    item_columns: ItemColumns = Field(ItemColumns(), description="Column names of the items file.")
    history_separator: str = Field(" ", min_length=1, description="Between the item ids of a history.")
    histories: Histories = Field(
        "joined",
        description="What validation and test targets are ranked after. joined: all that the windows of a user tell of "
        "what came before, often more than a window holds; published: the history of the target's own row. Models read "
        "the last items of either (prompt.history), and evaluation.exclude_seen leaves out all of them.",
    )
    on_error: OnError = Field("strict", description=_ON_ERROR)
    train_targets: TrainTargets = Field("protocol", description=_TRAIN_TARGETS)


DataConfig = Annotated[InteractionsData | WindowsData, Field(discriminator="format")]
