"""The answers of ``plan`` in plain words and tables on the terminal, a page with pictures, and Parquet."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from b3_lightning.mining.store import write_atomic, write_text
from b3_lightning.mining.whatif import Figure, TaskAnswer
from b3_lightning.reports.page import page, section, table
from b3_lightning.reports.svg import Axes, Line, line_chart

MOST_SUSPECTED = 0.2
"""A setting is not advised where more of the rows have a suspected false negative in their batch."""
MOST_OF_BATCH = 1 / 8
"""Nor is a cluster that is more of its batch: such batches are harder and train worse (docs/results.md)."""
_RANDOM_COLOR, _COLORS = 4, (1, 2, 3, 5, 6, 7, 8)
"""Of the style sheet's series, whose fourth is grey."""
_GOALS = (256, 1024, 4096)
_ASSUMED = (
    "Assumed: the teacher's similarities stand for the student's; hardness is the teacher's InfoNCE loss at "
    "temperature 0.05, without the negatives that are suspected to be right (nearly identical to the row's own, or, "
    "where the teacher is good enough, above its positive). Equally hard batches need not train equally well: mined "
    "ones show the same few rows to each other, so very uniform or noisy sets gain less, and clusters that were more "
    "than an eighth of their batch trained worse though harder, so none is advised where there is a smaller "
    "one. Compare with --data.batches=random before a long run."
)
_HEAD = (
    "batches",
    "window",
    "K",
    "|B|",
    "hardness",
    "without suspects",
    "rows with suspects",
    "edges kept",
    "as random",
)


def tell_what_if(console: Console, answers: Sequence[TaskAnswer], batch_size: int, folder: Path) -> None:
    """Print the advice for every task and write what_if.html and what_if.parquet."""
    for answer in answers:
        console.print(f"\n[bold]task {escape(answer.name)}[/]: {_rows(answer)}", highlight=False)
        console.print(_table(answer, batch_size))
        for line in advice(answer, batch_size):
            console.print(f"- {line}", highlight=False, markup=False)
    console.print(f"\n{_ASSUMED}", style="dim", highlight=False)
    write_text(folder / "what_if.html", _page(answers, batch_size))
    write_atomic(folder / "what_if.parquet", lambda path: pq.write_table(_figures(answers), path))
    console.print(f"picture and all figures: {folder / 'what_if.html'}", highlight=False, markup=False)


def _best(answer: TaskAnswer, batch_size: int) -> Figure | None:
    return answer.best(batch_size, MOST_SUSPECTED, MOST_OF_BATCH)


def _advised(answer: TaskAnswer, batch_size: int) -> Figure | None:
    """The best, where it is harder than random batches."""
    best = _best(answer, batch_size)
    return best if best is not None and _gain(answer, best) > 0 else None


def _gain(answer: TaskAnswer, figure: Figure) -> float:
    """Hardness above that of random batches of the same size."""
    by_chance = (one.clean for one in answer.random if one.batch_size == figure.batch_size)
    return figure.clean - next(by_chance, -math.inf)


def advice(answer: TaskAnswer, batch_size: int) -> list[str]:
    """What the figures say about mining at this batch size, and about other batch sizes, a sentence each."""
    best = _best(answer, batch_size)
    if best is None:
        return [
            f"no cluster size asked about divides |B| = {batch_size}, or the task has fewer rows: nothing to advise"
        ]
    gain = _gain(answer, best)
    if gain <= 0:
        alike = "easier" if gain < 0 else "no harder"
        return [
            f"nothing is advised: mined batches of {batch_size} are no harder than random ones here, with no setting "
            f"asked about; {alike} with {_setting(answer, best)}",
            *_weak_teacher(answer),
        ]
    all_rows = " (all rows)" if best.as_random >= answer.n_sampled else ""
    lines = [
        f"advised: {_setting(answer, best)}. Mined batches of {batch_size} are then as hard as random ones of about "
        f"{round(best.as_random):,}{all_rows}",
        *_warnings(best),
        *_weak_teacher(answer),
        *_sizes(answer, best),
    ]
    if best.as_random < 1.5 * batch_size:
        lines.append("mining buys little here: the clusters are hardly harder than chance")
    if answer.suspicious and answer.auto_first_rank > best.first_rank:
        of_all = round(answer.auto_first_rank / answer.sampled_frac)
        sampled = f" of the sample (about {of_all} of all rows)" if answer.sampled_frac < 1 else ""
        lines.append(
            f"first_rank: auto would begin at {answer.auto_first_rank}{sampled}, where fewer than 1 in 100 targets are "
            f"likely right: a safer window, and an easier one; at rank 0 {answer.suspicious[0]:.0%} are"
        )
    return lines


