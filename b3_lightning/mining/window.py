"""Ranked neighbours in; which of them are hard negatives, and which are likely false ones, out.

Ranks are counted first, on all other targets; then scores decide inside the window. A target is too similar where any
of the filters says so; those, and the ranks before the window, are listed for masking.

Shapes: N = rows, W = ranks kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.mining.alike import keys_of
from b3_lightning.mining.neighbors import tiles
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
        target_key_N: given, a target that is masked and that other rows hold too is so with all its copies, and none of
            them is hard, since what is masked is masked whichever row holds it.
    """
    rank_W = torch.arange(neighbors.ids_NW.shape[1], device=neighbors.ids_NW.device)
    filled_NW = neighbors.ids_NW != PADDING
    similar_NW = _too_similar(neighbors, settings)
    before_NW = (rank_W < first_rank).expand_as(filled_NW)
    looked_at_NW = filled_NW & (rank_W < first_rank + n_ranks)  # there may be more, of wider windows
    masked_NW = looked_at_NW & (before_NW | similar_NW)
    if target_key_N is not None:
        masked_NW |= looked_at_NW & _copies(masked_NW, neighbors, target_key_N)
    hard_NW = looked_at_NW & ~masked_NW
    if settings.min_score is not None:
        hard_NW &= neighbors.scores_NW >= settings.min_score
    return Window(hard_NW, masked_NW)


def _copies(marked_NW: Tensor, neighbors: Neighbors, target_key_N: Tensor) -> Tensor:
    """(N, W) bool: the entries that hold a target that a marked one of the same row holds.

    Copies need not follow one another: spellings that a teacher sees alike tie with them.
    """
    copy_NW = torch.zeros_like(marked_NW)
    several_T = torch.bincount(target_key_N) > 1
    if not several_T.any():
        return copy_NW
    for tile in tiles(len(neighbors)):
        key_QW = keys_of(neighbors.ids_NW[tile], target_key_N)
        several_QW = several_T[key_QW.clamp(min=0)] & (key_QW != PADDING)
        code_QW = key_QW + torch.arange(len(key_QW), device=key_QW.device)[:, None] * len(several_T)
        copy_NW[tile] = several_QW & torch.isin(code_QW, code_QW[several_QW & marked_NW[tile]])
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
