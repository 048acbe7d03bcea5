"""Rows sorted by the group that they belong to, or by chance."""

from __future__ import annotations

import torch
from torch import Tensor


def place_in_group(group_P: Tensor, n_groups: int) -> Tensor:
    """(P,) int64: 0, 1, 2, ... within each group; ``group_P`` must be ascending."""
    count_G = torch.bincount(group_P, minlength=n_groups)
    return torch.arange(len(group_P), device=group_P.device) - (count_G.cumsum(0) - count_G)[group_P]


def permutation(n: int, seed: int, device: torch.device) -> Tensor:
    """(n,) int64: 0 .. n - 1 in an order that depends on the seed and not on the device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
