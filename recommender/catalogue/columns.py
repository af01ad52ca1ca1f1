"""The catalogue's columns turned round: from a value to the items that have it, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recommender.catalogue.catalogue import Catalogue
from recommender.errors import UserError

_FEW = 20  # columns that an error lists

Value = str | int | float | bool


@dataclass(frozen=True)
class Column:
    """One column. An item has one value, several (a column of lists), or none.

    Attributes:
        codes: the number of each value, by whether it is a truth value (True == 1) and itself.
        by_value: int64 [entries]; items, value after value, of which `value_starts` [values + 1] are the borders.
        by_item: int32 [entries]; numbers of values, item after item, with the borders `item_starts` [items + 1].
    """

    codes: dict[tuple[bool, Value], int]
    by_value: np.ndarray
    value_starts: np.ndarray
    by_item: np.ndarray
    item_starts: np.ndarray

    def items_with(self, value: Value) -> np.ndarray:
        """int64, the items that have a value; none where no item has it."""
        code = self.codes.get(_key(value))
        return self.by_value[:0] if code is None else self.items_of(code)

    def items_of(self, code: int) -> np.ndarray:
        """int64, the items that have the value of this number."""
        return self.by_value[self.value_starts[code] : self.value_starts[code + 1]]

    def codes_of(self, item: int) -> list[int]:
        """The numbers of an item's values."""
        return self.by_item[self.item_starts[item] : self.item_starts[item + 1]].tolist()


def _key(value: Value) -> tuple[bool, Value]:
    return isinstance(value, bool), value


def columns_of(catalogue: Catalogue) -> dict[str, Column]:
    """The columns that can be filtered by: text, numbers, truth values, dates (as text), and lists of these."""
    return dict(_columns(catalogue)) if catalogue.columns is not None else {}


def column_named(columns: Mapping[str, Column], name: str) -> Column:
    """The column of this name.

    Raises:
        UserError: there is none; says which there are.
    """
    if name not in columns:
        known = ", ".join(sorted(columns)[:_FEW]) or "none"
        raise UserError(f"unknown column; columns of the catalogue to filter by: {known}")
    return columns[name]


def items_where(
    columns: Mapping[str, Column], where: Mapping[str, Sequence[Value]], allow: Sequence[int] | None, items: int
) -> np.ndarray | None:
    """What a filter leaves: the items that have one of the given values in every column and are among `allow`.

    Args:
        where: values by the name of their column, each one of `columns`.
        allow: item indices; None: all.
        items: how many the catalogue has.

    Returns:
        int64, item indices; None where all may be recommended.
    """
    if not where:
        return None if allow is None else np.array(allow, np.int64)
    mask = np.ones(items, bool)
    for name, values in where.items():
        having = np.zeros_like(mask)
        for value in values:
            having[columns[name].items_with(value)] = True
        mask &= having
    return np.flatnonzero(mask) if allow is None else np.array([item for item in allow if mask[item]], np.int64)


def values_of(catalogue: Catalogue, item: int) -> dict[str, Any]:
    """What an item has in each column, as it can be filtered by: dates as text. Bytes are left out."""
    if catalogue.columns is None:
        return {}
    row = catalogue.columns.slice(item, 1)
    shown = [field.name for field in row.schema if field.name not in ("item_id", "title") and not _binary(field.type)]
    return {name: _legible(row[name]).to_pylist()[0] for name in shown}


def _binary(kind: pa.DataType) -> bool:
    """Whether values hold bytes, at any depth."""
    if kind.num_fields:
        return any(_binary(kind.field(place).type) for place in range(kind.num_fields))
    return "binary" in str(kind)


def _legible(array: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dates as text. Not all that Arrow holds are dates to Python."""
    if pa.types.is_temporal(array.type):
        return array.cast(pa.string())
    lists = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if lists and pa.types.is_temporal(array.type.value_type):
        return array.cast(pa.large_list(pa.string()))
    return array


def _columns(catalogue: Catalogue) -> Iterator[tuple[str, Column]]:
    assert catalogue.columns is not None
    for name in catalogue.columns.column_names:
        if name not in ("item_id", "title") and (column := _column(catalogue.columns[name])) is not None:
            yield name, column


def _column(chunked: pa.ChunkedArray) -> Column | None:
    array = chunked.combine_chunks()
    items = len(array)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    owner = np.arange(items)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        owner, array = pc.list_parent_indices(array).to_numpy(zero_copy_only=False), pc.list_flatten(array)
    if pa.types.is_temporal(array.type):
        array = array.cast(pa.string())
    kind = array.type
    if not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
    ):
        return None
    encoded = array.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    entries = np.unique(np.stack([owner, codes], axis=1)[codes >= 0], axis=0)  # a list may hold a value twice
    owner, codes = entries[:, 0].astype(np.int64), entries[:, 1].astype(np.int32)
    order = np.argsort(codes, kind="stable")
    return Column(
        codes={_key(value): code for code, value in enumerate(encoded.dictionary.to_pylist())},
        by_value=owner[order],
        value_starts=np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1)),
        by_item=codes,
        item_starts=np.searchsorted(owner, np.arange(items + 1)),
    )
