"""How many hard-negative edges each algorithm keeps inside clusters, and in what time.

    python benchmarks/partitioners.py VECTORS.npy      (2, rows, dimensions): queries, then targets

Prints a Markdown table. Vectors: what a teacher gives for any pairs file, for example ``predict``'s.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from b3_lightning.mining.clusters import cut_clusters
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges, window_arcs
from b3_lightning.mining.neighbors import find_neighbors
from b3_lightning.types import Embeddings

WINDOW = {"first_rank": 30, "n_ranks": 100}


def measure(path: str) -> list[str]:
    """One Markdown row for each cluster size and algorithm."""
    query, target = np.load(path, allow_pickle=False)
    embeddings = Embeddings.from_arrays(query, target)
    start = time.perf_counter()
    neighbors = find_neighbors(embeddings, n_neighbors=130, target_key_N=torch.arange(len(embeddings)))
    seconds = time.perf_counter() - start
    edges = build_edges(neighbors, **WINDOW, kind="mutual")
    arcs = window_arcs(neighbors, **WINDOW)
    rows = [f"{len(embeddings)} rows, {len(edges)} edges, neighbours {seconds:.1f} s", ""]
    rows += ["| K | communities | kept | seconds |", "|---|---|---|---|"]
    for size in (8, 16, 32, 64):
        for algorithm in ("metis", "none", "louvain", "leiden"):
            start = time.perf_counter()
            found = find_communities(edges, algorithm=algorithm, resolution=1.0, cluster_size=size, seed=0)
            already_cut = algorithm == "metis"
            cut = cut_clusters(edges, found, arcs, embeddings, cluster_size=size, already_cut=already_cut, seed=0)
            kept = len(edges.within(cut.cluster_of_row())) / len(edges)
            rows.append(f"| {size} | {algorithm} | {kept:.3f} | {time.perf_counter() - start:.2f} |")
    return rows


if __name__ == "__main__":
    sys.stdout.write("\n".join(measure(sys.argv[1])) + "\n")
