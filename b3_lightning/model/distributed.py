"""What processes tell one another during a training step: rows of the global batch, and gradients.

Shapes: B = rows of this process, G = rows of the global batch, P = trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ELEMENTS_AT_ONCE = 2**25
"""Gradients of one type are sent together: at most so many, or one larger tensor (128 MiB in float32)."""


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(local_BX: Tensor) -> Tensor:
    """Concatenate equal shares of all processes, in rank order; gradients flow back to every process.

    With the mean that DDP takes over processes, the gradient of ``info_nce`` on gathered targets is that of the global
    batch in one process: no factor of the world size is needed.
    """
    if world_size() == 1:
        return local_BX
    if local_BX.is_floating_point() and torch.is_grad_enabled() and not local_BX.requires_grad:
        # the others' rows may need a gradient, and to collect it takes every process: a share without negatives too
        local_BX = local_BX.detach().requires_grad_()
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
        total_GX = grad_GX.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total_GX)
        return total_GX.chunk(dist.get_world_size())[dist.get_rank()]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set every gradient to its mean over the processes, as DDP would.

    A parameter that took part in some processes only counts as zero in the others; one that took part in none keeps no
    gradient, so that an optimiser leaves it alone.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not trained:
        return
    used_P = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used_P, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, used in zip(trained, used_P.tolist(), strict=True):
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    n_elements = 0
    for gradient in gradients:
        fits = buckets and n_elements + gradient.numel() <= _ELEMENTS_AT_ONCE
        if not fits or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            n_elements = 0
        buckets[-1].append(gradient)
        n_elements += gradient.numel()
    return buckets
