"""Retrieval metrics over all unique targets of a validation set.

torchmetrics' own retrieval metrics count a relevant item with a negative score as missed; cosines are often negative.

Shapes: N = pairs, B = rows of a batch, D = dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from b3_lightning.model.ranks import losses_of, rank_metrics, ranks_of, scored_tiles
from b3_lightning.types import name_rows


class RetrievalMetrics(Metric):
    """``hit@1 @5 @10``, ``mrr``, ``ndcg@10`` and InfoNCE ``loss`` of each query's own target among all unique targets.

    Keeps the vectors of the validation set, because a rank needs all targets; every row counts once, also where a
    distributed sampler repeats rows to even out the processes. ``rank_of_row_N2`` (int64: row id, rank from 0) are the
    ranks that the last ``compute`` found, by row, among ``n_targets`` unique ones. ``temperature`` is the loss's.
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
        self.temperature = 1.0

    def update(
        self,
        query_BD: Tensor,
        target_BD: Tensor,
        *,
        row_B: Tensor,
        query_key_B: Tensor,
        target_key_B: Tensor,
        group_key_B: Tensor,
    ) -> None:
        """Add rows: unit vectors, row ids and the keys of query, target and group (-1: none)."""
        self.query.append(query_BD)
        self.target.append(target_BD)
        self.key.append(torch.stack([row_B, query_key_B, target_key_B, group_key_B], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Metric name -> scalar.

        Raises:
            ValueError: where vectors are not finite: a comparison with such a score is false, as if nothing beat it.
        """
        query_ND, target_ND, key_N4 = (_as_one(state) for state in (self.query, self.target, self.key))
        _, row_of_N = key_N4[:, 0].unique(return_inverse=True)
        first_N = torch.full((int(row_of_N.max()) + 1,), len(key_N4), dtype=torch.int64, device=key_N4.device)
        first_N.scatter_reduce_(0, row_of_N, torch.arange(len(key_N4), device=key_N4.device), "amin")
        broken_N = ~(torch.isfinite(query_ND).all(dim=1) & torch.isfinite(target_ND).all(dim=1))
        if broken_N.any():
            row_R = key_N4[broken_N, 0].unique()
            raise ValueError(
                f"vectors of {len(row_R):,} of {len(first_N):,} rows are not finite ({name_rows(row_R)}): the model's "
                "weights are broken, or its numbers are too large for trainer.precision"
            )
        tiles = scored_tiles(query_ND[first_N], target_ND[first_N], *key_N4[first_N, 1:].unbind(1))
        found = [(ranks_of(*tile), losses_of(*tile, self.temperature)) for tile in tiles]
        rank_N, loss_N = (torch.cat(column) for column in zip(*found, strict=True))
        self.rank_of_row_N2 = torch.stack([key_N4[first_N, 0], rank_N], dim=1).cpu()
        self.n_targets = len(key_N4[:, 2].unique())
        return {**rank_metrics(rank_N), "loss": loss_N.mean()}


def _as_one(state: list[Tensor] | Tensor) -> Tensor:
    return state if isinstance(state, Tensor) else torch.cat(state)
