"""Files to tables: CSV, TSV, JSONL and Parquet, with what is wrong in them said row by row."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, LocalFileSystem

from recommender.errors import UserError
from trainer.data.config import InteractionColumns, ItemColumns, OnError, WindowColumns

_EXAMPLES = 5
_FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass
class Problems:
    """What was wrong with rows of the source files.

    Attributes:
        on_error: "strict" raises at the first kind of problem; "skip" writes it down.
        progress: told of each problem that is skipped.
        found: [{file, problem, count, examples}].
    """

    on_error: OnError
    progress: Callable[[str], None] = print
    found: list[dict[str, Any]] = field(default_factory=list)

    def report(self, file: str, problem: str, rows: Sequence[int], values: Sequence[object], remedy: str) -> None:
        """Report rows that cannot be used.

        Args:
            rows: numbers of the offending rows in the file, from 1, a header included.
            values: what stands there; at least as many as are shown.

        Raises:
            UserError: under "strict", when there are such rows.
        """
        if not len(rows):
            return
        examples = [f"row {row}: {_short(value)}" for row, value in zip(rows[:_EXAMPLES], values, strict=False)]
        message = f"{file}: {len(rows)} {'row' if len(rows) == 1 else 'rows'}: {problem}: " + "; ".join(examples)
        if self.on_error == "strict":
            raise UserError(f"{message}. {remedy}, or set data.on_error: skip to leave such rows out")
        self.found.append({"file": file, "problem": problem, "count": len(rows), "examples": examples})
        self.progress(f"skipped {message}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


@dataclass(frozen=True)
class Source:
    """Rows of one file.

    Attributes:
        file: as the user named it.
        table: its columns.
        rows: int64 [n]; number of each row in the file, from 1, a header included.
    """

    file: str
    table: pa.Table
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, bad: np.ndarray, column: str, problem: str, remedy: str, problems: Problems) -> Source:
        """Report the rows where `bad` and return the others."""
        if not bad.any():
            return self
        at = np.flatnonzero(bad)
        values = self.table[column].take(at[:_EXAMPLES]).to_pylist()
        problems.report(self.file, problem, self.rows[at].tolist(), values, remedy)
        return Source(self.file, self.table.filter(pa.array(~bad)), self.rows[~bad])


# -- The four kinds of file -------------------------------------------------------------------------------------------


def stream(file: str) -> Iterator[bytes]:
    """The bytes of a local file or a URL, as they lie there, a megabyte at a time.

    Raises:
        UserError: the file cannot be opened or read.
    """
    try:
        if "://" in file:
            filesystem, path = FileSystem.from_uri(file)
        else:
            filesystem, path = LocalFileSystem(), str(Path(file).expanduser())
        with filesystem.open_input_stream(path, compression=None) as opened:
            while chunk := opened.read(1 << 20):
                yield chunk
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; check the path under `data`") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def read(
    file: str, columns: Mapping[str, str], section: str, problems: Problems, optional: Sequence[str] = ()
) -> Source:
    """Read a file and give its mapped columns the names this project uses; further columns keep theirs.

    Args:
        file: path or URL; the extension tells the format.
        columns: our name → the file's name.
        section: where in the config the mapping lies, for messages.
        problems: takes malformed rows.
        optional: our names of columns that may be absent.

    Raises:
        UserError: the file is missing, truncated, empty, not UTF-8, of another format, or lacks a column.
    """
    path = Path(file.lower().removesuffix(".gz"))
    if path.suffix not in _FORMATS:
        raise UserError(f"{file}: unknown extension; name it one of {', '.join(_FORMATS)} (text may end in .gz)")
    data = b"".join(stream(file))
    if file.lower().endswith(".gz"):
        data = _decompress(file, data)
    if not data.strip():
        raise UserError(f"{file}: the file is empty; give one with rows")
    if path.suffix == ".parquet":
        source = _read_parquet(file, data)
    else:
        _check_utf8(file, data)
        read_text = _read_jsonl if path.suffix == ".jsonl" else _read_csv
        source = read_text(file, data, list(columns.values()), problems)
    if not len(source):
        raise UserError(f"{file}: the file holds no usable rows; give one with rows")
    return Source(file, _rename(file, source.table, columns, section, optional), source.rows)


def _decompress(file: str, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError:
        raise UserError(f"{file}: the gzip file is truncated; copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{file}: not a sound gzip file ({error}); copy it again, or drop .gz from its name") from None


def _check_utf8(file: str, data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        line = data[data.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0]
        bad = sum(not _is_utf8(line) for line in data.split(b"\n"))
        raise UserError(
            f"{file}: not UTF-8: {bad} lines, first row {number}: {_short(line)}. Convert the file first, e.g. "
            "`iconv -f latin1 -t utf-8`"
        ) from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_csv(file: str, data: bytes, text_columns: list[str], problems: Problems) -> Source:
    malformed: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip"

    delimiter = "\t" if ".tsv" in Path(file.lower()).suffixes else ","
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            # Single-threaded, because only then does Arrow number the malformed rows.
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=1 << 24),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(column_types={name: pa.string() for name in text_columns}),
        )
    except pa.ArrowException as error:
        raise UserError(f"{file}: not readable as {'TSV' if delimiter != ',' else 'CSV'}: {error}") from None
    numbers = [row.number for row in malformed]
    rows = np.delete(np.arange(2, 2 + len(table) + len(malformed), dtype=np.int64), np.array(numbers, np.int64) - 2)
    expected = f"expected {len(table.column_names)} fields, found another number"
    problems.report(file, expected, numbers, [row.text for row in malformed], "Quote fields that hold the delimiter")
    # An id or a title has no line break: a quote that is not closed took the following rows into it.
    texts = {name: table[name] for name in text_columns if table.column_names.count(name) == 1}
    broken = {name: pc.fill_null(pc.match_substring(values, "\n"), False).to_numpy() for name, values in texts.items()}
    whole = ~np.logical_or.reduce(list(broken.values()) or [np.zeros(len(table), bool)])
    for name, mask in broken.items():
        found = np.flatnonzero(mask)
        values = texts[name].take(found[:_EXAMPLES]).to_pylist()
        remedy = "Close the quotation mark that the field opens with, or write it twice where it belongs to the text"
        problems.report(file, f"{name}: goes on over several lines", rows[found].tolist(), values, remedy)
    return Source(file, table.filter(pa.array(whole)), rows[whole])


def _read_jsonl(file: str, data: bytes, text_columns: list[str], problems: Problems) -> Source:
    """JSON by the standard library: Arrow's reader guesses dates in ids and refuses columns of mixed type."""
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    malformed: list[tuple[int, str]] = []
    for number, line in enumerate(io.StringIO(data.decode("utf-8-sig")), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
            rows.append(number)
        else:
            malformed.append((number, line.rstrip("\n")))
    problems.report(
        file,
        "not a JSON object",
        [number for number, _ in malformed],
        [line for _, line in malformed],
        "Write one JSON object a line",
    )
    names = list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: _column([record.get(name) for record in records]) for name in names})
    return Source(file, table, np.array(rows, np.int64))


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError):
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values])


