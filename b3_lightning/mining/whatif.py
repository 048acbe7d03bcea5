"""What mining will buy, before anything is trained: how hard random and mined batches are for the teacher.

Neighbours are ranked once for all windows and cluster sizes. Hardness is the teacher's mean InfoNCE loss, as in a
plan's report, on a sample of rows; ``clean`` leaves out the negatives that are suspected to be right, since those make
a batch hard for the wrong reason. What the plan masks is left out of mined batches, as in training. A mined batch is a
part of all rows, so the random batch that is as hard is never larger than all of them.

Shapes: N = rows, A = sampled rows of a batch, B = rows of a batch, M = batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from b3_lightning.mining.backends import choose_backend
from b3_lightning.mining.batches import BatchPlan, random_clusters
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges
from b3_lightning.mining.groups import permutation
from b3_lightning.mining.hardness import TEMPERATURE
from b3_lightning.mining.neighbors import Progress, positive_scores
from b3_lightning.mining.pipeline import Rows, Search, Task, Values, cut_graph
from b3_lightning.mining.ranks import RankChoice, choose_ranks, near_distance
from b3_lightning.mining.settings import MiningSettings, Ranked
from b3_lightning.mining.stages import Stages
from b3_lightning.mining.swaps import improve_by_swaps
from b3_lightning.types import PADDING, Clusters, Neighbors, Window, to_device

_N_ANCHORS = 2048
"""Rows looked at for a figure; the standard error of their mean loss is 1 to 3%."""
_MOST_BATCHES = 64


@dataclass(frozen=True)
class Questions:
    """What is asked of the vectors.

    Args:
        batch_sizes: of random and mined batches; those that are no multiple of a cluster size are left out for it.
        cluster_sizes: K.
        first_ranks: where windows begin, beside the one set and the one that ``auto`` estimates.
        max_rows: of a task that are looked at; more are sampled.
    """

    batch_sizes: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    cluster_sizes: Sequence[int] = (4, 8, 16, 32)
    first_ranks: Sequence[int] = (0, 5, 30)
    max_rows: int = 30_000

    def __post_init__(self) -> None:
        for name, least in (("batch_sizes", 2), ("cluster_sizes", 2), ("first_ranks", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name}={list(values)}: needed are whole numbers of at least {least}")
        if self.max_rows < 2:
            raise ValueError(f"max_rows={self.max_rows} must be at least 2")

    def of(self, batch_size: int) -> Questions:
        """These, and the batch size that is set."""
        return replace(self, batch_sizes=tuple(sorted({*self.batch_sizes, batch_size})))


@dataclass(frozen=True, slots=True)
class Figure:
    """One kind of batch; random ones have no window and no clusters (-1). ``as_random``: the random |B| as hard."""

    batch_size: int
    hardness: float
    clean: float
    suspected: float
    first_rank: int = -1
    n_ranks: int = -1
    cluster_size: int = -1
    kept_frac: float = 0.0
    as_random: float = 0.0

    @property
    def setting(self) -> tuple[int, int, int]:
        return self.first_rank, self.n_ranks, self.cluster_size


@dataclass(frozen=True)
class TaskAnswer:
    """What was found for a task.

    ``beaten``: the share of queries for which another target leads; ``filters``: by score, which all windows have.
    """

    name: str
    n_rows: int
    n_sampled: int
    labels: bool
    beaten: float
    auto_first_rank: int
    suspicious: Sequence[float]
    filters: Mapping[str, float] = field(default_factory=dict)
    random: list[Figure] = field(default_factory=list)
    mined: list[Figure] = field(default_factory=list)

    @property
    def reliable(self) -> bool:
        """Does a score above the positive's count as a suspicion?"""
        return self.beaten < 0.5

    @property
    def sampled_frac(self) -> float:
        return self.n_sampled / self.n_rows

    def best(self, batch_size: int, max_suspected: float, max_cluster_frac: float) -> Figure | None:
        """The hardest mined batch, clean, of those in which few enough rows have a suspected false negative.

        As many as in random batches are few enough. Where there is none of these, the one with the fewest suspicions;
        None where no setting has this batch size.

        Args:
            max_cluster_frac: clusters that are a larger part of the batch are left out, unless all are.
        """
        there = [figure for figure in self.mined if figure.batch_size == batch_size]
        largest = max(max_cluster_frac * batch_size, min((figure.cluster_size for figure in there), default=0))
        there = [figure for figure in there if figure.cluster_size <= largest]
        chance = max((random.suspected for random in self.random if random.batch_size == batch_size), default=0.0)
        trusted = [figure for figure in there if figure.suspected <= max(max_suspected, chance)]
        if trusted:
            return max(trusted, key=lambda figure: figure.clean)
        return min(there, key=lambda figure: figure.suspected, default=None)


