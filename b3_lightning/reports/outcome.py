"""What a finished run says on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from b3_lightning.checkpoints import best_checkpoint
from b3_lightning.model.metrics import RetrievalMetrics
from b3_lightning.reports.compare import SHOWN, best_validation
from b3_lightning.reports.runs import csv_parts


def print_outcome(trainer: L.Trainer, folder: Path, *, trained: bool, offline: bool) -> None:
    """Print the best and the last validation of a run, where things lie, and what to do next."""
    console = Console(highlight=False, markup=False)
    epochs = "1 epoch" if trainer.current_epoch == 1 else f"{trainer.current_epoch} epochs"
    console.print(f"\n{trainer.global_step} steps, {epochs}")
    if not trained:
        limits = f"trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}"
        console.print(f"nothing was left to train ({limits}): raise the limit to go on; the run is as it was")
    validated = "val/mrr" in trainer.callback_metrics
    if trained and validated and csv_parts(folder):
        best = best_validation(folder)
        table = Table("metric", "at best mrr", "last", title="all unique validation targets")
        for name in SHOWN:
            table.add_row(name, f"{best[name]:.4f}", f"{float(trainer.callback_metrics[name]):.4f}")
        console.print(table)
    say = partial(console.print, soft_wrap=True)  # paths and commands are copied: the terminal may break them, no line
    say(f"run      {folder}  (config.yaml, metrics.csv, checkpoints)")
    which = "last" if best_checkpoint(trainer) is None else "best"
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        say(f"export   {folder / 'export'}  (the {which} weights; SentenceTransformer loads it)")
    if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        sync = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*"
        note = f"offline; upload with: {sync}" if offline else "online"
        say(f"W&B      {folder / 'wandb'}  ({note})")
    say("next     python -m b3_lightning compare RUN RUN ...  |  --data.batches=random for the baseline arm")


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
    console = Console(highlight=False)
    console.print(f"{len(metrics.rank_of_row_N2):,} queries, each against {metrics.n_targets:,} unique targets")
    console.print(table)
