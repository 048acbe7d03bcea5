"""The result of mining: every stage's output, what it measures, and its folder on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from b3_lightning.mining.batches import BatchPlan
from b3_lightning.mining.edges import arcs_by_tile
from b3_lightning.mining.ranks import RankChoice
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.mining.stages import fingerprint
from b3_lightning.mining.store import check_sha256, sha256, write_atomic, write_json
from b3_lightning.types import PADDING, Clusters, Communities, Edges, Neighbors, Window

FORMAT_VERSION = 3
LITTLE_OF_THE_WAY = 0.1
"""From random batches to the hardest possible: no further, and mining buys little."""


@dataclass(frozen=True)
class MinedPlan:
    """All clusters of all tasks, with the stages that led to them.

    ``task_N`` (int64) indexes ``task_names``. ``negative_NH`` (int64) holds rows whose targets are hard negatives, -1
    where too few were found. ``pairs`` is the fingerprint of the pairs, empty where bare vectors were mined. ``ranks``
    tells the window of every task, ``hardness`` the teacher's mean loss in
    ``mined`` and ``random`` batches and the ``best`` possible, ``seconds`` the time of each stage.
    """

    neighbors: Neighbors
    window: Window
    edges: Edges
    communities: Communities
    clusters: Clusters
    negative_NH: Tensor
    task_N: Tensor
    task_names: tuple[str, ...]
    settings: MiningSettings
    ranks: Mapping[str, RankChoice]
    hardness: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    pairs: str = ""

    def __post_init__(self) -> None:
        n_rows = len(self.task_N)
        for name, length in (
            ("neighbors", len(self.neighbors)),
            ("edges", self.edges.n_rows),
            ("communities", len(self.communities.label_N)),
            ("clusters", self.clusters.n_rows),
            ("negatives", len(self.negative_NH)),
        ):
            if length != n_rows:
                raise ValueError(f"the plan's {name} are of {length} rows, its tasks of {n_rows}")

    @property
    def n_rows(self) -> int:
        return len(self.task_N)

    def batches(self, *, batch_size: int, seed: int, task_weights: Mapping[str, float] | None = None) -> BatchPlan:
        """The batches of every epoch, drawn from these clusters."""
        return BatchPlan(
            self.clusters,
            batch_size=batch_size,
            seed=seed,
            task_N=self.task_N,
            task_names=self.task_names,
            task_weights=task_weights,
        )

    def masked_ids(self, ids_B: Tensor) -> Tensor:
        """(B, M) int64: the rows whose targets are likely right for each of these rows, padded with -1 to the most."""
        masked_BW = self.window.masked_NW[ids_B]
        # those that count come first, in the order of their ranks
        order_BW = (~masked_BW).to(torch.uint8).argsort(dim=1, stable=True)
        ids_BW = self.neighbors.ids_NW[ids_B].masked_fill(~masked_BW, PADDING).gather(1, order_BW)
        n_most = int(masked_BW.sum(dim=1).max()) if len(ids_B) else 0
        return ids_BW[:, :n_most].contiguous()

    @cached_property
    def filler_N(self) -> Tensor:
        """(N,) bool: no row of its cluster is a hard neighbour of it, and it is one of none of them."""
        cluster_N = self.clusters.cluster_of_row()
        filler_N = torch.ones(self.n_rows, dtype=torch.bool)
        for from_A, to_A in arcs_by_tile(self.neighbors, self.window):
            together_A = cluster_N[from_A] == cluster_N[to_A]
            filler_N[torch.cat([from_A[together_A], to_A[together_A]])] = False
        return filler_N

    def own_settings(self) -> list[MiningSettings]:
        """Of every task, with what it sets for itself."""
        return [self.settings.of_task(name) for name in self.task_names]

    def __repr__(self) -> str:
        told = ("n_rows", "n_edges", "n_clusters", "n_fillers", "hardness_mined")
        shown = ", ".join(f"{name}={value:g}" for name, value in self.summary().items() if name in told)
        return f"MinedPlan({shown}, cluster_size={self.clusters.cluster_size}, tasks={list(self.task_names)})"

    def way_to_hardest(self) -> float | None:
        """How far the batches are from random ones (0) to the hardest possible (1); None where it was not measured.

        All without what the plan masks. 0 too where they are easier than random ones, or no window makes them harder.
        """
        if not self.hardness:
            return None
        whole, gone = (self.hardness[name] - self.hardness["random_masked"] for name in ("best", "mined"))
        return max(0.0, gone / whole) if whole > 0 else 0.0

    def summary(self) -> dict[str, float]:
        """What was found: counts, ``kept_frac`` (edges whose two ends share a cluster), fillers, hardness, seconds."""
        return dict(self._summary)

    @cached_property
    def _summary(self) -> dict[str, float]:
        cluster_N = self.clusters.cluster_of_row()
        kept = self.edges.within(cluster_N)
        return {
            "n_rows": self.n_rows,
            "n_edges": len(self.edges),
            "n_communities": len(self.communities),
            "n_clusters": len(self.clusters),
            "kept_frac": len(kept) / max(1, len(self.edges)),
            "n_rows_without_edge": int((~self.edges.is_joined()).sum()),
            "n_fillers": int(self.filler_N.sum()),
            "n_masked": int(self.window.masked_NW.sum()),
            "n_negatives_lacking": int((self.negative_NH == PADDING).sum()),
            **{f"hardness_{name}": value for name, value in self.hardness.items() if name != "batch_size"},
            "seconds": sum(self.seconds.values()),
        }

    def save(self, directory: str | Path) -> None:
        """Write plan.parquet, edges.parquet, neighbors.safetensors and, last, plan.json with their checksums."""
        folder = Path(directory)
        neighbors = {
            "ids_NW": self.neighbors.ids_NW.contiguous(),
            "scores_NW": self.neighbors.scores_NW.contiguous(),
            "positive_score_N": self.neighbors.positive_score_N.contiguous(),
            "hard_NW": self.window.hard_NW,
            "masked_NW": self.window.masked_NW,
            "negative_NH": self.negative_NH,
        }
        edges = {
            "source": self.edges.source_E.numpy(),
            "target": self.edges.target_E.numpy(),
            "weight": self.edges.weight_E.numpy(),
        }
        write_atomic(folder / "neighbors.safetensors", lambda path: save_file(neighbors, path))
        write_atomic(folder / "edges.parquet", lambda path: pq.write_table(pa.table(edges), path))
        write_atomic(folder / "plan.parquet", lambda path: pq.write_table(self._row_table(), path))
        description = {
            "format_version": FORMAT_VERSION,
            "settings": dataclasses.asdict(self.settings),
            "task_names": list(self.task_names),
            "n_rows": self.n_rows,
            "pairs": self.pairs,
            "ranks": {name: dataclasses.asdict(choice) for name, choice in self.ranks.items()},
            "hardness": dict(self.hardness),
            "seconds": dict(self.seconds),
            "summary": self.summary(),
            "sha256": {name: sha256(folder / name) for name in _DATA_FILES},
        }
        write_json(folder / "plan.json", description | {_OWN_SHA256: fingerprint(description=description)})

    def _row_table(self) -> pa.Table:
        filled_CK = self.clusters.ids_CK != PADDING
        cluster_C, position_K = filled_CK.nonzero(as_tuple=True)
        row_R = self.clusters.ids_CK[filled_CK]
        names = pa.array(list(self.task_names))
        return pa.table(
            {
                "row": row_R.numpy(),
                "task": pa.DictionaryArray.from_arrays(self.task_N[row_R].numpy(), names).dictionary_decode(),
                "community": self.communities.label_N[row_R].numpy(),
                "cluster": cluster_C.numpy(),
                "position": position_K.numpy(),
            }
        )

    @staticmethod
    def settings_of(directory: str | Path) -> MiningSettings:
        """What the plan of a folder was mined with; errors as of ``load``."""
        return MiningSettings(**_describe(Path(directory))["settings"])

    @classmethod
    def load(cls, directory: str | Path) -> MinedPlan:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: where ``plan.json`` or a file it names is missing.
            ValueError: where a file is of another version or was changed.
        """
        folder = Path(directory)
        description = _describe(folder)
        for name, expected in description["sha256"].items():
            check_sha256(folder / name, expected)
        task_names = tuple(description["task_names"])
        tensors = load_file(folder / "neighbors.safetensors")
        plan = cls(
            neighbors=Neighbors(tensors["ids_NW"], tensors["scores_NW"], tensors["positive_score_N"]),
            window=Window(tensors["hard_NW"], tensors["masked_NW"]),
            negative_NH=tensors["negative_NH"],
            edges=_read_edges(folder / "edges.parquet", description["n_rows"]),
            **_read_rows(folder / "plan.parquet", task_names, description["settings"]["cluster_size"]),
            task_names=task_names,
            settings=MiningSettings(**description["settings"]),
            ranks={name: RankChoice(**choice) for name, choice in description["ranks"].items()},
            hardness=description["hardness"],
            seconds=description["seconds"],
            pairs=description.get("pairs", ""),
        )
        vars(plan)["_summary"] = description["summary"]  # a second for a million rows, and asked for by every process
        return plan

    def check_rows(self, n_rows: int, pairs: str | None = None) -> None:
        """Refuse pairs that this plan was not mined from; ``pairs`` is their fingerprint, if known."""
        if n_rows != self.n_rows:
            raise ValueError(
                f"the plan was mined from {self.n_rows} rows, the training pairs have {n_rows}; mine again"
            )
        if self.pairs and pairs is not None and self.pairs != pairs:
            raise ValueError(
                f"the plan was mined from other pairs, of which there are {n_rows} too (other texts, images, keys, "
                "order or prompts): mine again, or give the pairs that it was mined from"
            )


