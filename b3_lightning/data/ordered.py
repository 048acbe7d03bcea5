"""A plan's batches written for other trainers: the pairs in batch order, or in their own with a batch column."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from b3_lightning.data.columns import columns_of
from b3_lightning.data.tables import read_table
from b3_lightning.mining import BatchPlan, MinedPlan, rows_of_task
from b3_lightning.mining.store import write_atomic
from b3_lightning.types import PADDING

IN_NONE = -1
"""The batch of a row that fills none in an epoch; it comes first in the next."""
ORDERED = ("epoch", "batch", "row", "cluster")
ADDED = ("batch", "cluster")


@dataclass(frozen=True)
class Written:
    """What a file holds, and how many rows fill no batch in the last of its epochs."""

    n_batches: int
    n_rows: int
    n_carried: int


def read_sources(paths: Sequence[str]) -> tuple[pa.Table, list[int]]:
    """All columns of the pairs files, end to end, and the rows of each; a column that one lacks is null there.

    Raises:
        ValueError: where a column holds one kind of values in one file and another in the next.
    """
    tables = [read_table(path) for path in paths]
    try:
        return pa.concat_tables(tables, promote_options="permissive"), list(map(len, tables))
    except pa.ArrowTypeError as error:
        raise ValueError(
            f"{', '.join(paths)} cannot stand in one table: {error}. Give the column one type, or leave it out"
        ) from error


def with_negatives(
    mined: MinedPlan, table: pa.Table, path: str = "the pairs", *, fill: bool = False
) -> tuple[pa.Table, int]:
    """Put the plan's hard negatives into columns ``negative_1``, ``negative_2``, ...: targets of other rows.

    Args:
        table: the pairs that were mined, in their order.
        path: of their file, for messages.
        fill: in place of those that a row lacks take its others again or, where it has none, targets of its cluster,
            which stand in its batches anyway.

    Returns:
        The table, and how many negatives the rows lack, which are null.

    Raises:
        ValueError: where the plan has none, or the targets are not texts alone, or such a column is there already.
    """
    mined.check_rows(len(table))
    columns = columns_of(path, table.column_names, {}, ["pos_text", "pos_image_path"])
    if mined.negative_NH.shape[1] == 0:
        raise ValueError("the plan has no hard negatives: mine with data.mining.n_negatives of 1 or more")
    columns = {ours: name for ours, name in columns.items() if ours == "pos_text" or any(table[name].to_pylist())}
    if set(columns) != {"pos_text"}:
        raise ValueError(f"{path} has targets in {list(columns.values())}; hard negatives are written of texts alone")
    names = [f"negative_{number + 1}" for number in range(mined.negative_NH.shape[1])]
    _refuse_taken(table, names)
    target = table[columns["pos_text"]]
    negative_NH = _filled(mined, target.to_pylist()) if fill else mined.negative_NH
    for name, row_N in zip(names, negative_NH.unbind(1), strict=True):
        lacking_N = (row_N == PADDING).numpy()
        table = table.append_column(name, target.take(pa.array(row_N.clamp(min=0).numpy(), mask=lacking_N)))
    return table, int((negative_NH == PADDING).sum())


def _filled(mined: MinedPlan, targets: Sequence[str]) -> Tensor:
    """(N, H) the plan's hard negatives, lacking only where the whole cluster of a row has its target."""
    negative_NH = mined.negative_NH.clone()
    cluster_N = mined.clusters.cluster_of_row()
    for row in (negative_NH == PADDING).any(dim=1).nonzero().flatten().tolist():
        own_H = negative_NH[row]
        spare = own_H[own_H != PADDING].tolist()
        others = mined.clusters.ids_CK[cluster_N[row]].tolist()
        spare = spare or [other for other in others if other != PADDING and targets[other] != targets[row]]
        lacking = (own_H == PADDING).nonzero().flatten().tolist()
        for place, other in zip(lacking, itertools.cycle(spare), strict=False):
            own_H[place] = other
    return negative_NH


def check_files(mined: MinedPlan, sizes: Sequence[int]) -> None:
    """Refuse files, one for each task of the plan, that are given in another order; ``sizes`` are their rows."""
    tasks = rows_of_task(mined.task_N, mined.task_names)
    if sorted(sizes) == sorted(tasks.values()) and list(sizes) != list(tasks.values()):
        raise ValueError(f"the files have {list(sizes)} rows, in this order; the plan's tasks are {tasks}")


