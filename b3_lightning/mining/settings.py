"""What a user can set about mining; every field is a key of ``data.mining`` in a config."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

EdgeKind = Literal["mutual", "either"]
BackendName = Literal["auto", "cpu", "gpu"]
Search = Literal["exact", "approximate", "faiss", "cuvs"]
Cut = Literal["kaminpar", "louvain"]
CommunityAlgorithm = Literal["louvain", "leiden", "metis", "kaminpar", "none"]
Ranked = Literal["auto", "rows", "labels"]
NegativesOf = Literal["cluster", "row"]
AUTO = "auto"
MAX_LEVEL = 500
_SCORE_FILTERS = ("max_relative_score", "min_margin", "max_score", "min_score")

_OF_THE_WHOLE_PLAN = (
    "cluster_size", "n_negatives", "neighbors", "min_recall", "backend", "graph_gpus", "seed",
    "memory_budget_gib", "per_task",
)  # fmt: skip
"""Settings that a task cannot have of its own."""
_LEAST = {
    "max_level": 1,
    "graph_gpus": 1,
    "first_rank": 0,
    "n_ranks": 1,
    "cluster_size": 2,
    "swap_rounds": 0,
    "n_negatives": 0,
    "seed": 0,
}
_IDLE_WITH: dict[str, tuple[str, tuple[object, ...]]] = {
    "min_recall": ("neighbors", ("exact",)),
    "label_share": ("ranked", ("rows",)),
    "resolution": ("communities", ("metis", "kaminpar", "none")),
    "cut": ("communities", ("metis", "kaminpar", "none")),
    "threshold": ("backend", ("cpu",)),
    "max_level": ("backend", ("cpu",)),
    "negatives_of": ("n_negatives", (0,)),
    "random_negatives": ("n_negatives", (0,)),
    "first_rank": ("ranked", ("labels",)),
    "edges": ("ranked", ("labels",)),
    "neighbors": ("ranked", ("labels",)),
}
"""A setting -> another and its values, with which nothing reads the first."""
_ROWS_PER_LABEL = 10
_CHOICES = {
    "ranked": get_args(Ranked),
    "edges": get_args(EdgeKind),
    "communities": get_args(CommunityAlgorithm),
    "negatives_of": get_args(NegativesOf),
    "neighbors": get_args(Search),
    "cut": get_args(Cut),
    "backend": get_args(BackendName),
}


@dataclass(frozen=True)
class MiningSettings:
    """How hard negatives become clusters (B3, section 4).

    Args:
        first_rank: ranks below it count as likely false negatives: they get no edge, are never drawn as hard negatives
            and are listed for masking (the paper's p). ``auto`` estimates it from the vectors, task by task.
        n_ranks: how many ranks from ``first_rank`` on are hard negatives (the paper's m); ``auto`` grows with
            ``cluster_size``: 40 + 2 K, the line through the authors' own values, and at most a tenth of the rows.
        cluster_size: rows in a cluster (the paper's K, 32 for its batches of 1,024), an eighth of the batch or less;
            the batch size must be a multiple of it.
        ranked: ``rows`` ranks the targets of all other rows; ``labels`` ranks distinct targets, for tasks in which few
            targets serve many rows; ``auto`` takes labels where a target serves ten rows or more on average.
        label_share: in a labels task, the nearest so many of the other labels are hard (at most ``n_ranks``), from rank
            0 on: only the row's own label is left out.
        max_relative_score: a target is too similar where its score exceeds the positive's by this share of its size:
            above ``positive - (1 - max_relative_score) * |positive|``; 0.95 is usual.
        min_margin: a target is too similar where its score is above ``positive - min_margin``.
        max_score: a target is too similar above this cosine.
        min_score: a target is too easy below this cosine and gets no edge.
        edges: ``mutual`` keeps i-j where each lies in the other's window (the paper), ``either`` where one does.
        communities: ``louvain`` or ``leiden`` (then cut by KaMinPar inside the communities), ``metis`` (the paper's own
            k-way partition), ``kaminpar`` (on the whole graph), or ``none`` (random clusters, only improved by swaps).
        resolution: of Louvain and Leiden; above 1 gives smaller communities.
        threshold: cuGraph's Louvain stops where a level gains less modularity; its Leiden has 1e-4 built in, and
            networkit's algorithms have no such setting.
        max_level: of cuGraph's Louvain and Leiden, 500 at most.
        graph_gpus: above 1, communities are found on so many GPUs of this machine by Dask, for graphs that one cannot
            hold (extra ``rapids-cu13``).
        cut: how the communities of ``louvain`` and ``leiden`` become parts of about K: ``kaminpar`` keeps more edges
            and runs on the host, ``louvain`` divides them at ever higher resolutions where the backend is.
        swap_rounds: at most so many rounds of swaps that raise the share of edges kept inside clusters; 0 leaves the
            clusters as they were cut (the paper's recipe is ``communities: metis`` with 0).
        n_negatives: hard negatives written for every row (the paper's h: 5 in B3++).
        negatives_of: drawn from what the whole ``cluster`` finds hard, by how many of its rows do (the paper), or from
            the ``row``'s own window.
        random_negatives: share of the hard negatives that is drawn from all rows instead.
        neighbors: ``exact``; ``approximate`` (faiss's lists on the CPU, extra ``cpu``), see the docs on performance for
            when it costs less; or brute force by ``faiss`` (CPU or GPU) or ``cuvs`` (GPU), ranked again exactly.
        min_recall: where recall, which is measured for all but ``exact``, is below it, mining is refused.
        backend: where mining runs: ``gpu``, ``cpu``, or ``auto``, which takes a GPU where there is one with the
            packages for it, and says why not.
        seed: of every random choice; the same seed and settings give the same plan.
        memory_budget_gib: bounds what the search for neighbours holds beside vectors and result; a GPU gives half of
            its free memory instead.
        per_task: other values for single tasks, such as ``{vqa: {first_rank: 70}}``.

    Score filters act inside the rank window: ranks are counted first, on all targets, then scores decide.
    """

    first_rank: int | Literal["auto"] = 30
    n_ranks: int | Literal["auto"] = 100
    cluster_size: int = 8
    ranked: Ranked = "auto"
    label_share: float = 0.3
    max_relative_score: float | None = None
    min_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    edges: EdgeKind = "mutual"
    communities: CommunityAlgorithm = "louvain"
    resolution: float = 1.0
    threshold: float = 1e-7
    max_level: int = 100
    graph_gpus: int = 1
    cut: Cut = "kaminpar"
    swap_rounds: int = 30
    n_negatives: int = 0
    negatives_of: NegativesOf = "cluster"
    random_negatives: float = 0.0
    neighbors: Search = "exact"
    min_recall: float = 0.95
    backend: BackendName = "auto"
    seed: int = 0
    memory_budget_gib: float = 1.0
    per_task: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value != AUTO and value < least:
                raise ValueError(f"{name}={value} is too small; it must be at least {least}")
        if self.max_level > MAX_LEVEL:
            raise ValueError(f"max_level={self.max_level} must be at most {MAX_LEVEL}, which cuGraph stops at")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} must be below 2^31, which the partitioners stop at")
        for name in ("resolution", "threshold", "memory_budget_gib", "label_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("random_negatives", "label_share", "min_recall"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share, 0 to 1")
        self._check_filters()
        for task in self.per_task:
            self.of_task(task)

    def _check_filters(self) -> None:
        if self.min_margin is not None and self.min_margin < 0:
            raise ValueError(f"min_margin={self.min_margin} must be at least 0: by how much the positive must be above")
        if self.max_score is not None and self.min_score is not None and self.max_score <= self.min_score:
            raise ValueError(f"max_score={self.max_score} must be above min_score={self.min_score}")

    def of_task(self, task: str) -> MiningSettings:
        """These settings with the task's own values in place."""
        own = self.per_task.get(task, {})
        allowed = sorted({setting.name for setting in fields(self)} - set(_OF_THE_WHOLE_PLAN))
        unknown = sorted(set(own) - set(allowed))
        if unknown:
            raise ValueError(f"per_task.{task} sets {', '.join(unknown)}; a task can have its own {', '.join(allowed)}")
        return replace(self, per_task={}, **own)

    @property
    def score_filters(self) -> dict[str, float]:
        """Those of the window's filters by score that are set."""
        return {name: value for name in _SCORE_FILTERS if (value := getattr(self, name)) is not None}

    @property
    def n_random_negatives(self) -> int:
        """How many of a row's ``n_negatives`` are drawn from all rows."""
        return round(self.random_negatives * self.n_negatives)

    def check_used(self) -> None:
        """Refuse a setting that was changed and that nothing reads, with any task's own values."""
        of_task = {task: self.of_task(task) for task in self.per_task}
        default = {setting.name: setting.default for setting in fields(self)}
        for name, (other, idle) in _IDLE_WITH.items():
            value = getattr(self, name)
            if value != default[name] and all(getattr(one, other) in idle for one in (self, *of_task.values())):
                raise ValueError(
                    f"data.mining.{name}={value} is without effect with data.mining.{other}={getattr(self, other)}: "
                    f"change that, or leave {name} at {default[name]}"
                )
            for task, one in of_task.items():
                if name in self.per_task[task] and getattr(one, other) in idle:
                    raise ValueError(
                        f"data.mining.per_task: {name} of {task!r} is without effect with {other}="
                        f"{getattr(one, other)}: change that, or leave {name} out"
                    )
        if self.random_negatives and self.n_negatives and self.n_random_negatives == 0:
            raise ValueError(
                f"data.mining.random_negatives={self.random_negatives} of data.mining.n_negatives={self.n_negatives} "
                f"is less than one: set it above {0.5 / self.n_negatives:g}, or to 0"
            )

    def check_tasks(self, names: tuple[str, ...]) -> None:
        """Refuse values for tasks that do not exist."""
        unknown = sorted(set(self.per_task) - set(names))
        if unknown:
            raise ValueError(f"per_task names unknown tasks {unknown}; the tasks are {list(names)}")

    def ranks_labels(self, n_rows: int, n_targets: int) -> bool:
        """Is a task of so many rows and distinct targets a labels task?"""
        few = n_targets * _ROWS_PER_LABEL <= n_rows
        return self.ranked == "labels" or (self.ranked == "auto" and few)

    def check_fits(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse rows that would fill no task's window or no cluster, and a search that is not installed.

        A task of a mixture may be too small for its window: it has then what ranks there are.

        Args:
            sizes: rows and distinct targets of every task.
        """
        for name, module, extra in (
            ("approximate", "faiss", "cpu"),
            ("faiss", "faiss", "cpu"),
            ("cuvs", "cuvs", "gpu-cu13"),
        ):
            if self.neighbors == name and importlib.util.find_spec(module) is None:
                raise ValueError(
                    f"neighbors={name!r} needs {module}: pip install 'b3_lightning[{extra}]', or set it to exact"
                )
        n_rows = sum(rows for rows, _ in sizes.values())
        if n_rows < self.cluster_size:
            raise ValueError(
                f"{n_rows} rows are fewer than cluster_size={self.cluster_size}; "
                f"set cluster_size to at most {n_rows} or bring more pairs"
            )
        lacking = [self._lacking(name, *size) for name, size in sizes.items()]
        if all(lacking):
            raise ValueError(lacking[0])

    def _lacking(self, task: str, n_rows: int, n_targets: int) -> str:
        """What so many rows lack to fill a task's window; nothing where they do, or where it ranks labels."""
        own = self.of_task(task)
        first_rank = 0 if isinstance(own.first_rank, str) else own.first_rank
        n_ranks = 1 if isinstance(own.n_ranks, str) else own.n_ranks
        if own.ranks_labels(n_rows, n_targets) or n_rows > first_rank + n_ranks:
            return ""
        return (
            f"the {n_rows} rows of task {task!r} are too few for the ranks up to first_rank={first_rank} + "
            f"n_ranks={n_ranks}: more than {first_rank + n_ranks} rows are needed; lower first_rank and n_ranks, "
            "or set them to auto"
        )
