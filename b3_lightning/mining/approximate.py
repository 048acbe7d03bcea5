"""Neighbours of very many rows from a part of the targets: inverted lists, with the recall measured, never assumed.

Targets are dealt to the nearest of some 4 sqrt(M) centers, a query scans the lists of its nearest centers (faiss, in
float16), and what it finds gets the same exact scores as in neighbors.py. faiss scans one query at a time, the exact
search computes products of whole tiles, about ``SCAN_COST`` times as many targets a second; so the lists pay only
where few of them must be scanned.

Shapes: N = queries, M = targets, Q = queries of a tile, D = dimensions, W = neighbours kept, L = lists, V = candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from b3_lightning.mining.alike import KnownTargets
from b3_lightning.mining.cpu import InvertedLists
from b3_lightning.mining.exact import to_grid
from b3_lightning.mining.neighbors import Progress, TargetIndex, search_in_tiles, tiles
from b3_lightning.mining.rerank import SPARE, FoundNeighbors, Reranker
from b3_lightning.mining.stages import Stage

log = logging.getLogger(__name__)

SCAN_COST = 8
"""How many targets the exact search takes in the time in which faiss scans one: 4 to 6 at 100,000 rows on a CPU with
AVX512-BF16, more where products are faster, and what is found has to be ranked besides."""
_ROUNDS = 8
_SHORT_FRAC = 0.02
"""Where more rows than this find too few targets and are searched exactly, scanning more lists is faster."""
_SAMPLE_PER_LIST = 32


def find_neighbors_approximately(
    query_ND: Tensor,
    target_MD: Tensor,
    *,
    n_neighbors: int,
    exclude: Sequence[tuple[Tensor | KnownTargets, Tensor]] = (),
    min_recall: float = 0.95,
    n_lists: int | None = None,
    n_sampled: int = 1000,
    seed: int = 0,
    memory_budget_gib: float = 1.0,
    stage: Stage | None = None,
    progress: Progress | None = None,
) -> FoundNeighbors:
    """Find most of the nearest targets of every query by scanning as few lists as reach ``min_recall``.

    Rows for which the lists hold too few eligible targets are searched exactly. The answer depends on ``seed`` and
    not on the number of threads. The lists themselves (2 bytes a component) are not part of the memory budget.

    Args:
        n_lists: by default 4 sqrt(M).
        n_sampled: rows that are searched exactly as well, to measure recall.
        stage: keeps finished tiles and shares them out over processes.

    Raises:
        ValueError: where recall stays below ``min_recall`` at the number of lists beyond which exact search is faster;
            and as ``find_neighbors`` does.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = TargetIndex(
        target_MD,
        n_neighbors=n_neighbors,
        target_keys=[target_key_M for _, target_key_M in exclude],
        memory_budget_gib=memory_budget_gib,
    )
    n_lists = min(n_lists or round(4 * math.sqrt(len(target_MD))), len(target_MD))
    search = _ListSearch(exact, exclude, n_lists, memory_budget_gib, generator)
    sample = torch.randperm(len(query_ND), generator=generator)[:n_sampled].sort().values
    n_probes, recall = _enough_probes(search, query_ND, sample, min_recall)

    def search_tile(tile: slice) -> tuple[Tensor, Tensor]:
        return search.search(query_ND[tile], torch.arange(tile.start, tile.stop), n_probes)[:2]

    ids_NW, scores_NW = search_in_tiles(search_tile, query_ND, n_neighbors, stage, progress)
    return FoundNeighbors(ids_NW, scores_NW, recall, n_probes)


