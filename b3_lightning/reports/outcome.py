"""What a finished run says on the terminal."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from b3_lightning.reports.compare import SHOWN, best_validation


def print_outcome(trainer: L.Trainer, folder: Path, *, offline: bool) -> None:
    """Print the best and the last validation of a run, where things lie, and what to do next."""
    console = Console()
    console.print(f"\n{trainer.global_step} steps, {trainer.current_epoch} epochs", highlight=False)
    if "val/mrr" in trainer.callback_metrics and (folder / "metrics.csv").is_file():
        best = best_validation(folder)
        table = Table("metric", "best", "last", title="all unique validation targets")
        for name in SHOWN:
            table.add_row(name, f"{best[name]:.4f}", f"{float(trainer.callback_metrics[name]):.4f}")
        console.print(table)
    console.print(f"run      {folder}  (config.yaml, metrics.csv, checkpoints)", highlight=False)
    console.print(f"export   {folder / 'export'}  (the best weights; SentenceTransformer loads it)", highlight=False)
    if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        note = f"offline; upload with: wandb sync {folder}/wandb/offline-run-*" if offline else "online"
        console.print(f"W&B      {folder / 'wandb'}  ({note})", highlight=False)
    console.print("next     python -m b3_lightning compare RUN RUN ...  |  --data.batches=random for the baseline arm")
