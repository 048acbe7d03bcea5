"""Runs to be compared, wherever they are: a run's folder, an offline W&B file, or a project on a W&B server."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from b3_lightning.mining import MinedPlan
from b3_lightning.reports.offline import is_number, read_offline_run

WANDB = "wandb:"
AXES = {"step": "optimiser steps", "train/rows_seen": "rows seen", "train/seconds": "seconds"}
"""What a metric can be drawn against, and in words."""


@dataclass(frozen=True)
class Ranks:
    """Of the best validation: ``rank_N`` from 0 of the rows ``row_N``, and which pairs these are rows of."""

    row_N: Tensor
    rank_N: Tensor
    pairs: str


@dataclass(frozen=True)
class Run:
    """A run's flat settings and what it logged, one dict of numbers a call, ``step`` among them."""

    name: str
    source: str
    config: dict[str, Any]
    rows: list[dict[str, float]]
    ranks: Ranks | None = None
    url: str | None = None

    def logged(self) -> set[str]:
        """The names of all that it logged."""
        return {name for row in self.rows for name in row}

    def best(self, metric: str) -> dict[str, float]:
        """The row with the highest value of a metric, the lowest of a loss.

        Raises:
            ValueError: where it was never logged.
        """
        there = [row for row in self.rows if metric in row]
        if not there:
            validated = sorted(name for name in self.logged() if name.startswith("val/"))
            why = (
                f"it has {', '.join(validated)}" if validated else "it has not validated yet, or has no data.val_pairs"
            )
            raise ValueError(f"{self.source} holds no {metric}: {why}")
        sign = -1 if metric.endswith("loss") else 1
        return max(there, key=lambda row: sign * row[metric])

    def points(self, metric: str, axis: str) -> list[tuple[float, float]]:
        """(x, value) of every row that holds both, by x; steps as they are counted, from 1."""
        first = 1 if axis == "step" else 0  # Lightning logs what comes after a step under the steps before it
        return sorted((row[axis] + first, row[metric]) for row in self.rows if metric in row and axis in row)


def load_runs(given: Sequence[str]) -> list[Run]:
    """Read every run named; equal names are told apart by their folders.

    Args:
        given: folders of runs; ``.wandb`` files or their ``offline-run-*`` folders; ``wandb:entity/project`` for all
            runs of a project, ``wandb:entity/project/ID`` for one.

    Raises:
        FileNotFoundError: where there is none of these.
        ValueError: where a file is damaged, or the W&B server refuses.
    """
    runs = [run for one in given for run in _load(one)]
    return [replace(run, name=name) for run, name in zip(runs, _distinct(runs), strict=True)]


def _load(given: str) -> Iterator[Run]:
    if given.startswith(WANDB):
        yield from _from_server(given)
        return
    path = Path(given)
    if path.is_dir() and csv_parts(path):
        yield read_csv_run(path)
        return
    if path.suffix == ".wandb" and path.is_file():
        files = [path]
    else:
        # a run that was resumed has one folder a start; their names begin with the time
        files = sorted([*path.glob("*.wandb"), *path.glob("wandb/*run-*/*.wandb")])
    if not files:
        what = (
            "holds neither metrics.csv nor a .wandb file"
            if path.exists()
            else f"is not there (looked from {Path.cwd()})"
        )
        raise FileNotFoundError(f"{given} {what}; name the folder of a run")
    parts = [read_offline_run(file) for file in files]
    rows = _joined([_numbers(row) for row in part.history] for part in parts)
    yield Run(parts[-1].name, given, flat(parts[-1].config), rows, read_ranks(path))


