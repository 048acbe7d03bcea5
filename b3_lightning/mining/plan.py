"""The result of mining: every stage's output, what it measures, and its folder on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from b3_lightning.mining.batches import BatchPlan
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.mining.store import check_sha256, sha256, write_atomic, write_json
from b3_lightning.types import PADDING, Clusters, Communities, Edges, Neighbors

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MinedPlan:
    """All clusters of all tasks, with the stages that led to them.

    ``task_N`` (int64) indexes ``task_names``; ``seconds`` holds the time of each stage.
    """

    neighbors: Neighbors
    edges: Edges
    communities: Communities
    clusters: Clusters
    task_N: Tensor
    task_names: tuple[str, ...]
    settings: MiningSettings
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_rows = len(self.task_N)
        for name, length in (
            ("neighbors", len(self.neighbors)),
            ("edges", self.edges.n_rows),
            ("communities", len(self.communities.label_N)),
            ("clusters", self.clusters.n_rows),
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

    def summary(self) -> dict[str, float]:
        """What was found: counts, ``kept_frac`` (edges whose two ends share a cluster), fillers, seconds."""
        cluster_N = self.clusters.cluster_of_row()
        kept = self.edges.within(cluster_N)
        has_edge_N = torch.zeros(self.n_rows, dtype=torch.bool)
        has_edge_N[self.edges.source_E] = True
        has_edge_N[self.edges.target_E] = True
        at_home_N = torch.zeros(self.n_rows, dtype=torch.bool)
        at_home_N[kept.source_E] = True
        at_home_N[kept.target_E] = True
        return {
            "n_rows": self.n_rows,
            "n_edges": len(self.edges),
            "n_communities": len(self.communities),
            "n_clusters": len(self.clusters),
            "kept_frac": len(kept) / max(1, len(self.edges)),
            "n_rows_without_edge": int((~has_edge_N).sum()),
            "n_fillers": int((~at_home_N).sum()),
            "seconds": sum(self.seconds.values()),
        }

    def save(self, directory: str | Path) -> None:
        """Write plan.parquet, edges.parquet, neighbors.safetensors and, last, plan.json with their checksums."""
        folder = Path(directory)
        neighbors = {
            "ids_NW": self.neighbors.ids_NW.contiguous(),
            "scores_NW": self.neighbors.scores_NW.contiguous(),
            "positive_score_N": self.neighbors.positive_score_N.contiguous(),
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
            "seconds": dict(self.seconds),
            "summary": self.summary(),
            "sha256": {name: sha256(folder / name) for name in _DATA_FILES},
        }
        write_json(folder / "plan.json", description)

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

    @classmethod
    def load(cls, directory: str | Path) -> MinedPlan:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: where ``plan.json`` or a file it names is missing.
            ValueError: where a file is of another version or was changed.
        """
        folder = Path(directory)
        path = folder / "plan.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no mined plan (no plan.json); make one with the 'mine' command")
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {description.get('format_version')}; this release reads {FORMAT_VERSION}: "
                "mine again"
            )
        for name, expected in description["sha256"].items():
            check_sha256(folder / name, expected)
        task_names = tuple(description["task_names"])
        return cls(
            neighbors=Neighbors(**load_file(folder / "neighbors.safetensors")),
            edges=_read_edges(folder / "edges.parquet", description["n_rows"]),
            **_read_rows(folder / "plan.parquet", task_names, description["settings"]["cluster_size"]),
            task_names=task_names,
            settings=MiningSettings(**description["settings"]),
            seconds=description["seconds"],
        )

    def check_rows(self, n_rows: int) -> None:
        """Refuse pairs that this plan was not mined from."""
        if n_rows != self.n_rows:
            raise ValueError(
                f"the plan was mined from {self.n_rows} rows, the training pairs have {n_rows}; mine again"
            )


_DATA_FILES = ("plan.parquet", "edges.parquet", "neighbors.safetensors")


def _read_edges(path: Path, n_rows: int) -> Edges:
    table = pq.read_table(path)
    column = {name: torch.tensor(table[name].to_numpy()) for name in ("source", "target", "weight")}
    return Edges(column["source"], column["target"], column["weight"], n_rows)


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
