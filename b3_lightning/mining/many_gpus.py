"""Communities of a graph that one GPU cannot hold: cuGraph's Louvain and Leiden over the GPUs of this machine, by Dask.

Shapes: N = rows, E = edges, V = vertices found.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from b3_lightning.mining.groups import permutation
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import Edges

_EDGES_A_FILE = 2**24


@dataclass(frozen=True)
class DaskLibraries:
    """The modules that hold a graph on many GPUs."""

    dask_cuda: Any
    distributed: Any
    dask_cudf: Any
    cugraph: Any
    cugraph_dask: Any
    comms: Any

    @classmethod
    def load(cls) -> DaskLibraries:
        """Import them (extra ``rapids-cu13``)."""
        names = {"cugraph_dask": "cugraph.dask", "comms": "cugraph.dask.comms.comms"}
        names |= {name: name for name in ("dask_cuda", "distributed", "dask_cudf", "cugraph")}
        return cls(**{name: importlib.import_module(module) for name, module in names.items()})

    @contextmanager
    def cluster(self, n_gpus: int) -> Iterator[None]:
        """A worker on each of the first ``n_gpus``, joined."""
        with (
            self.dask_cuda.LocalCUDACluster(
                n_workers=n_gpus, rmm_allocator_external_lib_list=["torch", "cupy"]
            ) as workers,
            self.distributed.Client(workers),
        ):
            self.comms.initialize(p2p=True)
            try:
                yield
            finally:
                self.comms.destroy()


def communities(edges: Edges, libraries: DaskLibraries, settings: MiningSettings) -> Tensor:
    """(N,) int64 labels on the CPU; equal for one number of GPUs and one seed, as far as cuGraph is.

    Rows without an edge, which this API leaves out, become communities of their own.
    """
    if TYPE_CHECKING:  # so that a type checker holds these calls against the real packages, where it finds them
        import cugraph
        import cugraph.dask as cugraph_dask
        import dask_cudf
    else:
        cugraph, cugraph_dask, dask_cudf = libraries.cugraph, libraries.cugraph_dask, libraries.dask_cudf
    permutation_N = permutation(edges.n_rows, settings.seed, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="b3_lightning_") as folder, libraries.cluster(settings.graph_gpus):
        _write(edges, permutation_N, Path(folder))
        graph = cugraph.Graph(directed=False)  # undirected: it adds the other direction itself
        graph.from_dask_cudf_edgelist(
            dask_cudf.read_parquet(folder), source="source", destination="target", weight="weight"
        )
        if settings.communities == "louvain":
            found, _ = cugraph_dask.louvain(
                graph, max_level=settings.max_level, resolution=settings.resolution, threshold=settings.threshold
            )
        else:
            found, _ = cugraph_dask.leiden(
                graph,
                max_iter=settings.max_level,
                resolution=settings.resolution,  # pyright: ignore[reportArgumentType]  # declared int = 1.0 there
                random_state=settings.seed,
            )
        table = found.compute().to_arrow()
    vertex_V, label_V = (torch.tensor(table[name].to_numpy()).long() for name in ("vertex", "partition"))
    first_own = int(label_V.max()) + 1 if len(label_V) else 0
    label_N = torch.arange(edges.n_rows) + first_own
    label_N[vertex_V] = label_V
    return label_N[permutation_N]


def _write(edges: Edges, permutation_N: Tensor, folder: Path) -> None:
    """One Parquet file for every 16 million edges, so that the workers share the reading."""
    for part, start in enumerate(range(0, len(edges), _EDGES_A_FILE)):
        here = slice(start, start + _EDGES_A_FILE)
        columns = {
            "source": permutation_N[edges.source_E[here]].numpy(),
            "target": permutation_N[edges.target_E[here]].numpy(),
            "weight": edges.weight_E[here].double().numpy(),
        }
        pq.write_table(pa.table(columns), folder / f"part-{part:05d}.parquet")
