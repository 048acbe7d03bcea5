"""An audit as a table on the terminal and as a Parquet file of the offending rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from b3_lightning.data.audit import MEANING, OF_BATCH, Finding
from b3_lightning.data.foreign import ForeignPairs
from b3_lightning.mining.store import write_atomic


def print_audit(console: Console, found: Sequence[Finding], pairs: ForeignPairs, batches: str) -> None:
    """Print every kind of finding with the rows it concerns, wrong ones first, and an example of each."""
    mined = "; its column row names those of the pairs that were mined" if pairs.source_row is not None else ""
    rows = f"{len(pairs):,} rows (counted from 0 in this file{mined})"
    about = f"{rows}, {pairs.n_negatives:,} negatives, {len(pairs.batches):,} batches{batches}"
    named = ", ".join(f"{ours} = {theirs}" if ours != theirs else ours for ours, theirs in pairs.columns.items())
    console.print(f"{about}\ncolumns: {named}", highlight=False, markup=False)
    kinds: dict[str, list[Finding]] = {}
    for finding in found:
        kinds.setdefault(finding.name, []).append(finding)
    if not kinds:
        console.print("nothing found", style="green")
        return
    table = Table("", "rows", "exact", "finding")
    for name in sorted(kinds, key=lambda name: (not kinds[name][0].wrong, list(MEANING).index(name))):
        n_rows = _count_rows(kinds[name])
        n_exact = _count_rows([finding for finding in kinds[name] if finding.exact])
        mark = "[red]wrong[/]" if kinds[name][0].wrong else "[yellow]look[/]"
        in_batches = any(finding.batch is not None for finding in kinds[name])
        n_all = len(pairs) - (0 if in_batches else len(pairs.again))
        about = f"[bold]{name}[/]: {MEANING[name]}\n[dim]{escape(_example(kinds[name][0], pairs))}[/]"
        table.add_row(mark, f"{n_rows:,}\n{n_rows / n_all:.1%}", f"{n_exact:,}", about)
    console.print(table)


def _count_rows(found: Sequence[Finding]) -> int:
    """Rows that findings of one kind concern."""
    if found and found[0].name in OF_BATCH:
        return sum(1 + finding.n_others for finding in found)
    return len({finding.row for finding in found})


def _example(finding: Finding, pairs: ForeignPairs) -> str:
    def shown(row: int) -> str:
        both = (pairs.query[row], pairs.target[row])
        return f"row {row} " + " -> ".join(repr(_short(item.text or item.image)) for item in both)

    batch = "" if finding.batch is None else f"in batch {finding.batch}, "
    other = "" if finding.other is None else f"; {shown(finding.other)}"
    text = f" ({_short(finding.text)})" if finding.text else ""
    return f"{batch}{shown(finding.row)}{other}{text}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def write_audit(path: Path, found: Sequence[Finding], pairs: ForeignPairs) -> None:
    """Write one line a finding, wrong ones first.

    Columns: row, finding, wrong, exact, batch, other_row, n_others, detail, query, target.
    """
    found = sorted(found, key=lambda one: not one.wrong)
    columns = {
        "row": pa.array([one.row for one in found], pa.int64()),
        "finding": pa.array([one.name for one in found], pa.string()),
        "wrong": pa.array([one.wrong for one in found], pa.bool_()),
        "exact": pa.array([one.exact for one in found], pa.bool_()),
        "batch": pa.array([None if one.batch is None else str(one.batch) for one in found], pa.string()),
        "other_row": pa.array([one.other for one in found], pa.int64()),
        "n_others": pa.array([one.n_others for one in found], pa.int64()),
        "detail": pa.array([one.text for one in found], pa.string()),
        "query": pa.array([pairs.query[one.row].text or pairs.query[one.row].image for one in found], pa.string()),
        "target": pa.array([pairs.target[one.row].text or pairs.target[one.row].image for one in found], pa.string()),
    }
    write_atomic(path, lambda there: pq.write_table(pa.table(columns), there))
