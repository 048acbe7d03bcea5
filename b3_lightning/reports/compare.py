"""Finished runs side by side: the best validation, how sure the differences are, and which settings differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from b3_lightning.console import open_console
from b3_lightning.evaluation.bootstrap import PairedDifference, paired_bootstrap
from b3_lightning.model.ranks import query_metrics
from b3_lightning.reports.runs import Run, load_runs, read_csv_run

SHOWN = ("val/hit@1", "val/hit@5", "val/hit@10", "val/mrr", "val/ndcg@10", "val/loss")
COMPARED = ("hit@1", "mrr")
_WIDEST = 10_000
"""Characters that a table may ask for, to see how many it wants."""


@dataclass(frozen=True)
class Significance:
    """A run against the first one, metric by metric; ``why_not`` where their ranks cannot be compared."""

    name: str
    differences: dict[str, PairedDifference]
    n_queries: int
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """What is printed and drawn: the best row of each run, in their order, settings that differ, significance."""

    runs: list[Run]
    metric: str
    best: list[dict[str, float]]
    differing: dict[str, list[str]]
    against_first: list[Significance]
    left_out: Sequence[str] = ()
    """Runs that never logged the metric."""

    @classmethod
    def of(cls, given: Sequence[Run], metric: str) -> Comparison:
        """Compare runs at the best value of a metric, without those that never logged it, as before a validation.

        Raises:
            ValueError: where none did.
        """
        runs = [run for run in given if metric in run.logged()] or _none_of(given, metric)
        left_out = [run.name for run in given if not any(run is other for other in runs)]
        best = [run.best(metric) for run in runs]
        keys = sorted(set().union(*(run.config for run in runs)))
        values = {key: [str(run.config.get(key, "")) for run in runs] for key in keys}
        differing = {key: listed for key, listed in values.items() if len(set(listed)) > 1}
        return cls(runs, metric, best, differing, [significance(runs[0], run) for run in runs[1:]], left_out)

    def omission(self) -> str:
        """Which runs are left out, and why; empty where none is."""
        if not self.left_out:
            return ""
        n_given = len(self.runs) + len(self.left_out)
        return f"left out, {len(self.left_out)} of {n_given} runs hold no {self.metric}: {', '.join(self.left_out)}"

    def figures(self) -> dict[str, list[str]]:
        """Metric -> its value in every run, at the best validation."""
        names = dict.fromkeys([self.metric, *SHOWN])
        # loggers count steps from 0; checkpoints and ``fit`` say how many were done
        listed = {"steps": [f"{row['step'] + 1:.0f}" if "step" in row else "" for row in self.best]}
        for name in names:
            if any(name in row for row in self.best):
                listed[name] = [f"{row[name]:.4f}" if name in row else "" for row in self.best]
        return listed

    def workspaces(self) -> list[str]:
        """The W&B workspaces of runs that lie on a server."""
        urls = [run.url.rpartition("/runs/")[0] for run in self.runs if run.url]
        return sorted({f"{url}/workspace" for url in urls if url})


def _none_of(given: Sequence[Run], metric: str) -> list[Run]:
    """All runs, where none holds the metric and they share no other that could be taken instead."""
    shared = sorted(name for name in set.intersection(*(run.logged() for run in given)) if name.startswith("val/"))
    if len(given) > 1 and shared:
        raise ValueError(f"no run holds {metric}; all hold {', '.join(shared)}: --metric={shared[0]}")
    return list(given)


def significance(first: Run, other: Run) -> Significance:
    """``other - first`` over the same validation queries, by a paired bootstrap (95%)."""
    lacking = [run.name for run in (first, other) if run.ranks is None]
    if lacking or first.ranks is None or other.ranks is None:
        return Significance(other.name, {}, 0, f"no val_ranks.safetensors of {' and '.join(lacking)}")
    if first.ranks.pairs != other.ranks.pairs or not torch.equal(first.ranks.row_N, other.ranks.row_N):
        return Significance(other.name, {}, 0, f"{first.name} and {other.name} were validated on different pairs")
    ours, theirs = query_metrics(other.ranks.rank_N), query_metrics(first.ranks.rank_N)
    differences = {
        name: paired_bootstrap(ours[name], theirs[name], generator=torch.Generator().manual_seed(0))
        for name in COMPARED
    }
    return Significance(other.name, differences, len(other.ranks.rank_N))


def in_words(difference: PairedDifference) -> str:
    """In points, with the interval."""
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def verdict(difference: PairedDifference) -> str:
    """What the interval allows to say."""
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "not distinguishable"


def compare_runs(given: Sequence[str], *, metric: str = "val/mrr", output: str | None = None) -> None:
    """Print runs side by side and, with ``output``, write a page with their curves.

    Raises:
        ValueError: where ``output`` does not end in .html, and where a run never logged the metric.
    """
    if output is not None and not output.endswith(".html"):
        raise ValueError(f"--output {output} must end in .html: it is one page with curves and tables")
    console = open_console()
    compared = Comparison.of(load_runs(given), metric)
    if omission := compared.omission():
        console.print(omission, highlight=False, markup=False)
    names = [run.name for run in compared.runs]
    title = f"validation at the step of the best {metric}"
    console.print(_table(console, title, "", names, compared.figures()))
    _print_significance(compared, console)
    if len(names) > 1 and not compared.differing:
        console.print("no setting differs")
    elif len(names) > 1:
        console.print(_table(console, "settings that differ", "setting", names, compared.differing))
    if output is not None:
        from b3_lightning.reports.compare_page import write_compare_page

        write_compare_page(compared, Path(output))
        console.print(f"curves: {output}", highlight=False, soft_wrap=True, markup=False)
    for url in compared.workspaces():
        console.print(f"W&B workspace: {url}", highlight=False, soft_wrap=True, markup=False)


def _table(console: Console, title: str, corner: str, names: Sequence[str], rows: dict[str, list[str]]) -> Table:
    """Runs beside each other where the terminal is wide enough, else one below the other, else a line a value."""
    beside = _grid(title, [corner, *names], [[name, *values] for name, values in rows.items()])
    below = _grid(title, ["run", *rows], [[name, *values] for name, *values in zip(names, *rows.values(), strict=True)])
    for table in (beside, below):
        if Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum <= console.width:
            return table
    long = Table(corner, "run", "", title=title)
    for name, values in rows.items():
        for index, (run, value) in enumerate(zip(names, values, strict=True)):
            last = index == len(names) - 1
            long.add_row("" if index else escape(name), escape(run), escape(value), end_section=last)
    for column in long.columns:
        column.overflow = "fold"
    return long


def _grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*map(escape, head), title=title)
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def _print_significance(compared: Comparison, console: Console) -> None:
    sure = [one for one in compared.against_first if one.differences]
    if sure:
        title = (
            f"points above {compared.runs[0].name}, both at their best val/mrr; 95% over {sure[0].n_queries:,} queries"
        )
        table = Table("", *COMPARED, title=escape(title))
        for one in sure:
            said = (f"{in_words(one.differences[name])} {verdict(one.differences[name])}" for name in COMPARED)
            table.add_row(escape(one.name), *map(escape, said))
        console.print(table)
    for one in compared.against_first:
        if one.why_not:
            console.print(f"no interval for {one.name}: {one.why_not}", highlight=False, markup=False)


def best_validation(folder: Path) -> dict[str, float]:
    """The row of metrics.csv with the highest ``val/mrr``.

    Raises:
        ValueError: where no validation was logged.
    """
    best = read_csv_run(folder).best("val/mrr")
    return {name: best.get(name, math.nan) for name in ("step", *SHOWN)}
