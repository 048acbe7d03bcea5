"""Which rows of a batch are no negatives of one another, for all who score a batch: the loss, and what foretells it.

Shapes: B = rows that are asked about, C = rows of the batch, M = values that a row lists, padded with -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from b3_lightning.types import PADDING


def equal(own_B: Tensor, other_C: Tensor) -> Tensor:
    """(B, C) bool: equal values; -1 stands for none, and equals nothing."""
    return (own_B[:, None] == other_C) & (own_B[:, None] != PADDING)


def listed(listed_BM: Tensor, value_C: Tensor) -> Tensor:
    """(B, C) bool: is c's value among those that b lists? For values that are not negative."""
    sorted_C, order_C = value_C.sort()
    # a value can stand in several columns: those of one value are neighbours once sorted
    first_BM = torch.searchsorted(sorted_C, listed_BM)
    last_BM = torch.searchsorted(sorted_C, listed_BM, right=True)
    found_BM = (listed_BM >= 0) & (last_BM > first_BM)
    step_BC = torch.zeros(len(listed_BM), len(sorted_C) + 1, dtype=torch.int32, device=listed_BM.device)
    step_BC.scatter_add_(1, first_BM, found_BM.int())
    step_BC.scatter_add_(1, last_BM, -found_BM.int())
    inside_BC = step_BC.cumsum(1)[:, :-1] > 0
    return torch.empty_like(inside_BC).index_copy_(1, order_C, inside_BC)


def left_out(ids_B: Tensor, ids_C: Tensor, keys: Sequence[Tensor], masked_BM: Tensor | None = None) -> Tensor:
    """(B, C) bool: what training leaves out, the rows' own targets too.

    Args:
        keys: (N,) each, of the targets first; rows with an equal one are alike.
        masked_BM: rows that a plan masks for each of ``ids_B``, padded with -1; whoever else holds their targets is
            left out as well.
    """
    out_BC = torch.zeros(len(ids_B), len(ids_C), dtype=torch.bool, device=ids_B.device)
    for key_N in keys:
        out_BC |= equal(key_N[ids_B], key_N[ids_C])
    return out_BC if masked_BM is None else out_BC | listed(keys_of(masked_BM, keys[0]), keys[0][ids_C])


def keys_of(ids: Tensor, key_N: Tensor) -> Tensor:
    """The keys of rows, in the shape of ``ids``; -1 where there is none."""
    return key_N[ids.clamp(min=0)].masked_fill(ids == PADDING, PADDING)
