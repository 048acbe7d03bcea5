"""A page to look at beside every plan that a run mines; the same to W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from b3_lightning.data import PairsDataModule, datamodule_of
from b3_lightning.mining import MinedPlan
from b3_lightning.reports.cards import CardLimits
from b3_lightning.reports.plan import write_plan_report
from b3_lightning.reports.plan_page import write_plan_page


class MiningReport(Callback):
    """Write ``report.html`` and ``report.md`` beside each new plan.

    Args:
        enabled: switch it off.
        limits: how much of a plan the page shows.
    """

    def __init__(self, enabled: bool = True, limits: CardLimits = CardLimits()) -> None:  # noqa: B008 - frozen
        self.enabled, self.limits = enabled, limits

    def write(self, mined: MinedPlan, data: PairsDataModule, folder: Path, title: str) -> Path | None:
        """Write both files into a folder; None where the report is switched off."""
        if not self.enabled:
            return None
        path = folder / "report.html"
        pairs = data.pairs("train")
        write_plan_report(mined, pairs, folder / "report.md")
        write_plan_page(mined, pairs, data.image_root, path, title=title, limits=self.limits)
        return path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # after every callback's ``setup``, since that of ``Remine`` begins the list anew
        told = datamodule_of(trainer).after_mining
        if trainer.is_global_zero:
            told.append(lambda before, after, epoch, seconds: self._report(trainer, after, epoch))

    def _report(self, trainer: Trainer, mined: MinedPlan, epoch: int) -> None:
        data = datamodule_of(trainer)
        title = f"Plan of epoch {epoch}, {Path(trainer.default_root_dir).name}"
        path = self.write(mined, data, data.mined_folder(epoch), title)
        if path is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                # without ``inject`` W&B would put a style sheet from its own server into the page
                html: Any = wandb.Html(str(path), inject=False)
                logger.log_metrics({"mining/report": html}, step=trainer.global_step)
