"""The GPU backend: the only file that imports cupy, cuDF, cuGraph and cuVS.

Communities are cuGraph's, on a cuDF edge table where that is installed and on bare arrays by pylibcugraph where it is
not; both take the arcs that torch made ready on the device, without a trip through the host. What could differ between
two runs, or get lost, is settled here (tests/rapids holds what was read from the libraries):

- a row without an edge would vanish, so all vertices are listed, and labels are scattered by vertex;
- cuGraph's own seeds are without effect, so the seed permutes the vertices;
- sums in float32 depend on their order, so weights are float64 multiples of 2^-20, whose sums are exact below 2^33;
- ids of 32 bits overflow where there are 2^31 arcs, so these get 64.

Shapes: N = rows, E = edges, A = arcs (each edge in both directions).
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from b3_lightning.mining.groups import permutation
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import Edges

_GRID = 2.0**20
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Libraries:
    """The modules that communities are found with; without cuDF and cuGraph, pylibcugraph alone is used."""

    cupy: Any
    pylibcugraph: Any
    cudf: Any = None
    cugraph: Any = None

    @classmethod
    def load(cls, *, tables: bool) -> Libraries:
        """Import them.

        Args:
            tables: cuDF and cuGraph too.
        """
        names = ["cupy", "pylibcugraph", *(("cudf", "cugraph") if tables else ())]
        return cls(**{name: importlib.import_module(name) for name in names})


@dataclass(frozen=True)
class _Arcs:
    """The graph as cuGraph takes it, sorted, its vertices permuted: ``permutation_N`` gives each row's vertex."""

    from_A: Tensor
    to_A: Tensor
    weight_A: Tensor
    vertex_N: Tensor
    permutation_N: Tensor


def communities(edges: Edges, libraries: Libraries, settings: MiningSettings) -> Tensor:
    """(N,) int64: a community label for every row, any numbers, on the device of the edges."""
    with _on(edges.source_E.device):
        arcs = _arcs(edges, settings.seed)
        _synchronize(edges.source_E)  # the libraries' streams do not wait for torch's
        if edges.source_E.is_cuda:
            torch.cuda.empty_cache()  # cuGraph allocates past torch's pool
        run = _run_pylibcugraph if libraries.cugraph is None else _run_cugraph
        vertex, label = run(arcs, libraries, settings)
        _synchronize(edges.source_E)
        return _labels(vertex, label, arcs.permutation_N)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The libraries work on the current device, whatever device their arrays lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def arc_dtype(n_rows: int, n_arcs: int) -> torch.dtype:
    """The type of ids: cuGraph takes 32 bits only where both counts fit them."""
    return torch.int32 if max(n_rows, n_arcs) < _MAX_INT32 else torch.int64


