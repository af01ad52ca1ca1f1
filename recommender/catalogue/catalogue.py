"""The items that can be recommended: ids, titles, and how a person's words are matched to them."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import marisa_trie
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recommender.errors import UserError

POPULARITY = "training_interactions"  # the column of catalogue.parquet that holds it
_WHITESPACE = re.compile(r"\s+")


def normalise_title(raw: str) -> str:
    """Unescape HTML entities until nothing changes, apply NFKC, drop control characters, fold white space.

    Feeds from shops are escaped once, twice or not at all ("&amp;amp;"), hence the loop.
    """
    for _ in range(4):
        try:
            unescaped = html.unescape(raw)
        except ValueError:  # "&#999…;" with more digits than Python reads as a number
            break
        if unescaped == raw:
            break
        raw = unescaped
    text = unicodedata.normalize("NFKC", raw)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return _WHITESPACE.sub(" ", text).strip()


class Catalogue:
    """Items in a fixed order; an item's index is its row.

    Args:
        item_ids: the user's ids, distinct.
        titles: titles as in the source; normalised here. An empty one becomes "Item <item_id>".
        columns: further columns, kept as they are (categories, brands, …), with one row an item.
        popularity: int64 [items]; how often each occurs in the training data, where that is known.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        titles: Sequence[str],
        columns: pa.Table | None = None,
        popularity: np.ndarray | None = None,
    ):
        if len(item_ids) != len(titles):
            raise ValueError(f"{len(item_ids)} item ids, but {len(titles)} titles")
        if not item_ids:
            raise UserError("the catalogue has no items")
        self.item_ids = list(item_ids)
        self.titles = [normalise_title(t or "") or f"Item {i}" for i, t in zip(item_ids, titles, strict=True)]
        self.columns = columns
        self.popularity = popularity
        self._by_id = {item_id: index for index, item_id in enumerate(self.item_ids)}
        if len(self._by_id) != len(self.item_ids):
            raise UserError("the catalogue holds an item id twice")

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def title_index(self) -> marisa_trie.RecordTrie:
        """Title (case folded) → item indices, for look-ups and prefix search from Python."""
        return marisa_trie.RecordTrie("<I", ((t.casefold(), (i,)) for i, t in enumerate(self.titles)))

    def index_of_id(self, item_id: str) -> int | None:
        """The index of an item named by its id; None when unknown."""
        return self._by_id.get(item_id)

    def index_of(self, text: str) -> int | None:
        """The index of an item named by its id or, failing that, by its title (case ignored); None when unknown.

        Of several items with this title the first is meant; only an id tells them apart.
        """
        by_id = self._by_id.get(text)
        if by_id is not None:
            return by_id
        found = self.title_index.get(normalise_title(text).casefold())
        return min(index for (index,) in found) if found else None

    def similar_titles(self, text: str, limit: int = 3) -> list[str]:
        """Titles that share the longest opening with `text`, if that is four characters or more.

        A handful of look-ups in the trie of titles, whatever the catalogue's size: an error may not cost more than an
        answer.
        """
        folded = normalise_title(text[:80]).casefold()
        for length in range(len(folded), 3, -1):
            opened = list(islice(self.title_index.iteritems(folded[:length]), limit))
            if opened:
                return [self.titles[index] for _, (index,) in opened]
        return []

    def indices_of(self, texts: Sequence[str], field: str = "history") -> list[int]:
        """Indices of items named by id or title.

        Raises:
            UserError: names the unknown ones and, where there are any, titles that look like them.
        """
        found = [self.index_of(text) for text in texts]
        unknown = [text for text, index in zip(texts, found, strict=True) if index is None]
        if unknown:
            hint = "".join(f"; did you mean {title!r}?" for title in self.similar_titles(unknown[0])[:1])
            raise UserError(
                f"{field}: {len(unknown)} of {len(texts)} items are not in the catalogue: "
                + ", ".join(repr(text[:80]) for text in unknown[:5])
                + hint
            )
        return [index for index in found if index is not None]

    def extended(self, further: Catalogue) -> Catalogue:
        """With further items behind those that it has, in no training data yet.

        A column that one of the two lacks is null there.

        Raises:
            UserError: an item id stands in both, or a column holds other types.
        """
        tables = [
            pa.table({"item_id": pa.array(each.item_ids, pa.string())})
            if each.columns is None
            else each.columns.drop_columns(["title"] if "title" in each.columns.column_names else [])
            for each in (self, further)
        ]
        try:
            columns = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"the new items have columns of other types than the catalogue: {error}") from None
        popularity = None if self.popularity is None else np.append(self.popularity, np.zeros(len(further), np.int64))
        return Catalogue(self.item_ids + further.item_ids, self.titles + further.titles, columns, popularity)

    def save(self, directory: Path) -> None:
        table = self.columns if self.columns is not None else pa.table({})
        kept = [name for name in table.column_names if name not in ("item_id", "title", POPULARITY)]
        columns: dict[str, Any] = {
            "item_id": pa.array(self.item_ids, pa.string()),
            "title": pa.array(self.titles, pa.string()),
        }
        columns |= {name: table[name] for name in kept}
        if self.popularity is not None:
            columns[POPULARITY] = pa.array(self.popularity, pa.int64())
        pq.write_table(pa.table(columns), directory / "catalogue.parquet")
        self.title_index.save(str(directory / "titles.marisa"))

    @classmethod
    def load(cls, directory: Path) -> Catalogue:
        with pq.ParquetFile(directory / "catalogue.parquet") as file:  # `read_table` would import pandas
            table = file.read()
        popularity = None
        if POPULARITY in table.column_names:
            popularity = table[POPULARITY].to_numpy()
            table = table.drop_columns([POPULARITY])
        catalogue = cls(table["item_id"].to_pylist(), table["title"].to_pylist(), table, popularity)
        if (directory / "titles.marisa").exists():
            # marisa's own format, a plain trie: loading it runs no code.
            catalogue.__dict__["title_index"] = marisa_trie.RecordTrie("<I").mmap(str(directory / "titles.marisa"))
        return catalogue
