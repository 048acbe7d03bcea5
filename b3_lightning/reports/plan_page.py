"""A mined plan as one HTML page that opens from disk: figures, curves, and clusters to look through."""

from __future__ import annotations

import dataclasses
import itertools
import math
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from b3_lightning.data import PairTable
from b3_lightning.mining import MinedPlan
from b3_lightning.mining.plan import LITTLE_OF_THE_WAY
from b3_lightning.mining.store import write_text
from b3_lightning.reports.cards import MOST_CHARACTERS, CardLimits, Cards, make_cards
from b3_lightning.reports.figures import PlanFigures, TaskFigures
from b3_lightning.reports.page import asset, page, section, table, tiles
from b3_lightning.reports.svg import Axes, Band, Bar, Line, Span, bars, histogram, line_chart, short

_MOST_TASKS = 12
"""So many tasks have charts of their own; the table names all."""


def write_plan_page(
    mined: MinedPlan,
    pairs: PairTable,
    image_root: Path,
    path: Path,
    *,
    title: str = "Mined plan",
    limits: CardLimits = CardLimits(),  # noqa: B008 - frozen
) -> None:
    """Write the page: every word of the pairs is escaped, nothing is fetched when it is opened.

    Args:
        image_root: folder that the pairs' images are relative to.
        limits: how much of the plan is shown; the page says how many clusters of how many.
    """
    figures = PlanFigures.measure(mined)
    cards = make_cards(mined, figures, pairs, image_root, limits)
    body = _header(mined, title) + _overview(mined, figures) + _windows(figures) + _batches(mined, figures)
    body += _tasks(figures) + _explorer(mined, cards, limits)
    data = dataclasses.asdict(cards) | {"tasks": list(mined.task_names), "cut": MOST_CHARACTERS}
    write_text(path, page(title, body, script=asset("plan.js"), data=data))


def _header(mined: MinedPlan, title: str) -> str:
    settings = dataclasses.asdict(mined.settings)
    rows = [[name, str(value)] for name, value in settings.items() if value not in (None, {})]
    seconds = [[stage, f"{value:.2f}"] for stage, value in mined.seconds.items()]
    n_tasks = len(mined.task_names)
    about = f"{mined.n_rows:,} rows" + (f" of {n_tasks} tasks" if n_tasks > 1 else "")
    about += f", clusters of {mined.settings.cluster_size}, mined in {_seconds(sum(mined.seconds.values()))}"
    return (
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p>"
        "<details><summary>Settings and seconds by stage</summary><div class=two>"
        f"{table(['setting', 'value'], rows, label='Settings')}{table(['stage', 'seconds'], seconds, label='Seconds')}"
        "</div></details></header>"
    )


def _overview(mined: MinedPlan, figures: PlanFigures) -> str:
    summary = mined.summary()
    n_rows = mined.n_rows
    suspected = sum(task.n_suspected_rows for task in figures.tasks)
    values = {
        "Edges kept": (f"{summary['kept_frac']:.1%}", f"of {summary['n_edges']:,} lie inside a cluster"),
        "Fillers": (
            _share(summary["n_fillers"], n_rows),
            f"{_rows(summary['n_fillers'])} with nothing hard in their cluster",
        ),
        "Suspected": (_share(suspected, n_rows), f"{_rows(suspected)} trained against a target that beats their own"),
        "Masked": (f"{summary['n_masked'] / n_rows:.1f}", "targets a row, likely right, left out of the loss"),
        "Communities": (_count(summary["n_communities"]), f"cut into {summary['n_clusters']:,} clusters"),
        "No edge at all": (
            _share(summary["n_rows_without_edge"], n_rows),
            f"{_rows(summary['n_rows_without_edge'])}, placed by the window alone",
        ),
    }
    return tiles(values) + _findings(mined, figures, suspected)


