"""InfoNCE over the targets of the global batch: a pure function, and the gather that feeds it.

Shapes: B = rows of this process, G = rows of the global batch, D = dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    query_BD: Tensor,
    target_GD: Tensor,
    *,
    temperature: float,
    first_row: int = 0,
    ignore_BG: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of each query against the targets of the global batch.

    Args:
        query_BD: unit queries of this process.
        target_GD: unit targets of all processes; the positive of query b is target ``first_row + b``.
        temperature: divides the cosines (B3 trains at 0.02).
        ignore_BG: bool, targets that are no negatives of a query; its positive is never left out.
    """
    logits_BG = query_BD @ target_GD.T / temperature
    positive_B = first_row + torch.arange(len(query_BD), device=query_BD.device)
    if ignore_BG is not None:
        ignore_BG = ignore_BG.scatter(1, positive_B[:, None], value=False)
        logits_BG = logits_BG.masked_fill(ignore_BG, -torch.inf)
    return F.cross_entropy(logits_BG, positive_B)


def same_key(query_key_B: Tensor, query_key_G: Tensor, target_key_B: Tensor, target_key_G: Tensor) -> Tensor:
    """(B, G) bool: target g equals row b's own target, or belongs to another row with the same query."""
    return (query_key_B[:, None] == query_key_G) | (target_key_B[:, None] == target_key_G)


def gather_rows(local_BX: Tensor) -> Tensor:
    """Concatenate equal shares of all processes, in rank order; gradients flow back to every process.

    With the mean that DDP takes over processes, the gradient of ``info_nce`` on gathered targets is that of the global
    batch in one process: no factor of the world size is needed.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local_BX
    gathered: Tensor = _GatherRows.apply(local_BX)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BX: Tensor) -> Tensor:
        parts = [torch.empty_like(local_BX) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local_BX.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_GX: Tensor) -> Tensor:
        total_GX = grad_GX.contiguous()
        dist.all_reduce(total_GX)
        return total_GX.chunk(dist.get_world_size())[dist.get_rank()]
