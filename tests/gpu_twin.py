"""Stand-ins for the RAPIDS packages on CPU arrays, so that the very functions of the GPU backend run.

Every call is bound to the committed signatures of the real packages; what the real ones are known to refuse or to
forget is refused and forgotten here too. The answers are networkit's, in an order of their own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from b3_lightning.mining import cpu
from b3_lightning.mining.gpu import Libraries
from b3_lightning.mining.many_gpus import DaskLibraries
from b3_lightning.types import Edges

SIGNATURES: dict[str, Any] = json.loads((Path(__file__).parent / "rapids" / "signatures.json").read_text())


def bind(name: str, *args: Any, **kwargs: Any) -> None:
    """Raise TypeError where the real function would not take these arguments."""
    parameters = [
        inspect.Parameter(
            word,
            inspect._ParameterKind[kind],
            default=None if has_default and not kind.startswith("VAR") else inspect.Parameter.empty,
        )
        for word, (kind, has_default) in SIGNATURES[name].items()
    ]
    inspect.Signature(parameters).bind(*args, **kwargs)


def checked(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer``, after the arguments were bound to the real signature."""

    def call(*args: Any, **kwargs: Any) -> Any:
        bind(name, *args, **kwargs)
        return answer(*args, **kwargs)

    return call


class Graph:
    """What SGGraph checks when it is made, and the edges for the answer."""

    def __init__(self, source: Any, target: Any, weight: Any, vertices: Any | None, *, symmetric: bool) -> None:
        for ids in (source, target, vertices):
            if ids is not None and ids.dtype not in (np.int32, np.int64):
                raise RuntimeError(f"invalid data type enum: {ids.dtype}")
        if source.dtype != target.dtype or (vertices is not None and vertices.dtype != source.dtype):
            raise RuntimeError("vertex types differ")
        if weight.dtype not in (np.float32, np.float64) or len({len(source), len(target), len(weight)}) != 1:
            raise RuntimeError("weights are not floats, or of another length")
        arcs = set(zip(source.tolist(), target.tolist(), weight.tolist(), strict=True))
        if symmetric and arcs != {(target, source, weight) for source, target, weight in arcs}:
            raise RuntimeError("the graph is not symmetric")
        if len(arcs) != len(source):
            raise RuntimeError("an arc stands there twice")
        # a vertex that is in no list does not exist
        seen = np.union1d(source, target)
        self.vertices = seen if vertices is None else np.union1d(seen, vertices)
        low = source < target
        with torch.device("cpu"):
            self.edges = Edges(
                torch.tensor(source[low]).long(), torch.tensor(target[low]).long(), torch.tensor(weight[low]).float(),
                int(self.vertices.max()) + 1,
            )  # fmt: skip

    def partition(self, *, resolution: float, **_: Any) -> tuple[Any, Any, float]:
        with torch.device("cpu"):
            label = cpu.louvain(self.edges, resolution=resolution, seed=0).numpy()[self.vertices]
        shuffled = np.random.default_rng(0).permutation(len(self.vertices))
        return self.vertices[shuffled].astype(np.int32), (1000 + label[shuffled]).astype(np.int32), 0.5


def pylibcugraph() -> Any:
    """The slim library."""

    def sg_graph(**given: Any) -> Graph:
        if given["renumber"] or given["symmetrize"]:
            raise RuntimeError("the caller renumbers and symmetrises")
        return Graph(
            given["src_or_offset_array"], given["dst_or_index_array"], given["weight_array"], given["vertices_array"],
            symmetric=given["graph_properties"]["is_symmetric"],
        )  # fmt: skip

    def partition(**given: Any) -> tuple[Any, Any, float]:
        assert given["max_level"] <= 500
        found: Graph = given["graph"]
        return found.partition(resolution=given["resolution"])

    answers: dict[str, Any] = {
        "ResourceHandle": lambda: "handle", "GraphProperties": lambda **given: given, "SGGraph": sg_graph,
        "louvain": partition, "leiden": partition,
    }  # fmt: skip
    return SimpleNamespace(**{name: checked(f"pylibcugraph.{name}", answer) for name, answer in answers.items()})


class Column:
    """A cuDF column: ``values`` is a cupy array."""

    def __init__(self, values: Any) -> None:
        self.values = values