def _read_parquet(file: str, data: bytes) -> Source:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a sound Parquet file: {error}") from None
    return Source(file, table, np.arange(1, 1 + len(table), dtype=np.int64))


def _rename(file: str, table: pa.Table, columns: Mapping[str, str], section: str, optional: Sequence[str]) -> pa.Table:
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{file}: {len(twice)} column names stand there twice: {', '.join(twice)}; rename them")
    missing = {ours: theirs for ours, theirs in columns.items() if theirs not in names and ours not in optional}
    if missing:
        ours = next(iter(missing))
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            raise UserError(
                f"{file}: has one column, {names[0]!r}: part the fields by commas (by tabs in a .tsv file), e.g. "
                "`pandas.read_csv(path, sep=None, engine='python').to_csv(path, index=False)`"
            )
        raise UserError(
            f"{file}: {len(missing)} columns are missing: {', '.join(missing.values())}. It has: {', '.join(names)}. "
            f"Name the right one in the config, e.g. {section}.{ours}: {names[0]}"
        )
    mapped = {ours: table[theirs] for ours, theirs in columns.items() if theirs in names}
    further = {name: table[name] for name in names if name not in columns.values()}
    return pa.table(mapped | {f"{name}_source" if name in mapped else name: values for name, values in further.items()})


# -- Columns ----------------------------------------------------------------------------------------------------------


