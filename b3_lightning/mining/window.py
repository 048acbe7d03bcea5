"""Ranked neighbours in; which of them are hard negatives, and which are likely false ones, out.

Ranks are counted first, on all other targets; then scores decide inside the window. A target is too similar where any
of the filters says so; those, and the ranks before the window, are listed for masking.

Shapes: N = rows, W = ranks kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.mining.alike import keys_of
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import PADDING, Neighbors, Window


def rank_window(
    neighbors: Neighbors,
    settings: MiningSettings,
    *,
    first_rank: int,
    n_ranks: int,
    target_key_N: Tensor | None = None,
) -> Window:
    """Mark the ranks ``[first_rank, first_rank + n_ranks)`` that pass the score filters of ``settings``.

    Args:
        target_key_N: given, a target that other rows hold too is on one side of the window's beginning with all its
            copies, the near one, since what is masked is masked whichever row holds it.
    """
    rank_W = torch.arange(neighbors.ids_NW.shape[1], device=neighbors.ids_NW.device)
    filled_NW = neighbors.ids_NW != PADDING
    similar_NW = _too_similar(neighbors, settings)
    before_NW = (rank_W < first_rank).expand_as(filled_NW)
    if target_key_N is not None and 0 < first_rank <= len(rank_W):
        before_NW = before_NW | _copies_of_last(neighbors, first_rank, target_key_N)
    hard_NW = filled_NW & ~before_NW & (rank_W < first_rank + n_ranks) & ~similar_NW
    if settings.min_score is not None:
        hard_NW &= neighbors.scores_NW >= settings.min_score
    return Window(hard_NW, filled_NW & (before_NW | similar_NW))


def _copies_of_last(neighbors: Neighbors, first_rank: int, target_key_N: Tensor) -> Tensor:
    """(N, W) bool: the ranks from ``first_rank`` on that hold the target before them; copies score alike: in a row."""
    copy_NW = torch.zeros_like(neighbors.ids_NW, dtype=torch.bool)
    last_N = keys_of(neighbors.ids_NW[:, first_rank - 1], target_key_N)
    for rank in range(first_rank, neighbors.ids_NW.shape[1]):
        copy_NW[:, rank] = (keys_of(neighbors.ids_NW[:, rank], target_key_N) == last_N) & (last_N != PADDING)
        if not copy_NW[:, rank].any():
            break
    return copy_NW


def _too_similar(neighbors: Neighbors, settings: MiningSettings) -> Tensor:
    score_NW, positive_N1 = neighbors.scores_NW, neighbors.positive_score_N[:, None]
    similar_NW = torch.zeros_like(score_NW, dtype=torch.bool)
    if settings.max_relative_score is not None:
        # the size of the positive's score, not its value: a negative cosine must not turn the filter round
        similar_NW |= score_NW > positive_N1 - (1 - settings.max_relative_score) * positive_N1.abs()
    if settings.min_margin is not None:
        similar_NW |= score_NW > positive_N1 - settings.min_margin
    if settings.max_score is not None:
        similar_NW |= score_NW > settings.max_score
    return similar_NW
