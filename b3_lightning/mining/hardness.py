"""How hard batches are: the teacher's own InfoNCE loss in them, mean over rows.

Shapes: N = rows, M = batches, B = rows of a batch, W = ranks kept, R = sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from b3_lightning.mining.alike import Alike
from b3_lightning.types import Embeddings, Neighbors, Window

Masked = Callable[[Tensor], Tensor]

TEMPERATURE = 0.05
"""At which hardness is measured. It is no setting, so that figures of different plans can be compared."""
_MOST_ROWS = 2**16
"""Rows looked at: the standard error of their mean is below 1%, and seconds suffice for any N."""


def mean_hardness(embeddings: Embeddings, alike: Alike, ids_MB: Tensor, masked: Masked | None = None) -> float:
    """Mean InfoNCE loss of query -> target over the rows of these batches, without what training leaves out.

    Args:
        alike: which rows are no negatives of each other.
        masked: rows -> (B, M) the rows that a plan masks for them, padded with -1.
    """
    losses = []
    for ids_B in ids_MB[_spread(len(ids_MB), max(1, _MOST_ROWS // ids_MB.shape[1]))]:
        score_BB = embeddings.query_ND[ids_B] @ embeddings.target_ND[ids_B].T / TEMPERATURE
        out_BB = alike.left_out(ids_B, ids_B, None if masked is None else masked(ids_B))
        score_BB.masked_fill_(out_BB.fill_diagonal_(False), -torch.inf)
        losses.append(score_BB.logsumexp(dim=1) - score_BB.diagonal())
    return float(torch.cat(losses).double().mean())


def best_hardness(neighbors: Neighbors, window: Window, batch_size: int, labels_N: Tensor) -> float:
    """What no batch can exceed: each row with its own hardest ``batch_size - 1`` of the window.

    Where a window is shorter, its last score stands for ranks that it lacks; where it is empty, the best that is not
    masked, or the row's last: what ranks behind is no harder.

    Args:
        labels_N: (N,) bool, rows of a labels task: a label ranks once and can stand in all rows of a batch.
    """
    rows = _spread(len(neighbors), _MOST_ROWS)
    kept_RW = neighbors.scores_NW[rows] / TEMPERATURE
    score_RW = kept_RW.masked_fill(~window.hard_NW[rows], -torch.inf).sort(dim=1, descending=True).values
    score_RW[:, 1:].masked_fill_(labels_N[rows, None], -torch.inf)  # the first is filled up with its copies
    score_RW = score_RW[:, : batch_size - 1]
    found_RW = score_RW > -torch.inf
    free_R = kept_RW.masked_fill(window.masked_NW[rows], -torch.inf).amax(dim=1)
    behind_R = torch.where(free_R.isfinite(), free_R, _least(kept_RW))
    last_R = torch.where(found_RW.any(dim=1), _least(score_RW), behind_R)
    n_lacking_R = batch_size - 1 - found_RW.sum(dim=1)
    fill_R = torch.where((n_lacking_R > 0) & last_R.isfinite(), last_R + n_lacking_R.log(), -torch.inf)
    positive_R = neighbors.positive_score_N[rows] / TEMPERATURE
    total_R = torch.cat([score_RW, fill_R[:, None], positive_R[:, None]], dim=1).logsumexp(dim=1)
    return float((total_R - positive_R).double().mean())


def _least(score_RW: Tensor) -> Tensor:
    """(R,) the lowest score of each row but -inf; inf where there is none."""
    return score_RW.masked_fill(score_RW == -torch.inf, torch.inf).amin(dim=1)


def _spread(n: int, most: int) -> Tensor:
    """Evenly spread positions, at most so many."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float64).long()
