"""Files of every kind, good and bad."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recommender.errors import UserError
from trainer.data.config import InteractionColumns, InteractionsData, ItemColumns, OnError, WindowColumns, WindowsData
from trainer.data.dataset import Dataset, prepare_dataset
from trainer.data.readers import Problems, as_text, as_times, read_items, read_windows

ITEMS = [("007", "Seven"), ("1", "One, or so"), ("2", ""), ("3", 'The "third"')]
INTERACTIONS = [("u", "1", 10), ("u", "007", 20), ("v", "3", 5), ("u", "2", 30), ("u", "3", 40), ("v", "1", 6)]


def csv_text(header: str, rows: list[tuple[object, ...]], delimiter: str = ",") -> str:
    def field(value: object) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if delimiter in text or '"' in text else text

    return "\n".join([header.replace(",", delimiter), *(delimiter.join(map(field, row)) for row in rows)]) + "\n"


def write(path: Path, columns: list[str], rows: list[tuple[object, ...]]) -> str:
    """Write a table in the format that the name tells."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.table({c: [row[i] for row in rows] for i, c in enumerate(columns)}), path)
        return str(path)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        text = csv_text(",".join(columns), rows, "\t" if name.endswith(".tsv") else ",")
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> dict[str, str]:
    return {
        "items": write(tmp_path / "items.csv", ["item_id", "title"], ITEMS),
        "interactions": write(tmp_path / "interactions.csv", ["user_id", "item_id", "timestamp"], INTERACTIONS),
    }


def prepare(tmp_path: Path, said: list[str] | None = None, **config: object) -> Dataset:
    said = [] if said is None else said
    return prepare_dataset(InteractionsData.model_validate(config), tmp_path / "out", progress=said.append)


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"])
def test_formats_read_alike(tmp_path: Path, extension: str) -> None:
    items = write(tmp_path / f"items.{extension}", ["item_id", "title"], ITEMS)
    columns = ["user_id", "item_id", "timestamp"]
    interactions = write(tmp_path / f"interactions.{extension}", columns, INTERACTIONS)
    dataset = prepare(tmp_path, items=items, interactions=interactions)
    assert dataset.item_ids == ["007", "1", "2", "3"]
    assert dataset.titles == ["Seven", "One, or so", "", 'The "third"']
    assert dataset.users == ["u", "v"]
    assert dataset.flat_items.tolist() == [1, 0, 2, 3, 3, 1]


def test_a_url_is_read_like_a_path(tmp_path: Path, good: dict[str, str]) -> None:
    urls = {name: Path(path).as_uri() for name, path in good.items()}
    assert prepare(tmp_path, **urls).users == ["u", "v"]


def test_columns_are_mapped_and_further_ones_kept(tmp_path: Path, good: dict[str, str]) -> None:
    path = tmp_path / "feed.jsonl"
    lines = [
        {"asin": "007", "name": "Seven", "title": "Dr.", "brand": None, "tags": ["a", "b"], "price": 3},
        {"asin": "1", "name": "One", "tags": [], "price": 2.5},
        {"asin": 2, "name": "Two", "brand": "B", "odd": 1},
        {"asin": "3", "name": "Three", "odd": "x"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    dataset = prepare(
        tmp_path,
        items=str(path),
        interactions=good["interactions"],
        item_columns={"item_id": "asin", "title": "name"},
    )
    assert dataset.item_ids == ["007", "1", "2", "3"]
    assert dataset.titles == ["Seven", "One", "Two", "Three"]
    assert dataset.items_table["tags"].to_pylist() == [["a", "b"], [], None, None]
    assert dataset.items_table["price"].to_pylist() == [3, 2.5, None, None]
    assert dataset.items_table["odd"].to_pylist() == [None, None, "1", "x"]
    assert dataset.items_table["title_source"].to_pylist() == ["Dr.", None, None, None]


def test_ids_stay_text() -> None:
    assert as_text(pa.chunked_array([["007", "1e3", "NA"]])).to_pylist() == ["007", "1e3", "NA"]
    assert as_text(pa.chunked_array([[7.0, None, float("nan")]])).to_pylist() == ["7", None, None]
    assert as_text(pa.chunked_array([[2**62]])).to_pylist() == [str(2**62)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 1, 2**60], [3, 1, 2**60]),
        (["3", " 1", "-2"], [3, 1, -2]),
        (["1.5", "2", "1e9"], [1.5, 2.0, 1e9]),
        (["1970-01-02", "1970-01-01T00:00:01Z", "1970-01-01T01:00:00+01:00"], [86400, 1, 0]),
        (["1970-01-01 00:00:01.25", "1970-01-01"], [1.25, 0.0]),
        ([datetime(1970, 1, 1, 0, 1), datetime(1970, 1, 2)], [60, 86400]),
    ],
)
def test_timestamps(values: list[object], expected: list[float]) -> None:
    times, bad = as_times(pa.chunked_array([values]))
    assert times.tolist() == expected
    assert not bad.any()


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        (["3", "soon", "", "nan"], [1, 2, 3]),
        (["2020-01-01", "12", "2020-13-01", "2021-01-01"], [1, 2]),
        ([1.0, float("inf"), None], [1, 2]),
        ([None, 4], [0]),
    ],
)
def test_unreadable_timestamps(values: list[object], bad: list[int]) -> None:
    assert np.flatnonzero(as_times(pa.chunked_array([values]))[1]).tolist() == bad


