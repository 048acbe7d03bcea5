"""Embeddings in, a mined plan out: one call a stage, task by task (B3 mines each task on its own, section 4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3_lightning.mining.alike import Alike, within_tasks
from b3_lightning.mining.approximate import find_neighbors_approximately
from b3_lightning.mining.backends import Backend, choose_backend
from b3_lightning.mining.batches import BatchPlan, check_batch_size, random_clusters
from b3_lightning.mining.clusters import cut_clusters
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges, tie_lone_rows
from b3_lightning.mining.hardness import best_hardness, mean_hardness
from b3_lightning.mining.labels import rank_labels
from b3_lightning.mining.negatives import draw_negatives
from b3_lightning.mining.neighbors import Progress, find_neighbors, positive_scores
from b3_lightning.mining.parts import cut_into_parts
from b3_lightning.mining.plan import MinedPlan, join_tasks
from b3_lightning.mining.ranks import RankChoice, choose_ranks
from b3_lightning.mining.rerank import find_neighbors_with
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.mining.stages import Stage, Stages, fingerprint
from b3_lightning.mining.swaps import improve_by_swaps
from b3_lightning.mining.window import rank_window
from b3_lightning.types import Clusters, Communities, Edges, Embeddings, Neighbors, Window, name_rows, to_device

log = logging.getLogger(__name__)

_SHOWN_RANKS = (0, 1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200)

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
    stages: Stages | None = None,
    progress: Progress | None = None,
) -> MinedPlan:
    """Mine clusters of rows that are hard negatives for one another.

    Args:
        query_ND: (N, D) numpy array or tensor, a teacher's vectors of the queries; normalised here.
        target_ND: (N, D), the same teacher's vectors of the targets; row i is the positive of query i.
        settings: rank window, filters, cluster size, algorithms.
        target_keys: N values; rows with equal values hold the same target and are never each other's neighbours.
        query_keys: N values; rows with equal values ask the same, so each one's target is right for the other too.
        groups: N values of your own with the same meaning; None or NaN marks a row that belongs to no group.
        tasks: N values; rows of different tasks never meet.
        batch_size: given, the plan says how hard its batches are, against random and the best possible.
        stages: keeps finished tiles of neighbours, so that a killed run goes on, and shares them out over processes:
            the first calls ``mine``, the others ``help_mine`` with the same arguments.
        progress: told (stage, done, total).

    Raises:
        ValueError: on vectors that are not finite and non-zero, on disagreeing lengths, on fewer rows than
            ``cluster_size`` or than the rank window needs, on a ``batch_size`` that is no multiple of ``cluster_size``
            or more than a task has rows, on approximate neighbours below ``min_recall``.
    """
    rows = Rows.check(query_ND, target_ND, settings, target_keys, query_keys, groups, tasks)
    if batch_size is not None:  # told before hours are spent
        check_batch_size(batch_size, settings.cluster_size)
        single = random_clusters(len(rows.task_N))
        BatchPlan(single, batch_size=batch_size, seed=0, task_N=rows.task_N, task_names=rows.task_names)
    backend = choose_backend(settings)
    search = Search(replace(settings, backend=backend.name), backend, stages or Stages(), progress)
    parts = [(task.ids, _mine_task(task, search)) for task in rows.by_task()]
    mined = join_tasks(parts, rows.task_N, rows.task_names, search.settings)
    if batch_size is None:
        return mined
    return replace(mined, hardness=_hardness(mined, rows, batch_size))


def help_mine(
    query_ND: Any,
    target_ND: Any,
    *,
    settings: MiningSettings,
    stages: Stages,
    **values: Values,
) -> None:
    """Do this process's share of what another one mines; arguments (``values``: keys, groups, tasks) as of ``mine``."""
    rows = Rows.check(query_ND, target_ND, settings, **values)
    search = Search(settings, choose_backend(settings), stages, None)
    for task in rows.by_task():
        search.rank(task, choose_ranks(task.embeddings, task.alike, settings.of_task(task.name)))


@dataclass(frozen=True)
class Task:
    """The rows ``ids`` of one task, numbered from 0."""

    name: str
    ids: Tensor
    embeddings: Embeddings
    alike: Alike

    def window(self, neighbors: Neighbors, settings: MiningSettings, choice: RankChoice) -> Window:
        """The ranks chosen, of neighbours on any device."""
        key_N = self.alike.target_N.to(neighbors.ids_NW.device)
        ranks = {"first_rank": choice.first_rank, "n_ranks": choice.n_ranks}
        return rank_window(neighbors, settings, **ranks, target_key_N=key_N)