def _enough_probes(search: _ListSearch, query_ND: Tensor, sample: Tensor, min_recall: float) -> tuple[int, float]:
    """Double the number of lists until recall on the sample suffices."""
    query_SD = query_ND[sample]
    expected_SW = search.reranker.exact_scores(query_SD, sample)
    most = max(1, search.n_lists // SCAN_COST)
    n_probes = min(most, search.fewest_probes())
    while True:
        _, found_SW, n_short = search.search(query_SD, sample, n_probes)
        recall = search.reranker.recall(found_SW, expected_SW)
        log.info(
            "%d of %d lists a row: recall %.4f of %d sampled rows, %d of them searched exactly",
            n_probes, search.n_lists, recall, len(sample), n_short,
        )  # fmt: skip
        if recall >= min_recall and (n_short <= _SHORT_FRAC * len(sample) or n_probes == most):
            return n_probes, recall
        if n_probes == most:
            raise ValueError(
                f"approximate neighbours reached a recall of {recall:.3f} with {n_probes} of {search.n_lists} lists a "
                f"row, min_recall={min_recall} was asked for, and more lists take longer than exact search: "
                "lower min_recall, or search exactly"
            )
        n_probes = min(2 * n_probes, most)


class _ListSearch:
    """Targets in lists about spherical k-means centers."""

    def __init__(
        self,
        exact: TargetIndex,
        exclude: Sequence[tuple[Tensor | KnownTargets, Tensor]],
        n_lists: int,
        memory_budget_gib: float,
        generator: torch.Generator,
    ) -> None:
        self.exact, self.n_lists = exact, n_lists
        self.reranker = Reranker(exact, exclude, memory_budget_gib)
        self._budget_gib = memory_budget_gib
        self._center_LD = _train_centers(exact.target_MD, n_lists, memory_budget_gib, generator)
        list_M = torch.empty(len(exact.target_MD), dtype=torch.int64)
        nearest = TargetIndex(self._center_LD, n_neighbors=1, memory_budget_gib=memory_budget_gib)
        for tile in tiles(len(list_M)):
            list_M[tile] = nearest.search(exact.target_MD[tile])[0][:, 0]
        self._lists = InvertedLists(self._center_LD, exact.target_MD, list_M, piece_rows=4096)
        self._nearest: dict[int, TargetIndex] = {}

    def fewest_probes(self) -> int:
        """Lists that on average hold twice the candidates of a row."""
        return math.ceil(2 * (self.exact.n_neighbors + SPARE) * self.n_lists / len(self.exact.target_MD))

    def search(self, query_QD: Tensor, rows: Tensor, n_probes: int) -> tuple[Tensor, Tensor, int]:
        """(Q, W) ids and scores, and how many rows were searched exactly; ``rows`` are the numbers of the queries."""
        if n_probes not in self._nearest:
            self._nearest[n_probes] = TargetIndex(
                self._center_LD, n_neighbors=n_probes, memory_budget_gib=self._budget_gib
            )
        list_QL, _ = self._nearest[n_probes].search(query_QD)
        ids_QV = self._lists.scan(query_QD, list_QL, self.exact.n_neighbors + SPARE)
        return self.reranker.rank(query_QD, rows, ids_QV)


def _train_centers(target_MD: Tensor, n_lists: int, memory_budget_gib: float, generator: torch.Generator) -> Tensor:
    """(L, D) unit centers by spherical k-means on a sample.

    Sums of multiples of 2^-26 are exact in float64, so centers come out the same in any order of addition.
    """
    order_M = torch.randperm(len(target_MD), generator=generator)
    sample_SD = target_MD[order_M[: n_lists * _SAMPLE_PER_LIST].sort().values].float()
    center_LD = target_MD[order_M[:n_lists]].float()
    for _ in range(_ROUNDS):
        nearest = TargetIndex(center_LD, n_neighbors=1, memory_budget_gib=memory_budget_gib)
        sum_LD = torch.zeros(n_lists, target_MD.shape[1], dtype=torch.float64)
        for tile in tiles(len(sample_SD)):
            list_Q = nearest.search(sample_SD[tile])[0][:, 0]
            sum_LD.index_add_(0, list_Q, to_grid(sample_SD[tile]))
        norm_L1 = sum_LD.square().sum(dim=1, keepdim=True).sqrt()
        # rounded, so that the last bits of the norm, which depend on the order of its sum, do not matter
        center_LD = torch.where(norm_L1 > 1e-6, to_grid(sum_LD / norm_L1.clamp(min=1e-6)).float(), center_LD)
    return center_LD
