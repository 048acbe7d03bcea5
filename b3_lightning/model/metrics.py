"""Retrieval metrics over all unique targets of a validation set.

torchmetrics' own retrieval metrics count a relevant item with a negative score as missed; cosines are often negative.

Shapes: N = pairs, U = unique targets, Q = queries of a tile, D = dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from b3_lightning.types import name_rows

TOP_K = (1, 5, 10)
_TILE = 1024


def positive_ranks(query_ND: Tensor, target_ND: Tensor, query_key_N: Tensor, target_key_N: Tensor) -> Tensor:
    """(N,) int64: how many unique targets score at least as high as the query's own, 0 being best.

    Rows with equal target keys hold one target. Other targets of the same query are positives too, so they are not
    counted. A tie counts against the query, so that a collapsed embedder scores 0.
    """
    _, target_of_N = target_key_N.unique(return_inverse=True)
    first_U = torch.full((int(target_of_N.max()) + 1,), len(target_ND), dtype=torch.int64, device=target_ND.device)
    first_U.scatter_reduce_(0, target_of_N, torch.arange(len(target_ND), device=target_ND.device), "amin")
    target_UD = target_ND[first_U]
    _, query_of_N = query_key_N.unique(return_inverse=True)
    order_N = query_of_N.argsort(stable=True)
    count_G = torch.bincount(query_of_N)
    start_G = count_G.cumsum(0) - count_G
    ranks = []
    for start in range(0, len(query_ND), _TILE):
        row_Q = torch.arange(start, min(start + _TILE, len(query_ND)), device=query_ND.device)
        score_QU = query_ND[row_Q] @ target_UD.T
        own_Q = score_QU.gather(1, target_of_N[row_Q, None])
        group_Q = query_of_N[row_Q]
        size_Q = count_G[group_Q]
        query_P = torch.arange(len(row_Q), device=row_Q.device).repeat_interleave(size_Q)
        within_P = torch.arange(len(query_P), device=row_Q.device) - (size_Q.cumsum(0) - size_Q)[query_P]
        sibling_P = order_N[start_G[group_Q][query_P] + within_P]
        score_QU[query_P, target_of_N[sibling_P]] = -torch.inf
        ranks.append((score_QU >= own_Q).sum(dim=1))
    return torch.cat(ranks)


class RetrievalMetrics(Metric):
    """``hit@1 @5 @10``, ``mrr`` and ``ndcg@10`` of each query's own target among all unique targets.

    Keeps the vectors of the validation set, because a rank needs all targets; every row counts once, also where a
    distributed sampler repeats rows to even out the processes. ``rank_of_row_N2`` (int64: row id, rank from 0) are the
    ranks that the last ``compute`` found, by row, among ``n_targets`` unique ones.
    """

    full_state_update = False
    query: list[Tensor]
    target: list[Tensor]
    key: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("query", "target", "key"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.rank_of_row_N2 = torch.empty(0, 2, dtype=torch.int64)
        self.n_targets = 0

    def update(
        self, query_BD: Tensor, target_BD: Tensor, *, row_B: Tensor, query_key_B: Tensor, target_key_B: Tensor
    ) -> None:
        """Add rows: unit vectors, row ids and the keys of query and target."""
        self.query.append(query_BD)
        self.target.append(target_BD)
        self.key.append(torch.stack([row_B, query_key_B, target_key_B], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Metric name -> scalar.

        Raises:
            ValueError: where vectors are not finite: a comparison with such a score is false, as if nothing beat it.
        """
        query_ND, target_ND, key_N3 = (_as_one(state) for state in (self.query, self.target, self.key))
        _, row_of_N = key_N3[:, 0].unique(return_inverse=True)
        first_N = torch.full((int(row_of_N.max()) + 1,), len(key_N3), dtype=torch.int64, device=key_N3.device)
        first_N.scatter_reduce_(0, row_of_N, torch.arange(len(key_N3), device=key_N3.device), "amin")
        broken_N = ~(torch.isfinite(query_ND).all(dim=1) & torch.isfinite(target_ND).all(dim=1))
        if broken_N.any():
            row_R = key_N3[broken_N, 0].unique()
            raise ValueError(
                f"vectors of {len(row_R):,} of {len(first_N):,} rows are not finite ({name_rows(row_R)}): the model's "
                "weights are broken, or its numbers are too large for trainer.precision"
            )
        rank_N = positive_ranks(query_ND[first_N], target_ND[first_N], key_N3[first_N, 1], key_N3[first_N, 2])
        self.rank_of_row_N2 = torch.stack([key_N3[first_N, 0], rank_N], dim=1).cpu()
        self.n_targets = len(key_N3[:, 2].unique())
        return rank_metrics(rank_N)


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


def _as_one(state: list[Tensor] | Tensor) -> Tensor:
    return state if isinstance(state, Tensor) else torch.cat(state)
