"""Communities of any size in, clusters of exactly K rows out.

Communities come cut into parts of about K (parts.py). Sizes are then made exact by
affinity: a part that is too large gives up the members with the fewest edges into it, small left-over parts are
dissolved, and every homeless row, those of no part included, goes to the open cluster that holds most of its
neighbours. Only rows of which the graph says nothing more are dealt out at random.

Shapes: N = rows, C = clusters, K = cluster_size, A = (row, neighbour) pairs, R = (row, cluster) pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from b3_lightning.mining.groups import permutation, place_in_group
from b3_lightning.types import PADDING, Clusters, Edges

HOMELESS = -1


def cut_clusters(edges: Edges, part_N: Tensor, *, cluster_size: int, seed: int) -> Clusters:
    """Make clusters of exactly ``cluster_size`` of parts of about that size; only the last one may be padded.

    Args:
        edges: of all rows for which any is known, those of no part too.
        part_N: (N,) the part of every row, numbered from 0; ``HOMELESS`` for rows of none.
        seed: of the order in which rows are dealt out that no edge ties to an open cluster.
    """
    n_clusters = math.ceil(edges.n_rows / cluster_size)
    capacity_C = part_N.new_full((n_clusters,), cluster_size)
    capacity_C[-1] = edges.n_rows - (n_clusters - 1) * cluster_size
    cluster_N = _seed_clusters(part_N, edges, capacity_C)
    _found_clusters(cluster_N, capacity_C)
    _place_by_affinity(cluster_N, capacity_C, edges)
    _deal_out(cluster_N, capacity_C, seed)
    return _as_table(cluster_N, capacity_C, cluster_size)


def _seed_clusters(part_N: Tensor, edges: Edges, capacity_C: Tensor) -> Tensor:
    """Let the largest parts become clusters; evict what exceeds a capacity, weakest first. Others are homeless."""
    size_P = torch.bincount(part_N[part_N != HOMELESS], minlength=1)
    rank_P = size_P.argsort(descending=True, stable=True).argsort()
    rank_N = torch.where(part_N == HOMELESS, len(capacity_C), rank_P[part_N])
    cluster_N = torch.where(rank_N < len(capacity_C), rank_N, HOMELESS)
    inside = edges.within(cluster_N)
    from_A, _, weight_A = inside.both_directions()
    strength_N = weight_A.new_zeros(len(part_N)).index_add_(0, from_A, weight_A)
    housed = (cluster_N != HOMELESS).nonzero().flatten()
    stays = _first_of_each(cluster_N[housed], strength_N[housed], capacity_C)
    cluster_N[housed[~stays]] = HOMELESS
    return cluster_N


def _found_clusters(cluster_N: Tensor, capacity_C: Tensor) -> None:
    """Give every empty cluster a first member, so that others can join: homeless rows, evenly spaced."""
    empty = (_free(cluster_N, capacity_C) == capacity_C).nonzero().flatten()
    homeless = (cluster_N == HOMELESS).nonzero().flatten()
    every = torch.arange(len(empty), device=empty.device) * len(homeless) // max(1, len(empty))
    cluster_N[homeless[every]] = empty


def _first_of_each(cluster_R: Tensor, strength_R: Tensor, free_C: Tensor) -> Tensor:
    """(R,) bool: is the applicant among the ``free_C`` strongest of its cluster? Ties go to the earlier applicant."""
    by_strength = strength_R.argsort(descending=True, stable=True)
    order = by_strength[cluster_R[by_strength].argsort(stable=True)]
    place_R = torch.empty_like(cluster_R)
    place_R[order] = place_in_group(cluster_R[order], len(free_C))
    return place_R < free_C[cluster_R]


def _free(cluster_N: Tensor, capacity_C: Tensor) -> Tensor:
    return capacity_C - torch.bincount(cluster_N[cluster_N != HOMELESS], minlength=len(capacity_C))


def _place_by_affinity(cluster_N: Tensor, capacity_C: Tensor, edges: Edges) -> None:
    """In rounds, every homeless row applies to its best open cluster and the strongest applicants are let in."""
    from_A, to_A, weight_A = edges.both_directions()
    while True:
        homeless_A = cluster_N[from_A] == HOMELESS
        from_A, to_A, weight_A = from_A[homeless_A], to_A[homeless_A], weight_A[homeless_A]
        free_C = _free(cluster_N, capacity_C)
        row_R, cluster_R, strength_R = _best_open(cluster_N, free_C, from_A, to_A, weight_A)
        if len(row_R) == 0:
            return
        accepted = _first_of_each(cluster_R, strength_R, free_C)
        cluster_N[row_R[accepted]] = cluster_R[accepted]


def _best_open(
    cluster_N: Tensor, free_C: Tensor, from_A: Tensor, to_A: Tensor, weight_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For every row with a neighbour in an open cluster: (row, the cluster that most of them are in, their weight)."""
    cluster_A = cluster_N[to_A]
    open_A = (cluster_A != HOMELESS) & (free_C[cluster_A.clamp(min=0)] > 0)
    pair_A = from_A[open_A] * len(free_C) + cluster_A[open_A]
    pair_R, index_A = pair_A.unique(return_inverse=True)
    strength_R = weight_A.new_zeros(len(pair_R)).index_add_(0, index_A, weight_A[open_A])
    row_R, cluster_R = pair_R // len(free_C), pair_R % len(free_C)
    best = _first_of_each(row_R, strength_R, torch.ones_like(cluster_N))
    return row_R[best], cluster_R[best], strength_R[best]


def _deal_out(cluster_N: Tensor, capacity_C: Tensor, seed: int) -> None:
    """House the rows that no edge ties to an open cluster at random.

    Not by similarity: their nearest are among the ranks before the window, which are likely right.
    """
    homeless = (cluster_N == HOMELESS).nonzero().flatten()
    place = torch.arange(len(capacity_C), device=cluster_N.device).repeat_interleave(_free(cluster_N, capacity_C))
    cluster_N[homeless[permutation(len(homeless), seed, homeless.device)]] = place


def _as_table(cluster_N: Tensor, capacity_C: Tensor, cluster_size: int) -> Clusters:
    ids_CK = cluster_N.new_full((len(capacity_C), cluster_size), PADDING)
    order = cluster_N.argsort(stable=True)
    ids_CK[cluster_N[order], place_in_group(cluster_N[order], len(capacity_C))] = order
    return Clusters(ids_CK)
