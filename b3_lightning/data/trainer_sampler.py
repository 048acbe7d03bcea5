"""A plan's batches in sentence-transformers' own trainer.

``SentenceTransformerTrainingArguments(batch_sampler=B3BatchSampler.of("plan"))`` for one dataset, and
``multi_dataset_batch_sampler=B3BatchSampler.of("plan")`` for a ``DatasetDict`` whose datasets are the plan's tasks.

What the trainer does with a batch sampler decides what this one gives it. It reads ``len`` once, before the first
epoch, and ends every epoch there: so all epochs have as many batches, cut from the endless stream of the plan's epochs,
and none is lost. Under several processes accelerate hands whole batches of ``per_device_train_batch_size`` round the
processes: so as many successive batches are the shares of one global batch.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor
from torch.utils.data import ConcatDataset, RandomSampler

from b3_lightning.mining import BatchPlan, MinedPlan, rows_of_task
from b3_lightning.types import Clusters

log = logging.getLogger(__name__)

Unplanned = Literal["refuse", "random"]


@dataclass(frozen=True)
class _Planned:
    """What batches are drawn from: the clusters, and the task of every row."""

    clusters: Clusters
    task_N: Tensor
    task_names: tuple[str, ...]

    @classmethod
    def of(cls, plan: MinedPlan) -> _Planned:
        return cls(plan.clusters, plan.task_N, plan.task_names)


class B3BatchSampler(DefaultBatchSampler):
    """The batches of a plan, as sentence-transformers' trainer asks for them; made by ``of``.

    Args:
        dataset: whose row i is row i of the pairs that were mined.
        plan: the clusters of these rows.
        batch_size: rows of one process's batch.
        seed: of the draw of batches.
        n_processes: that train together; a global batch is ``batch_size * n_processes`` rows.
        task_weights: how many times an epoch passes over a task, by name; 1 where absent.

    Raises:
        ValueError: where the global batch is no multiple of the cluster size, or exceeds the rows of a task.
    """

    def __init__(
        self,
        dataset: Any,
        plan: _Planned,
        *,
        batch_size: int,
        seed: int,
        n_processes: int = 1,
        task_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=True, seed=seed)
        # accelerate tells the epoch to ``batch_sampler.sampler`` where it does not know the batch sampler itself
        self.sampler = self
        self.n_processes = n_processes
        self._batch_plan = BatchPlan(
            plan.clusters,
            batch_size=batch_size * n_processes,
            seed=seed,
            task_N=plan.task_N,
            task_names=plan.task_names,
            task_weights=task_weights,
        )
        self._epoch: int | None = None
        if batch_size % plan.clusters.cluster_size:
            log.warning(
                "per_device_train_batch_size=%d is no multiple of cluster_size=%d, so processes share clusters: train "
                "with a loss that gathers (gather_across_devices=True)", batch_size, plan.clusters.cluster_size,
            )  # fmt: skip

    @classmethod
    def of(
        cls,
        plan: str | Path | MinedPlan,
        *,
        unplanned: Unplanned = "refuse",
        task_weights: dict[str, float] | None = None,
    ) -> SamplerFactory:
        """Make what ``batch_sampler`` or ``multi_dataset_batch_sampler`` of the training arguments takes.

        Args:
            plan: its folder, or what ``mine`` returned.
            unplanned: what is done with a dataset that has other rows than the plan, such as one for evaluation:
                ``refuse`` it, or draw ``random`` batches, as the trainer does where nothing is set.
            task_weights: how many times an epoch passes over a task, by name; 1 where absent.

        Raises:
            FileNotFoundError, ValueError: where the folder holds no plan.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError(
                "sentence-transformers' trainer needs accelerate: pip install 'sentence-transformers[train]'"
            )
        mined = plan if isinstance(plan, MinedPlan) else MinedPlan.load(plan)
        return SamplerFactory(_Planned.of(mined), unplanned, task_weights)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._epoch = epoch

    @cached_property
    def _n_global(self) -> int:
        return self._batch_plan.n_batches(0)

    def __len__(self) -> int:
        return self._n_global * self.n_processes

    def __iter__(self) -> Iterator[list[int]]:
        if self._epoch is None:
            raise ValueError(
                "the trainer did not tell the epoch, which happens where several processes go on within an epoch: "
                "resume from a checkpoint at an epoch's end (save_strategy='epoch')"
            )
        first = self._epoch * self._n_global
        ids_MB = self._stream(first, first + self._n_global)
        log.info("epoch %d: batches %d to %d of the plan", self._epoch, first, first + self._n_global - 1)
        return iter(ids_MB.view(-1, self.batch_size).tolist())

    def _stream(self, start: int, stop: int) -> Tensor:
        """Global batches [start, stop) of the plan's epochs put end to end."""
        parts, epoch, passed = [], 0, 0
        while passed < stop:
            n_batches = self._batch_plan.n_batches(epoch)
            if passed + n_batches > start:
                parts.append(self._batch_plan.epoch(epoch)[max(0, start - passed) : stop - passed])
            passed += n_batches
            epoch += 1
        return torch.cat(parts)


