"""Clusters of exactly K in, clusters of the same sizes that keep more edges out: a local search by swaps.

Two rows of different clusters change places where that raises the weight of the edges inside clusters. In a round every
row that is better off elsewhere looks for its best partner there; of the swaps found, those are made that are the
best of both their clusters, so that no gain depends on another and the sum of all gains is exact.

Shapes: N = rows, C = clusters, K = cluster size, A = (row, cluster) pairs with an edge between, S = swaps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.types import PADDING, Clusters, Edges

_LEAST_GAIN = 1e-6
_ROWS_AT_ONCE = 2**15
"""Wishes examined at once: each looks at K partners, so this bounds memory at about 100 MiB for K = 64."""


def improve_by_swaps(clusters: Clusters, edges: Edges, *, max_rounds: int) -> Clusters:
    """Swap rows until no swap raises the kept weight, or ``max_rounds`` are done."""
    if len(edges) == 0 or len(clusters) == 1:
        return clusters
    ids_CK = clusters.ids_CK.clone()
    cluster_N = clusters.cluster_of_row()
    for _ in range(max_rounds):
        first_S, second_S, gain_S = _find_swaps(ids_CK, cluster_N, edges)
        if len(gain_S) == 0:
            break
        chosen_S = _independent(cluster_N[first_S], cluster_N[second_S], gain_S, len(ids_CK))
        _swap(ids_CK, cluster_N, first_S[chosen_S], second_S[chosen_S])
    return Clusters(ids_CK)


class _Ties:
    """Weight of the edges between every row and every cluster, looked up by (row, cluster)."""

    def __init__(self, cluster_N: Tensor, edges: Edges, n_clusters: int) -> None:
        from_A, to_A, weight_A = edges.both_directions()
        self.n_clusters = n_clusters
        self.code_A, index_A = (from_A * n_clusters + cluster_N[to_A]).unique(return_inverse=True)
        self.weight_A = torch.zeros(len(self.code_A)).index_add_(0, index_A, weight_A)

    def __call__(self, row: Tensor, cluster: Tensor) -> Tensor:
        return _look_up(self.code_A, self.weight_A, row * self.n_clusters + cluster)


def _look_up(code_A: Tensor, weight_A: Tensor, code: Tensor) -> Tensor:
    """The weight that stands at each code of sorted ``code_A``; 0 where it is absent."""
    place = torch.searchsorted(code_A, code).clamp(max=len(code_A) - 1)
    return torch.where(code_A[place] == code, weight_A[place], 0.0)


def _find_swaps(ids_CK: Tensor, cluster_N: Tensor, edges: Edges) -> tuple[Tensor, Tensor, Tensor]:
    """For every (row, other cluster) that ties the row more than its own: its best partner there, and the gain."""
    ties = _Ties(cluster_N, edges, len(ids_CK))
    own_N = ties(torch.arange(len(cluster_N)), cluster_N)
    edge_code_E = edges.source_E * edges.n_rows + edges.target_E
    row_A, cluster_A = ties.code_A // len(ids_CK), ties.code_A % len(ids_CK)
    pull_A = ties.weight_A - own_N[row_A]
    wish = ((pull_A > 0) & (cluster_A != cluster_N[row_A])).nonzero().flatten()
    rows, partners, gains = [wish[:0]], [wish[:0]], [pull_A[:0]]
    for part in wish.split(_ROWS_AT_ONCE):
        row_S = row_A[part]
        partner_SK = ids_CK[cluster_A[part]]
        known_SK = partner_SK.clamp(min=0)
        back_SK = ties(known_SK, cluster_N[row_S][:, None].expand_as(known_SK)) - own_N[known_SK]
        low_SK = torch.minimum(row_S[:, None], known_SK)
        between_SK = _look_up(
            edge_code_E, edges.weight_E, low_SK * edges.n_rows + torch.maximum(row_S[:, None], known_SK)
        )
        gain_SK = pull_A[part][:, None] + back_SK - 2 * between_SK
        best = gain_SK.masked_fill(partner_SK == PADDING, -torch.inf).max(dim=1)
        useful = best.values > _LEAST_GAIN
        rows.append(row_S[useful])
        partners.append(partner_SK.gather(1, best.indices[:, None]).flatten()[useful])
        gains.append(best.values[useful])
    return torch.cat(rows), torch.cat(partners), torch.cat(gains)


def _independent(first_S: Tensor, second_S: Tensor, gain_S: Tensor, n_clusters: int) -> Tensor:
    """Pick swaps, best first, that share no cluster; ties go to the earlier swap. Takes and gives positions."""
    order_S = gain_S.argsort(descending=True, stable=True)
    first_S, second_S = first_S[order_S], second_S[order_S]
    picked = []
    left = torch.arange(len(order_S))
    taken_C = torch.zeros(n_clusters, dtype=torch.bool)
    while len(left):
        best_C = torch.full((n_clusters,), len(order_S))
        best_C.scatter_reduce_(0, first_S[left], left, "amin").scatter_reduce_(0, second_S[left], left, "amin")
        wins = left[(best_C[first_S[left]] == left) & (best_C[second_S[left]] == left)]
        picked.append(wins)
        taken_C[first_S[wins]] = True
        taken_C[second_S[wins]] = True
        left = left[~taken_C[first_S[left]] & ~taken_C[second_S[left]]]
    return order_S[torch.cat(picked)]


def _swap(ids_CK: Tensor, cluster_N: Tensor, first_S: Tensor, second_S: Tensor) -> None:
    position_N = torch.empty(len(cluster_N), dtype=torch.int64)
    filled_CK = ids_CK != PADDING
    position_N[ids_CK[filled_CK]] = filled_CK.flatten().nonzero().flatten()
    ids_CK.view(-1)[position_N[first_S]] = second_S
    ids_CK.view(-1)[position_N[second_S]] = first_S
    cluster_N[first_S], cluster_N[second_S] = cluster_N[second_S], cluster_N[first_S]