def write_ordered(
    mined: MinedPlan, table: pa.Table, output: Path, *, batch_size: int, n_epochs: int, seed: int
) -> Written:
    """Write the rows of every batch, batch after batch, with the columns ``epoch batch row cluster`` before their own.

    A batch is ``batch_size`` successive rows, numbered from 0 through all epochs; read them in order and unshuffled.

    Args:
        table: the pairs that were mined, in their order.
        output: a .parquet file, or a folder that ``datasets.load_from_disk`` reads.
        batch_size: rows of a batch, a multiple of the cluster size.
        n_epochs: each combines the clusters anew.
        seed: of the draw; ``data.seed`` gives the batches of ``fit``.

    Raises:
        ValueError: where the table has other rows than the plan, or a column of one of these names.
    """
    plan = _checked(mined, table, ORDERED, batch_size, seed)
    if n_epochs < 1:
        raise ValueError(f"epochs={n_epochs} must be at least 1")
    cluster_N = mined.clusters.cluster_of_row()
    schema = pa.schema([*((name, pa.int64()) for name in ORDERED), *table.schema])

    def tables() -> Iterator[pa.Table]:
        n_before = 0
        for epoch in range(n_epochs):
            ids_MB = plan.epoch(epoch)
            for first, ids_PB in enumerate(ids_MB.split(_batches_at_once(batch_size))):
                start = n_before + first * _batches_at_once(batch_size)
                yield _ordered(table, ids_PB, cluster_N, epoch, start).cast(schema)
            n_before += len(ids_MB)

    if output.suffix == ".parquet":
        write_atomic(output, lambda path: _write_parquet(path, schema, tables()))
    else:
        _save_dataset(pa.concat_tables(tables()), output)
    n_batches = sum(plan.n_batches(epoch) for epoch in range(n_epochs))
    return Written(n_batches, n_batches * batch_size, len(plan.carried_after(n_epochs - 1)))


def write_with_column(mined: MinedPlan, table: pa.Table, output: Path, *, batch_size: int, seed: int) -> Written:
    """Write the rows in their own order with two more columns, ``batch`` (of the first epoch) and ``cluster``.

    ``batch`` is -1 where a row fills none. Arguments and errors as of ``write_ordered``.
    """
    plan = _checked(mined, table, ADDED, batch_size, seed)
    batch_N = _batch_of_row(plan, 0, len(table))
    for name, value_N in zip(ADDED, (batch_N, mined.clusters.cluster_of_row()), strict=True):
        table = table.append_column(name, pa.array(value_N.numpy()))
    if output.suffix == ".parquet":
        write_atomic(output, lambda path: pq.write_table(table, path))
    else:
        _save_dataset(table, output)
    return Written(plan.n_batches(0), len(table), int((batch_N == IN_NONE).sum()))


def add_batch_column(dataset: Any, plan: MinedPlan, *, batch_size: int, epoch: int = 0, seed: int = 0) -> Any:
    """Add the columns ``batch`` (of an epoch, -1 for none) and ``cluster`` to the ``datasets.Dataset`` that was mined.

    Raises:
        ValueError: where the dataset has other rows than the plan, or such a column already, where a row stands in two
            batches of the epoch, since the one before left it over, or there is no such epoch.
    """
    if epoch < 0:
        raise ValueError(f"epoch={epoch} must not be negative")
    batches = _checked(plan, dataset, ADDED, batch_size, seed)
    batch_N = _batch_of_row(batches, epoch, len(dataset))
    added = dataset.add_column("batch", batch_N.tolist())
    return added.add_column("cluster", plan.clusters.cluster_of_row().tolist())


def _checked(mined: MinedPlan, table: Any, names: Sequence[str], batch_size: int, seed: int) -> BatchPlan:
    mined.check_rows(len(table))
    _refuse_taken(table, names)
    return mined.batches(batch_size=batch_size, seed=seed)


def _refuse_taken(table: Any, names: Sequence[str]) -> None:
    taken = [name for name in names if name in table.column_names]
    if taken:
        raise ValueError(
            f"the pairs have a column {taken} already; rename it, since the plan's are called {list(names)}"
        )


def _batches_at_once(batch_size: int) -> int:
    return max(1, 2**16 // batch_size)


def _ordered(table: pa.Table, ids_PB: Tensor, cluster_N: Tensor, epoch: int, start: int) -> pa.Table:
    row_R = ids_PB.flatten()
    batch_R = torch.arange(start, start + len(ids_PB)).repeat_interleave(ids_PB.shape[1])
    columns = (torch.full_like(row_R, epoch), batch_R, row_R, cluster_N[row_R])
    taken = table.take(pa.array(row_R.numpy()))
    arrays = [pa.array(column.numpy()) for column in columns]
    return pa.table([*arrays, *taken.columns], names=[*ORDERED, *table.column_names])


def _batch_of_row(plan: BatchPlan, epoch: int, n_rows: int) -> Tensor:
    ids_MB = plan.epoch(epoch)
    n_twice = ids_MB.numel() - len(ids_MB.unique())
    if n_twice:
        raise ValueError(
            f"epoch {epoch} holds {n_twice} rows twice, left over by the epochs before, and a column has room for one "
            "batch a row: take epoch 0, or write the rows in batch order (write_ordered; batches without --column)"
        )
    batch_N = torch.full((n_rows,), IN_NONE, dtype=torch.int64)
    batch_N[ids_MB.flatten()] = torch.arange(len(ids_MB)).repeat_interleave(ids_MB.shape[1])
    return batch_N


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _save_dataset(table: pa.Table, folder: Path) -> None:
    from datasets import Dataset

    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder, or a file that ends in .parquet")
    Dataset(table).save_to_disk(str(folder))
