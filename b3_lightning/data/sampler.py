"""The batches of one epoch, cut into the equal shares of the processes, from any place in the epoch on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

from b3_lightning.data.pairs import PairTable, task_codes
from b3_lightning.mining import BatchPlan, random_clusters


class EpochBatches:
    """A batch sampler over one epoch's plan: this rank's share of every global batch, in the plan's order.

    ``len`` counts all batches of the epoch, also where ``first_batch`` says that some were trained on before.

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
        self.first_batch = 0

    def __len__(self) -> int:
        return len(self.ids_MB)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.ids_MB[self.first_batch :].tolist())


class EpochLoader(DataLoader[int]):
    """A loader whose place in the epoch is part of the checkpoint, counted in global batches.

    Lightning asks for ``state_dict`` when it saves and hands it back before it iterates.

    Args:
        batches: of the epoch.
        n_trained: tells how many of them are done; the loader itself only knows what its workers have fetched.
    """

    def __init__(self, *, batches: EpochBatches, n_trained: Callable[[], int], **loading: Any) -> None:
        super().__init__(batch_sampler=batches, **loading)
        self._batches, self._n_trained = batches, n_trained

    def state_dict(self) -> dict[str, int]:
        return {"n_trained": self._n_trained()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches.first_batch = state_dict["n_trained"]


def random_batches(pairs: PairTable, batch_size: int, seed: int) -> dict[str, Any]:
    """Arguments of a ``BatchPlan`` whose clusters are single rows; a mined one differs in its clusters alone."""
    return {
        "clusters": random_clusters(len(pairs)),
        "batch_size": batch_size,
        "seed": seed,
        "task_N": task_codes(pairs),
        "task_names": tuple(pairs.task_weights),
        "task_weights": pairs.task_weights,
    }


def limited(n_batches: int, limit: int | float) -> int:
    """Batches of an epoch under Lightning's ``limit_train_batches``: so many, or such a share."""
    return min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)


class Done(NamedTuple):
    """What a run has trained on: optimiser steps, whole epochs before this one, and batches of this one."""

    steps: int = 0
    epoch: int = 0
    batches: int = 0

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Done:
        """What Lightning's checkpoint says; an epoch's end counts all of its batches, weights alone none."""
        if "loops" not in checkpoint:
            return cls()
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
        return cls(checkpoint["global_step"], checkpoint["epoch"], batches)


def count_steps(plan: BatchPlan, trainer: Any, done: Done = Done()) -> int:  # noqa: B008 - immutable
    """Optimiser steps of a whole run on such batches, those done among them, without touching a loader."""
    n_epochs = trainer.max_epochs or 0
    if n_epochs < 0:
        return max(1, int(trainer.max_steps))
    left = [limited(plan.n_batches(epoch), trainer.limit_train_batches) for epoch in range(done.epoch, n_epochs)]
    if left:
        left[0] = max(0, left[0] - done.batches)
    steps = done.steps + sum(-(-n // trainer.accumulate_grad_batches) for n in left)
    if trainer.max_steps > 0:
        return min(steps, trainer.max_steps) if steps else int(trainer.max_steps)
    return max(1, int(steps))