_OWN_SHA256 = "sha256_of_the_rest"
_DATA_FILES = ("plan.parquet", "edges.parquet", "neighbors.safetensors")


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / "plan.json"
    if not path.is_file():
        how = f"name its folder, {folder.parent}" if folder.is_file() else "make one with the 'mine' command"
        raise FileNotFoundError(f"{folder} holds no mined plan (no plan.json); {how}")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is damaged ({error}): mine again, or restore it from a backup") from error
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {description.get('format_version')}; this release reads {FORMAT_VERSION}: "
            "mine again"
        )
    if description.pop(_OWN_SHA256, "") != fingerprint(description=description):
        raise ValueError(f"{path} is not what was written: mine again, or restore it from a backup")
    return description


def _read_edges(path: Path, n_rows: int) -> Edges:
    table = pq.read_table(path)
    column = {name: torch.tensor(table[name].to_numpy()) for name in ("source", "target", "weight")}
    return Edges(column["source"], column["target"], column["weight"], n_rows)


def rows_of_task(task_N: Tensor, task_names: Sequence[str]) -> dict[str, int]:
    """How many rows each task has, in their order."""
    counts = task_N.bincount(minlength=len(task_names)).tolist()
    return dict(zip(task_names, counts, strict=True))


def _read_rows(path: Path, task_names: tuple[str, ...], cluster_size: int) -> dict[str, Any]:
    table = pq.read_table(path)
    row, community, cluster, position = (
        torch.tensor(table[name].to_numpy()) for name in ("row", "community", "cluster", "position")
    )
    task_id = {name: task for task, name in enumerate(task_names)}
    task_N = torch.empty(len(row), dtype=torch.int64)
    task_N[row] = torch.tensor([task_id[name] for name in table["task"].to_pylist()])
    label_N = torch.empty(len(row), dtype=torch.int64)
    label_N[row] = community
    ids_CK = torch.full((int(cluster.max()) + 1, cluster_size), PADDING, dtype=torch.int64)
    ids_CK[cluster, position] = row
    return {"communities": Communities(label_N), "clusters": Clusters(ids_CK), "task_N": task_N}