def _joined(parts: Iterable[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The rows of all starts of a run in their order, without steps that a later start made anew."""
    rows: list[dict[str, float]] = []
    for later in parts:
        first = min((row["step"] for row in later if "step" in row), default=math.inf)
        rows = [row for row in rows if row.get("step", -1.0) < first] + later
    return rows


def csv_parts(folder: Path) -> list[Path]:
    """What a run logged, a file for every time that it was started, in this order."""
    last = folder / "metrics.csv"
    earlier = sorted(folder.glob("metrics-until-*.csv"), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
    return [*earlier, *([last] if last.is_file() else [])]


@contextmanager
def _naming(path: Path, *errors: type[Exception], or_else: str = "leave this run out") -> Iterator[None]:
    """Tell of a file in which reading meets one of these errors."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or {or_else}") from error


def read_csv_rows(path: Path) -> list[dict[str, float]]:
    """The numbers of each row; a row that a full disk or a kill cut off is left out.

    Raises:
        ValueError: where anything else is wrong with the file.
    """
    with _naming(path, ValueError, TypeError, csv.Error):
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole)]
    return [{key: value for key, value in row.items() if is_number(value)} for row in rows]


def read_csv_run(folder: Path) -> Run:
    """A run by its folder's metrics.csv and those of earlier starts."""
    rows = _joined(read_csv_rows(part) for part in csv_parts(folder))
    path = folder / "config.yaml"
    config = _read_config(path) if path.is_file() else {}
    return Run(folder.resolve().name, str(folder), flat(config) | _of_plan(config), rows, read_ranks(folder))


def _of_plan(config: dict[str, Any]) -> dict[str, Any]:
    """What the plan was mined with that a run was given, where that still is there: its own settings had no say."""
    given = (config.get("data") or {}).get("plan")
    if given is None or not Path(given).is_dir():
        return {}
    settings = dataclasses.asdict(MinedPlan.settings_of(given))
    return {f"{name} of data.plan": value for name, value in flat(settings).items()}


def _read_config(path: Path) -> dict[str, Any]:
    with _naming(path, yaml.YAMLError, UnicodeDecodeError):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict | None):
        raise ValueError(f"{path} is no config of a run: copy it again, or leave this run out")
    return config or {}


def _from_server(given: str) -> Iterator[Run]:
    import wandb

    parts = given.removeprefix(WANDB).strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{given} should be {WANDB}ENTITY/PROJECT or {WANDB}ENTITY/PROJECT/RUN_ID")
    try:
        api = wandb.Api()
        found = [api.run("/".join(parts))] if len(parts) == 3 else list(api.runs("/".join(parts)))
        for run in found:
            rows = [_numbers(row) for row in run.scan_history()]
            yield Run(run.name or run.id, run.url, flat(dict(run.config)), rows, None, run.url)
    except (wandb.errors.Error, wandb.errors.CommError) as error:
        raise ValueError(
            f"W&B does not give {given}: {error}. Log in with 'wandb login', and check the name"
        ) from error
    if not found:
        raise ValueError(f"{given} holds no runs")


def read_ranks(folder: Path) -> Ranks | None:
    """What ``fit`` kept of its best validation, query by query.

    Raises:
        ValueError: where the file is damaged.
    """
    path = folder / "val_ranks.safetensors"
    if not path.is_file():
        return None
    or_else = "remove it, and the run is compared without intervals"
    with _naming(path, SafetensorError, KeyError, TypeError, or_else=or_else), safe_open(path, "pt") as file:
        return Ranks(file.get_tensor("row"), file.get_tensor("rank"), file.metadata()["pairs"])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row of W&B under the names that metrics.csv has; pictures, tables and W&B's own keys left out."""
    numbers = {key: float(value) for key, value in row.items() if is_number(value) and not key.startswith("_")}
    if "trainer/global_step" in numbers:
        numbers["step"] = numbers.pop("trainer/global_step")
    return numbers


def _distinct(runs: Sequence[Run]) -> list[str]:
    """Names, with as much of the folders before them as tells them apart, and else a number."""
    names = [run.name for run in runs]
    for n_parts in (2, 3):
        double = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(Path(run.source).resolve().parts[-n_parts:]) if name in double and run.url is None else name
            for run, name in zip(runs, names, strict=True)
        ]
    seen: dict[str, int] = {}
    numbered = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        numbered.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return numbered


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; W&B's own are left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "_wandb":
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
