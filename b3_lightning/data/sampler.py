"""The batches of one epoch, cut into the equal shares of the processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


class EpochBatches:
    """A batch sampler over one epoch's plan: this rank's share of every global batch, in the plan's order.

    Args:
        ids_MB: (M, B) row ids of the global batches.
        rank: of this process.
        world_size: how many processes share a batch.
    """

    def __init__(self, ids_MB: Tensor, *, rank: int = 0, world_size: int = 1) -> None:
        batch_size = ids_MB.shape[1]
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {world_size} processes")
        share = batch_size // world_size
        self.ids_MB = ids_MB[:, rank * share : (rank + 1) * share]

    def __len__(self) -> int:
        return len(self.ids_MB)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.ids_MB.tolist())
