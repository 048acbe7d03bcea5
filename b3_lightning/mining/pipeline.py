"""Embeddings in, a mined plan out: one call a stage, task by task (B3 mines each task on its own, section 4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3_lightning.mining.clusters import cut_clusters
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges, window_arcs
from b3_lightning.mining.neighbors import Progress, find_neighbors
from b3_lightning.mining.plan import MinedPlan
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.mining.swaps import improve_by_swaps
from b3_lightning.types import PADDING, Clusters, Communities, Edges, Embeddings, Neighbors

log = logging.getLogger(__name__)


def mine(
    query_ND: Any,
    target_ND: Any,
    *,
    settings: MiningSettings,
    target_keys: Sequence[Any] | Tensor | None = None,
    tasks: Sequence[Any] | Tensor | None = None,
    progress: Progress | None = None,
) -> MinedPlan:
    """Mine clusters of rows that are hard negatives for one another.

    Args:
        query_ND: (N, D) numpy array or tensor, a teacher's vectors of the queries; normalised here.
        target_ND: (N, D), the same teacher's vectors of the targets; row i is the positive of query i.
        settings: rank window, cluster size, algorithms.
        target_keys: N values; rows with equal values hold the same target and are never each other's neighbours.
        tasks: N values; rows of different tasks never meet.
        progress: told (stage, done, total).

    Raises:
        ValueError: on vectors that are not finite and non-zero, on disagreeing lengths, on fewer rows than
            ``cluster_size`` or than the rank window needs.
    """
    embeddings = Embeddings.from_arrays(query_ND, target_ND)
    n_rows = len(embeddings)
    settings.check_fits(n_rows)
    target_key_N, _ = _factorise("target_keys", target_keys, n_rows, default=range(n_rows))
    task_N, task_names = _factorise("tasks", tasks, n_rows, default=["default"] * n_rows)
    parts: list[MinedPlan] = []
    rows_of_part: list[Tensor] = []
    for task, name in enumerate(task_names):
        rows = (task_N == task).nonzero().flatten()
        if len(rows) <= settings.first_rank + 1:
            log.warning("task %r has %d rows, none beyond rank %d: no edges", name, len(rows), settings.first_rank)
        parts.append(_mine_task(embeddings.take(rows), target_key_N[rows], settings, progress))
        rows_of_part.append(rows)
    return _join_tasks(parts, rows_of_part, task_N, task_names, settings)


def _mine_task(
    embeddings: Embeddings, target_key_N: Tensor, settings: MiningSettings, progress: Progress | None
) -> MinedPlan:
    """The stages on one task, rows numbered from 0."""
    seconds: dict[str, float] = {}
    window = {"first_rank": settings.first_rank, "n_ranks": settings.n_ranks}
    with _timed("neighbours", seconds, progress):
        neighbors = find_neighbors(
            embeddings,
            n_neighbors=settings.n_neighbors,
            target_key_N=target_key_N,
            memory_budget_gib=settings.memory_budget_gib,
            progress=progress,
        )
    with _timed("edges", seconds, progress):
        edges = build_edges(neighbors, **window, kind=settings.edges)
    with _timed("communities", seconds, progress):
        communities = find_communities(
            edges,
            algorithm=settings.communities,
            resolution=settings.resolution,
            cluster_size=settings.cluster_size,
            seed=settings.seed,
        )
    with _timed("clusters", seconds, progress):
        clusters = cut_clusters(
            edges,
            communities,
            window_arcs(neighbors, **window),
            embeddings,
            cluster_size=settings.cluster_size,
            already_cut=settings.communities == "metis",
            seed=settings.seed,
        )
    with _timed("swaps", seconds, progress):
        clusters = improve_by_swaps(clusters, edges, max_rounds=settings.swap_rounds)
    task_N = torch.zeros(len(embeddings), dtype=torch.int64)
    return MinedPlan(neighbors, edges, communities, clusters, task_N, ("default",), settings, seconds)


@contextmanager
def _timed(stage: str, seconds: dict[str, float], progress: Progress | None) -> Iterator[None]:
    if progress is not None:
        progress(stage, 0, 1)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    if progress is not None:
        progress(stage, 1, 1)


def _factorise(name: str, values: Any, n_rows: int, *, default: Sequence[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Codes in order of first appearance, and the distinct values as text."""
    if values is None:
        values = default
    listed = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if len(listed) != n_rows:
        raise ValueError(f"{name} has {len(listed)} values for {n_rows} rows")
    codes: dict[Any, int] = {}
    code_N = torch.tensor([codes.setdefault(value, len(codes)) for value in listed], dtype=torch.int64)
    return code_N, tuple(str(value) for value in codes)


def _join_tasks(
    parts: list[MinedPlan],
    rows_of_part: list[Tensor],
    task_N: Tensor,
    task_names: tuple[str, ...],
    settings: MiningSettings,
) -> MinedPlan:
    """Put the tasks' plans back on the row ids of the whole."""
    n_rows = len(task_N)
    width = settings.n_neighbors
    ids_NW = torch.full((n_rows, width), PADDING, dtype=torch.int64)
    scores_NW = torch.full((n_rows, width), -torch.inf)
    positive_N, label_N = torch.empty(n_rows), torch.empty(n_rows, dtype=torch.int64)
    sources, targets, weights, clusters = [], [], [], []
    n_labels = 0
    for part, rows in zip(parts, rows_of_part, strict=True):
        local = part.neighbors.ids_NW
        ids_NW[rows] = torch.where(local == PADDING, PADDING, rows[local.clamp(min=0)])
        scores_NW[rows] = part.neighbors.scores_NW
        positive_N[rows] = part.neighbors.positive_score_N
        label_N[rows] = part.communities.label_N + n_labels
        n_labels += len(part.communities)
        sources.append(rows[part.edges.source_E])
        targets.append(rows[part.edges.target_E])
        weights.append(part.edges.weight_E)
        ids_CK = part.clusters.ids_CK
        clusters.append(torch.where(ids_CK == PADDING, PADDING, rows[ids_CK.clamp(min=0)]))
    seconds = {stage: sum(part.seconds[stage] for part in parts) for stage in parts[0].seconds}
    return MinedPlan(
        neighbors=Neighbors(ids_NW, scores_NW, positive_N),
        edges=Edges(torch.cat(sources), torch.cat(targets), torch.cat(weights), n_rows),
        communities=Communities(label_N),
        clusters=Clusters(torch.cat(clusters)),
        task_N=task_N,
        task_names=task_names,
        settings=settings,
        seconds=seconds,
    )
