"""Finished runs side by side, from the metrics.csv and config.yaml that each leaves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

SHOWN = ("val/hit@1", "val/hit@5", "val/hit@10", "val/mrr", "val/ndcg@10", "val/loss")


def compare_runs(runs: list[str]) -> None:
    """Print the best validation of each run, and the settings in which they differ.

    Args:
        runs: folders of runs.
    """
    folders = [Path(run) for run in runs]
    best = [best_validation(folder) for folder in folders]
    configs = [_flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))) for folder in folders]
    console = Console()
    table = Table("", *(folder.name for folder in folders), title="validation at the step of the best MRR")
    for name in ("step", *SHOWN):
        table.add_row(name, *(f"{row[name]:.4f}" if name != "step" else f"{row[name]:.0f}" for row in best))
    console.print(table)
    differing = sorted(key for key in set().union(*configs) if len({str(config.get(key)) for config in configs}) > 1)
    settings = Table("setting", *(folder.name for folder in folders), title="settings that differ")
    for key in differing:
        settings.add_row(key, *(str(config.get(key, "")) for config in configs))
    console.print(settings)


def best_validation(folder: Path) -> dict[str, float]:
    """The row of metrics.csv with the highest ``val/mrr``.

    Raises:
        FileNotFoundError: where the folder holds no metrics.csv.
        ValueError: where no validation was logged.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.csv; name the folder of a run")
    rows = []
    for part in [*sorted(folder.glob("metrics-until-*.csv")), path]:
        with part.open(encoding="utf-8", newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("val/mrr")]
    if not rows:
        raise ValueError(f"{path} holds no validation; runs need data.val_pairs to be compared")
    best = max(rows, key=lambda row: float(row["val/mrr"]))
    return {name: float(best[name]) for name in ("step", *SHOWN)}


def keep_old_metrics(folder: Path) -> None:
    """Move the metrics of a run that is resumed aside: Lightning's logger begins its file anew."""
    path = folder / "metrics.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            step = max((int(row["step"]) for row in csv.DictReader(file)), default=0)
        n_before = len(list(folder.glob("metrics-until-*.csv")))
        path.rename(folder / f"metrics-until-{step:08d}-{n_before}.csv")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
