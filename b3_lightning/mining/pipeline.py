"""Embeddings in, a mined plan out: one call a stage, task by task (B3 mines each task on its own, section 4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3_lightning.mining.batches import BatchPlan, random_clusters
from b3_lightning.mining.clusters import cut_clusters
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges, window_arcs
from b3_lightning.mining.hardness import best_hardness, mean_hardness
from b3_lightning.mining.labels import rank_labels
from b3_lightning.mining.negatives import draw_negatives
from b3_lightning.mining.neighbors import Progress, find_neighbors, positive_scores
from b3_lightning.mining.plan import MinedPlan, join_tasks
from b3_lightning.mining.ranks import RankChoice, choose_ranks
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.mining.swaps import improve_by_swaps
from b3_lightning.mining.window import rank_window
from b3_lightning.types import Embeddings, Neighbors

log = logging.getLogger(__name__)

Values = Sequence[Any] | Tensor | np.ndarray[Any, Any] | None


def mine(
    query_ND: Any,
    target_ND: Any,
    *,
    settings: MiningSettings,
    target_keys: Values = None,
    query_keys: Values = None,
    groups: Values = None,
    tasks: Values = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> MinedPlan:
    """Mine clusters of rows that are hard negatives for one another.

    Args:
        query_ND: (N, D) numpy array or tensor, a teacher's vectors of the queries; normalised here.
        target_ND: (N, D), the same teacher's vectors of the targets; row i is the positive of query i.
        settings: rank window, filters, cluster size, algorithms.
        target_keys: N values; rows with equal values hold the same target and are never each other's neighbours.
        query_keys: N values; rows with equal values ask the same, so each one's target is right for the other too.
        groups: N values of your own with the same meaning; None marks a row that belongs to no group.
        tasks: N values; rows of different tasks never meet.
        batch_size: given, the plan says how hard its batches are, against random and the best possible.
        progress: told (stage, done, total).

    Raises:
        ValueError: on vectors that are not finite and non-zero, on disagreeing lengths, on fewer rows than
            ``cluster_size`` or than the rank window needs.
    """
    embeddings = Embeddings.from_arrays(query_ND, target_ND)
    n_rows = len(embeddings)
    settings.check_fits(n_rows)
    keys = [_codes("target_keys", range(n_rows) if target_keys is None else target_keys, n_rows)[0]]
    keys += [
        _codes(name, values, n_rows)[0]
        for name, values in (("query_keys", query_keys), ("groups", groups))
        if values is not None
    ]
    task_N, names = _codes("tasks", ["default"] * n_rows if tasks is None else tasks, n_rows)
    task_names = tuple(str(name) for name in names)
    settings.check_tasks(task_names)
    parts: list[tuple[Tensor, MinedPlan]] = []
    for task, name in enumerate(task_names):
        rows = (task_N == task).nonzero().flatten()
        part = _mine_task(name, embeddings.take(rows), [key_N[rows] for key_N in keys], settings, progress)
        parts.append((rows, part))
    mined = join_tasks(parts, task_N, task_names, settings)
    if batch_size is None:
        return mined
    return replace(mined, hardness=_hardness(mined, embeddings, keys[0], batch_size))


def _mine_task(
    name: str,
    embeddings: Embeddings,
    keys: Sequence[Tensor],
    settings_of_all: MiningSettings,
    progress: Progress | None,
) -> MinedPlan:
    """The stages on one task, rows numbered from 0."""
    settings = settings_of_all.of_task(name)
    seconds: dict[str, float] = {}
    with _timed("ranks", seconds, progress):
        choice = choose_ranks(embeddings, keys[0], settings)
        _log_choice(name, len(embeddings), choice)
    with _timed("neighbours", seconds, progress):
        neighbors = _rank(embeddings, keys, choice, settings, progress)
    with _timed("edges", seconds, progress):
        window = rank_window(neighbors, settings, first_rank=choice.first_rank, n_ranks=choice.n_ranks)
        edges = build_edges(neighbors, window, kind="either" if choice.labels else settings.edges)
    algorithm, size, seed = settings.communities, settings.cluster_size, settings.seed
    with _timed("communities", seconds, progress):
        communities = find_communities(
            edges, algorithm=algorithm, resolution=settings.resolution, cluster_size=size, seed=seed
        )
    with _timed("clusters", seconds, progress):
        arcs = partial(window_arcs, neighbors, window)
        clusters = cut_clusters(edges, communities, arcs, embeddings, algorithm=algorithm, cluster_size=size, seed=seed)
    with _timed("swaps", seconds, progress):
        clusters = improve_by_swaps(clusters, edges, max_rounds=settings.swap_rounds)
    with _timed("negatives", seconds, progress):
        negative_NH = draw_negatives(clusters, neighbors, window, keys, settings)
    return MinedPlan(
        neighbors=neighbors,
        window=window,
        edges=edges,
        communities=communities,
        clusters=clusters,
        negative_NH=negative_NH,
        task_N=torch.zeros(len(embeddings), dtype=torch.int64),
        task_names=(name,),
        settings=settings_of_all,
        ranks={name: choice},
        seconds=seconds,
    )


def _rank(
    embeddings: Embeddings,
    keys: Sequence[Tensor],
    choice: RankChoice,
    settings: MiningSettings,
    progress: Progress | None,
) -> Neighbors:
    search: dict[str, Any] = {"memory_budget_gib": settings.memory_budget_gib, "progress": progress}
    if choice.labels:
        return rank_labels(embeddings, keys[0], keys[1:], n_ranks=choice.n_ranks, seed=settings.seed, **search)
    query_ND, target_ND = embeddings.query_ND, embeddings.target_ND
    width = choice.first_rank + choice.n_ranks
    exclude = [(key_N, key_N) for key_N in keys]
    ids_NW, scores_NW = find_neighbors(query_ND, target_ND, n_neighbors=width, exclude=exclude, **search)
    return Neighbors(ids_NW, scores_NW, positive_scores(query_ND, target_ND))


def _log_choice(task: str, n_rows: int, choice: RankChoice) -> None:
    log.info("task %r: ranks %d to %d are hard: %s", task, choice.first_rank, choice.last_rank, choice.reason)
    if choice.suspicious:
        log.info("task %r: share of likely right targets by rank: %s", task, [round(x, 3) for x in choice.suspicious])
    if not choice.labels and n_rows <= choice.first_rank + 1:
        log.warning("task %r has %d rows, none beyond rank %d: no edges", task, n_rows, choice.first_rank)


def _hardness(mined: MinedPlan, embeddings: Embeddings, target_key_N: Tensor, batch_size: int) -> dict[str, float]:
    """The same number of batches of the first epoch, mined and random, and the bound."""
    seed = mined.settings.seed
    random = BatchPlan(
        random_clusters(mined.n_rows),
        batch_size=batch_size,
        seed=seed,
        task_N=mined.task_N,
        task_names=mined.task_names,
    )
    return {
        "mined": mean_hardness(embeddings, target_key_N, mined.batches(batch_size=batch_size, seed=seed).epoch(0)),
        "random": mean_hardness(embeddings, target_key_N, random.epoch(0)),
        "best": best_hardness(mined.neighbors, mined.window, batch_size),
        "batch_size": batch_size,
    }


@contextmanager
def _timed(stage: str, seconds: dict[str, float], progress: Progress | None) -> Iterator[None]:
    if progress is not None:
        progress(stage, 0, 1)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    if progress is not None:
        progress(stage, 1, 1)


def _codes(name: str, values: Any, n_rows: int) -> tuple[Tensor, list[Any]]:
    """Codes in order of first appearance, and the distinct values; every None is a value of its own."""
    listed = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if len(listed) != n_rows:
        raise ValueError(f"{name} has {len(listed)} values for {n_rows} rows")
    codes: dict[Any, int] = {}
    code_N = [codes.setdefault((row,) if value is None else value, len(codes)) for row, value in enumerate(listed)]
    return torch.tensor(code_N, dtype=torch.int64), list(codes)