def what_if(
    query_ND: Any,
    target_ND: Any,
    *,
    settings: MiningSettings,
    questions: Questions,
    stages: Stages | None = None,
    progress: Progress | None = None,
    **values: Values,
) -> list[TaskAnswer]:
    """Simulate batches of every size, cluster size and window, task by task.

    Args:
        query_ND: (N, D) vectors of the queries, ``target_ND`` of the targets, as for ``mine``.
        settings: all that is not asked about: ``n_ranks``, filters, algorithms, seed.
        stages: keep the neighbours.
        values: ``target_keys``, ``query_keys``, ``groups``, ``tasks``, as for ``mine``.

    Raises:
        ValueError: as ``mine``.
    """
    rows = Rows.check(query_ND, target_ND, settings, **values)
    search = Search(settings, choose_backend(settings), stages or Stages(), progress)
    return [_answer(task, search, questions) for task in rows.by_task()]


def _answer(task: Task, search: Search, questions: Questions) -> TaskAnswer:
    settings = search.settings.of_task(task.name)
    sample = _sampled(task, questions.max_rows, settings.seed)
    # whether few targets serve many rows is seen on all rows, not on a sample
    ranked: Ranked = "labels" if settings.ranks_labels(len(task.ids), len(task.alike.target_N.unique())) else "rows"
    estimate = choose_ranks(sample.embeddings, sample.alike, replace(settings, first_rank="auto", ranked=ranked))
    windows = _windows(estimate, len(sample.ids), settings, questions)
    widest = max(window.first_rank + window.n_ranks for window in windows)
    neighbors = search.rank(sample, estimate if estimate.labels else replace(windows[0], first_rank=0, n_ranks=widest))
    beaten_N = neighbors.scores_NW[:, 0] > neighbors.positive_score_N
    answer = TaskAnswer(
        task.name,
        len(task.ids),
        len(sample.ids),
        estimate.labels,
        float(beaten_N.double().mean()),
        estimate.first_rank,
        estimate.suspicious,
        settings.score_filters,
    )
    judge = _Judge(sample, reliable=answer.reliable, seed=settings.seed)
    answer.random.extend(_random_figures(judge, questions))
    n_all = len(windows) * len(questions.cluster_sizes)
    for done, (choice, window, clusters, kept) in enumerate(_cuts(sample, neighbors, windows, search, questions)):
        for batch_size in questions.batch_sizes:
            if batch_size % clusters.cluster_size == 0 and batch_size <= len(sample.ids):
                ids_MB = BatchPlan(clusters, batch_size=batch_size, seed=settings.seed).epoch(0)
                figure = replace(
                    judge.look(ids_MB, neighbors.ids_NW.masked_fill(~window.masked_NW, PADDING)),
                    first_rank=choice.first_rank,
                    n_ranks=choice.n_ranks,
                    cluster_size=clusters.cluster_size,
                    kept_frac=kept,
                )
                answer.mined.append(replace(figure, as_random=equal_random(answer.random, figure.clean)))
        if search.progress is not None:
            search.progress("what if", done + 1, n_all)
    return answer


def _sampled(task: Task, max_rows: int, seed: int) -> Task:
    if len(task.ids) <= max_rows:
        return task
    rows = permutation(len(task.ids), seed, task.ids.device)[:max_rows].sort().values
    return Task(task.name, task.ids[rows], task.embeddings.take(rows), task.alike.take(rows))


def _windows(estimate: RankChoice, n_rows: int, settings: MiningSettings, questions: Questions) -> list[RankChoice]:
    """The windows asked about that so many rows can fill, the earliest first; a labels task has its own alone.

    Where they fill none, as in a small task of a mixture, the earliest with what ranks there are, as ``mine`` has it.
    """
    if estimate.labels:
        return [estimate]
    own = estimate.first_rank if isinstance(settings.first_rank, str) else settings.first_rank
    first_ranks = sorted({*questions.first_ranks, own, estimate.first_rank})
    fitting = [first for first in first_ranks if first + estimate.n_ranks < n_rows]
    if not fitting:
        first = min(first_ranks[0], max(0, n_rows - 2))
        return [replace(estimate, first_rank=first, n_ranks=max(1, n_rows - 1 - first))]
    return [replace(estimate, first_rank=first) for first in fitting]