def join_tasks(
    parts: Sequence[tuple[Tensor, MinedPlan]], task_N: Tensor, task_names: tuple[str, ...], settings: MiningSettings
) -> MinedPlan:
    """Put the tasks' plans, each with the rows it is of, back on the row ids of the whole."""
    if len(parts) == 1:
        return parts[0][1]
    n_rows, width = len(task_N), max(part.neighbors.ids_NW.shape[1] for _, part in parts)
    ids_NW = torch.full((n_rows, width), PADDING, dtype=torch.int64)
    scores_NW = torch.full((n_rows, width), -torch.inf)
    hard_NW, masked_NW = torch.zeros(n_rows, width, dtype=torch.bool), torch.zeros(n_rows, width, dtype=torch.bool)
    positive_N, label_N = torch.empty(n_rows), torch.empty(n_rows, dtype=torch.int64)
    negative_NH = torch.empty(n_rows, settings.n_negatives, dtype=torch.int64)
    clusters, n_labels = [], 0
    for rows, part in parts:
        own = slice(part.neighbors.ids_NW.shape[1])
        ids_NW[rows, own] = _renumber(part.neighbors.ids_NW, rows)
        scores_NW[rows, own] = part.neighbors.scores_NW
        hard_NW[rows, own], masked_NW[rows, own] = part.window.hard_NW, part.window.masked_NW
        positive_N[rows] = part.neighbors.positive_score_N
        negative_NH[rows] = _renumber(part.negative_NH, rows)
        label_N[rows] = part.communities.label_N + n_labels
        n_labels += len(part.communities)
        clusters.append(_renumber(part.clusters.ids_CK, rows))
    return MinedPlan(
        neighbors=Neighbors(ids_NW, scores_NW, positive_N),
        window=Window(hard_NW, masked_NW),
        edges=_join_edges([(rows, part.edges) for rows, part in parts], n_rows),
        communities=Communities(label_N),
        clusters=Clusters(torch.cat(clusters)),
        negative_NH=negative_NH,
        task_N=task_N,
        task_names=task_names,
        settings=settings,
        ranks={name: choice for _, part in parts for name, choice in part.ranks.items()},
        seconds={stage: sum(part.seconds[stage] for _, part in parts) for stage in parts[0][1].seconds},
    )


def _join_edges(parts: Sequence[tuple[Tensor, Edges]], n_rows: int) -> Edges:
    return Edges(
        torch.cat([rows[edges.source_E] for rows, edges in parts]),
        torch.cat([rows[edges.target_E] for rows, edges in parts]),
        torch.cat([edges.weight_E for _, edges in parts]),
        n_rows,
    )


def _renumber(ids: Tensor, rows: Tensor) -> Tensor:
    """Ids of a task's rows -> ids of the whole; padding stays."""
    return torch.where(ids == PADDING, PADDING, rows[ids.clamp(min=0)])
