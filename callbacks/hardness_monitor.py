"""How hard the batches are for the student, and which of their negatives look right; warns of too easy and of poisoned.

Shapes: B = rows of this process, C = columns that a query is scored against, S = suspects.
"""

from __future__ import annotations

import csv
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from b3_lightning.data import datamodule_of
from b3_lightning.data.images import load_image
from b3_lightning.data.pairs import Item
from b3_lightning.mining.store import write_text
from b3_lightning.types import OF_FILE

log = logging.getLogger(__name__)

_SHOWN = 300
"""Characters of a text in the list of suspects."""
NAMES = ("in_batch_accuracy", "hardest_margin", "cohesion", "masked_frac", "suspected_frac", "loss")
COLUMNS = ("epoch", "task", "row", "query", "target", "other_row", "other_target", "score_above_positive")


@dataclass(frozen=True)
class BatchHardness:
    """Of one batch, (B,) each: the positive's score, the hardest negative's and its column, the mean of negatives."""

    own_B: Tensor
    hardest_B: Tensor
    column_B: Tensor
    mean_B: Tensor
    masked_frac: Tensor

    @classmethod
    def measure(cls, score_BC: Tensor, ignore_BC: Tensor, there_C: Tensor, first_row: int) -> BatchHardness:
        """Look at every negative that the loss looked at; columns that are not ``there_C`` count as nothing."""
        positive_B1 = first_row + torch.arange(len(score_BC), device=score_BC.device)[:, None]
        own_B = score_BC.gather(1, positive_B1)[:, 0]
        out_BC = ignore_BC.scatter(1, positive_B1, value=True)
        hardest = score_BC.masked_fill(out_BC, -torch.inf).max(dim=1)
        count_B = (~out_BC).sum(dim=1).clamp(min=1)
        mean_B = score_BC.masked_fill(out_BC, 0).sum(dim=1) / count_B
        n_negatives = max(1, int(there_C.sum()) - 1)
        masked_frac = ((out_BC & there_C).sum(dim=1) - 1).float().mean() / n_negatives
        # a row without negatives is neither hard nor suspicious
        hardest_B = torch.where(hardest.values == -torch.inf, own_B - 2, hardest.values)
        return cls(own_B, hardest_B, hardest.indices, mean_B, masked_frac)