def as_text(column: pa.ChunkedArray) -> pa.Array:
    """Ids as strings: 7 and 7.0 (what pandas makes of integers beside a gap) are "7"; null stays null."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        with contextlib.suppress(pa.ArrowInvalid):
            column = column.cast(pa.int64())
    column = column.cast(pa.string())
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def as_times(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Timestamps as numbers that sort, and where they cannot be read.

    Numbers are taken as they are; dates and ISO 8601 become seconds since 1970, UTC where no zone is given.

    Returns:
        int64 or float64 [n], 0 where unreadable; bool [n], True where unreadable.
    """
    kind = column.type
    bad = np.asarray(column.is_null())
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("s"))
    if pa.types.is_temporal(column.type):
        micros = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).fill_null(0).to_numpy()
        return (micros // 1_000_000 if (micros % 1_000_000 == 0).all() else micros / 1e6), bad
    if pa.types.is_integer(kind):
        return column.cast(pa.int64()).fill_null(0).to_numpy(), bad
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = column.cast(pa.float64()).fill_null(np.nan).to_numpy()
        return np.where(np.isfinite(values), values, 0.0), ~np.isfinite(values)
    text = column.cast(pa.string())
    for number in (pa.int64(), pa.float64()):
        try:
            return as_times(text.cast(number))
        except pa.ArrowInvalid:
            continue
    return _mixed_times(text.to_pylist())


def _mixed_times(texts: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Parse one by one. Numbers beside dates have no common order: the rarer kind counts as unreadable."""
    numbers = np.array([_number(text) for text in texts])
    dates = np.array([_seconds(text) for text in texts])
    values = dates if np.isfinite(dates).sum() > np.isfinite(numbers).sum() else numbers
    bad = ~np.isfinite(values)
    values = np.where(bad, 0.0, values)
    return (values.astype(np.int64) if (values == np.floor(values)).all() else values), bad


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return np.nan


def _seconds(text: str | None) -> float:
    try:
        moment = datetime.fromisoformat((text or "").strip())
    except ValueError:
        return np.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def missing_text(column: pa.Array) -> np.ndarray:
    """bool [n]: null or empty."""
    return np.asarray(pc.fill_null(pc.equal(pc.utf8_length(column), 0), True))


# -- Items, interactions, windows -------------------------------------------------------------------------------------


def read_items(file: str, columns: ItemColumns, problems: Problems) -> pa.Table:
    """The catalogue: `item_id` (distinct) and `title`, both strings, then every further column as in the source.

    Raises:
        UserError: see `read`; under "strict" also for missing or repeated ids and for missing titles. An empty title
            is none of these: it is spelled by the item's id.
    """
    source = read(file, columns.model_dump(), "data.item_columns", problems)
    table = source.table
    table = table.set_column(0, "item_id", as_text(table["item_id"])).set_column(1, "title", as_text(table["title"]))
    source = Source(file, table, source.rows)
    ids = table["item_id"].combine_chunks()
    source = source.without(missing_text(ids), "title", "the item has no id", "Fill in the ids", problems)
    untitled = np.asarray(source.table["title"].is_null())
    source = source.without(untitled, "item_id", "the item has no title", "Fill in the titles", problems)
    codes = source.table["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    source = source.without(~first, "item_id", "the item id stands there already", "Keep one row an item", problems)
    if not len(source):
        raise UserError(f"{file}: no usable items; see the problems above")
    return source.table


@dataclass(frozen=True)
class Interactions:
    """Interactions in file order.

    Attributes:
        users: names of the users, in order of first appearance.
        user: int64 [n]; index into `users`.
        item: int64 [n]; index into the catalogue.
        time: int64 or float64 [n], or None where the file has no times.
    """

    users: list[str]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None

    def __len__(self) -> int:
        return len(self.user)

    def where(self, keep: np.ndarray) -> Interactions:
        """The interactions where `keep`, the users renumbered."""
        codes, user = np.unique(self.user[keep], return_inverse=True)
        time = None if self.time is None else self.time[keep]
        return Interactions([self.users[c] for c in codes], user, self.item[keep], time)


def read_interactions(file: str, columns: InteractionColumns, item_ids: pa.Array, problems: Problems) -> Interactions:
    """Interactions with the items of the catalogue.

    Raises:
        UserError: see `read`; under "strict" also for missing users, unknown items and unreadable timestamps.
    """
    mapping = columns.model_dump(exclude_none=True)
    source = read(file, mapping, "data.columns", problems)
    source = Source(file, source.table.select(list(mapping)), source.rows)
    absent = missing_text(as_text(source.table["user_id"]))
    source = source.without(absent, "item_id", "no user id", "Fill in the user ids", problems)
    unknown = np.asarray(pc.is_null(pc.index_in(as_text(source.table["item_id"]), value_set=item_ids)))
    source = source.without(unknown, "item_id", "the item is not in the items file", "Add it there", problems)
    time = None
    if columns.timestamp is not None:
        _, bad = as_times(source.table["timestamp"])
        source = source.without(
            bad, "timestamp", "unreadable timestamp", "Write numbers of one unit, or ISO 8601 dates", problems
        )
    if not len(source):
        raise UserError(f"{file}: no usable interactions; see the problems above")
    if columns.timestamp is not None:
        time, _ = as_times(source.table["timestamp"])
    user = as_text(source.table["user_id"]).dictionary_encode()
    item = pc.index_in(as_text(source.table["item_id"]), value_set=item_ids).to_numpy().astype(np.int64)
    return Interactions(user.dictionary.to_pylist(), user.indices.to_numpy().astype(np.int64), item, time)


@dataclass(frozen=True)
class Windows:
    """Windows of one split in file order.

    Attributes:
        users: [m] user ids.
        histories: [m] item indices before the target, oldest first, at least one.
        targets: int64 [m]; item indices.
        time: int64 or float64 [m], or None where the file has no times.
        candidates: [m] item indices, or None where the file has none.
    """

    users: list[str]
    histories: list[list[int]]
    targets: np.ndarray
    time: np.ndarray | None
    candidates: list[list[int]] | None

    def __len__(self) -> int:
        return len(self.users)


def read_windows(file: str, columns: WindowColumns, separator: str, item_ids: pa.Array, problems: Problems) -> Windows:
    """(user, history, target) rows with the items of the catalogue.

    Raises:
        UserError: see `read`; under "strict" also for missing users, empty histories, unknown items, candidates without
            the target and unreadable timestamps.
    """
    source = read(file, columns.model_dump(), "data.columns", problems, optional=("timestamp", "candidates"))
    absent = missing_text(as_text(source.table["user_id"]))
    source = source.without(absent, "target", "no user id", "Fill in the user ids", problems)
    unknown = np.asarray(pc.is_null(pc.index_in(as_text(source.table["target"]), value_set=item_ids)))
    remedy = "Add it to the items file"
    source = source.without(unknown, "target", "the target is not in the items file", remedy, problems)
    if "timestamp" in source.table.column_names:
        _, bad = as_times(source.table["timestamp"])
        source = source.without(
            bad, "timestamp", "unreadable timestamp", "Write numbers of one unit, or ISO 8601 dates", problems
        )
    lists = [name for name in ("history", "candidates") if name in source.table.column_names]
    for name in lists:
        items, lengths = _item_lists(source.table[name], separator, item_ids)
        empty = f"empty {name}" if name == "history" else "no candidates"
        bad = lengths == 0
        lost = np.zeros(len(source), bool)
        lost[np.repeat(np.arange(len(source)), lengths)[items < 0]] = True
        source = source.without(bad, name, empty, "Give each row at least one item", problems)
        separated = f"{remedy}, or set data.history_separator (now {separator!r})"
        hold = "the history holds" if name == "history" else "the candidates hold"
        source = source.without(lost[~bad], name, f"{hold} unknown items", separated, problems)
    if "candidates" in lists:
        items, lengths = _item_lists(source.table["candidates"], separator, item_ids)
        wanted = np.repeat(_indices(source.table["target"], item_ids), lengths)
        named = np.bincount(np.repeat(np.arange(len(source)), lengths), items == wanted, minlength=len(source)) > 0
        source = source.without(~named, "candidates", "the candidates miss the target", "Put it among them", problems)
    if not len(source):
        raise UserError(f"{file}: no usable windows; see the problems above")
    found = {name: _nested(*_item_lists(source.table[name], separator, item_ids)) for name in lists}
    return Windows(
        users=as_text(source.table["user_id"]).to_pylist(),
        histories=found["history"],
        targets=_indices(source.table["target"], item_ids),
        time=as_times(source.table["timestamp"])[0] if "timestamp" in source.table.column_names else None,
        candidates=found.get("candidates"),
    )


def _indices(column: pa.ChunkedArray, item_ids: pa.Array) -> np.ndarray:
    """int64 [n]: indices of known items."""
    found: np.ndarray = pc.index_in(as_text(column), value_set=item_ids).to_numpy().astype(np.int64)
    return found


def _item_lists(column: pa.ChunkedArray, separator: str, item_ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Item indices of all lists in a row, −1 where unknown, and the length of each list."""
    lists = column.combine_chunks()
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        lists = pc.split_pattern(as_text(column), separator)
    parents = pc.list_parent_indices(lists).to_numpy()
    texts = pc.utf8_trim_whitespace(as_text(pa.chunked_array([pc.list_flatten(lists)])))
    filled = ~missing_text(texts)
    found = pc.fill_null(pc.index_in(texts, value_set=item_ids), -1).to_numpy()
    return found[filled].astype(np.int64), np.bincount(parents[filled], minlength=len(lists))


def _nested(items: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    values, ends = items.tolist(), np.cumsum(lengths).tolist()
    return [values[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