# -- Rows that cannot be used: strict stops, skip reports -------------------------------------------------------------

I_HEAD, T_HEAD = "user_id,item_id,timestamp\n", "item_id,title\n"
GOOD_ROWS = "u,1,10\nu,007,20\nu,3,30\nu,1,40\nv,3,5\n"
GOOD_ITEMS = "007,Seven\n1,One\n3,Three\n"

BAD_ROWS = [
    ("interactions.csv", I_HEAD + "w,1,noon\n" + GOOD_ROWS, "unreadable timestamp", ["row 2: 'noon'"], "ISO 8601"),
    (
        "interactions.csv",
        I_HEAD + GOOD_ROWS + "w,99,1\nw,98,1\n",
        "not in the items file",
        ["row 7: '99'", "row 8: '98'"],
        "Add",
    ),
    ("interactions.csv", I_HEAD + "u,7,1\n" + GOOD_ROWS, "not in the items file", ["row 2: '7'"], "Add"),
    ("interactions.csv", I_HEAD + "u,1,1\n,3,1\n" + GOOD_ROWS, "no user id", ["row 3: '3'"], "Fill in"),
    ("interactions.csv", I_HEAD + "u,1,1\nu,1\n" + GOOD_ROWS, "expected 3 fields", ["row 3: 'u,1'"], "Quote"),
    ("items.csv", T_HEAD + GOOD_ITEMS + "3,Again\n", "the item id stands there already", ["row 5: '3'"], "Keep one"),
    (
        "items.csv",
        T_HEAD + '007,Seven\n1,"One\n2,Two\n4,"Four"\n3,Three\n',
        "title: goes on over several lines",
        ["row 3: 'One\\n2,Two\\n4,Four\"'"],
        "Close the quotation mark",
    ),
    ("items.csv", T_HEAD + ",Nameless\n" + GOOD_ITEMS, "the item has no id", ["row 2: 'Nameless'"], "Fill in"),
    (
        "items.jsonl",
        '{"item_id":"007","title":"x"}\n{"item_id":"1"}\n\n{"item_id":"3","title":""}\n',
        "no title",
        ["row 2: '1'"],
        "Fill in",
    ),
    (
        "items.jsonl",
        '{"item_id":"007","title":"x"}\n{"item_id":"1","title":\n[1]\n{"item_id":"3","title":""}',
        "not a JSON object",
        ['row 2: \'{"item_id":"1","title":\'', "row 3: '[1]'"],
        "one JSON object a line",
    ),
]


