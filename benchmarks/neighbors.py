"""Exact neighbours against a bare matrix product and faiss, side by side on one machine.

    python benchmarks/neighbors.py --rows 57000 --dimensions 384 --neighbors 130 --threads 2
    python benchmarks/neighbors.py --vectors VECTORS.npy

VECTORS is (2, rows, dimensions): queries, then targets; absent, both are drawn about random centers of a sphere. Every
round runs each method on the same tile of queries, one after the other, so that a busy machine slows all of them; the
table shows medians over the rounds, scaled to all rows, and find_neighbors is compared with each. ``--all-rows`` and
``--approximate MIN_RECALL`` time whole searches once.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable

import faiss
import numpy as np
import torch

from b3_lightning.mining.approximate import find_neighbors_approximately
from b3_lightning.mining.neighbors import TILE_ROWS, TargetIndex, find_neighbors
from b3_lightning.types import Embeddings

N_CHECKED = 256
OURS = "find_neighbors"


def synthetic(n_rows: int, n_dims: int) -> Embeddings:
    """Targets about 1 center for 100 rows, queries about their targets."""
    generator = torch.Generator().manual_seed(0)
    center_CD = torch.nn.functional.normalize(torch.randn(n_rows // 100 + 1, n_dims, generator=generator), dim=1)
    label_N = torch.randint(0, len(center_CD), (n_rows,), generator=generator)
    noise = 0.05 * (384 / n_dims) ** 0.5
    target_ND = center_CD[label_N] + noise * torch.randn(n_rows, n_dims, generator=generator)
    query_ND = target_ND + 0.6 * noise * torch.randn(n_rows, n_dims, generator=generator)
    return Embeddings.from_arrays(query_ND, target_ND)


def methods(vectors: Embeddings, width: int, index: TargetIndex) -> dict[str, Callable[[slice], object]]:
    """Each takes a tile of rows."""
    query_ND, target_ND = vectors.query_ND, vectors.target_ND
    key_N = torch.arange(len(vectors))
    score = {dtype: torch.empty(1024, len(vectors), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    cast = {dtype: (query_ND.to(dtype), target_ND.to(dtype)) for dtype in score}
    flat = faiss.IndexFlatIP(target_ND.shape[1])
    flat.add(target_ND.numpy())

    def product(rows: slice, dtype: torch.dtype, n_best: int = 0) -> None:
        query, target = cast[dtype]
        for part in query[rows].split(1024):
            out = torch.mm(part, target.T, out=score[dtype][: len(part)])
            if n_best:
                out.topk(n_best, dim=1)

    return {
        "float32 product alone": lambda rows: product(rows, torch.float32),
        "bfloat16 product alone": lambda rows: product(rows, torch.bfloat16),
        "float32 product, topk": lambda rows: product(rows, torch.float32, width + 16),
        "faiss IndexFlatIP": lambda rows: flat.search(query_ND[rows].numpy(), width + 1),
        OURS: lambda rows: index.search(query_ND[rows], [key_N[rows]]),
    }


def measure(vectors: Embeddings, width: int, n_rounds: int) -> list[str]:
    """A Markdown table, then what the check against float64 found."""
    n_rows, key_N = len(vectors), torch.arange(len(vectors))
    start = time.perf_counter()
    index = TargetIndex(vectors.target_ND, n_neighbors=width, target_keys=[key_N])
    index.search(vectors.query_ND[:1], [key_N[:1]])
    lines = [f"{n_rows} x {vectors.query_ND.shape[1]}, {torch.get_num_threads()} threads, index {_since(start):.2f} s"]
    run = methods(vectors, width, index)
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(n_rounds + 1):
        first = turn * TILE_ROWS % max(1, n_rows - TILE_ROWS)
        rows = slice(first, min(first + TILE_ROWS, n_rows))
        for name, search in run.items():
            start = time.perf_counter()
            search(rows)
            if turn:  # the first warms up
                seconds[name].append(_since(start) * n_rows / (rows.stop - rows.start))
    ours = statistics.median(seconds[OURS])
    lines += ["", "| method | seconds, all rows | least | of find_neighbors |", "|---|---|---|---|"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"| {name} | {median:.2f} | {min(times):.2f} | {median / ours:.2f} |")
    return [*lines, "", check(vectors, index)]


def check(vectors: Embeddings, index: TargetIndex) -> str:
    """Compare some rows with float64 scores of all targets."""
    rows = torch.arange(0, len(vectors), max(1, len(vectors) // N_CHECKED))[:N_CHECKED]
    ids_QW, scores_QW = index.search(vectors.query_ND[rows], [rows])
    score_QM = vectors.query_ND[rows].double() @ vectors.target_ND.double().T
    score_QM[torch.arange(len(rows)), rows] = -torch.inf
    best = torch.sort(score_QM.float(), dim=1, descending=True, stable=True)
    width = ids_QW.shape[1]
    equal = (ids_QW == best.indices[:, :width]).float().mean()
    same_bits = torch.equal(scores_QW, best.values[:, :width])
    return f"float64 on {len(rows)} rows: {100 * equal:.3f}% of ids equal, scores equal to the bit: {same_bits}"


def approximate(vectors: Embeddings, width: int, min_recall: float) -> str:
    """All rows, the making of the lists included."""
    key_N = torch.arange(len(vectors))
    start = time.perf_counter()
    found = find_neighbors_approximately(
        vectors.query_ND, vectors.target_ND, n_neighbors=width, exclude=[(key_N, key_N)], min_recall=min_recall
    )
    return f"inverted lists: {_since(start):.1f} s, recall {found.recall:.4f} with {found.n_probes} lists a row"


def exact(vectors: Embeddings, width: int) -> str:
    """All rows, the making of the index included."""
    key_N = torch.arange(len(vectors))
    start = time.perf_counter()
    find_neighbors(vectors.query_ND, vectors.target_ND, n_neighbors=width, exclude=[(key_N, key_N)])
    return f"find_neighbors, all rows: {_since(start):.1f} s"


def _since(start: float) -> float:
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=57_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--neighbors", type=int, default=130)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vectors", help="(2, rows, dimensions) .npy")
    parser.add_argument("--all-rows", action="store_true", help="also time find_neighbors on all rows")
    parser.add_argument("--approximate", type=float, metavar="MIN_RECALL", help="also search inverted lists")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    faiss.omp_set_num_threads(chosen.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    vectors = (
        Embeddings.from_arrays(*np.load(chosen.vectors, allow_pickle=False))
        if chosen.vectors
        else synthetic(chosen.rows, chosen.dimensions)
    )
    for line in measure(vectors, chosen.neighbors, chosen.rounds) if chosen.rounds else []:
        sys.stdout.write(line + "\n")
    if chosen.all_rows:
        sys.stdout.write(exact(vectors, chosen.neighbors) + "\n")
    if chosen.approximate is not None:
        sys.stdout.write(approximate(vectors, chosen.neighbors, chosen.approximate) + "\n")


if __name__ == "__main__":
    main()