@dataclass(frozen=True)
class Rows:
    """All rows, checked."""

    embeddings: Embeddings
    alike: Alike
    task_N: Tensor
    task_names: tuple[str, ...]

    @classmethod
    def check(
        cls,
        query_ND: Any,
        target_ND: Any,
        settings: MiningSettings,
        target_keys: Values = None,
        query_keys: Values = None,
        groups: Values = None,
        tasks: Values = None,
    ) -> Rows:
        embeddings = Embeddings.from_arrays(query_ND, target_ND)
        n_rows = len(embeddings)
        task_N, task_names = _tasks(tasks, n_rows)
        keys = [_codes("target_keys", range(n_rows) if target_keys is None else target_keys, n_rows)[0]]
        for name, values in (("query_keys", query_keys), ("groups", groups)):
            if values is not None:
                keys.append(within_tasks(_codes(name, values, n_rows)[0], task_N))
        settings.check_tasks(task_names)
        settings.check_fits(
            {name: (len(own := keys[0][task_N == task]), len(own.unique())) for task, name in enumerate(task_names)}
        )
        return cls(embeddings, Alike(keys), task_N, task_names)

    def by_task(self) -> Iterator[Task]:
        for task, name in enumerate(self.task_names):
            ids = (self.task_N == task).nonzero().flatten()
            yield Task(name, ids, self.embeddings.take(ids), self.alike.take(ids))


@dataclass(frozen=True)
class Search:
    """How neighbours are ranked and where finished tiles are kept."""

    settings: MiningSettings
    backend: Backend
    stages: Stages
    progress: Progress | None

    def rank(self, task: Task, choice: RankChoice) -> Neighbors:
        settings, embeddings = self.settings, task.embeddings
        device = self.backend.device
        search: dict[str, Any] = {
            "memory_budget_gib": self.backend.budget_gib(settings),
            "stage": self._stage(task, choice),
            "progress": self.progress,
        }
        if choice.labels:
            return rank_labels(
                embeddings,
                task.alike,
                n_ranks=choice.n_ranks,
                seed=settings.seed,
                device=device,
                **search,
            )
        query_ND, target_ND = embeddings.query_ND, embeddings.target_ND
        search |= {
            "n_neighbors": choice.first_rank + choice.n_ranks,
            "exclude": task.alike.exclusions(),
        }
        if settings.neighbors == "exact":
            ids_NW, scores_NW = find_neighbors(query_ND, target_ND, device=device, **search)
        else:
            search |= {"min_recall": settings.min_recall, "seed": settings.seed}
            if settings.neighbors == "approximate":  # on the CPU alone
                found = find_neighbors_approximately(query_ND, target_ND, **search)
            else:
                found = find_neighbors_with(settings.neighbors, query_ND, target_ND, device=device, **search)
            log.info("task %r: recall of the neighbours %.4f", task.name, found.recall)
            ids_NW, scores_NW = found.ids_NW, found.scores_NW
        return Neighbors(ids_NW, scores_NW, positive_scores(query_ND, target_ND))

    def _stage(self, task: Task, choice: RankChoice) -> Stage:
        if self.stages.folder is None:
            return self.stages.stage("neighbours", "")
        content = fingerprint(
            query=task.embeddings.query_ND,
            target=task.embeddings.target_ND,
            keys=torch.stack(list(task.alike.keys)),
            choice=["labels" if choice.labels else "rows", choice.first_rank + choice.n_ranks],
            **({"without": "known targets"} if task.alike.known else {}),
            how=[self.settings.neighbors, self.settings.min_recall, self.settings.seed],
        )
        return self.stages.stage("neighbours", content)