@pytest.mark.parametrize(("name", "text", "problem", "examples", "remedy"), BAD_ROWS)
@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_bad_rows(
    tmp_path: Path, name: str, text: str, problem: str, examples: list[str], remedy: str, on_error: OnError
) -> None:
    files = {"items": tmp_path / "items.csv", "interactions": tmp_path / "interactions.csv"}
    files["items"].write_text(T_HEAD + GOOD_ITEMS)
    files["interactions"].write_text(I_HEAD + GOOD_ROWS)
    bad = tmp_path / name
    bad.write_text(text)
    files[bad.stem] = bad
    config = {key: str(path) for key, path in files.items()}
    if on_error == "strict":
        with pytest.raises(UserError) as caught:
            prepare(tmp_path, **config)
        message = str(caught.value)
        assert problem in message
        assert all(example in message for example in examples)
        assert remedy in message
        assert str(bad) in message
        assert "on_error: skip" in message
        assert not list((tmp_path / "out").glob("[!.]*"))
        return
    said: list[str] = []
    dataset = prepare(tmp_path, said, **config, on_error="skip")
    found = next(entry for entry in dataset.stats["problems"] if problem in entry["problem"])
    assert found["file"] == str(bad)
    assert found["count"] == len(examples)
    assert found["examples"] == examples
    assert any(line.startswith("skipped") and problem in line for line in said)
    assert set(dataset.item_ids) <= {"007", "1", "3"}


