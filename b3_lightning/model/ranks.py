"""The rank of each query's own target, and what it is worth; without torchmetrics, which takes seconds to import.

Shapes: N = queries, M = pairs, U = unique targets, Q = queries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from b3_lightning.types import PADDING

TOP_K = (1, 5, 10)
_TILE = 1024
_TIE = 1e-6


def positive_ranks(
    query_ND: Tensor,
    target_MD: Tensor,
    query_key_M: Tensor,
    target_key_M: Tensor,
    group_key_M: Tensor | None = None,
) -> Tensor:
    """(N,) int64: how many unique targets score at least as high as the query's own, 0 being best.

    The queries are those of the first N of M pairs; of the others, the targets are ranked alone.
    Rows with equal target keys hold one target. Other targets of the same query or group are positives too, so they are
    not counted; the group of -1 is none. A tie counts against the query, so that a collapsed embedder scores 0; scores
    within 1e-6 are tied, since equal vectors need not score alike to the last bit.
    """
    tiles = scored_tiles(query_ND, target_MD, query_key_M, target_key_M, group_key_M)
    return torch.cat([ranks_of(score_QU, own_Q) for score_QU, own_Q in tiles])


def scored_tiles(
    query_ND: Tensor,
    target_MD: Tensor,
    query_key_M: Tensor,
    target_key_M: Tensor,
    group_key_M: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """By tiles of queries: (Q, U) scores of the unique targets, -inf for what is right; (Q, 1) of the own one."""
    _, target_of_M = target_key_M.unique(return_inverse=True)
    first_U = torch.full((int(target_of_M.max()) + 1,), len(target_MD), dtype=torch.int64, device=target_MD.device)
    first_U.scatter_reduce_(0, target_of_M, torch.arange(len(target_MD), device=target_MD.device), "amin")
    target_UD = target_MD[first_U]
    alike = [_Alike(query_key_M), *([] if group_key_M is None else [_Alike(group_key_M)])]
    for start in range(0, len(query_ND), _TILE):
        row_Q = torch.arange(start, min(start + _TILE, len(query_ND)), device=query_ND.device)
        score_QU = query_ND[row_Q] @ target_UD.T
        own_Q = score_QU.gather(1, target_of_M[row_Q, None])
        for rows in alike:
            query_P, row_P = rows.of(row_Q)
            score_QU[query_P, target_of_M[row_P]] = -torch.inf
        yield score_QU, own_Q


def ranks_of(score_QU: Tensor, own_Q: Tensor) -> Tensor:
    """(Q,) int64 of a tile."""
    return (score_QU >= own_Q - _TIE).sum(dim=1)


def losses_of(score_QU: Tensor, own_Q: Tensor, temperature: float) -> Tensor:
    """(Q,) InfoNCE of a tile: the own target against all that are not right."""
    own_Q = own_Q.float().flatten() / temperature
    return torch.logaddexp(own_Q, (score_QU.float() / temperature).logsumexp(dim=1)) - own_Q


class _Alike:
    """The rows of every key; those of the key -1 are alike to none, themselves included."""

    def __init__(self, key_M: Tensor) -> None:
        _, self._number_M = key_M.unique(return_inverse=True)
        self._order_M = self._number_M.argsort(stable=True)
        count_G = torch.bincount(self._number_M)
        self._start_G = count_G.cumsum(0) - count_G
        self._count_M = count_G[self._number_M].masked_fill(key_M == PADDING, 0)

    def of(self, row_Q: Tensor) -> tuple[Tensor, Tensor]:
        """(place in ``row_Q``, row) of every pair of rows that share a key."""
        count_Q = self._count_M[row_Q]
        query_P = torch.arange(len(row_Q), device=row_Q.device).repeat_interleave(count_Q)
        within_P = torch.arange(len(query_P), device=row_Q.device) - (count_Q.cumsum(0) - count_Q)[query_P]
        return query_P, self._order_M[self._start_G[self._number_M[row_Q]][query_P] + within_P]


def rank_metrics(rank_N: Tensor) -> dict[str, Tensor]:
    """Metric name -> scalar, from ranks counted from 0."""
    return {name: value_N.mean() for name, value_N in query_metrics(rank_N).items()}


def query_metrics(rank_N: Tensor) -> dict[str, Tensor]:
    """Metric name -> (N,) float32, what each query adds to the mean."""
    rank_N = rank_N.float()
    values = {f"hit@{k}": (rank_N < k).float() for k in TOP_K}
    values["mrr"] = 1 / (rank_N + 1)
    values["ndcg@10"] = torch.where(rank_N < 10, 1 / torch.log2(rank_N + 2), 0.0)
    return values