def _mine_task(task: Task, search: Search) -> MinedPlan:
    """The stages on one task, rows numbered from 0."""
    settings, backend = search.settings.of_task(task.name), search.backend
    embeddings, n_rows = task.embeddings, len(task.embeddings)
    seconds: dict[str, float] = {}
    timed = partial(_timed, seconds=seconds, progress=search.progress)
    with timed("ranks"):
        choice = choose_ranks(embeddings, task.alike, settings)
        _log_choice(task.name, n_rows, choice)
    backend.check_memory(n_rows, embeddings.query_ND.shape[1], choice.last_rank + 1)
    with timed("neighbours"):
        neighbors = to_device(search.rank(task, choice), backend.device)
    with timed("edges"):
        window = task.window(neighbors, settings, choice)
        edges = build_edges(neighbors, window, kind="either" if choice.labels else settings.edges)
    with timed("communities"):
        communities = find_communities(edges, settings, backend)
    with timed("clusters"):
        clusters, tied = cut_graph(edges, communities, neighbors, window, settings, backend)
    with timed("swaps"):
        clusters = improve_by_swaps(clusters, tied, max_rounds=settings.swap_rounds)
    with timed("negatives"):
        negative_NH = draw_negatives(clusters, neighbors, window, task.alike.to(backend.device), settings)
    host = partial(to_device, device=torch.device("cpu"))
    return MinedPlan(
        neighbors=host(neighbors),
        window=host(window),
        edges=host(edges),
        communities=host(communities),
        clusters=host(clusters),
        negative_NH=negative_NH.cpu(),
        task_N=torch.zeros(n_rows, dtype=torch.int64),
        task_names=(task.name,),
        settings=search.settings,
        ranks={task.name: choice},
        seconds=seconds,
    )


def cut_graph(
    edges: Edges,
    communities: Communities,
    neighbors: Neighbors,
    window: Window,
    settings: MiningSettings,
    backend: Backend,
) -> tuple[Clusters, Edges]:
    """Clusters of exactly K; and the edges with the ties of rows that have none, which swaps go by."""
    part_N = cut_into_parts(edges, communities, settings, backend)
    tied = tie_lone_rows(edges, neighbors, window, n_entries=2 * settings.cluster_size)
    return cut_clusters(tied, part_N, cluster_size=settings.cluster_size, seed=settings.seed), tied


def _log_choice(task: str, n_rows: int, choice: RankChoice) -> None:
    log.info("task %r: ranks %d to %d are hard: %s", task, choice.first_rank, choice.last_rank, choice.reason)
    if choice.suspicious:
        shown = {rank: round(choice.suspicious[rank], 3) for rank in _SHOWN_RANKS if rank < len(choice.suspicious)}
        log.info("task %r: share of likely right targets by rank: %s", task, shown)
    if not choice.labels and n_rows <= choice.first_rank + 1:
        log.warning("task %r has %d rows, none beyond rank %d: no edges", task, n_rows, choice.first_rank)


def _hardness(mined: MinedPlan, rows: Rows, batch_size: int) -> dict[str, float]:
    """Of batches of the first epoch: mined, without what the plan masks; random, with and without it; and the bound."""
    seed = mined.settings.seed
    hardness_of = partial(mean_hardness, rows.embeddings, rows.alike)
    random = replace(mined, clusters=random_clusters(mined.n_rows))
    random_MB = random.batches(batch_size=batch_size, seed=seed).epoch(0)
    of_labels = torch.tensor([mined.ranks[name].labels for name in mined.task_names])
    return {
        "mined": hardness_of(mined.batches(batch_size=batch_size, seed=seed).epoch(0), mined.masked_ids),
        "random": hardness_of(random_MB),
        "random_masked": hardness_of(random_MB, mined.masked_ids),
        "best": best_hardness(mined.neighbors, mined.window, batch_size, of_labels[mined.task_N]),
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


def _tasks(tasks: Values, n_rows: int) -> tuple[Tensor, tuple[str, ...]]:
    """The task of every row, and the tasks' names in order of first appearance."""
    if tasks is None:
        return torch.zeros(n_rows, dtype=torch.int64), ("default",)
    listed = _listed("tasks", tasks, n_rows)
    missing = [row for row, value in enumerate(listed) if _is_missing(value)]
    if missing:
        raise ValueError(f"tasks names none for {name_rows(missing)}; every row needs one")
    task_N, names = _codes("tasks", [str(value) for value in listed], n_rows)
    return task_N, tuple(names)


def _listed(name: str, values: Any, n_rows: int) -> list[Any]:
    listed = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if len(listed) != n_rows:
        raise ValueError(f"{name} has {len(listed)} values for {n_rows} rows")
    return listed


def _codes(name: str, values: Any, n_rows: int) -> tuple[Tensor, list[Any]]:
    """Codes in order of first appearance, and the distinct values; every None or NaN is a value of its own."""
    listed = _listed(name, values, n_rows)
    codes: dict[Any, int] = {}
    code_N = [codes.setdefault((row,) if _is_missing(value) else value, len(codes)) for row, value in enumerate(listed)]
    return torch.tensor(code_N, dtype=torch.int64), list(codes)


def _is_missing(value: Any) -> bool:
    """None, and what pandas and numpy put in its place; NaN alone would do for two NaN to be the same or not."""
    return value is None or (not isinstance(value, str) and str(value) in ("nan", "NaT", "<NA>"))
