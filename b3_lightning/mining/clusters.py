"""Communities of any size in, clusters of exactly K rows out.

Communities come cut into parts of about K (parts.py). Sizes are then made exact by
affinity, never at random: a part that is too large gives up the members with the fewest edges into it, small left-over
parts are dissolved, and every homeless row goes to the open cluster that holds most of its neighbours.

Shapes: N = rows, C = clusters, K = cluster_size, P = homeless rows, A = (row, neighbour) pairs, D = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from b3_lightning.mining.groups import place_in_group
from b3_lightning.types import PADDING, Clusters, Edges, Embeddings

HOMELESS = -1
_TILE_ROWS = 2**16
_ARC_WEIGHT = 0.25
"""A one-sided window entry counts a quarter of a mutual edge."""


def cut_clusters(
    edges: Edges,
    part_N: Tensor,
    arcs_touching: Callable[[Tensor], tuple[Tensor, Tensor]],
    embeddings: Embeddings,
    *,
    cluster_size: int,
) -> Clusters:
    """Make clusters of exactly ``cluster_size`` of parts of about that size; only the last one may be padded.

    Args:
        part_N: (N,) the part of every row, numbered from 0.
        arcs_touching: (N,) bool -> (from_A, to_A), the directed window entries with such a row at an end; they find a
            home for rows without a mutual edge.
    """
    n_clusters = math.ceil(edges.n_rows / cluster_size)
    capacity_C = part_N.new_full((n_clusters,), cluster_size)
    capacity_C[-1] = edges.n_rows - (n_clusters - 1) * cluster_size
    cluster_N = _seed_clusters(part_N, edges, capacity_C)
    homeless_N = cluster_N == HOMELESS
    if bool(homeless_N.any()):
        _place_by_affinity(cluster_N, capacity_C, _Affinity(edges, arcs_touching(homeless_N)))
        _place_by_similarity(cluster_N, capacity_C, embeddings)
    return _as_table(cluster_N, capacity_C, cluster_size)


def _seed_clusters(part_N: Tensor, edges: Edges, capacity_C: Tensor) -> Tensor:
    """Let the largest parts become clusters; evict what exceeds a capacity, weakest first. Others are homeless."""
    size_P = torch.bincount(part_N)
    rank_P = size_P.argsort(descending=True, stable=True).argsort()
    cluster_N = torch.where(rank_P[part_N] < len(capacity_C), rank_P[part_N], HOMELESS)
    inside = edges.within(cluster_N)
    from_A, _, weight_A = inside.both_directions()
    strength_N = weight_A.new_zeros(len(part_N)).index_add_(0, from_A, weight_A)
    housed = (cluster_N != HOMELESS).nonzero().flatten()
    stays = _first_of_each(cluster_N[housed], strength_N[housed], capacity_C)
    cluster_N[housed[~stays]] = HOMELESS
    return cluster_N


def _first_of_each(cluster_R: Tensor, strength_R: Tensor, free_C: Tensor) -> Tensor:
    """(R,) bool: is the applicant among the ``free_C`` strongest of its cluster? Ties go to the earlier applicant."""
    by_strength = strength_R.argsort(descending=True, stable=True)
    order = by_strength[cluster_R[by_strength].argsort(stable=True)]
    place_R = torch.empty_like(cluster_R)
    place_R[order] = place_in_group(cluster_R[order], len(free_C))
    return place_R < free_C[cluster_R]


def _free(cluster_N: Tensor, capacity_C: Tensor) -> Tensor:
    return capacity_C - torch.bincount(cluster_N[cluster_N != HOMELESS], minlength=len(capacity_C))


class _Affinity:
    """All (row, neighbour, weight) pairs, mutual edges before one-sided window entries."""

    def __init__(self, edges: Edges, arcs: tuple[Tensor, Tensor]) -> None:
        from_A, to_A, weight_A = edges.both_directions()
        self.row_A = torch.cat([from_A, arcs[0], arcs[1]])
        self.neighbor_A = torch.cat([to_A, arcs[1], arcs[0]])
        self.weight_A = torch.cat([weight_A, weight_A.new_full((2 * len(arcs[0]),), _ARC_WEIGHT)])

    def restrict_to(self, homeless_N: Tensor) -> None:
        keep_A = homeless_N[self.row_A]
        self.row_A, self.neighbor_A, self.weight_A = self.row_A[keep_A], self.neighbor_A[keep_A], self.weight_A[keep_A]

    def best_open(self, cluster_N: Tensor, free_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every homeless row with a neighbour in an open cluster: (row, its best cluster, the affinity)."""
        cluster_A = cluster_N[self.neighbor_A]
        open_A = (cluster_A != HOMELESS) & (free_C[cluster_A.clamp(min=0)] > 0)
        pair_A = self.row_A[open_A] * len(free_C) + cluster_A[open_A]
        pair_R, index_A = pair_A.unique(return_inverse=True)
        strength_R = self.weight_A.new_zeros(len(pair_R)).index_add_(0, index_A, self.weight_A[open_A])
        row_R, cluster_R = pair_R // len(free_C), pair_R % len(free_C)
        best = _first_of_each(row_R, strength_R, torch.ones_like(cluster_N))
        return row_R[best], cluster_R[best], strength_R[best]