def _cuts(
    task: Task, neighbors: Neighbors, windows: Sequence[RankChoice], search: Search, questions: Questions
) -> Iterator[tuple[RankChoice, Window, Clusters, float]]:
    """Clusters of every window and size, and the share of edges that they keep."""
    settings, backend = search.settings.of_task(task.name), search.backend
    here, host = to_device(neighbors, backend.device), partial(to_device, device=torch.device("cpu"))
    for choice in windows:
        window = task.window(here, settings, choice)
        edges = build_edges(here, window, kind="either" if choice.labels else settings.edges)
        communities = None
        for size in (size for size in questions.cluster_sizes if size <= len(task.ids)):
            sized = replace(settings, cluster_size=size)
            if communities is None or settings.communities == "metis":  # whose communities are clusters of about K
                communities = find_communities(edges, sized, backend)
            cut, tied = cut_graph(edges, communities, here, window, sized, backend)
            clusters = improve_by_swaps(cut, tied, max_rounds=settings.swap_rounds)
            kept = len(edges.within(clusters.cluster_of_row())) / max(1, len(edges))
            yield choice, host(window), host(clusters), kept


def _random_figures(judge: _Judge, questions: Questions) -> list[Figure]:
    """Random batches of the sizes asked about, of powers of two up to all rows, and all rows at once."""
    n_rows = judge.n_rows
    powers = [2**power for power in range(4, int(math.log2(n_rows)) + 1)]
    sizes = sorted({size for size in (*questions.batch_sizes, *powers, n_rows) if size <= n_rows})
    figures = []
    for size in sizes:
        ids_MB = BatchPlan(random_clusters(n_rows), batch_size=size, seed=judge.seed).epoch(0)
        figures.append(replace(judge.look(ids_MB), as_random=size))
    return figures


def equal_random(random: Sequence[Figure], clean: float) -> float:
    """The size of the random batch that is as hard: between the sizes measured, straight over log |B|."""
    if clean <= random[0].clean:
        return float(random[0].batch_size)
    for below, above in pairwise(random):
        if clean <= above.clean:
            share = (clean - below.clean) / (above.clean - below.clean)
            return float(below.batch_size * (above.batch_size / below.batch_size) ** share)
    return float(random[-1].batch_size)


class _Judge:
    """Measures batches of one task."""

    def __init__(self, task: Task, *, reliable: bool, seed: int) -> None:
        query_ND, target_ND = task.embeddings.query_ND, task.embeddings.target_ND
        self._query_ND, self._target_ND, self._alike = query_ND, target_ND, task.alike
        self.n_rows, self.reliable, self.seed = len(task.ids), reliable, seed
        order = permutation(self.n_rows, seed, query_ND.device)
        sample, other = order[:_N_ANCHORS], order.roll(1)[:_N_ANCHORS]
        self._positive_N = positive_scores(query_ND, target_ND)
        self._near = [(vector_ND, near_distance(vector_ND, sample, other)) for vector_ND in (query_ND, target_ND)]

    def look(self, ids_MB: Tensor, masked_NW: Tensor | None = None) -> Figure:
        """Hardness with and without suspects, and the share of rows with a suspect in their batch.

        Args:
            masked_NW: the rows that each row leaves out, padded with -1.
        """
        n_batches, batch_size = ids_MB.shape
        most = min(n_batches, _MOST_BATCHES)
        n_anchors = min(batch_size, math.ceil(_N_ANCHORS / most))
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        for batch in torch.linspace(0, n_batches - 1, most).long().tolist():
            place_A = torch.randperm(batch_size, generator=generator)[:n_anchors]
            parts.append(self._losses(ids_MB[batch], place_A, masked_NW))
        hardness, clean, suspected = torch.cat(parts, dim=1).mean(dim=1).tolist()
        return Figure(batch_size, hardness, clean, suspected)

    def _losses(self, ids_B: Tensor, place_A: Tensor, masked_NW: Tensor | None) -> Tensor:
        """(3, A) float64: the loss, the loss without suspects, and whether there are any."""
        ids_A = ids_B[place_A]
        score_AB = self._query_ND[ids_A] @ self._target_ND[ids_B].T
        positive_A = self._positive_N[ids_A]
        same_AB = self._alike.left_out(ids_A, ids_B, None if masked_NW is None else masked_NW[ids_A])
        suspect_AB = score_AB > positive_A[:, None] if self.reliable else torch.zeros_like(same_AB)
        for vector_ND, near in self._near:
            suspect_AB |= 1 - vector_ND[ids_A] @ vector_ND[ids_B].T < near
        suspect_AB &= ~same_AB
        losses = []
        for left_out_AB in (same_AB, same_AB | suspect_AB):
            negative_AB = score_AB.masked_fill(left_out_AB, -torch.inf)
            all_AB = torch.cat([positive_A[:, None], negative_AB], dim=1) / TEMPERATURE
            losses.append((all_AB.logsumexp(dim=1) - positive_A / TEMPERATURE).double())
        return torch.stack([*losses, suspect_AB.any(dim=1).double()])
