"""Results on disk: one file for each finished set, and one of them all, with what every query gave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b3_lightning.evaluation.scoring import METRICS, Columns, Scoring, check_vectors
from b3_lightning.evaluation.sets import EvalSet
from b3_lightning.evaluation.suites import SUITES, Suite
from b3_lightning.mining.store import write_text

FORMAT = 1


@dataclass(frozen=True)
class TaskResult:
    """One task: its metric, its figures (shares of 1), and the columns of values by query that they are made of."""

    metric: str
    figures: dict[str, float]
    columns: dict[str, list[float]]

    @classmethod
    def of(cls, scoring: Scoring, vector_UD: Any) -> TaskResult:
        """Score vectors of the set's items."""
        columns = scoring.columns(vector_UD)
        names = [scoring.metric, *(name for name in columns if name in METRICS and name != scoring.metric)]
        figures = {name: float(METRICS[name](columns)) for name in names}
        return cls(scoring.metric, figures, {name: _compact(values) for name, values in columns.items()})

    @property
    def value(self) -> float:
        """The task's figure."""
        return self.figures[self.metric]

    def arrays(self) -> Columns:
        """Its columns for ``METRICS``."""
        return {name: np.asarray(values, dtype=np.float64) for name, values in self.columns.items()}


def _compact(values: Any) -> list[float]:
    """Whole numbers as such, so that a file of hits is one of 0 and 1."""
    return [int(value) if value == int(value) else float(value) for value in values.tolist()]


@dataclass(frozen=True)
class SetResult:
    """One finished set; ``fingerprint`` names the model, the data and the settings that it holds for."""

    name: str
    fingerprint: str
    rows: str
    n_items: int
    notes: dict[str, int]
    tasks: dict[str, TaskResult]

    @classmethod
    def of(cls, eval_set: EvalSet, vector_UD: Any, fingerprint: str) -> SetResult:
        """Score all tasks of a set."""
        check_vectors(vector_UD)
        tasks = {name: TaskResult.of(scoring, vector_UD) for name, scoring in eval_set.tasks.items()}
        return cls(eval_set.name, fingerprint, eval_set.rows, len(eval_set.items), eval_set.notes, tasks)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> SetResult:
        """Of what ``asdict`` gave."""
        tasks = {name: TaskResult(**task) for name, task in given["tasks"].items()}
        return cls(**{**given, "tasks": tasks})

    def save(self, path: Path) -> None:
        """Write one file."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> SetResult | None:
        """The result, or None where there is no whole one with this fingerprint."""
        if not path.is_file():
            return None
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            fits = given.pop("format") == FORMAT and given["fingerprint"] == fingerprint
            return cls.from_dict(given) if fits else None
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Mean:
    """An unweighted mean over the tasks of a group that are there: ``n_tasks`` of ``n_group``."""

    value: float
    n_tasks: int
    n_group: int

    @property
    def complete(self) -> bool:
        """Is every task of the group in it?"""
        return self.n_tasks == self.n_group


@dataclass(frozen=True)
class Results:
    """All sets of one model in one suite.

    Args:
        settings: of the run, for a reader.
    """

    suite: Suite
    model: str
    settings: dict[str, Any]
    sets: list[SetResult]

    def tasks(self) -> dict[str, TaskResult]:
        """Every task by name."""
        return {name: task for result in self.sets for name, task in result.tasks.items()}

    def rows(self) -> dict[str, str]:
        """Every task's fingerprint of rows."""
        return {name: result.rows for result in self.sets for name in result.tasks}

    def means(self, figure: str | None = None) -> dict[str, Mean]:
        """The groups that have a task; of each task's own metric, or of the figure named."""
        return dict(self._means(figure))

    def _means(self, figure: str | None) -> Iterator[tuple[str, Mean]]:
        values = {name: task.figures[figure or task.metric] for name, task in self.tasks().items()}
        for group, members in self.suite.groups.items():
            there = [values[name] for name in members if name in values]
            if there:
                yield group, Mean(float(np.mean(there)), len(there), len(members))

    def save(self, path: Path) -> None:
        """Write results.json: a line for each set, the means above them."""
        head = {
            "format": FORMAT,
            "suite": self.suite.name,
            "model": self.model,
            "settings": self.settings,
            "means": {name: asdict(mean) for name, mean in self.means().items()},
        }
        lines = ",\n".join(json.dumps(asdict(result)) for result in self.sets)
        write_text(path, json.dumps(head, indent=2)[:-2] + f',\n  "sets": [\n{lines}\n]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results.json, or the folder that holds it.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it is none.
        """
        file = path / "results.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no results {file}; name the results.json that evaluate wrote, or its folder")
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            sets = [SetResult.from_dict(one) for one in given["sets"]]
            return cls(SUITES[given["suite"]], given["model"], given["settings"], sets)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no results.json of evaluate ({error!r}); run evaluate again") from error