def _arcs(edges: Edges, seed: int) -> _Arcs:
    from_A, to_A, weight_A = edges.both_directions()
    permutation_N = permutation(edges.n_rows, seed, from_A.device)
    code_A, order_A = (permutation_N[from_A] * edges.n_rows + permutation_N[to_A]).sort()
    dtype = arc_dtype(edges.n_rows, len(code_A))
    return _Arcs(
        from_A=(code_A // edges.n_rows).to(dtype),
        to_A=(code_A % edges.n_rows).to(dtype),
        weight_A=(weight_A[order_A].double() * _GRID).round_().clamp_(min=1).div_(_GRID),
        vertex_N=torch.arange(edges.n_rows, dtype=dtype, device=from_A.device),
        permutation_N=permutation_N,
    )


def _labels(vertex: Any, label: Any, permutation_N: Tensor) -> Tensor:
    """Labels by row, from those that the library gave in an order of its own."""
    vertex_V, label_V = from_dlpack(vertex).long(), from_dlpack(label).long()
    n_rows = len(permutation_N)
    if not torch.equal(vertex_V.sort().values, torch.arange(n_rows, device=permutation_N.device)):
        raise RuntimeError(f"cuGraph labelled {len(vertex_V)} of {n_rows} vertices")
    label_N = torch.empty_like(permutation_N)
    label_N[vertex_V] = label_V
    return label_N[permutation_N]


def _run_pylibcugraph(arcs: _Arcs, libraries: Libraries, settings: MiningSettings) -> tuple[Any, Any]:
    plc, array = libraries.pylibcugraph, libraries.cupy.from_dlpack
    handle = plc.ResourceHandle()
    graph = plc.SGGraph(
        resource_handle=handle,
        graph_properties=plc.GraphProperties(is_symmetric=True, is_multigraph=False),
        src_or_offset_array=array(arcs.from_A),
        dst_or_index_array=array(arcs.to_A),
        weight_array=array(arcs.weight_A),
        vertices_array=array(arcs.vertex_N),
        store_transposed=False,
        renumber=False,
        do_expensive_check=False,
        input_array_format="COO",
        drop_self_loops=False,
        drop_multi_edges=False,
        symmetrize=False,
    )
    about: dict[str, Any] = {
        "resource_handle": handle, "graph": graph, "max_level": settings.max_level, "resolution": settings.resolution,
        "do_expensive_check": False,
    }  # fmt: skip
    if settings.communities == "louvain":
        vertex, label, _ = plc.louvain(**about, threshold=settings.threshold)
    else:
        vertex, label, _ = plc.leiden(**about, random_state=settings.seed, theta=1.0)
    return vertex, label


def edge_table(arcs: _Arcs, libraries: Libraries) -> Any:
    """The arcs as a cuDF table; its columns are views of the same memory."""
    if TYPE_CHECKING:  # so that a type checker holds these calls against the real packages, where it finds them
        import cudf
    else:
        cudf = libraries.cudf
    columns = {"source": arcs.from_A, "target": arcs.to_A, "weight": arcs.weight_A}
    return cudf.DataFrame({name: libraries.cupy.from_dlpack(column) for name, column in columns.items()})


def _run_cugraph(arcs: _Arcs, libraries: Libraries, settings: MiningSettings) -> tuple[Any, Any]:
    if TYPE_CHECKING:
        import cudf
        import cugraph
    else:
        cudf, cugraph = libraries.cudf, libraries.cugraph
    graph = cugraph.Graph(directed=False)
    graph.from_cudf_edgelist(
        edge_table(arcs, libraries),
        source="source",
        destination="target",
        weight="weight",
        renumber=False,
        symmetrize=False,
        vertices=cudf.Series(libraries.cupy.from_dlpack(arcs.vertex_N)),
    )
    if settings.communities == "louvain":
        found, _ = cugraph.louvain(
            graph, max_level=settings.max_level, resolution=settings.resolution, threshold=settings.threshold
        )
    else:
        found, _ = cugraph.leiden(
            graph, max_iter=settings.max_level, resolution=settings.resolution, random_state=settings.seed
        )
    # cuDF declares that a column may be None
    return found["vertex"].values, found["partition"].values  # pyright: ignore[reportOptionalMemberAccess]


MAX_FAISS_NEIGHBORS = 2048
"""Beyond it faiss ends the whole process instead of raising."""


class FaissTargets:
    """Targets on the GPU, searched by faiss's brute force in float32."""

    def __init__(self, target_MD: Tensor) -> None:
        import faiss
        import faiss.contrib.torch_utils  # lets knn_gpu take tensors

        if not hasattr(faiss, "StandardGpuResources"):
            raise ValueError(
                "neighbors='faiss' on a GPU needs faiss-gpu in the place of faiss-cpu (both own one folder): "
                "pip uninstall faiss-cpu, then pip install 'b3_lightning[gpu-cu13]'"
            )
        self._target_MD, self._faiss = target_MD, faiss
        self._resources = faiss.StandardGpuResources()

    def scan(self, query_QD: Tensor, n_best: int) -> Tensor:
        """(Q, n_best) ids of the best targets.

        Raises:
            ValueError: where ``n_best`` is beyond what faiss can do.
        """
        if n_best > MAX_FAISS_NEIGHBORS:
            raise ValueError(
                f"neighbors='faiss' on a GPU can find {MAX_FAISS_NEIGHBORS} at most and {n_best} are needed (ranks, "
                "spare and rows with equal keys): lower n_ranks, or set neighbors to exact or cuvs"
            )
        with _on(query_QD.device):
            _, ids_QV = self._faiss.knn_gpu(
                self._resources, query_QD, self._target_MD, n_best, metric=self._faiss.METRIC_INNER_PRODUCT
            )
        found: Tensor = ids_QV
        return found


class CuvsTargets:
    """Targets on the GPU, searched by cuVS's brute force."""

    def __init__(self, target_MD: Tensor) -> None:
        self._brute_force = importlib.import_module("cuvs.neighbors.brute_force")
        _synchronize(target_MD)
        with _on(target_MD.device):
            self._index = self._brute_force.build(target_MD, metric="inner_product")

    def scan(self, query_QD: Tensor, n_best: int) -> Tensor:
        """(Q, n_best) ids of the best targets."""
        _synchronize(query_QD)
        with _on(query_QD.device):
            # without resources of our own it waits for its stream before it returns
            _, ids = self._brute_force.search(self._index, query_QD.contiguous(), n_best)
            return torch.as_tensor(ids, device=query_QD.device).long()
