"""Look for wrong negatives, duplicates and useless batches in pairs, triplets or batches.

Reads .parquet, .jsonl, .csv or a dataset. Columns: a query (qry, anchor, query, ...), a target (pos_text, positive,
...), and where they are there: negatives (neg_text, negative, negative_1, ...), batch, group, key.
Exit status: 0 nothing is wrong, 3 something is, 1 the file could not be read.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from b3_lightning.console import open_console
from b3_lightning.data.audit import audit, suspect, uneven
from b3_lightning.data.foreign import ForeignPairs, deal_batches, read_foreign
from b3_lightning.data.tables import check_output
from b3_lightning.data.vectors import check_vectors, load_vectors
from b3_lightning.reports.audit import print_audit, write_audit
from b3_lightning.types import Embeddings

FOUND = 3
"""The exit status where something is wrong; 1 and 2 are those of other errors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="pairs, triplets (a column of negatives) or batches (a column of batch numbers)")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="such as qry=title batch=step")
    parser.add_argument("--batch_size", type=int, help="deal plain pairs into random batches of this size first")
    parser.add_argument("--in_order", action="store_true", help="with --batch_size: successive rows instead of random")
    parser.add_argument("--vectors", help="a teacher's: .npy of shape (2, rows, dimensions), .safetensors or .parquet")
    parser.add_argument(
        "--margin", type=float, help="with --vectors: suspect above the positive plus this (default: 0)"
    )
    parser.add_argument("--output", type=Path, help="a .parquet file for the offending rows")
    parser.add_argument("--strict", action="store_true", help="what is only worth a look counts as wrong too")


def run(given: argparse.Namespace) -> None:
    unclear = [entry for entry in given.columns if entry.count("=") != 1]
    if unclear:
        raise ValueError(f"--columns {' '.join(unclear)}: write OURS=THEIRS, such as qry=question")
    if given.margin is not None and given.vectors is None:
        raise ValueError("--margin says what the teacher's vectors make suspect: give --vectors too")
    if given.in_order and given.batch_size is None:
        raise ValueError("--in_order says how rows are dealt into batches: give --batch_size too")
    if given.output is not None:
        check_output(given.output, [given.file])
    pairs = read_foreign(given.file, dict(entry.split("=") for entry in given.columns))
    pairs, dealt = _with_batches(pairs, given)
    console = open_console()
    found = audit(pairs) + ([] if dealt else uneven(pairs))
    if given.vectors is not None:
        vectors = _vectors(given.vectors, pairs)
        more, n_unknown = suspect(pairs, vectors, margin=given.margin or 0.0, easy=not dealt and bool(pairs.batches))
        found += more
        if n_unknown:
            console.print(f"{n_unknown:,} negatives are no row's target, so they have no vector and were not scored")
    print_audit(console, found, pairs, dealt)
    if given.output is not None:
        write_audit(given.output, found, pairs)
        console.print(f"{len(found):,} findings: {given.output}", highlight=False, markup=False)
    if any(one.wrong or given.strict for one in found):
        sys.exit(FOUND)


def _vectors(path: str, pairs: ForeignPairs) -> Embeddings:
    """Of every row; a file that ``batches`` wrote takes those of the pairs that were mined."""
    if pairs.source_row is None:
        return check_vectors(path, len(pairs))
    vectors, last = load_vectors(Path(path)), max(pairs.source_row)
    if last >= len(vectors):
        raise ValueError(
            f"{path} holds vectors of {len(vectors)} rows, and the column 'row' names row {last} of the pairs that "
            "were mined: give the vectors that they were mined with"
        )
    return vectors.take(torch.tensor(pairs.source_row))


def _with_batches(pairs: ForeignPairs, given: argparse.Namespace) -> tuple[ForeignPairs, str]:
    if given.batch_size is None:
        return pairs, ""
    if pairs.batches:
        raise ValueError(f"the file has the batch column {pairs.columns['batch']!r}: leave --batch_size out")
    how = "in the file's order" if given.in_order else "dealt at random, as a trainer shuffles them"
    batches = deal_batches(len(pairs), given.batch_size, in_order=given.in_order)
    return replace(pairs, batches=batches), f" of {given.batch_size} {how}"