def _n_processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@dataclass(frozen=True)
class SamplerFactory:
    """What the training arguments hold: called by the trainer for each of its datasets."""

    planned: _Planned
    unplanned: Unplanned
    task_weights: dict[str, float] | None
    _met: set[bool] = field(default_factory=set, compare=False)
    """Of the datasets that were asked for: are there the plan's, are there others?"""

    def __call__(
        self, dataset: Any, *, batch_samplers: Sequence[Any] | None = None, batch_size: int = 0, **about: Any
    ) -> Any:
        """The sampler of a dataset; with ``batch_samplers``, of several that are put end to end."""
        parts: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
        sizes = [len(part) for part in parts]
        why = self._mismatch(sizes, several=batch_samplers is not None)
        if why and self.unplanned == "refuse":
            raise ValueError(
                f"{why}. Give the trainer the pairs that were mined, in their order; if this is a dataset for "
                "evaluation, say B3BatchSampler.of(plan, unplanned='random')"
            )
        self._met.add(not why)
        if why:
            # the trainer asks for its training set before any other
            tell = log.info if True in self._met else log.warning
            tell("%s: it gets random batches. If it is the training set, give the pairs that were mined, in order", why)
            return self._random(dataset, batch_samplers, batch_size, about)
        return B3BatchSampler(
            dataset,
            self.planned,
            batch_size=batch_samplers[0].batch_size if batch_samplers is not None else batch_size,
            seed=about.get("seed") or 0,
            n_processes=_n_processes(),
            task_weights=self.task_weights,
        )

    def _random(self, dataset: Any, batch_samplers: Sequence[Any] | None, batch_size: int, about: Any) -> Any:
        """What the trainer itself would draw."""
        if batch_samplers is not None:
            from sentence_transformers.base.sampler import ProportionalBatchSampler

            return ProportionalBatchSampler(dataset, batch_samplers=list(batch_samplers), **about)
        sampler = RandomSampler(dataset, generator=about.get("generator"))
        return DefaultBatchSampler(sampler, batch_size=batch_size, **about)

    def _mismatch(self, sizes: list[int], *, several: bool) -> str:
        """Why the plan is not of datasets of these sizes; empty where it is."""
        n_rows = len(self.planned.task_N)
        if sum(sizes) != n_rows:
            return f"the plan was mined from {n_rows} rows, the dataset has {sum(sizes)}"
        if not several:
            return ""
        tasks = rows_of_task(self.planned.task_N, self.planned.task_names)
        bounds = list(accumulate(sizes, initial=0))
        whole = all(len(self.planned.task_N[a:b].unique()) == 1 for a, b in pairwise(bounds))
        if list(tasks.values()) == sizes and whole:
            return ""
        return f"the datasets have {sizes} rows, in this order; the plan's tasks are {tasks}"
