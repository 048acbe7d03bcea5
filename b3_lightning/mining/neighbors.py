"""Embeddings in, exact nearest other targets of every query out.

A tile of queries meets all targets in one matrix product, so memory is one tile of scores, whatever N is. Candidates
come from float32 scores; the few that are kept are scored again in float64, which makes the order independent of how
the product was split over threads.

Shapes: N = rows, Q = queries of a tile, D = dimensions, W = neighbours kept, V = candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from b3_lightning.types import PADDING, Embeddings, Neighbors

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as a stage goes on."""

_SPARE = 16
"""Candidates beyond W: float32 rounding (2e-7 on unit vectors) can swap neighbours about the last rank."""
_ROUNDING = 1e-6


def find_neighbors(
    embeddings: Embeddings,
    *,
    n_neighbors: int,
    target_key_N: Tensor,
    memory_budget_gib: float = 1.0,
    progress: Progress | None = None,
) -> Neighbors:
    """Rank for every query the targets of all rows with another target key, and keep the best ``n_neighbors``.

    Args:
        target_key_N: (N,) int64; rows with one key hold the same target and are never each other's neighbours.
        memory_budget_gib: bounds the score tile.
    """
    n_rows = len(embeddings)
    same_key = _RowsByKey(target_key_N)
    tile_rows = max(1, min(4096, int(memory_budget_gib * 2**30 / (8 * n_rows))))
    ids_NW = torch.full((n_rows, n_neighbors), PADDING, dtype=torch.int64)
    scores_NW = torch.full((n_rows, n_neighbors), -torch.inf, dtype=torch.float32)
    for start in range(0, n_rows, tile_rows):
        query_QD = embeddings.query_ND[start : start + tile_rows]
        score_QN = query_QD @ embeddings.target_ND.T
        same_key.blank(score_QN, start)
        ids_QV = _candidates(score_QN, n_neighbors)
        ids_QW, scores_QW = _rescore(query_QD, embeddings.target_ND, ids_QV, score_QN, n_neighbors)
        ids_NW[start : start + tile_rows, : ids_QW.shape[1]] = ids_QW
        scores_NW[start : start + tile_rows, : ids_QW.shape[1]] = scores_QW
        if progress is not None:
            progress("neighbours", min(start + tile_rows, n_rows), n_rows)
    positive_score_N = (embeddings.query_ND.double() * embeddings.target_ND.double()).sum(dim=1).float()
    return Neighbors(ids_NW, scores_NW, positive_score_N)


class _RowsByKey:
    """Rows sorted by target key, to blank the scores of equal targets without an N x N mask."""

    def __init__(self, target_key_N: Tensor) -> None:
        _, key_N, self.count_G = target_key_N.unique(return_inverse=True, return_counts=True)
        self.row_N = key_N.argsort(stable=True)
        self.first_G = self.count_G.cumsum(0) - self.count_G
        self.key_N = key_N

    def blank(self, score_QN: Tensor, start: int) -> None:
        key_Q = self.key_N[start : start + len(score_QN)]
        count_Q = self.count_G[key_Q]
        query_P = torch.arange(len(key_Q)).repeat_interleave(count_Q)
        offset_P = torch.arange(len(query_P)) - (count_Q.cumsum(0) - count_Q).repeat_interleave(count_Q)
        score_QN[query_P, self.row_N[self.first_G[key_Q].repeat_interleave(count_Q) + offset_P]] = -torch.inf


def _candidates(score_QN: Tensor, n_neighbors: int) -> Tensor:
    """At least every id that can be among the best; when ties reach past the spare ones, the lowest ids of the tie."""
    n_candidates = min(n_neighbors + _SPARE, score_QN.shape[1])
    top = score_QN.topk(n_candidates, dim=1)
    if n_candidates == score_QN.shape[1]:
        return top.indices
    last_Q = top.values[:, min(n_neighbors, n_candidates) - 1]
    crowded_R = (top.values[:, -1] >= last_Q - _ROUNDING).nonzero().flatten()
    for row in crowded_R.tolist():
        score_N = score_QN[row]
        threshold = float(last_Q[row])
        sure = (score_N > threshold + _ROUNDING).nonzero().flatten()
        tied = ((score_N - threshold).abs() <= _ROUNDING).nonzero().flatten()
        top.indices[row] = torch.cat([sure, tied])[:n_candidates] if threshold > -torch.inf else top.indices[row]
    return top.indices


def _rescore(
    query_QD: Tensor, target_ND: Tensor, ids_QV: Tensor, score_QN: Tensor, n_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Order candidates by their float64 score (rounded to float32), then by id; drop what was blanked."""
    ids_QV = ids_QV.sort(dim=1).values
    scores_QV = torch.empty(ids_QV.shape, dtype=torch.float32)
    for start in range(0, len(ids_QV), 256):
        part = slice(start, start + 256)
        exact = torch.einsum("qd,qvd->qv", query_QD[part].double(), target_ND[ids_QV[part]].double())
        scores_QV[part] = exact.float()
    scores_QV[score_QN.gather(1, ids_QV) == -torch.inf] = -torch.inf
    best = scores_QV.sort(dim=1, descending=True, stable=True)
    scores_QW = best.values[:, :n_neighbors]
    ids_QW = ids_QV.gather(1, best.indices[:, :n_neighbors]).masked_fill(scores_QW == -torch.inf, PADDING)
    return ids_QW, scores_QW
