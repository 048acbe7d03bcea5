"""The CPU backend: the only file that imports networkit, graspologic-native, KaMinPar, pymetis and faiss.

Each partitioner runs on one thread, because each gives other partitions on more (measured with networkit 11 and
KaMinPar 3.7), and one thread costs about a second for 57,000 rows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from b3_lightning.types import Edges

_IMBALANCE = 0.03
"""KaMinPar's parts may exceed K by this share before sizes are made exact; tighter costs kept edges."""
_MOST_SWEEPS = 100
"""Leiden's moves over all rows in one level: rounding must not let two rows change places for ever."""


def louvain(edges: Edges, *, resolution: float, seed: int) -> Tensor:
    """Community label of every row by parallel Louvain (networkit's PLM) on one thread."""
    import networkit as nk

    pairs = (edges.source_E.numpy().astype(np.uint64), edges.target_E.numpy().astype(np.uint64))
    weights = edges.weight_E.numpy().astype(np.float64)
    threads = nk.getMaxNumberOfThreads()
    nk.setNumberOfThreads(1)
    nk.setSeed(seed, False)
    try:
        graph = nk.GraphFromCoo((weights, pairs), n=edges.n_rows, weighted=True)
        algorithm = nk.community.PLM(graph, gamma=resolution, par="none").run()
    finally:
        nk.setNumberOfThreads(threads)
    partition = algorithm.getPartition()  # must outlive the copy: its vector is freed with it
    return torch.tensor(partition.getVector(), dtype=torch.int64, device="cpu")


def leiden(edges: Edges, *, resolution: float, seed: int) -> Tensor:
    """Community label of every row by Leiden (graspologic-native); networkit's does not end on some graphs."""
    import graspologic_native

    offset, neighbor, weight = _adjacency(edges)
    _, label_of_row = graspologic_native.leiden_csr(
        offset,
        neighbor.astype(np.int32),
        weight.astype(np.float64),
        edges.n_rows,
        resolution=resolution,
        seed=seed,
        max_local_moving_iterations=_MOST_SWEEPS,
    )
    return torch.tensor([label_of_row[row] for row in range(edges.n_rows)], dtype=torch.int64, device="cpu")


def _adjacency(edges: Edges) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Compressed rows: (offset of each row, neighbours, weights)."""
    from_A, to_A, weight_A = edges.both_directions()
    order_A = (from_A * edges.n_rows + to_A).argsort()
    degree_N = torch.bincount(from_A, minlength=edges.n_rows)
    offset = np.concatenate([[0], degree_N.cumsum(0).numpy()])
    return offset, to_A[order_A].numpy(), weight_A[order_A].numpy()


def _whole(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Weights as the whole numbers that partitioners take; those of 1 stay exact."""
    return (weight * 64).round().clip(min=1).astype(np.int64)


def metis_parts(edges: Edges, *, n_parts: int, seed: int) -> Tensor:
    """METIS's k-way partition, the paper's choice: parts of about equal size (3%)."""
    import pymetis

    if n_parts < 2:
        return torch.zeros(edges.n_rows, dtype=torch.int64, device="cpu")
    offset, neighbor, weight = _adjacency(edges)
    _, part_N = pymetis.part_graph(
        n_parts,
        pymetis.CSRAdjacency(offset, neighbor),
        eweights=_whole(weight),
        recursive=False,
        options=pymetis.Options(seed=seed),
    )
    return torch.tensor(part_N, dtype=torch.int64, device="cpu")


def kaminpar_parts(edges: Edges, *, n_parts: int, seed: int) -> Tensor:
    """KaMinPar's partition for many small parts: sizes within 3%."""
    import kaminpar

    if n_parts < 2 or len(edges) == 0:
        return torch.arange(edges.n_rows, device="cpu") * n_parts // edges.n_rows
    with tempfile.TemporaryDirectory(prefix="b3_lightning_") as folder:
        path = Path(folder) / "graph.parhip"
        _write_parhip(path, edges)
        graph = kaminpar.load_graph(str(path), kaminpar.GraphFileFormat.PARHIP)
    kaminpar.reseed(seed)
    solver = kaminpar.KaMinPar(1, kaminpar.largek_context())
    return torch.tensor(solver.compute_partition(graph, n_parts, _IMBALANCE), dtype=torch.int64, device="cpu")


def _write_parhip(path: Path, edges: Edges) -> None:
    """Write ParHIP's binary format: (version, n, m), byte offsets of each row, neighbours, edge weights; all 64 bit."""
    offset, neighbor, weight = _adjacency(edges)
    header_bytes = 3 * 8 + len(offset) * 8
    with path.open("wb") as file:
        # the version's lowest bit is set where edge weights are absent, the next where node weights are
        np.array([2, edges.n_rows, len(neighbor)], dtype=np.uint64).tofile(file)
        (offset * 8 + header_bytes).astype(np.uint64).tofile(file)
        neighbor.astype(np.uint64).tofile(file)
        _whole(weight).tofile(file)


class InvertedLists:
    """Targets in lists, in float16, scanned by faiss; which list is whose is decided by the caller.

    faiss's own k-means is not used: its float32 products may come out otherwise on another number of threads.
    """

    def __init__(self, center_LD: Tensor, target_MD: Tensor, list_M: Tensor, *, piece_rows: int) -> None:
        import faiss

        n_lists, n_dims = center_LD.shape
        self._quantizer = faiss.IndexFlatIP(n_dims)  # must outlive the index, which does not own it
        self._quantizer.add(center_LD.numpy())
        self._index: Any = faiss.IndexIVFScalarQuantizer(
            self._quantizer, n_dims, n_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.is_trained = True  # float16 has nothing to learn, and the centers are given
        self._index.parallel_mode = 3  # queries are shared over threads; by default lists that are given are not
        for start in range(0, len(target_MD), piece_rows):
            target = np.ascontiguousarray(target_MD[start : start + piece_rows].numpy(), dtype=np.float32)
            ids = np.arange(start, start + len(target), dtype=np.int64)
            lists = np.ascontiguousarray(list_M[start : start + piece_rows].numpy())
            self._index.add_core(len(target), faiss.swig_ptr(target), faiss.swig_ptr(ids), faiss.swig_ptr(lists), None)

    def scan(self, query_QD: Tensor, list_QL: Tensor, n_best: int) -> Tensor:
        """(Q, n_best) ids of the best targets in the given lists; -1 where these hold fewer."""
        self._index.nprobe = list_QL.shape[1]
        query = np.ascontiguousarray(query_QD.numpy(), dtype=np.float32)
        _, ids = self._index.search_preassigned(query, n_best, np.ascontiguousarray(list_QL.numpy()), None)
        return torch.from_numpy(ids)


class FlatTargets:
    """Targets in faiss's flat index: brute force in float32."""

    def __init__(self, target_MD: Tensor) -> None:
        import faiss

        self._index: Any = faiss.IndexFlatIP(target_MD.shape[1])
        self._index.add(np.ascontiguousarray(target_MD.numpy(), dtype=np.float32))

    def scan(self, query_QD: Tensor, n_best: int) -> Tensor:
        """(Q, n_best) ids of the best targets."""
        _, ids = self._index.search(np.ascontiguousarray(query_QD.numpy(), dtype=np.float32), n_best)
        return torch.from_numpy(ids)
