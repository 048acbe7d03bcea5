"""What a plan's page tells in numbers: of every task, and of every cluster.

A *suspect* is a row of the same cluster whose target the teacher scores above the query's own: trained against it, a
likely right answer is pushed away, unless the plan lists it for masking. Only ranks that the plan keeps are known, so
suspects are counted among these.

Shapes: N = rows, W = ranks kept, C = clusters, R = ranks of a task, P = suspects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from b3_lightning.mining import MinedPlan
from b3_lightning.mining.ranks import RankChoice
from b3_lightning.types import PADDING

_TILE_ROWS = 2**15
_MOST_ROWS = 2**14
"""Rows whose scores are looked at for the curves: quantiles and shares are then known to half a percent."""


@dataclass(frozen=True)
class Suspects:
    """Pairs of rows in one cluster, the worst first: ``other``'s target beats the own one of ``row`` by ``gap`` > 0."""

    row_P: Tensor
    other_P: Tensor
    gap_P: Tensor
    masked_P: Tensor


@dataclass(frozen=True)
class ClusterFigures:
    """(C,) each: rows, edges inside, their share of all pairs, suspects by whether the plan masks them, fillers."""

    n_rows_C: Tensor
    task_C: Tensor
    cohesion_C: Tensor
    n_suspects_C: Tensor
    n_masked_C: Tensor
    n_fillers_C: Tensor


@dataclass(frozen=True)
class TaskFigures:
    """One task; scores are (R,) by rank, NaN where no row has so many; shares are of the queries looked at."""

    name: str
    choice: RankChoice
    n_rows: int
    n_looked_at: int
    low_R: list[float]
    median_R: list[float]
    high_R: list[float]
    positive: float
    beaten_R: list[float]
    n_edges: int
    kept_frac: float
    n_communities: int
    n_clusters: int
    n_fillers: int
    n_masked: int
    n_suspected_rows: int

    @property
    def leads(self) -> float:
        """The share of queries that the teacher answers right; below one half its scores are weak evidence."""
        return 1 - self.beaten_R[0] if self.beaten_R else 1.0


@dataclass(frozen=True)
class PlanFigures:
    """All that the page shows; ``filler_N`` (bool) marks rows that no row of their cluster is hard for."""

    tasks: list[TaskFigures]
    clusters: ClusterFigures
    suspects: Suspects
    filler_N: Tensor
    community_sizes: Tensor

    @classmethod
    def measure(cls, mined: MinedPlan) -> PlanFigures:
        """Count; some seconds for a million rows."""
        cluster_N = mined.clusters.cluster_of_row()
        suspects = _find_suspects(mined, cluster_N)
        kept = mined.edges.within(cluster_N)
        filler_N = mined.filler_N
        n_clusters = len(mined.clusters)
        size_C = (mined.clusters.ids_CK != PADDING).sum(dim=1)
        of_P = cluster_N[suspects.row_P]
        clusters = ClusterFigures(
            n_rows_C=size_C,
            task_C=mined.task_N[mined.clusters.ids_CK[:, 0]],
            cohesion_C=cluster_N[kept.source_E].bincount(minlength=n_clusters)
            / (size_C * (size_C - 1) / 2).clamp(min=1),
            n_suspects_C=of_P[~suspects.masked_P].bincount(minlength=n_clusters),
            n_masked_C=of_P[suspects.masked_P].bincount(minlength=n_clusters),
            n_fillers_C=cluster_N[filler_N].bincount(minlength=n_clusters),
        )
        suspected_N = torch.zeros(mined.n_rows, dtype=torch.bool)
        suspected_N[suspects.row_P[~suspects.masked_P]] = True
        tasks = [
            _measure_task(mined, task, cluster_N, filler_N=filler_N, suspected_N=suspected_N)
            for task in range(len(mined.task_names))
        ]
        return cls(tasks, clusters, suspects, filler_N, mined.communities.label_N.bincount())


def _find_suspects(mined: MinedPlan, cluster_N: Tensor) -> Suspects:
    neighbors, found = mined.neighbors, []
    for start in range(0, mined.n_rows, _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        ids_QW = neighbors.ids_NW[rows]
        gap_QW = neighbors.scores_NW[rows] - neighbors.positive_score_N[rows, None]
        row_P, rank_P = ((gap_QW > 0) & (ids_QW != PADDING)).nonzero(as_tuple=True)
        other_P = ids_QW[row_P, rank_P]
        here = cluster_N[other_P] == cluster_N[row_P + start]
        row_P, rank_P, other_P = row_P[here], rank_P[here], other_P[here]
        masked_P = mined.window.masked_NW[rows][row_P, rank_P]
        found.append((row_P + start, other_P, gap_QW[row_P, rank_P], masked_P))
    row_P, other_P, gap_P, masked_P = (torch.cat(part) for part in zip(*found, strict=True))
    order = gap_P.argsort(descending=True, stable=True)
    return Suspects(row_P[order], other_P[order], gap_P[order], masked_P[order])


def _measure_task(
    mined: MinedPlan, task: int, cluster_N: Tensor, *, filler_N: Tensor, suspected_N: Tensor
) -> TaskFigures:
    name = mined.task_names[task]
    of_task_N = mined.task_N == task
    rows = of_task_N.nonzero().flatten()
    sample = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _MOST_ROWS), dtype=torch.float64).long()]
    score_SW = mined.neighbors.scores_NW[sample]
    n_ranks = int((score_SW > -torch.inf).any(dim=0).sum())
    score_SW = score_SW[:, :n_ranks]
    there_SW = score_SW > -torch.inf
    positive_S1 = mined.neighbors.positive_score_N[sample, None]
    share_3 = torch.tensor([0.1, 0.5, 0.9])
    low_R, median_R, high_R = score_SW.masked_fill(~there_SW, torch.nan).nanquantile(share_3, dim=0).tolist()
    beaten_R = ((score_SW > positive_S1) & there_SW).sum(dim=0) / there_SW.sum(dim=0).clamp(min=1)
    edge_E = of_task_N[mined.edges.source_E]
    source_E, target_E = mined.edges.source_E[edge_E], mined.edges.target_E[edge_E]
    n_kept = int((cluster_N[source_E] == cluster_N[target_E]).sum())
    return TaskFigures(
        name=name,
        choice=mined.ranks[name],
        n_rows=len(rows),
        n_looked_at=len(sample),
        low_R=low_R,
        median_R=median_R,
        high_R=high_R,
        positive=float(positive_S1.median()),
        beaten_R=beaten_R.tolist(),
        n_edges=len(source_E),
        kept_frac=n_kept / max(1, len(source_E)),
        n_communities=len(mined.communities.label_N[rows].unique()),
        n_clusters=len(cluster_N[rows].unique()),
        n_fillers=int(filler_N[rows].sum()),
        n_masked=int(mined.window.masked_NW[rows].sum()),
        n_suspected_rows=int(suspected_N[rows].sum()),
    )