def _place_by_affinity(cluster_N: Tensor, capacity_C: Tensor, affinity: _Affinity) -> None:
    """In rounds, every homeless row applies to its best open cluster and the strongest applicants are let in."""
    while True:
        affinity.restrict_to(cluster_N == HOMELESS)
        free_C = _free(cluster_N, capacity_C)
        row_R, cluster_R, strength_R = affinity.best_open(cluster_N, free_C)
        if len(row_R) == 0:
            return
        accepted = _first_of_each(cluster_R, strength_R, free_C)
        cluster_N[row_R[accepted]] = cluster_R[accepted]


def _place_by_similarity(cluster_N: Tensor, capacity_C: Tensor, embeddings: Embeddings) -> None:
    """House rows whose neighbours' clusters are all full: by similarity to the members of an open cluster."""
    while bool((cluster_N == HOMELESS).any()):
        free_C = _free(cluster_N, capacity_C)
        size_C = capacity_C - free_C
        open_C = ((free_C > 0) & (size_C > 0)).nonzero().flatten()
        homeless_P = (cluster_N == HOMELESS).nonzero().flatten()
        if len(open_C) == 0:
            # only empty clusters are left: the first homeless row founds one
            cluster_N[homeless_P[0]] = int((free_C > 0).nonzero()[0])
            continue
        place_C = capacity_C.new_full((len(capacity_C) + 1,), HOMELESS)
        place_C[open_C] = torch.arange(len(open_C), device=open_C.device)
        member_R = (place_C[cluster_N] != HOMELESS).nonzero().flatten()
        centroid_OD = torch.zeros(len(open_C), embeddings.query_ND.shape[1], dtype=torch.float64, device=open_C.device)
        for rows in member_R.split(_TILE_ROWS):
            centroid_OD.index_add_(0, place_C[cluster_N[rows]], _row_vectors(embeddings, rows))
        best = _nearest(embeddings, homeless_P, _on_grid(centroid_OD))
        accepted = _first_of_each(open_C[best.indices], best.values, free_C)
        cluster_N[homeless_P[accepted]] = open_C[best.indices[accepted]]


def _row_vectors(embeddings: Embeddings, rows: Tensor) -> Tensor:
    """What rows are about: the middles of query and target, on the device of ``rows``; vectors stay on the host."""
    here = rows.to(embeddings.query_ND.device)
    return _on_grid((embeddings.query_ND[here].double() + embeddings.target_ND[here].double()).to(rows.device))


def _on_grid(vector_RD: Tensor) -> Tensor:
    """Unit norm, in steps of 2^-20: float64 products of these are exact, whatever order they are summed in."""
    unit_RD = torch.nn.functional.normalize(vector_RD, dim=1)
    return (unit_RD * 2**20).round() / 2**20


def _nearest(embeddings: Embeddings, row_P: Tensor, centroid_OD: Tensor) -> torch.return_types.max:
    """Best centroid of each row, in tiles of at most 128 MiB of scores."""
    tile = max(1, 2**24 // len(centroid_OD))
    parts = [(_row_vectors(embeddings, rows) @ centroid_OD.T).max(dim=1) for rows in row_P.split(tile)]
    return torch.return_types.max((torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])))


def _as_table(cluster_N: Tensor, capacity_C: Tensor, cluster_size: int) -> Clusters:
    ids_CK = cluster_N.new_full((len(capacity_C), cluster_size), PADDING)
    order = cluster_N.argsort(stable=True)
    ids_CK[cluster_N[order], place_in_group(cluster_N[order], len(capacity_C))] = order
    return Clusters(ids_CK)
