"""Runs side by side as one page: curves against steps, rows and seconds, intervals, settings that differ."""

from __future__ import annotations

from html import escape
from pathlib import Path

from b3_lightning.evaluation.bootstrap import N_DRAWS, PairedDifference
from b3_lightning.mining.store import write_text
from b3_lightning.reports.compare import COMPARED, Comparison, in_words, verdict
from b3_lightning.reports.page import page, section, table
from b3_lightning.reports.runs import AXES, Run
from b3_lightning.reports.svg import Axes, Line, line_chart

_COLORS = 8
_MOST_DRAWN = 16
"""Eight colours, each plain and dashed."""


def write_compare_page(compared: Comparison, path: Path) -> None:
    """Write the page; it says which runs are not drawn."""
    runs = compared.runs
    names = ", ".join(run.name for run in runs[:4]) + (", ..." if len(runs) > 4 else "")
    links = "".join(f' <a href="{escape(url)}">W&amp;B workspace</a>' for url in compared.workspaces())
    title = "1 run" if len(runs) == 1 else f"{len(runs)} runs compared"
    omission = f"<p>{escape(compared.omission())}</p>" if compared.left_out else ""
    body = f"<header><h1>{title}</h1><p>{escape(names)}{links}</p>{omission}</header>"
    body += _best(compared) + _significance(compared) + _curves(compared) + _settings(compared)
    write_text(path, page(title, body))


def _best(compared: Comparison) -> str:
    figures = compared.figures()
    rows = [[run.name, *(values[i] for values in figures.values())] for i, run in enumerate(compared.runs)]
    intro = f"Each run at the step of its best {compared.metric}, over all unique validation targets."
    return section("The best validation", table(["run", *figures], rows, label="Best validation"), intro)


def _significance(compared: Comparison) -> str:
    if not compared.against_first:
        return ""
    head = ["run", *(part for name in COMPARED for part in (f"{name}: points above, 95%", "")), "queries"]
    rows = []
    for one in compared.against_first:
        cells = [""] * (2 * len(COMPARED))
        if one.differences:
            cells = [part for name in COMPARED for part in _both(one.differences[name])]
        rows.append([one.name, *cells, f"{one.n_queries:,}" if one.differences else one.why_not])
    intro = (
        f"Against {compared.runs[0].name}: the difference in points over the same queries, each run at its best "
        f"val/mrr, of which the ranks are kept, with a paired bootstrap of {N_DRAWS:,} draws."
    )
    return section("How sure is it?", table(head, rows, label="Significance"), intro)


def _both(difference: PairedDifference) -> tuple[str, str]:
    return in_words(difference), verdict(difference)


def _curves(compared: Comparison) -> str:
    drawn = compared.runs[:_MOST_DRAWN]
    metrics = [compared.metric, "val/hit@1", "val/mrr", "val/loss", "train/loss"]
    charts = "".join(_chart(drawn, metric, axis) for metric in dict.fromkeys(metrics) for axis in AXES)
    intro = "Seconds are of the whole run: mining, training and validation."
    if len(drawn) < len(compared.runs):
        intro += f" The first {len(drawn)} of {len(compared.runs)} runs are drawn."
    return section("On the way", f'<div class="grid">{charts}</div>', intro)


def _chart(runs: list[Run], metric: str, axis: str) -> str:
    lines, lacking, said = [], [], []
    for index, run in enumerate(runs):
        points = run.points(metric, axis)
        if not points:
            lacking.append(run.name)
            continue
        xs, ys = [x for x, _ in points], [y for _, y in points]
        lines.append(Line(run.name, xs, ys, index % _COLORS + 1, dashed=index >= _COLORS))
        said.append(f"{run.name} ends at {ys[-1]:.3f} after {xs[-1]:,.0f}")
    said_all, title = "; ".join(said) + ".", f"{metric} by {AXES[axis]}"
    note = f"Not logged by {', '.join(lacking)}." if lacking and lines else ""
    axes = Axes(title, AXES[axis], "", said_all, note, x_from_zero=True)
    return line_chart(axes, lines)


def _settings(compared: Comparison) -> str:
    rows = [[key, *values] for key, values in compared.differing.items()]
    head = ["setting", *(run.name for run in compared.runs)]
    return section("Settings that differ", table(head, rows, label="Settings that differ") if rows else "")
