"""Write a plan's batches for another trainer: the pairs in batch order, or in their own order with a batch column.

Read the ordered file unshuffled, batch_size rows at a time; the columns epoch, batch, row and cluster come first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from b3_lightning.console import open_console
from b3_lightning.data.ordered import check_files, read_sources, with_negatives, write_ordered, write_with_column
from b3_lightning.data.tables import check_output
from b3_lightning.mining import MinedPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="folder of a mined plan")
    parser.add_argument("--pairs", nargs="+", required=True, help="the file or files that were mined, in their order")
    parser.add_argument("--output", type=Path, required=True, help="a .parquet file, or a new folder for datasets")
    parser.add_argument("--batch_size", type=int, required=True, help="rows of a batch, a multiple of cluster_size")
    parser.add_argument("--epochs", type=int, default=1, help="each combines the clusters anew (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, as data.seed of fit (default: 0)")
    parser.add_argument(
        "--column", action="store_true", help="keep the order of the pairs and add the columns batch and cluster"
    )
    parser.add_argument(
        "--negatives",
        action="store_true",
        help="write the plan's hard negatives too: columns negative_1, negative_2, ...",
    )
    parser.add_argument(
        "--fill", action="store_true",
        help="with --negatives: in place of lacking ones the row's others, or else targets of its cluster",
    )  # fmt: skip


def run(given: argparse.Namespace) -> None:
    if given.column and given.epochs != 1:
        raise ValueError(f"--column tells the batches of one epoch, not of --epochs={given.epochs}; leave one out")
    if given.fill and not given.negatives:
        raise ValueError("--fill is of hard negatives: give --negatives too")
    check_output(given.output, given.pairs, folder=True)
    replaced = " (in place of what was there)" if given.output.exists() else ""
    mined, (table, sizes) = MinedPlan.load(given.plan), read_sources(given.pairs)
    check_files(mined, sizes)
    n_lacking = 0
    if given.negatives:
        table, n_lacking = with_negatives(mined, table, ", ".join(given.pairs), fill=given.fill)
    about = {"batch_size": given.batch_size, "seed": given.seed}
    if given.column:
        written = write_with_column(mined, table, given.output, **about)
        left = f"{written.n_carried} rows that fill none have batch -1"
    else:
        written = write_ordered(mined, table, given.output, n_epochs=given.epochs, **about)
        left = f"{written.n_carried} rows fill none in the last epoch and are not in the file"
    console = open_console(highlight=False)
    console.print(
        f"{written.n_batches} batches of {given.batch_size} in {written.n_rows} rows: {given.output}{replaced}",
        markup=False,
        soft_wrap=True,
    )
    console.print(left)
    n_negatives = mined.negative_NH.shape[1]
    if n_negatives and not given.negatives:
        console.print(f"the plan's {n_negatives} hard negatives a row are left out: --negatives writes them")
    if n_lacking:
        how = "" if given.fill else "; sentence-transformers' trainer takes none: --fill"
        console.print(f"{n_lacking:,} hard negatives are lacking, and null{how}")
    console.print(
        "only the number of pairs was checked: they must be those that were mined, in their order", style="dim"
    )
