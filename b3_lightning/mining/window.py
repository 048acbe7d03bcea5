"""Ranked neighbours in; which of them are hard negatives, and which are likely false ones, out.

Ranks are counted first, on all other targets; then scores decide inside the window. A target is too similar where any
of the filters says so; those, and the ranks before the window, are listed for masking.

Shapes: N = rows, W = ranks kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import PADDING, Neighbors, Window


def rank_window(neighbors: Neighbors, settings: MiningSettings, *, first_rank: int, n_ranks: int) -> Window:
    """Mark the ranks ``[first_rank, first_rank + n_ranks)`` that pass the score filters of ``settings``."""
    rank_W = torch.arange(neighbors.ids_NW.shape[1], device=neighbors.ids_NW.device)
    filled_NW = neighbors.ids_NW != PADDING
    similar_NW = _too_similar(neighbors, settings)
    inside_W = (rank_W >= first_rank) & (rank_W < first_rank + n_ranks)
    hard_NW = filled_NW & inside_W & ~similar_NW
    if settings.min_score is not None:
        hard_NW &= neighbors.scores_NW >= settings.min_score
    return Window(hard_NW, filled_NW & ((rank_W < first_rank) | similar_NW))


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
