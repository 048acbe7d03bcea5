"""Candidates that some library found, ranked by exact scores; how many of the true neighbours they hold is measured.

Shapes: N = queries, M = targets, Q = queries of a tile, D = dimensions, W = neighbours kept, S = sampled queries,
V = candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from b3_lightning.mining import cpu, gpu
from b3_lightning.mining.alike import KnownTargets
from b3_lightning.mining.exact import missing_keys, order_keys, read_keys, score_candidates, to_grid
from b3_lightning.mining.groups import permutation
from b3_lightning.mining.neighbors import Progress, TargetIndex, search_in_tiles
from b3_lightning.mining.stages import Stage

SPARE = 32
"""Candidates beyond W, of which exclusions may take some."""


@dataclass(frozen=True, slots=True)
class FoundNeighbors:
    """``ids_NW`` and ``scores_NW`` as of ``find_neighbors``.

    ``recall`` is the share of the exact neighbours of sampled rows that were found, with ``n_probes`` lists a row.
    """

    ids_NW: Tensor
    scores_NW: Tensor
    recall: float
    n_probes: int = 1


class CandidateSource(Protocol):
    """Finds targets that may be the nearest."""

    def scan(self, query_QD: Tensor, n_best: int) -> Tensor:
        """(Q, n_best) ids; -1 where there are fewer."""


class Reranker:
    """Ranks candidates exactly; rows of which too few are eligible are searched exactly.

    Args:
        exact: the exact search, on the device where all is computed.
        exclude: as of ``find_neighbors``.
    """

    def __init__(
        self, exact: TargetIndex, exclude: Sequence[tuple[Tensor | KnownTargets, Tensor]], memory_budget_gib: float
    ) -> None:
        self.exact, self._budget_gib = exact, memory_budget_gib
        device = exact.device
        self._keys = [(query_key_N.to(device), target_key_M.to(device)) for query_key_N, target_key_M in exclude]

    def exact_scores(self, query_QD: Tensor, rows: Tensor) -> Tensor:
        """(Q, W) scores of the true neighbours."""
        return self.exact.search(query_QD, self._keys_of(rows))[1]

    def rank(self, query_QD: Tensor, rows: Tensor, ids_QV: Tensor) -> tuple[Tensor, Tensor, int]:
        """(Q, W) ids and scores, and how many rows were searched exactly; ``rows`` are the numbers of the queries."""
        eligible_QV = ids_QV >= 0
        for query_key_N, target_key_M in self._keys:
            key_QV = target_key_M[ids_QV.clamp(min=0)]
            for query_key_Q in query_key_N[rows].view(len(rows), -1).unbind(1):
                eligible_QV &= key_QV != query_key_Q[:, None]
        ids_QW, scores_QW = read_keys(self._best(query_QD, ids_QV, eligible_QV))
        short = (eligible_QV.sum(dim=1) < self.exact.n_neighbors).nonzero().flatten()
        if len(short):
            ids_QW[short], scores_QW[short] = self.exact.search(query_QD[short], self._keys_of(rows[short]))
        return ids_QW, scores_QW, len(short)

    def recall(self, found_SW: Tensor, expected_SW: Tensor) -> float:
        """The share of the true neighbours that were found, told by their scores; 1 where there are none.

        Of targets that tie for the last place any will do.
        """
        is_there_SW = expected_SW > -torch.inf
        last_S1 = expected_SW.masked_fill(~is_there_SW, torch.inf).amin(dim=1, keepdim=True)
        n_expected = int(is_there_SW.sum())
        return int((found_SW >= last_S1).sum()) / n_expected if n_expected else 1.0

    def _keys_of(self, rows: Tensor) -> list[Tensor]:
        return [query_key_N[rows] for query_key_N, _ in self._keys]

    def _best(self, query_QD: Tensor, ids_QV: Tensor, eligible_QV: Tensor) -> Tensor:
        """(Q, W) order keys of the eligible candidates by exact score."""
        order_QV = eligible_QV.byte().argsort(dim=1, descending=True, stable=True)
        ids_QV = ids_QV.gather(1, order_QV).clamp(min=0)
        exact_QV = score_candidates(
            to_grid(query_QD),
            self.exact.target_MD,
            ids_QV,
            eligible_QV.sum(dim=1),
            on_grid=False,
            chunk_bytes=int(self._budget_gib * 2**27),
        )
        key_QV = order_keys(exact_QV, ids_QV)
        missing_QW = missing_keys(len(key_QV), self.exact.n_neighbors, key_QV.device)
        return torch.cat([key_QV, missing_QW], dim=1).topk(self.exact.n_neighbors, dim=1).values


def find_neighbors_with(
    library: Literal["faiss", "cuvs"],
    query_ND: Tensor,
    target_MD: Tensor,
    *,
    n_neighbors: int,
    exclude: Sequence[tuple[Tensor | KnownTargets, Tensor]] = (),
    min_recall: float = 0.95,
    n_sampled: int = 1000,
    seed: int = 0,
    memory_budget_gib: float = 1.0,
    device: torch.device | None = None,
    stage: Stage | None = None,
    progress: Progress | None = None,
) -> FoundNeighbors:
    """Let a library's brute force find some more than ``n_neighbors`` candidates, and rank these exactly.

    Its float32 scores may order near ties otherwise, and cuVS's can be off by more than that: hence ``recall``.

    Raises:
        ValueError: where recall stays below ``min_recall``; and as ``find_neighbors`` does.
    """
    exact = TargetIndex(
        target_MD,
        n_neighbors=n_neighbors,
        target_keys=[target_key_M for _, target_key_M in exclude],
        memory_budget_gib=memory_budget_gib,
        device=device,
    )
    device = exact.device
    source = _source(library, exact.target_MD)
    reranker = Reranker(exact, exclude, memory_budget_gib)
    n_best = min(n_neighbors + SPARE, len(target_MD))

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        query_QD = query_ND[rows].to(device)
        ids_QW, scores_QW, _ = reranker.rank(query_QD, rows.to(device), source.scan(query_QD, n_best))
        return ids_QW.to(query_ND.device), scores_QW.to(query_ND.device)

    sample = permutation(len(query_ND), seed, torch.device("cpu"))[:n_sampled].sort().values
    expected_SW = reranker.exact_scores(query_ND[sample].to(device), sample.to(device)).to(query_ND.device)
    recall = reranker.recall(search(sample)[1], expected_SW)
    _check_recall(library, recall, min_recall, len(sample))

    def search_tile(tile: slice) -> tuple[Tensor, Tensor]:
        return search(torch.arange(tile.start, tile.stop))

    ids_NW, scores_NW = search_in_tiles(search_tile, query_ND, n_neighbors, stage, progress)
    return FoundNeighbors(ids_NW, scores_NW, recall)


def _check_recall(library: str, recall: float, min_recall: float, n_sampled: int) -> None:
    if recall < min_recall:
        raise ValueError(
            f"neighbors={library!r} found {recall:.3f} of the neighbours of {n_sampled} sampled rows, "
            f"min_recall={min_recall} was asked for: set neighbors to exact"
        )


def _source(library: Literal["faiss", "cuvs"], target_MD: Tensor) -> CandidateSource:
    if library == "cuvs":
        return gpu.CuvsTargets(target_MD)
    return gpu.FaissTargets(target_MD) if target_MD.is_cuda else cpu.FlatTargets(target_MD)