def _warnings(best: Figure) -> list[str]:
    """What to know of the batches that are advised."""
    lines = []
    if best.cluster_size > MOST_OF_BATCH * best.batch_size:
        lines.append(
            f"careful: clusters of {best.cluster_size} are more than an eighth of |B| = {best.batch_size}, and no "
            "smaller ones were asked about"
        )
    if best.suspected > MOST_SUSPECTED:
        lines.append(
            f"careful: {best.suspected:.0%} of the rows have a suspected false negative in their batch, and no "
            f"setting has fewer than {MOST_SUSPECTED:.0%}: begin windows later, or filter by score "
            "(data.mining.max_relative_score)"
        )
    else:
        lines.append(f"{best.suspected:.1%} of the rows have a suspected false negative in their batch")
    return lines


def _weak_teacher(answer: TaskAnswer) -> list[str]:
    if answer.reliable:
        return []
    return [
        f"careful: the teacher puts a query's own target first for only {1 - answer.beaten:.0%} of the queries, so "
        "what it ranks high is no sure evidence: hardness says little here, and suspects are undercounted. Take a "
        "better teacher (data.teacher) before long runs"
    ]


def _setting(answer: TaskAnswer, figure: Figure) -> str:
    filters = "".join(f", {name} {value:g} as set" for name, value in answer.filters.items())
    if answer.labels:
        return f"cluster_size {figure.cluster_size}{filters}; few targets serve many rows, so labels are ranked"
    sampled = ""
    if answer.sampled_frac < 1:
        first, n = (round(value / answer.sampled_frac) for value in (figure.first_rank, figure.n_ranks))
        sampled = f" of the sample, which is about first_rank {first} and n_ranks {n} of all rows"
    window = f"first_rank {figure.first_rank} and n_ranks {figure.n_ranks}{sampled}"
    return f"cluster_size {figure.cluster_size}, {window}{filters}"


def _sizes(answer: TaskAnswer, best: Figure) -> list[str]:
    """The smallest mined batches, with the same setting, that are as hard as random ones of usual sizes."""
    least = best.cluster_size / MOST_OF_BATCH
    own = [figure for figure in answer.mined if figure.setting == best.setting and figure.batch_size >= least]
    lines, none = [], []
    for goal in (goal for goal in _GOALS if goal <= answer.n_sampled):
        enough = [figure.batch_size for figure in own if goal <= figure.as_random and figure.batch_size < goal]
        if enough:
            lines.append(f"instead of random batches of {goal:,}: mined batches of {min(enough):,}")
        else:
            none.append(f"{goal:,}")
    if none:
        lines.append(f"no smaller mined batch asked about is as hard as random ones of {' or '.join(none)}")
    return lines


def _rows(answer: TaskAnswer) -> str:
    if answer.sampled_frac == 1:
        return f"{answer.n_rows:,} rows"
    return (
        f"{answer.n_sampled:,} of {answer.n_rows:,} rows, drawn at random; a sample is sparser, so mined batches of "
        "all rows are harder than these"
    )