def _findings(mined: MinedPlan, figures: PlanFigures, suspected: int) -> str:
    """What the figures mean, in sentences, each marked as fine or to be looked at."""
    said: list[tuple[bool, str]] = []
    way = mined.way_to_hardest()
    if way is not None and mined.hardness["mined"] < mined.hardness["random_masked"]:
        said.append((False, "The batches are easier than random ones: see how much of the window score filters leave."))
    elif way is not None:
        said.append(
            (way > LITTLE_OF_THE_WAY, f"The batches are {way:.0%} of the way from random to the hardest possible.")
        )
    weak = [task for task in figures.tasks if task.leads < 0.5]
    if weak:
        named = ", ".join(f"{task.name} ({task.leads:.0%})" for task in weak[:4]) + (", ..." if len(weak) > 4 else "")
        said.append((False, f"The teacher puts the own target first in less than half of the queries of {named}: "
                            "a target that beats it is weak evidence there."))  # fmt: skip
    share = suspected / mined.n_rows
    against = "against a target that the teacher prefers to their own."
    if share > 0.01:
        advice = "If the first cards show right answers, raise first_rank or set max_relative_score."
        said.append((False, f"{share:.1%} of the rows are trained {against} {advice}"))
    else:
        said.append((True, f"{_rows(suspected)} trained {against}"))
    fillers = int(figures.filler_N.sum()) / mined.n_rows
    if fillers > 0.2:
        either = ", edges: either," if any(own.edges != "either" for own in mined.own_settings()) else ""
        company = f"a larger n_ranks{either} or smaller clusters give them company."
        said.append((False, f"{fillers:.0%} of the rows have nothing hard in their cluster: {company}"))
    items = "".join(
        f'<li class="{"fine" if fine else "look"}"><b>{"Fine" if fine else "Look"}</b><span>{escape(text)}</span></li>'
        for fine, text in said
    )
    return f'<ul class="findings">{items}</ul>'


def _windows(figures: PlanFigures) -> str:
    largest = sorted(figures.tasks, key=lambda task: -task.n_rows)[:_MOST_TASKS]
    n_tasks = len(figures.tasks)
    charts = "".join(
        _score_chart(task, n_tasks) + _right_chart(task, n_tasks) + _cohesion_chart(task, figures, n_tasks)
        for task in largest
    )
    left_out = len(figures.tasks) - len(largest)
    intro = (
        "The window should begin where targets stop being right answers and end while they are still hard; "
        "its clusters should hold together."
    )
    if left_out:
        intro += f" Charts of the {len(largest)} largest of {len(figures.tasks)} tasks; the table below has all."
    return section("Does the window sit right?", f'<div class="grid">{charts}</div>', intro)


def _spans(task: TaskFigures) -> list[Span]:
    choice, last = task.choice, float(len(task.median_R) - 1)
    spans = [Span("hard: the window", choice.first_rank, min(choice.last_rank + 1, last), "hard")]
    if choice.first_rank:
        spans.insert(0, Span("masked: likely right", 0, min(choice.first_rank, last), "masked"))
    return spans


def _named(task: TaskFigures, n_tasks: int, title: str) -> str:
    return f"{task.name}: {title}" if n_tasks > 1 else title[0].upper() + title[1:]


def _score_chart(task: TaskFigures, n_tasks: int) -> str:
    ranks = list(range(len(task.median_R)))
    if not ranks:
        return ""
    kind = "label" if task.choice.labels else "rank"
    first, last = task.choice.first_rank, min(task.choice.last_rank, ranks[-1])
    summary = (
        f"The median cosine falls from {task.median_R[0]:.2f} at {kind} 0 to {task.median_R[-1]:.2f} at {kind} "
        f"{ranks[-1]}; the query's own target has {task.positive:.2f}. The window is {kind}s {first} to {last}."
    )
    axes = Axes(_named(task, n_tasks, f"scores by {kind}"), f"{kind} of the other target", "teacher's cosine", summary,
                f"Window: {kind}s {first} to {last}, {task.choice.reason}.")  # fmt: skip
    lines = [
        Line("other targets, median", ranks, task.median_R, 1),
        Line("own target, median", [0, ranks[-1]], [task.positive] * 2, 2, dashed=True),
    ]
    bands = [Band("10% to 90%", ranks, task.low_R, task.high_R, 1)]
    return line_chart(axes, lines, bands, _spans(task))