def test_row_numbers_count_malformed_rows(tmp_path: Path, good: dict[str, str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(I_HEAD + GOOD_ROWS + "v,3,5,\nu,1,50\nv\nw,1,x\n")
    found = prepare(tmp_path, items=good["items"], interactions=str(path), on_error="skip").stats["problems"]
    assert [entry["examples"] for entry in found] == [["row 7: 'v,3,5,'", "row 9: 'v'"], ["row 10: 'x'"]]


def test_only_the_first_offending_rows_are_shown(tmp_path: Path, good: dict[str, str]) -> None:
    path = tmp_path / "many.csv"
    path.write_text(I_HEAD + GOOD_ROWS + "".join(f"u,x{i},1\n" for i in range(1000)))
    with pytest.raises(UserError, match="1000 rows") as caught:
        prepare(tmp_path, items=good["items"], interactions=str(path))
    assert "row 7: 'x0'" in str(caught.value)
    assert len(str(caught.value)) < 600


# -- Files that cannot be used: both modes stop -----------------------------------------------------------------------

GZ = gzip.compress((I_HEAD + GOOD_ROWS * 100).encode(), mtime=0)
BAD_FILES = [
    ("absent.csv", None, "no such file"),
    ("a.xlsx", b"x", "unknown extension"),
    ("a.csv", b"", "empty"),
    ("a.csv", I_HEAD.encode(), "no usable rows"),
    (
        "a.csv",
        b"user,item_id,timestamp\nu,1,1\n",
        r"1 columns? (is|are) missing: user_id. It has: user, item_id.*data.columns.user_id: ",
    ),
    ("a.csv", b"user_id;item_id;timestamp\nu;1;1\n", "has one column.*part the fields by commas"),
    ("a.csv", b"user_id,user_id,item_id,timestamp\nu,u,1,1\n", "twice: user_id"),
    ("a.csv", (I_HEAD + "u,1,1\n").encode() + "Jürgen,1,1\n".encode("latin-1"), "not UTF-8.*row 3"),
    ("a.jsonl", '{"user_id":"Jürgen"}'.encode("latin-1"), "not UTF-8.*row 1"),
    ("a.csv.gz", GZ[:-20], "truncated"),
    ("a.csv.gz", GZ[:5], "truncated"),
    ("a.csv.gz", I_HEAD.encode() * 5, "not a sound gzip"),
    ("a.parquet", b"PAR1 no", "not a sound Parquet"),
    ("a.csv", (I_HEAD + "u,99,1\n").encode(), "not in the items file|no usable interactions"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES)
@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_bad_files(
    tmp_path: Path, good: dict[str, str], name: str, data: bytes | None, message: str, on_error: OnError
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        prepare(tmp_path, items=good["items"], interactions=str(tmp_path / name), on_error=on_error)
    assert name in str(caught.value)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, good: dict[str, str]) -> None:
    for name, text in (("a.csv", csv_text("item_id,title", ITEMS)), ("a.jsonl", '{"item_id":"1","title":"One"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        table = read_items(str(tmp_path / name), ItemColumns(), Problems("strict"))
        assert table.column_names == ["item_id", "title"]


def test_times_are_needed_only_where_they_are_named(tmp_path: Path, good: dict[str, str]) -> None:
    path = tmp_path / "untimed.csv"
    path.write_text("user_id,item_id\nu,1\nu,007\nu,1\nu,3\n")
    with pytest.raises(UserError, match="missing: timestamp"):
        prepare(tmp_path, items=good["items"], interactions=str(path))
    columns = InteractionColumns(timestamp=None)
    dataset = prepare(tmp_path, items=good["items"], interactions=str(path), columns=columns)
    assert dataset.flat_items.tolist() == [1, 0, 1, 3]
    with pytest.raises(ValueError, match=r"columns\.timestamp"):
        InteractionsData(interactions="a", items="b", columns=columns, protocol="chronological")


# -- Windows ----------------------------------------------------------------------------------------------------------

W_COLUMNS = ["user_id", "history_item_ids", "target_item_id", "candidate_item_ids"]
IDS = pa.array(["007", "1", "2", "3"])


@pytest.mark.parametrize("extension", ["csv", "jsonl", "parquet"])
def test_histories_as_text_and_as_lists(tmp_path: Path, extension: str) -> None:
    rows: list[tuple[object, ...]] = [("u", "007 1  3 ", "2", "2 1"), ("v", "3", "007", "007 3")]
    file = write(tmp_path / f"windows.{extension}", W_COLUMNS, rows)
    found = read_windows(file, WindowColumns(), " ", IDS, Problems("strict"))
    assert found.histories == [[0, 1, 3], [3]]
    assert found.targets.tolist() == [2, 0]
    assert found.candidates == [[2, 1], [0, 3]]
    assert found.time is None
    if extension != "csv":
        lists = [
            tuple(value.split() if i in (1, 3) else value for i, value in enumerate(map(str, row))) for row in rows
        ]
        file = write(tmp_path / f"lists.{extension}", W_COLUMNS, lists)
        again = read_windows(file, WindowColumns(), " ", IDS, Problems("strict"))
        assert (again.histories, again.candidates) == (found.histories, found.candidates)


@pytest.mark.parametrize("on_error", ["strict", "skip"])
@pytest.mark.parametrize(
    ("row", "problem", "example"),
    [
        (("u", "", "1", "1"), "empty history", "row 3: ''"),
        (("u", "1 99", "1", "1"), "the history holds unknown items", "row 3: '1 99'"),
        (("u", "1,3", "1", "1"), "the history holds unknown items", "row 3: '1,3'"),
        (("u", "1", "99", "1"), "the target is not in the items file", "row 3: '99'"),
        (("u", "1", "", "1"), "the target is not in the items file", "row 3: ''"),
        (("", "1", "1", "1"), "no user id", "row 3: '1'"),
        (("u", "1", "1", "1 98"), "the candidates hold unknown items", "row 3: '1 98'"),
        (("u", "1", "1", "2 3"), "the candidates miss the target", "row 3: '2 3'"),
    ],
)
def test_bad_windows(tmp_path: Path, row: tuple[object, ...], problem: str, example: str, on_error: OnError) -> None:
    rows: list[tuple[object, ...]] = [("u", "1 3", "2", "2"), row, ("v", "007", "3", "3 1")]
    path = tmp_path / "windows.tsv"
    file = write(path, W_COLUMNS, rows)
    problems = Problems(on_error, progress=lambda line: None)
    if on_error == "strict":
        with pytest.raises(UserError, match=problem) as caught:
            read_windows(file, WindowColumns(), " ", IDS, problems)
        assert example in str(caught.value)
        return
    found = read_windows(file, WindowColumns(), " ", IDS, problems)
    assert problems.found == [{"file": file, "problem": problem, "count": 1, "examples": [example]}]
    assert (found.users, found.histories, found.targets.tolist()) == (["u", "v"], [[1, 3], [0]], [2, 3])
    assert found.candidates == [[2], [3, 1]]


def test_windows_name_the_column_that_is_missing(tmp_path: Path, good: dict[str, str]) -> None:
    file = write(tmp_path / "w.csv", ["user_id", "history", "target_item_id"], [("u", "1", "3")])
    config = WindowsData(format="windows", train=file, validation=file, test=file, items=good["items"])
    with pytest.raises(UserError, match=r"history_item_ids.*data\.columns\.history"):
        prepare_dataset(config, tmp_path / "out", progress=lambda line: None)