class Frame(dict[str, Column]):
    """A cuDF table, as far as it is used."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__({name: Column(values) for name, values in data.items()})

    def to_arrow(self) -> pa.Table:
        return pa.table({name: column.values for name, column in self.items()})


class CugraphGraph:
    """cuGraph's Graph, from a table on one GPU or from one on many."""

    def __init__(self, directed: bool) -> None:
        assert not directed

    def from_cudf_edgelist(self, *args: Any, **given: Any) -> None:
        bind("cugraph.Graph.from_cudf_edgelist", *args, **given)
        table, vertices = args[0], given["vertices"].values
        if given["renumber"] or not np.array_equal(np.sort(vertices), np.arange(len(vertices))):
            raise RuntimeError("without renumbering, vertices are 0 .. n - 1")
        source, target, weight = (table[given[name]].values for name in ("source", "destination", "weight"))
        self.graph = Graph(source, target, weight, vertices, symmetric=True)

    def from_dask_cudf_edgelist(self, *args: Any, **given: Any) -> None:
        bind("cugraph.Graph.from_dask_cudf_edgelist", *args, **given)
        columns = [args[0][given[name]].to_numpy() for name in ("source", "destination", "weight")]
        source, target, weight = columns
        from_, to = np.concatenate([source, target]), np.concatenate([target, source])
        self.graph = Graph(from_, to, np.tile(weight, 2), None, symmetric=True)

    def partition(self, **given: Any) -> tuple[Frame, float]:
        vertex, label, modularity = self.graph.partition(**given)
        return Frame({"vertex": vertex, "partition": label}), modularity


def libraries(*, tables: bool) -> Libraries:
    """cupy and pylibcugraph, and with ``tables`` cuDF and cuGraph."""
    cupy = SimpleNamespace(from_dlpack=np.from_dlpack)
    if not tables:
        return Libraries(cupy, pylibcugraph())
    partition = {
        name: checked(f"cugraph.{name}", lambda graph, **given: graph.partition(**given))
        for name in ("louvain", "leiden")
    }
    cudf = SimpleNamespace(DataFrame=checked("cudf.DataFrame", Frame), Series=checked("cudf.Series", Column))
    cugraph = SimpleNamespace(Graph=checked("cugraph.Graph", CugraphGraph), **partition)
    return Libraries(cupy, pylibcugraph(), cudf, cugraph)


class _Context:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> _Context:
        self.log.append(f"enter {self.name}")
        return self

    def __exit__(self, *_: Any) -> None:
        self.log.append(f"exit {self.name}")


def dask_libraries(log: list[str]) -> DaskLibraries:
    """Many GPUs; what is begun and ended is written to ``log``."""

    def lazy(graph: CugraphGraph, **given: Any) -> tuple[Any, float]:
        found, modularity = graph.partition(**given)
        return SimpleNamespace(compute=lambda: found), modularity

    return DaskLibraries(
        dask_cuda=SimpleNamespace(
            LocalCUDACluster=checked(
                "dask_cuda.LocalCUDACluster", lambda **given: _Context(log, f"{given['n_workers']} workers")
            )
        ),
        distributed=SimpleNamespace(Client=lambda _: _Context(log, "client")),
        dask_cudf=SimpleNamespace(read_parquet=checked("dask_cudf.read_parquet", lambda folder: pq.read_table(folder))),
        cugraph=SimpleNamespace(Graph=checked("cugraph.Graph", CugraphGraph)),
        cugraph_dask=SimpleNamespace(
            louvain=checked("cugraph.dask.louvain", lazy), leiden=checked("cugraph.dask.leiden", lazy)
        ),
        comms=SimpleNamespace(
            initialize=checked("cugraph.dask.comms.comms.initialize", lambda **_: log.append("comms")),
            destroy=checked("cugraph.dask.comms.comms.destroy", lambda: log.append("comms ended")),
        ),
    )


def shadow_cudf() -> ModuleType:
    """A module that narwhals takes for cuDF: pandas, whose methods take only what the real ones take."""
    module = ModuleType("cudf")
    module.Series, module.DataFrame, module.Index = _ShadowSeries, _ShadowFrame, pd.Index  # type: ignore[attr-defined]
    module.concat, module.__version__ = pd.concat, "26.10.0"  # type: ignore[attr-defined]
    module.read_parquet = checked(  # type: ignore[attr-defined]
        "cudf.read_parquet", lambda path, **given: _ShadowFrame(pd.read_parquet(path, **given))
    )
    return module


class _ShadowSeries(pd.Series):
    @property
    def _constructor(self) -> Any:
        return _ShadowSeries

    @property
    def _constructor_expanddim(self) -> Any:
        return _ShadowFrame


class _ShadowFrame(pd.DataFrame):
    @property
    def _constructor(self) -> Any:
        return _ShadowFrame

    @property
    def _constructor_sliced(self) -> Any:
        return _ShadowSeries

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        real = f"cudf.DataFrame.{name}"
        return checked(real, value) if real in SIGNATURES else value
