"""Gradients of a large batch in the memory of a chunk (GradCache, arXiv 2101.06983).

Every chunk is embedded without keeping activations; the loss on all vectors gives the gradient of each vector; then the
chunks are embedded once more, with the same random numbers, and each vector's gradient is sent on into the weights.
The chunks come ready from the loader, each preprocessed on its own, so any kind of input works.

Shapes: P = items of a chunk, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Encode = Callable[[dict[str, Any]], Tensor]
"""A chunk's features -> its (P, D) vectors."""


@dataclass(frozen=True, slots=True)
class _Pass:
    features: dict[str, Any]
    vector_PD: Tensor
    random: _RandomState


class GradCache:
    """Collects the chunks of one step; ``backward`` is called once the loss has given the vectors their gradients."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._passes: list[_Pass] = []

    def encode(self, features: dict[str, Any]) -> Tensor:
        """Vectors that need a gradient but know nothing of how they came about."""
        random = _RandomState.now()
        with torch.no_grad():
            vector_PD = self._encode(features)
        vector_PD.requires_grad_()
        self._passes.append(_Pass(features, vector_PD, random))
        return vector_PD

    def backward(self, forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Send the gradients of all vectors on, chunk by chunk; ``forward_context`` is that of the first pass."""
        after = _RandomState.now()
        for step in self._passes:
            if step.vector_PD.grad is None:
                continue
            step.random.restore()
            with forward_context():
                vector_PD = self._encode(step.features)
            if vector_PD.requires_grad:  # not where all that made them is frozen
                vector_PD.backward(step.vector_PD.grad)
        self._passes.clear()
        after.restore()


@dataclass(frozen=True, slots=True)
class _RandomState:
    """Of torch's generators on the CPU and on the current GPU: what dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _RandomState:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def check_chunkable(model: nn.Module) -> None:
    """Refuse a model whose vectors depend on what else is in the chunk.

    Raises:
        ValueError: where a layer normalises over the batch.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if names:
        raise ValueError(
            f"model.chunks cannot be used with batch normalisation ({names[0]} and {len(names) - 1} other layers): its "
            "statistics would be those of a chunk, and be counted twice; leave model.chunks out"
        )
