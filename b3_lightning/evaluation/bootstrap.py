"""Are two models different? Queries drawn again, the same for both, task by task.

Shapes: R = resamples, Q = queries of a task.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from b3_lightning.evaluation.results import Results
from b3_lightning.evaluation.scoring import METRICS, Columns

log = logging.getLogger(__name__)

N_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class Difference:
    """Ours less the other's, in shares of 1: the difference, its 95% interval, and a two-sided p.

    ``p`` is twice the smaller share of resamples on either side of zero, at least 1 / resamples.
    """

    ours: float
    other: float
    low: float
    high: float
    p: float
    n_tasks: int

    @property
    def value(self) -> float:
        """Ours less the other's."""
        return self.ours - self.other


def compare(
    ours: Results, other: Results, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Differences of the groups, and of the tasks, that both results have.

    Queries are drawn within each task, so that every resample has as many of each task, and the same for both models.

    Raises:
        ValueError: where the results are of two suites, of other rows, or share no task.
    """
    if ours.suite.name != other.suite.name:
        raise ValueError(f"--against holds results of the suite {other.suite.name}; these are of {ours.suite.name}")
    shared = [name for name in ours.tasks() if name in other.tasks()]
    if not shared:
        raise ValueError(f"--against has no task of these: it has {', '.join(other.tasks())}")
    changed = [name for name in shared if ours.rows()[name] != other.rows()[name]]
    if changed:
        raise ValueError(f"--against is of other rows in {', '.join(changed)}; evaluate both on the same files")
    if len(shared) < len(ours.tasks()):
        log.warning(
            "--against lacks %s: left out of the comparison", ", ".join(sorted(set(ours.tasks()) - set(shared)))
        )
    generator = np.random.default_rng(seed)
    values = {name: (ours.tasks()[name].value, other.tasks()[name].value) for name in shared}
    drawn = {name: _differences(ours, other, name, n_resamples, generator) for name in shared}
    groups = {}
    for group, members in ours.suite.groups.items():
        names = [name for name in members if name in shared]
        if names:
            groups[group] = _summary([values[name] for name in names], [drawn[name] for name in names])
    return groups, {name: _summary([values[name]], [drawn[name]]) for name in shared}


def _differences(
    ours: Results, other: Results, name: str, n_resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """(R,) differences of one task."""
    task = ours.tasks()[name]
    metric = METRICS[task.metric]
    both: list[Columns] = []
    for results in (ours, other):
        columns = results.tasks()[name].arrays()
        both.append({task.metric: columns[task.metric]} if task.metric in columns else columns)
    n_queries = len(next(iter(both[0].values())))
    parts = []
    for n in _at_once(n_resamples):
        draw_RQ = generator.integers(n_queries, size=(n, n_queries))
        first, second = (metric({key: values[draw_RQ] for key, values in columns.items()}) for columns in both)
        parts.append(first - second)
    return np.concatenate(parts)


def _at_once(n: int) -> Iterator[int]:
    for start in range(0, n, _RESAMPLES_AT_ONCE):
        yield min(_RESAMPLES_AT_ONCE, n - start)


def _summary(values: list[tuple[float, float]], drawn: list[NDArray[np.float64]]) -> Difference:
    mean_R = np.mean(drawn, axis=0)
    low, high = np.quantile(mean_R, (0.025, 0.975))
    side = min(float((mean_R <= 0).mean()), float((mean_R >= 0).mean()))
    first, second = np.mean(values, axis=0)
    p = min(1.0, max(2 * side, 1 / len(mean_R)))
    return Difference(float(first), float(second), float(low), float(high), p, len(values))
