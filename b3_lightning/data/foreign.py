"""Somebody else's pairs, triplets or batches, read as they are: what an audit should find is not refused here."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from b3_lightning.data.columns import ALIASES, columns_of, numbered_negatives
from b3_lightning.data.ordered import ORDERED
from b3_lightning.data.pairs import TEXT_AND_IMAGE, Item, PairSource, read_negatives, read_strings
from b3_lightning.data.tables import read_table, whole_numbers
from b3_lightning.mining.groups import permutation
from b3_lightning.types import name_rows

_NO_BATCH = (None, -1, "-1", "")


@dataclass(frozen=True)
class ForeignPairs:
    """The rows of a file.

    Args:
        batches: the rows of each.
        empty: rows with an empty side.
        group: a text a row, empty for none; ``key`` too.
        source_row: of a file that ``batches`` wrote: which of the mined pairs each row is, again in every epoch.
    """

    query: list[Item]
    target: list[Item]
    negatives: list[list[Item]]
    batches: dict[Any, list[int]]
    group: list[str]
    key: list[str]
    columns: dict[str, str]
    empty: frozenset[int] = frozenset()
    source_row: list[int] | None = None

    def __len__(self) -> int:
        return len(self.query)

    @cached_property
    def again(self) -> set[int]:
        """Rows whose pair stood before, in another epoch."""
        first: dict[int, int] = {}
        return {row for row, source in enumerate(self.source_row or ()) if first.setdefault(source, row) != row}

    @property
    def n_negatives(self) -> int:
        return sum(len(items) for items in self.negatives)


def normal(item: Item) -> Item:
    """Equal for texts that differ in case, spaces or Unicode form only."""
    return Item(" ".join(unicodedata.normalize("NFKC", item.text).casefold().split()), item.image)


def read_foreign(path: str, columns: Mapping[str, str]) -> ForeignPairs:
    """Read a file whose columns have ours or common names.

    Args:
        columns: ours -> the file's, for other names.

    Raises:
        FileNotFoundError, ValueError: where the file or a column is missing, or holds what is no text.
    """
    table = read_table(path)
    if table.num_rows == 0:
        raise ValueError(f"{path} holds no rows")
    names = _names(path, table.column_names, columns)
    text = {ours: read_strings(table, names[ours], path, False) if ours in names else [""] * table.num_rows
            for ours in (*TEXT_AND_IMAGE["query"], *TEXT_AND_IMAGE["target"])}  # fmt: skip
    sides = {
        side: [Item(*both) for both in zip(text[a], text[b], strict=True)] for side, (a, b) in TEXT_AND_IMAGE.items()
    }
    empty = frozenset(
        row for row in range(table.num_rows) if any(not (s[row].text.strip() or s[row].image) for s in sides.values())
    )
    return ForeignPairs(
        sides["query"],
        sides["target"],
        list(read_negatives(table, PairSource(path, columns=names))),
        _batches(table, names.get("batch"), path),
        _labels(table, names.get("group")),
        _labels(table, names.get("key")),
        columns={**names, **{name: name for name in numbered_negatives(table.column_names, names)}},
        empty=empty,
        source_row=_source_rows(table, path) if set(ORDERED) <= set(table.column_names) else None,
    )


def deal_batches(n_rows: int, batch_size: int, *, in_order: bool, seed: int = 0) -> dict[Any, list[int]]:
    """Batches such as a trainer makes of plain pairs: shuffled, or in the file's order; the last may be shorter."""
    if not 2 <= batch_size <= n_rows:
        raise ValueError(f"batch_size={batch_size} must lie between 2 and the {n_rows} rows")
    rows = torch.arange(n_rows) if in_order else permutation(n_rows, seed, torch.device("cpu"))
    return {batch: part.tolist() for batch, part in enumerate(rows.split(batch_size))}


def _names(path: str, found: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    names = columns_of(path, found, columns, list(ALIASES))
    for side, pair in TEXT_AND_IMAGE.items():
        if not set(pair) & set(names):
            raise ValueError(
                f"{path} has no column for the {side}; it has {found}. Say --columns {pair[0]}=YOUR_COLUMN"
            )
    return names


def _batches(table: pa.Table, column: str | None, path: str) -> dict[Any, list[int]]:
    """Rows by batch; -1, null and an empty cell stand for none."""
    if column is None:
        return {}
    values = whole_numbers(table[column]).to_pylist()
    wrong = [row for row, value in enumerate(values) if not isinstance(value, int | str | None)]
    if wrong:
        raise ValueError(
            f"{path}: the batch column {column!r} must hold whole numbers or texts; not so in {name_rows(wrong)}"
        )
    batches: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        if value not in _NO_BATCH:
            batches.setdefault(value, []).append(row)
    return batches


def _source_rows(table: pa.Table, path: str) -> list[int]:
    """Of a file that ``batches`` wrote; CSV has them as texts."""
    values = table["row"].to_pylist()
    wrong = [row for row, value in enumerate(values) if not str(value).isdecimal()]
    if wrong:
        raise ValueError(f"{path}: the column 'row' must hold rows of the mined pairs; not so in {name_rows(wrong)}")
    return [int(value) for value in values]


def _labels(table: pa.Table, column: str | None) -> list[str]:
    if column is None:
        return [""] * table.num_rows
    return ["" if value is None else str(value) for value in whole_numbers(table[column]).to_pylist()]
