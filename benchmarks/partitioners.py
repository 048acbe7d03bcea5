"""How many hard-negative edges each algorithm keeps inside clusters of exactly K, and in what time.

    python benchmarks/partitioners.py VECTORS.npy [KEYS.npy]

VECTORS is (2, rows, dimensions): queries, then targets, what a teacher gives for any pairs file. KEYS is (rows,) whole
numbers: rows with one key hold the same target; absent, all targets differ. Prints a Markdown table. "paper" is METIS
with sizes repaired as the paper's scripts do it: rows that exceed K fill small parts in arbitrary order.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from b3_lightning.mining.backends import CPU
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges
from b3_lightning.mining.neighbors import find_neighbors, positive_scores
from b3_lightning.mining.pipeline import cut_graph
from b3_lightning.mining.settings import CommunityAlgorithm, Cut, MiningSettings
from b3_lightning.mining.swaps import improve_by_swaps
from b3_lightning.mining.window import rank_window
from b3_lightning.types import Edges, Embeddings, Neighbors

WINDOW = {"first_rank": 30, "n_ranks": 100}
N_SWAP_ROUNDS = 30
WAYS: tuple[tuple[CommunityAlgorithm, Cut], ...] = (
    ("metis", "kaminpar"), ("kaminpar", "kaminpar"), ("louvain", "kaminpar"), ("louvain", "louvain"),
    ("leiden", "kaminpar"), ("none", "kaminpar"),
)  # fmt: skip
"""Communities, and what cuts them."""


def measure(vectors: str, keys: str | None = None) -> list[str]:
    """One Markdown row for each cluster size and algorithm."""
    query, target = np.load(vectors, allow_pickle=False)
    embeddings = Embeddings.from_arrays(query, target)
    target_key_N = torch.arange(len(embeddings)) if keys is None else torch.tensor(np.load(keys, allow_pickle=False))
    start = time.perf_counter()
    query_ND, target_ND = embeddings.query_ND, embeddings.target_ND
    ids_NW, scores_NW = find_neighbors(query_ND, target_ND, n_neighbors=130, exclude=[(target_key_N, target_key_N)])
    neighbors = Neighbors(ids_NW, scores_NW, positive_scores(query_ND, target_ND))
    seconds = time.perf_counter() - start
    window = rank_window(neighbors, MiningSettings(), **WINDOW)
    edges = build_edges(neighbors, window, kind="mutual")
    find_communities(edges, MiningSettings(), CPU)  # imports are not counted
    rows = [f"{len(embeddings)} rows, {len(edges)} edges, neighbours {seconds:.1f} s", ""]
    rows += ["| K | communities | kept when cut | kept after swaps | seconds to cut | seconds of swaps |"]
    rows += ["|---|---|---|---|---|---|"]
    for size in (8, 16, 32, 64):
        for algorithm, cut_by in WAYS:
            start = time.perf_counter()
            chosen = MiningSettings(communities=algorithm, cut=cut_by, cluster_size=size)
            found = find_communities(edges, chosen, CPU)
            if algorithm == "metis":
                rows.append(f"| {size} | paper | {_kept(edges, _repaired_at_random(found.label_N, size)):.3f} | | | |")
            cut, tied = cut_graph(edges, found, neighbors, window, chosen, CPU)
            middle = time.perf_counter()
            better = improve_by_swaps(cut, tied, max_rounds=N_SWAP_ROUNDS)
            shares = (_kept(edges, clusters.cluster_of_row()) for clusters in (cut, better))
            end = time.perf_counter()
            cells = [f"{share:.3f}" for share in shares] + [f"{middle - start:.1f}", f"{end - middle:.1f}"]
            rows.append(
                f"| {size} | {algorithm}{' cut by louvain' if cut_by == 'louvain' else ''} | {' | '.join(cells)} |"
            )
    return rows


def _kept(edges: Edges, cluster_N: torch.Tensor) -> float:
    return len(edges.within(cluster_N)) / len(edges)


def _repaired_at_random(part_N: torch.Tensor, size: int) -> torch.Tensor:
    """Every part keeps its first K rows; the others fill the places that are left, in the order of the parts."""
    n_clusters = -(-len(part_N) // size)
    order = part_N.argsort(stable=True)
    count_P = torch.bincount(part_N, minlength=n_clusters)
    place = torch.arange(len(order)) - (count_P.cumsum(0) - count_P)[part_N[order]]
    stays = (place < size) & (part_N[order] < n_clusters)
    cluster_N = torch.full_like(part_N, -1)
    cluster_N[order[stays]] = part_N[order[stays]]
    free_C = size - torch.bincount(cluster_N[cluster_N >= 0], minlength=n_clusters)
    left = order[~stays]
    cluster_N[left] = torch.arange(n_clusters).repeat_interleave(free_C)[: len(left)]
    return cluster_N


if __name__ == "__main__":
    sys.stdout.write("\n".join(measure(*sys.argv[1:3])) + "\n")
