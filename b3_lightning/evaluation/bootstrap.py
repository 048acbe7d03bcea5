"""Are two models different? Queries drawn again, the same for both: of one set, or task by task.

Shapes: R = draws (all, or of a tile), Q = queries of a task.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from b3_lightning.evaluation.results import Results
from b3_lightning.evaluation.scoring import METRICS, Columns

log = logging.getLogger(__name__)

N_DRAWS = 2000
"""They give the ends to about 2% of the interval."""
_DRAWN_AT_ONCE = 2**22


class PairedDifference(NamedTuple):
    """The mean of ``a - b`` and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    a_Q: Tensor, b_Q: Tensor, *, n_draws: int = N_DRAWS, generator: torch.Generator
) -> PairedDifference:
    """How sure a difference is: both arms answer the same queries, which are drawn again with replacement.

    Args:
        a_Q: (Q,) a value of each query, such as its reciprocal rank.
        b_Q: (Q,) the other arm's, in the same order.
    """
    if a_Q.shape != b_Q.shape or a_Q.ndim != 1 or len(a_Q) == 0:
        raise ValueError(f"values of {tuple(a_Q.shape)} and {tuple(b_Q.shape)}; both need (queries,), the same ones")
    difference_Q = (a_Q.double() - b_Q.double()).numpy()
    means = [difference_Q[draw_RQ].mean(axis=1) for draw_RQ in _draws(len(difference_Q), n_draws, generator)]
    return PairedDifference(float(difference_Q.mean()), *_ends(np.concatenate(means)))


@dataclass(frozen=True)
class Difference:
    """Ours less the other's, in shares of 1: the difference, its 95% interval, and a two-sided p.

    ``p`` is twice the smaller share of draws on either side of zero, at least 1 / draws.
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
    ours: Results, other: Results, *, n_draws: int = N_DRAWS, seed: int = 0
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Differences of the groups, and of the tasks, that both results have.

    Queries are drawn within each task, so that every draw has as many of each task, and the same for both models.

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
    generator = torch.Generator().manual_seed(seed)
    values = {name: (ours.tasks()[name].value, other.tasks()[name].value) for name in shared}
    drawn = {name: _differences(ours, other, name, n_draws, generator) for name in shared}
    groups = {}
    for group, members in ours.suite.groups.items():
        names = [name for name in members if name in shared]
        if names:
            groups[group] = _summary([values[name] for name in names], [drawn[name] for name in names])
    return groups, {name: _summary([values[name]], [drawn[name]]) for name in shared}


def _differences(
    ours: Results, other: Results, name: str, n_draws: int, generator: torch.Generator
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
    for draw_RQ in _draws(n_queries, n_draws, generator):
        first, second = (metric({key: values[draw_RQ] for key, values in columns.items()}) for columns in both)
        parts.append(first - second)
    return np.concatenate(parts)


def _draws(n_queries: int, n_draws: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """(R, Q) positions of queries drawn with replacement, a tile at a time."""
    tile = max(1, _DRAWN_AT_ONCE // n_queries)
    for start in range(0, n_draws, tile):
        yield torch.randint(n_queries, (min(tile, n_draws - start), n_queries), generator=generator).numpy()


def _ends(value_R: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(value_R, (0.025, 0.975))
    return float(low), float(high)


def _summary(values: list[tuple[float, float]], drawn: list[NDArray[np.float64]]) -> Difference:
    mean_R = np.mean(drawn, axis=0)
    side = min(float((mean_R <= 0).mean()), float((mean_R >= 0).mean()))
    first, second = np.mean(values, axis=0)
    p = min(1.0, max(2 * side, 1 / len(mean_R)))
    return Difference(float(first), float(second), *_ends(mean_R), p, len(values))
