"""What a finished run says on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.table import Table

from b3_lightning.checkpoints import best_checkpoint
from b3_lightning.console import open_console
from b3_lightning.data.datamodule import datamodule_of
from b3_lightning.model.metrics import RetrievalMetrics
from b3_lightning.reports.compare import SHOWN, best_validation
from b3_lightning.reports.runs import csv_parts


def print_outcome(trainer: L.Trainer, folder: Path, *, trained: bool, offline: bool) -> None:
    """Print the best and the last validation of a run, where things lie, and what to do next."""
    console = open_console(highlight=False, markup=False)
    epochs = "1 epoch" if trainer.current_epoch == 1 else f"{trainer.current_epoch} epochs"
    console.print(f"\n{trainer.global_step} steps, {epochs}")
    if not trained:
        limits = f"trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}"
        console.print(f"nothing was left to train ({limits}): raise the limit to go on; the run is as it was")
    validated = "val/mrr" in trainer.callback_metrics
    if trained and validated and csv_parts(folder):
        best = best_validation(folder)
        table = Table("metric", "at best mrr", "last", title=_among(trainer.lightning_module.metrics))
        for name in SHOWN:
            table.add_row(name, f"{best[name]:.4f}", f"{float(trainer.callback_metrics[name]):.4f}")
        console.print(table)
    elif trained and not validated and _would_validate(trainer):
        console.print(
            "it ended before its first validation; trainer.val_check_interval=N validates every N batches, within an "
            "epoch too",
            soft_wrap=True,
        )
    say = partial(console.print, soft_wrap=True)  # paths and commands are copied: the terminal may break them, no line
    there = [name for name in ("config.yaml", "metrics.csv", "checkpoints") if (folder / name).exists()]
    say(f"run      {folder}  ({', '.join(there)})")
    which = "last" if best_checkpoint(trainer) is None else "best"
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        say(f"export   {folder / 'export'}  (the {which} weights; SentenceTransformer loads it)")
    if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        sync = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*"
        note = f"offline; upload with: {sync}" if offline else "online"
        say(f"W&B      {folder / 'wandb'}  ({note})")
    say("next     python -m b3_lightning compare RUN RUN ...  |  --data.batches=random for the baseline arm")


def _among(metrics: Any) -> str:
    """What the last validation, or test, ranked."""
    return f"{len(metrics.rank_of_row_N2):,} queries, each against {metrics.n_targets:,} unique targets"


def _would_validate(trainer: L.Trainer) -> bool:
    return datamodule_of(trainer).sources["val"] is not None and bool(trainer.limit_val_batches)


def print_scores(scores: Mapping[str, Any], metrics: RetrievalMetrics, split: str) -> None:
    """Print what ``validate`` or ``test`` found.

    Args:
        scores: by name, as logged.
        metrics: that found them.
        split: ``val`` or ``test``.
    """
    table = Table("metric", "value")
    for name in (name.replace("val/", f"{split}/") for name in SHOWN):
        table.add_row(name, f"{float(scores[name]):.4f}")
    console = open_console(highlight=False)
    console.print(_among(metrics))
    console.print(table)
