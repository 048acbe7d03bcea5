"""Mine new batches between epochs, with the student's current weights or with the teacher."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from lightning import Callback, LightningModule, Trainer

from b3_lightning.data import PairsDataModule, datamodule_of
from b3_lightning.data.checks import task_sizes
from b3_lightning.data.miner import Miner, MiningRequest
from b3_lightning.mining import MinedPlan
from b3_lightning.types import Edges, by_epoch

log = logging.getLogger(__name__)


class Remine(Callback):
    """Mine again every ``every_n_epochs`` epochs.

    Args:
        enabled: switch it on; off, the first plan serves the whole run.
        every_n_epochs: counted from ``start_epoch``.
        start_epoch: the first epoch that trains on re-mined batches.
        miner: whose vectors rank negatives.
        teacher_weight: epoch -> the teacher's share of the cosines that the student mines with from then on, such as
            ``{1: 0.5, 3: 0.0}``; 0 before the first.
        first_rank: epoch -> ``data.mining.first_rank`` from then on, such as ``{1: 50, 3: 20}``; before the first as
            set there.
        on_error: ``stop`` the run where mining fails, or ``keep`` the plan in use, warn, and log ``mining/failed``.
    """

    def __init__(
        self,
        enabled: bool = False,
        every_n_epochs: int = 1,
        start_epoch: int = 1,
        miner: Miner = "student",
        teacher_weight: dict[int, float] | None = None,
        first_rank: dict[int, int] | None = None,
        on_error: Literal["stop", "keep"] = "stop",
    ) -> None:
        if every_n_epochs < 1 or start_epoch < 1:
            raise ValueError(
                f"remine.every_n_epochs={every_n_epochs} and remine.start_epoch={start_epoch} must be at least 1"
            )
        self.enabled, self.every_n_epochs, self.start_epoch, self.miner = enabled, every_n_epochs, start_epoch, miner
        self.teacher_weight, self.first_rank, self.on_error = teacher_weight or {}, first_rank or {}, on_error
        wrong = [weight for weight in self.teacher_weight.values() if not 0 <= weight <= 1]
        if wrong or any(rank < 0 for rank in self.first_rank.values()):
            raise ValueError(
                f"remine.teacher_weight={self.teacher_weight} must lie between 0 and 1, and "
                f"remine.first_rank={self.first_rank} must not be negative"
            )

    def request(self, epoch: int) -> MiningRequest:
        """What is mined with in an epoch."""
        return MiningRequest(
            self.miner, by_epoch(self.teacher_weight, epoch, 0.0), by_epoch(dict(self.first_rank), epoch, None)
        )

    def should_remine(self, epoch: int) -> bool:
        """Is a new plan mined before this epoch?"""
        return self.enabled and epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every_n_epochs == 0

    def check(self, data: PairsDataModule) -> None:
        """Refuse settings under which re-mining would be without effect, or a student would never mine."""
        if data.batches == "b3" and not self.enabled and data.teacher == "student" and data.plan_folder is None:
            raise ValueError(
                "data.teacher=student mines with the model in training, so it needs remine.enabled=true; "
                "or name another teacher, or set data.batches=random"
            )
        if not self.enabled and (self.teacher_weight or self.first_rank):
            raise ValueError(
                "remine.teacher_weight and remine.first_rank are without effect without remine.enabled=true"
            )
        if self.teacher_weight and (data.teacher == "student" or self.miner == "teacher"):
            raise ValueError(
                f"remine.teacher_weight={self.teacher_weight} mixes a teacher into the student's ranks: it needs "
                "remine.miner=student and a data.teacher other than student"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = datamodule_of(trainer)
        if stage != "fit":
            return
        self.check(data)
        if data.batches != "b3":
            return
        if self.enabled:
            data.check_mining()
        for first_rank in self.first_rank.values():
            replace(data.mining, first_rank=first_rank).check_fits(task_sizes(data.pairs("train")))
        # asked when an epoch's loader is built: on_train_epoch_start is too late, and on_train_epoch_end is not called
        # again for a run that is resumed from the end of an epoch
        data.before_epoch = [partial(self._remine_if_due, trainer)]
        data.after_mining = [partial(log_plan, trainer)]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = datamodule_of(trainer)
        data.before_epoch, data.after_mining = [], []

    def _remine_if_due(self, trainer: Trainer, epoch: int) -> None:
        data = datamodule_of(trainer)
        if self.should_remine(epoch):
            with data.ending_at_once():
                self._remine(trainer, data, epoch)

    def _remine(self, trainer: Trainer, data: PairsDataModule, epoch: int) -> None:
        try:
            plan = data.new_plan(epoch, self.request(epoch))
        # ``on_error: keep`` asks for this, and it is told each time. All kinds of errors, since the other processes
        # only learn that one failed (PeerError) and keep the plan: were this one to end alone, they would wait for it
        except Exception as error:
            if self.on_error == "stop" or data.mined is None:
                raise
            log.warning("epoch %d: mining failed, so the plan in use is kept: %s", epoch, error)
            for logger in trainer.loggers:
                logger.log_metrics({"mining/failed": 1.0, "epoch": float(epoch)}, step=trainer.global_step)
            return
        if plan is not None:
            data.take_over(plan, epoch)


def log_plan(trainer: Trainer, before: MinedPlan | None, after: MinedPlan, epoch: int, seconds: float) -> None:
    """Log what a new plan holds, how hard its batches are, and what changed; also for the first one."""
    values = {f"mining/{name}": float(value) for name, value in after.summary().items()}
    if before is not None:
        values |= {f"mining/{name}": value for name, value in plan_change(before, after).items()}
    values["mining/seconds"] = seconds
    for logger in trainer.loggers:
        logger.log_metrics(values | {"epoch": float(epoch)}, step=trainer.global_step)


def plan_change(before: MinedPlan, after: MinedPlan) -> dict[str, float]:
    """How much of a plan a new one keeps.

    ``edges_kept_frac`` is the share of the old edges that the new graph has too, ``together_frac`` the share of pairs
    of rows in one old cluster that share a new one.
    """
    old, new = _edge_codes(before.edges), _edge_codes(after.edges)
    old_N, new_N = before.clusters.cluster_of_row(), after.clusters.cluster_of_row()
    both_N = old_N * (int(new_N.max()) + 1) + new_N
    return {
        "edges_kept_frac": float(torch.isin(old, new).float().mean()) if len(old) else 0.0,
        "together_frac": _n_pairs(both_N) / max(1.0, _n_pairs(old_N)),
    }


def _edge_codes(edges: Edges) -> torch.Tensor:
    return edges.source_E * edges.n_rows + edges.target_E


def _n_pairs(label_N: torch.Tensor) -> float:
    count = label_N.unique(return_counts=True)[1].double()
    return float((count * (count - 1) / 2).sum())