def _right_chart(task: TaskFigures, n_tasks: int) -> str:
    ranks = list(range(len(task.beaten_R)))
    if not ranks:
        return ""
    kind = "label" if task.choice.labels else "rank"
    lines = [Line("scores above the own target", ranks, task.beaten_R, 2)]
    estimate = list(task.choice.suspicious)
    if estimate:
        lines.insert(0, Line("likely right too (estimate)", range(len(estimate)), estimate, 3))
    at = min(task.choice.first_rank, len(ranks) - 1)
    summary = (
        f"At {kind} 0 {task.beaten_R[0]:.1%} of the queries have a target that scores above their own, where the "
        f"window begins {task.beaten_R[at]:.1%}."
    )
    note = f"Of {task.n_looked_at:,} queries."
    if estimate:
        note += " The estimate also counts near-identical queries and targets, and its tail is chance."
    axes = Axes(_named(task, n_tasks, "likely false negatives"), f"{kind} of the other target", "share of queries",
                summary, note, percent=True)  # fmt: skip
    return line_chart(axes, lines, (), _spans(task))


def _cohesion_chart(task: TaskFigures, figures: PlanFigures, n_tasks: int) -> str:
    index = [one.name for one in figures.tasks].index(task.name)
    cohesion_C = figures.clusters.cohesion_C[figures.clusters.task_C == index]
    said = f"Of {len(cohesion_C):,} clusters; the median is {cohesion_C.median():.1%}."
    axes = Axes(_named(task, n_tasks, "cohesion of clusters"), "share of a cluster's pairs that are edges", "clusters",
                said, said)  # fmt: skip
    return histogram(axes, _by_tenths(cohesion_C))


def _batches(mined: MinedPlan, figures: PlanFigures) -> str:
    found = figures.clusters
    charts = []
    if mined.hardness:
        size = int(mined.hardness["batch_size"])
        listed = [
            Bar(name, mined.hardness[key], f"{mined.hardness[key]:#.3g}", color)
            for name, key, color in (
                ("random", "random_masked", 4),
                ("mined", "mined", 1),
                ("best possible", "best", 4),
            )
        ]
        said = ", ".join(f"{bar.name} {bar.shown}" for bar in listed)
        note = (
            "The teacher's mean InfoNCE loss without what the plan masks; best: every row with its own hardest "
            f"negatives. With it, random batches have {mined.hardness['random']:#.3g}."
        )
        charts.append(bars(Axes(f"Hardness of batches of {size}", "", "", f"{said}.", note), listed))
    sizes = found.n_rows_C.bincount()
    full = int(sizes[mined.settings.cluster_size]) if len(sizes) > mined.settings.cluster_size else 0
    padded = len(found.n_rows_C) - full
    note = (
        f"{full:,} clusters of {mined.settings.cluster_size} rows" + (f", {padded:,} smaller" if padded else "") + "."
    )
    charts += [
        histogram(
            Axes("Sizes of communities", "rows in a community", "communities",
                 f"{len(figures.community_sizes):,} communities, the largest of {int(figures.community_sizes.max()):,} "
                 "rows.", note),
            _by_powers(figures.community_sizes),
        ),
        histogram(
            Axes("Suspects in a cluster", "pairs whose target beats the own one", "clusters",
                 f"{int((found.n_suspects_C > 0).sum()):,} clusters have suspects, the worst "
                 f"{int(found.n_suspects_C.max()):,}.", "Those that the plan masks are not counted."),
            _by_powers(found.n_suspects_C),
        ),
    ]  # fmt: skip
    return section("What are the batches made of?", f'<div class="grid">{"".join(charts)}</div>')


def _by_powers(value_C: Tensor) -> list[Bar]:
    """Bins 0, 1, 2-3, 4-7 and so on, without the empty ones at the ends."""
    edges = [0, 1]
    while edges[-1] <= int(value_C.max()):
        edges.append(edges[-1] * 2)
    found = []
    for low, high in itertools.pairwise(edges):
        count = int(((value_C >= low) & (value_C < high)).sum())
        name = f"{short(low)}" if high - low == 1 else f"{short(low)}-{short(high - 1)}"
        found.append(Bar(name, count, f"{count:,}"))
    there = [index for index, bar in enumerate(found) if bar.value]
    return found[there[0] : there[-1] + 1]