def _table(answer: TaskAnswer, batch_size: int) -> Table:
    head = (Column("setting", no_wrap=True), "hardness without suspects", "as random |B|", "rows with suspects")
    table = Table(*head, title=f"|B| = {batch_size}")
    for figure in (figure for figure in answer.random if figure.batch_size == batch_size):
        table.add_row("random", f"{figure.clean:.3f}", f"{batch_size}", f"{figure.suspected:.1%}")
    best = _advised(answer, batch_size)
    for figure in (figure for figure in answer.mined if figure.batch_size == batch_size):
        name = f"K {figure.cluster_size}, ranks {figure.first_rank} to {figure.first_rank + figure.n_ranks - 1}"
        name, style = (f"{name} (advised)", "bold green") if figure is best else (name, None)
        cells = (f"{figure.clean:.3f}", _as_random(answer, figure), f"{figure.suspected:.1%}")
        table.add_row(name, *cells, style=style)
    return table


def _figures(answers: Sequence[TaskAnswer]) -> pa.Table:
    rows = [
        {"task": answer.name, "batches": kind, "sampled_frac": answer.sampled_frac, **dataclasses.asdict(figure)}
        for answer in answers
        for kind, figures in (("random", answer.random), ("mined", answer.mined))
        for figure in figures
    ]
    return pa.Table.from_pylist(rows)


def _page(answers: Sequence[TaskAnswer], batch_size: int) -> str:
    title = "What mining will buy"
    parts = [f"<h1>{title}</h1>"]
    for answer in answers:
        said = "".join(f"<li>{html.escape(line)}</li>" for line in advice(answer, batch_size))
        rows = [_line(kind, figure, answer) for kind in ("random", "mined") for figure in getattr(answer, kind)]
        figures = table(_HEAD, rows, label=f"all figures of {answer.name}")
        told = f"<ul>{said}</ul>{_charts(answer, batch_size)}<details><summary>all figures</summary>{figures}</details>"
        parts.append(section(answer.name, told, _rows(answer)))
    return page(title, "".join([*parts, section("What this assumes", f'<p class="intro">{html.escape(_ASSUMED)}</p>')]))


def _as_random(answer: TaskAnswer, figure: Figure) -> str:
    least = answer.random[0]
    return f"< {least.batch_size}" if figure.clean < least.clean else f"{round(figure.as_random):,}"


def _line(kind: str, figure: Figure, answer: TaskAnswer) -> tuple[str, ...]:
    mined = kind == "mined"
    return (
        kind,
        f"{figure.first_rank} to {figure.first_rank + figure.n_ranks - 1}" if mined else "",
        f"{figure.cluster_size}" if mined else "",
        f"{figure.batch_size}",
        f"{figure.hardness:.3g}",
        f"{figure.clean:.3g}",
        f"{figure.suspected:.1%}",
        f"{figure.kept_frac:.1%}" if mined else "",
        _as_random(answer, figure) if mined else "",
    )


def _charts(answer: TaskAnswer, batch_size: int) -> str:
    """Hardness against |B|: a chart for each K, random batches and every window in each."""
    sizes, clean = zip(*((figure.batch_size, figure.clean) for figure in answer.random), strict=True)
    random = Line("random", sizes, clean, _RANDOM_COLOR, dashed=True)
    best = _advised(answer, batch_size)
    advised = None if best is None else best.setting
    charts = []
    for cluster_size in sorted({figure.cluster_size for figure in answer.mined}):
        own = [figure for figure in answer.mined if figure.cluster_size == cluster_size]
        lines = [random]
        for index, setting in enumerate(sorted({figure.setting for figure in own})):
            there = [figure for figure in own if figure.setting == setting]
            name = f"from rank {setting[0]}{' (advised)' if setting == advised else ''}"
            xs, ys = [figure.batch_size for figure in there], [figure.clean for figure in there]
            lines.append(Line(name, xs, ys, _COLORS[index % len(_COLORS)], dashed=index >= len(_COLORS)))
        said = "; ".join(
            f"{line.name}: {line.y[0]:.3g} at {line.x[0]}, {line.y[-1]:.3g} at {line.x[-1]}" for line in lines
        )
        axes = Axes(f"K = {cluster_size}", "rows in a batch, |B|", "hardness, suspects left out", said, log_x=True)
        charts.append(line_chart(axes, lines))
    return f'<div class="grid">{"".join(charts)}</div>'
