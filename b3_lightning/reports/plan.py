"""A mined plan as one Markdown page: the counts, and clusters to look at."""

from __future__ import annotations

from pathlib import Path

from b3_lightning.data import PairTable
from b3_lightning.mining import MinedPlan
from b3_lightning.mining.store import write_text
from b3_lightning.mining.tables import count_edges, read_edges
from b3_lightning.types import PADDING

_N_SHOWN = 5
_MEANING = {
    "n_rows": "training pairs",
    "n_edges": "edges of the hard-negative graph",
    "n_communities": "communities found",
    "n_clusters": "clusters cut from them",
    "kept_frac": "share of edges whose two ends share a cluster (higher: harder batches)",
    "n_rows_without_edge": "rows with no edge at all",
    "n_fillers": "rows with nothing hard in their cluster",
    "n_masked": "ranked targets that are likely right too: before the window, or too similar",
    "n_negatives_lacking": "hard negatives that could not be drawn",
    "hardness_mined": "the teacher's mean InfoNCE loss in the mined batches",
    "hardness_random": "the same in random batches",
    "hardness_random_masked": "the same in random batches, without what the plan masks",
    "hardness_best": "the same if every row had its own hardest negatives",
    "seconds": "seconds, embedding not counted",
}


def write_plan_report(mined: MinedPlan, pairs: PairTable, path: Path) -> None:
    """Write the report into the folder of the saved plan; shows the rows of a few clusters spread over the plan."""
    lines = ["# Mined plan", "", "| | | |", "|---|---|---|"]
    for name, value in mined.summary().items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        lines.append(f"| {name} | {shown} | {_MEANING[name]} |")
    lines += ["", f"Seconds by stage: {', '.join(f'{k} {v:.1f}' for k, v in mined.seconds.items())}", ""]
    lines += ["| task | hard ranks | why |", "|---|---|---|"]
    for task, choice in mined.ranks.items():
        kind = "labels" if choice.labels else "ranks"
        lines.append(f"| {_cell(task)} | {kind} {choice.first_rank} to {choice.last_rank} | {choice.reason} |")
    lines += ["", "| task | edges | inside a community | inside a cluster |", "|---|---|---|---|"]
    for task, *counts in count_edges(read_edges(path.parent)).iter_rows():
        lines.append(f"| {_cell(task)} | {' | '.join(f'{count:,}' for count in counts)} |")
    lines.append("")
    queries, targets = pairs.items("query"), pairs.items("target")
    step = max(1, len(mined.clusters) // _N_SHOWN)
    for cluster in range(0, len(mined.clusters), step)[:_N_SHOWN]:
        lines += [f"## Cluster {cluster}", "", "| row | query | target |", "|---|---|---|"]
        for row in mined.clusters.ids_CK[cluster].tolist():
            if row != PADDING:
                both = (_cell(item.text or item.image) for item in (queries[row], targets[row]))
                lines.append(f"| {row} | {' | '.join(both)} |")
        lines.append("")
    write_text(path, "\n".join(lines))


def _cell(text: str) -> str:
    one_line = " ".join(text.split()).replace("|", "\\|")
    return one_line if len(one_line) <= 100 else one_line[:99] + "…"