def _by_tenths(share_C: Tensor) -> list[Bar]:
    """Ten bins up to the next round share above the largest."""
    high = max(0.1, math.ceil(float(share_C.max()) * 10 - 1e-6) / 10)
    index_C = (share_C / high * 10).long().clamp(max=9)
    counts = torch.bincount(index_C, minlength=10).tolist()
    starts = [high * 100 * index / 10 for index in range(11)]
    return [
        Bar(f"{starts[i]:.0f}%", count, f"{count:,} clusters from {starts[i]:.0f}% to {starts[i + 1]:.0f}%")
        for i, count in enumerate(counts)
    ]


def _tasks(figures: PlanFigures) -> str:
    head = ["task", "rows", "window", "edges", "kept", "communities", "clusters", "fillers", "masked a row",
            "suspected rows", "own target first", "why this window"]  # fmt: skip
    rows = []
    for task in figures.tasks:
        choice = task.choice
        kind = "labels " if choice.labels else ""
        rows.append([
            task.name, f"{task.n_rows:,}", f"{kind}{choice.first_rank}-{choice.last_rank}", f"{task.n_edges:,}",
            f"{task.kept_frac:.1%}", f"{task.n_communities:,}", f"{task.n_clusters:,}",
            f"{_share(task.n_fillers, task.n_rows)}", f"{task.n_masked / task.n_rows:.1f}",
            f"{task.n_suspected_rows:,} ({_share(task.n_suspected_rows, task.n_rows)})", f"{task.leads:.1%}",
            choice.reason,
        ])  # fmt: skip
    return section("Task by task", table(head, rows, label="Tasks"))


def _explorer(mined: MinedPlan, cards: Cards, limits: CardLimits) -> str:
    n_shown, n_all = len(cards.clusters), len(mined.clusters)
    reasons = {"suspects": "with most suspects", "loose": "least cohesive", "sample": "drawn evenly"}
    counts = [(sum(card["why"] == why for card in cards.clusters), said) for why, said in reasons.items()]
    shown = ", ".join(f"{count:,} {said}" for count, said in counts if count)
    intro = f"{n_shown:,} of {n_all:,} clusters are on this page: {shown}."
    if n_shown < n_all:
        intro += (
            f" A page holds at most {limits.n_clusters:,} clusters, {limits.n_pictures:,} pictures and "
            f"{limits.n_bytes / 1e6:.1f} MB of them."
        )
    options = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(mined.task_names))
    tasks = f'<label>Task <select id="task"><option value="">all</option>{options}</select></label>'
    controls = (
        '<form id="controls" role="search"><label class="search">Search '
        '<input id="search" type="search" placeholder="words, row 7 or cluster 7" autocomplete="off"></label>'
        '<label>Order <select id="order"><option value="suspects">most suspects</option>'
        '<option value="loose">least cohesive</option><option value="fillers">most fillers</option>'
        '<option value="id">cluster number</option></select></label>'
        f"{tasks if len(mined.task_names) > 1 else ''}"
        '<label>Shown because <select id="why"><option value="">any reason</option>'
        '<option value="suspects">most suspects</option><option value="loose">least cohesive</option>'
        '<option value="sample">drawn evenly</option></select></label>'
        '<output id="count" aria-live="polite"></output></form>'
    )
    empty = '<p class="note"><noscript>The cards need JavaScript.</noscript></p>'
    return section("The clusters", f'{controls}{empty}<div id="cards"></div><div id="more"></div>', intro)


def _share(part: float, whole: float) -> str:
    return f"{part / max(1, whole):.1%}"


def _rows(count: float) -> str:
    return f"{int(count):,} row{'' if count == 1 else 's'}"


def _count(count: float) -> str:
    return short(count) if count >= 1e5 else f"{count:,}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