class HardnessMonitor(Callback):
    """Log, overall and for each task, how the student does inside its batches, and list suspected false negatives.

    Under ``train/`` and, with several tasks, ``train/TASK/``: ``in_batch_accuracy`` (queries whose positive leads),
    ``hardest_margin`` (positive less hardest negative), ``cohesion`` (mean negative, less the mean score with the
    targets of the task's batch before: 0 for random batches), ``masked_frac``, ``suspected_frac``. Suspects go to
    ``suspects.csv`` in the run's folder and to a W&B table, with pictures.

    Args:
        enabled: switch it off to save a glance at the scores now and then.
        every_n_steps: every so many batches of an epoch one is looked at.
        suspect_margin: a negative is suspected where the student scores it above the positive by more than this.
        n_suspects: listed after every epoch, the most suspicious first.
        easy_loss: warn of a task whose mean loss stays below this while nearly every positive leads.
        poisoned_frac: warn of a task with more suspected rows than this, where most positives lead.
    """

    def __init__(
        self,
        enabled: bool = True,
        every_n_steps: int = 10,
        suspect_margin: float = 0.05,
        n_suspects: int = 32,
        easy_loss: float = 0.02,
        poisoned_frac: float = 0.25,
    ) -> None:
        if every_n_steps < 1 or n_suspects < 1:
            raise ValueError(f"hardness.every_n_steps={every_n_steps} and n_suspects={n_suspects} must be at least 1")
        self.enabled, self.every_n_steps = enabled, every_n_steps
        self.suspect_margin, self.n_suspects = suspect_margin, n_suspects
        self.easy_loss, self.poisoned_frac = easy_loss, poisoned_frac
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._suspects = torch.full((0, 4), -torch.inf, dtype=torch.float64)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled or batch_idx % self.every_n_steps:
            return
        contrast, task = outputs["contrast"], int(batch["task"])
        found = BatchHardness.measure(
            contrast.score_BC, contrast.ignore_BC, contrast.column_row_C >= 0, contrast.first_row
        )
        suspected_B = found.hardest_B - found.own_B > self.suspect_margin
        values = torch.stack(
            [
                (found.own_B > found.hardest_B).float().mean(),
                (found.own_B - found.hardest_B).mean(),
                found.mean_B.mean() - self._random_score(contrast, task),
                found.masked_frac,
                suspected_B.float().mean(),
                contrast.loss.float(),  # outputs["loss"] is divided by the batches that are added up
            ]
        )
        values = trainer.strategy.reduce(values, reduce_op="mean").double().cpu()
        self._sums[task] = self._sums.get(task, torch.zeros(len(NAMES) + 1)) + torch.cat([values, torch.ones(1)])
        self._remember(found, contrast, batch, suspected_B)
        _log(trainer, self._named(trainer, task, values))

    def _random_score(self, contrast: Any, task: int) -> Tensor:
        """The mean score with the targets of the task's batch before; NaN where there was none."""
        query_BD: Tensor = contrast.query_BD
        before_BD = self._targets.get(task)
        self._targets[task] = contrast.target_BD
        return query_BD.new_tensor(torch.nan) if before_BD is None else (query_BD @ before_BD.T).mean()

    def _named(self, trainer: Trainer, task: int, values: Tensor) -> dict[str, float]:
        pairs = dict(zip(NAMES, values.tolist(), strict=True))
        pairs = {name: value for name, value in pairs.items() if value == value and name != "loss"}
        tasks = list(datamodule_of(trainer).pairs("train").task_weights)
        named = {f"train/{name}": value for name, value in pairs.items()}
        if len(tasks) > 1:
            named |= {f"train/{tasks[task]}/{name}": value for name, value in pairs.items()}
        return named

    def _remember(self, found: BatchHardness, contrast: Any, batch: Any, suspected_B: Tensor) -> None:
        gap_B = (found.hardest_B - found.own_B).double()
        other_B = contrast.column_row_C[found.column_B]
        task_B = torch.full_like(gap_B, float(batch["task"]))
        of_a_row_B = suspected_B & (other_B != OF_FILE)  # negatives of the pairs file are listed there
        listed_S4 = torch.stack([gap_B, batch["row_B"].double(), other_B.double(), task_B], dim=1)[of_a_row_B].cpu()
        self._suspects = _worst(torch.cat([self._suspects, listed_S4]), self.n_suspects)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        padded = torch.full((self.n_suspects, 4), -torch.inf, dtype=torch.float64)
        padded[: len(self._suspects)] = self._suspects
        gathered = trainer.strategy.all_gather(padded.to(trainer.strategy.root_device)).reshape(-1, 4).cpu()
        suspects = _worst(gathered[gathered[:, 0] > -torch.inf], self.n_suspects)
        if trainer.is_global_zero:
            self._warn(list(datamodule_of(trainer).pairs("train").task_weights))
            if len(suspects):
                _write_suspects(trainer, suspects)

    def _warn(self, tasks: list[str]) -> None:
        for task, sums in self._sums.items():
            mean = dict(zip(NAMES, (sums[:-1] / sums[-1]).tolist(), strict=True))
            if mean["loss"] < self.easy_loss and mean["in_batch_accuracy"] > 0.99:
                log.warning(
                    "task %r: the batches are too easy (loss %.4f, %.1f%% of the positives lead): mine "
                    "them harder (a lower data.mining.first_rank, a higher cluster_size), or again",
                    tasks[task], mean["loss"], 100 * mean["in_batch_accuracy"],
                )  # fmt: skip
            # where hardly a positive leads, the student is no witness yet
            if mean["suspected_frac"] > self.poisoned_frac and mean["in_batch_accuracy"] > 0.5:
                log.warning(
                    "task %r: in %.0f%% of the rows a negative scores over %.2f above the positive; if suspects.csv "
                    "shows right answers, raise data.mining.first_rank or set model.loss.mask_margin",
                    tasks[task], 100 * mean["suspected_frac"], self.suspect_margin,
                )  # fmt: skip


def _worst(suspects_S4: Tensor, n_most: int) -> Tensor:
    """The pairs of rows with the largest gap, each once."""
    order_S = suspects_S4[:, 0].argsort(descending=True, stable=True)
    kept: dict[tuple[float, float], Tensor] = {}
    for suspect in suspects_S4[order_S]:
        kept.setdefault((float(suspect[1]), float(suspect[2])), suspect)
    listed = list(kept.values())[:n_most]
    return torch.stack(listed) if listed else suspects_S4[:0]


def _write_suspects(trainer: Trainer, suspects_S4: Tensor) -> None:
    data = datamodule_of(trainer)
    pairs = data.pairs("train")
    tasks, queries, targets = list(pairs.task_weights), pairs.items("query"), pairs.items("target")
    rows: list[list[Any]] = []
    for gap, row, other, task in suspects_S4.tolist():
        own, one = int(row), int(other)
        texts = _words(queries[own]), _words(targets[own])
        shown = [trainer.current_epoch, tasks[int(task)], own, *texts, one, _words(targets[one]), round(gap, 4)]
        rows.append(shown)
    path = Path(trainer.default_root_dir) / "suspects.csv"
    before = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:] if path.is_file() else []
    kept = [row for row in before if row and int(row[0]) < trainer.current_epoch]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *kept, *rows])
    write_text(path, text.getvalue())
    items = [(items[int(row)], row) for row in suspects_S4[:8, 1].tolist() for items in (queries, targets)]
    items += [(targets[int(row)], row) for row in suspects_S4[:8, 2].tolist()]
    pictures = [(item, row) for item, row in items if item.image]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("train/suspects", columns=list(COLUMNS), data=rows)
            if pictures:
                images = [load_image(item.image, data.image_root) for item, _ in pictures]
                logger.log_image("train/suspects_pictures", images, caption=[f"row {row:.0f}" for _, row in pictures])


def _words(item: Item) -> str:
    return " ".join(f"{item.text} {item.image}".split())[:_SHOWN]


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    """Under the step that Lightning logs the same batch's loss under, one before ``global_step``."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(values | {"epoch": float(trainer.current_epoch)}, step=step)
