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
_ARCS_AT_ONCE = 2**18
"""Neighbours looked at together: few enough that ties are looked up in cache (2^22 takes 1.4 times as long)."""
_ROWS_AT_ONCE = 2**15
"""Wishes examined at once: each looks at K partners, so this bounds memory at about 100 MiB for K = 64."""


def improve_by_swaps(clusters: Clusters, edges: Edges, *, max_rounds: int) -> Clusters:
    """Swap rows until no swap raises the kept weight, or ``max_rounds`` are done."""
    if len(edges) == 0 or len(clusters) == 1:
        return clusters
    search = _Search(clusters, edges)
    for _ in range(max_rounds):
        first_S, second_S, gain_S = search.find_swaps()
        if len(gain_S) == 0:
            break
        while len(gain_S):
            chosen_S = _independent(search.cluster_N[first_S], search.cluster_N[second_S], gain_S, len(clusters))
            search.swap(first_S[chosen_S], second_S[chosen_S])
            # the others found may still be worth it: to weigh those again is far cheaper than to find new ones
            gain_S[chosen_S] = 0
            left_S = gain_S > 0
            first_S, second_S = first_S[left_S], second_S[left_S]
            gain_S = search.gains(first_S, second_S)
            left_S = gain_S > _LEAST_GAIN
            first_S, second_S, gain_S = first_S[left_S], second_S[left_S], gain_S[left_S]
    return Clusters(search.ids_CK)


class _Search:
    """The clusters as they are, and which of them changed since swaps were last looked for.

    The gain of a swap depends only on who is in its two clusters, so a round looks only at pairs of clusters of which
    one has changed: a swap that was found and not made lost to one that changed a cluster of its own.
    """

    def __init__(self, clusters: Clusters, edges: Edges) -> None:
        self.edges = edges
        self.ids_CK = clusters.ids_CK.clone()
        self.cluster_N = clusters.cluster_of_row()
        from_A, to_A, weight_A = edges.both_directions()
        order_A = from_A.argsort()
        self._to_A, self._weight_A = to_A[order_A], weight_A[order_A]
        self._degree_N = torch.bincount(from_A, minlength=edges.n_rows)
        self._first_N = self._degree_N.cumsum(0) - self._degree_N
        self._edge_code_E = edges.source_E * edges.n_rows + edges.target_E
        self._own_N = edges.weight_E.new_zeros(edges.n_rows)
        self._changed_C = torch.ones_like(self.ids_CK[:, 0], dtype=torch.bool)

    def _arcs_of(self, row_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every neighbour of these rows: (position in ``row_S``, neighbour, weight)."""
        degree_S = self._degree_N[row_S]
        pair_A = torch.arange(len(row_S), device=row_S.device).repeat_interleave(degree_S)
        place_A = (
            torch.arange(len(pair_A), device=pair_A.device)
            - (degree_S.cumsum(0) - degree_S - self._first_N[row_S])[pair_A]
        )
        return pair_A, self._to_A[place_A], self._weight_A[place_A]

    def find_swaps(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every (row, other cluster) that ties the row more than its own: its best partner there, and the gain."""
        changed_N = self._changed_C[self.cluster_N]
        self._changed_C = torch.zeros_like(self._changed_C)
        rows = changed_N.nonzero().flatten()
        rows = rows[self.cluster_N[rows].argsort(stable=True)]
        parts = self._by_whole_clusters(rows)
        for part in parts:
            self._update_own(part)
        found = [self._find_swaps_with(part) for part in parts]
        first_S, second_S, gain_S = (torch.cat(column) for column in zip(*found, strict=True))
        return first_S, second_S, gain_S

    def _by_whole_clusters(self, row_R: Tensor) -> list[Tensor]:
        """Rows, in the order of their clusters, in parts of about ``_ARCS_AT_ONCE`` neighbours."""
        if len(row_R) == 0:
            return [row_R]
        part_R = self._degree_N[row_R].cumsum(0) // _ARCS_AT_ONCE
        _, size_C = self.cluster_N[row_R].unique_consecutive(return_counts=True)
        part_C = part_R[size_C.cumsum(0) - 1]  # a cluster goes where its last row does
        return list(row_R.split(torch.bincount(part_C, size_C.double()).long()[part_C.unique()].tolist()))

    def _update_own(self, row_R: Tensor) -> None:
        """Weight of the edges between these rows and their own clusters."""
        pair_A, near_A, weight_A = self._arcs_of(row_R)
        inside_A = self.cluster_N[row_R[pair_A]] == self.cluster_N[near_A]
        self._own_N[row_R] = 0
        self._own_N.index_add_(0, row_R[pair_A[inside_A]], weight_A[inside_A])

    def _ties_with(self, row_R: Tensor) -> _Ties:
        """The ties between rows and clusters of which one is in, or is, the cluster of a row of ``row_R``."""
        pair_A, near_A, weight_A = self._arcs_of(row_R)
        row_A = row_R[pair_A]
        here_N = torch.zeros_like(self.cluster_N, dtype=torch.bool)
        here_N[row_R] = True
        out_A = ~here_N[near_A]  # seen from there, such an edge leads into one of these clusters
        from_A, to_A = torch.cat([row_A, near_A[out_A]]), torch.cat([near_A, row_A[out_A]])
        return _Ties(from_A, self.cluster_N[to_A], torch.cat([weight_A, weight_A[out_A]]), len(self.ids_CK))

    def _find_swaps_with(self, row_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The swaps of which one row is in a cluster of ``row_R``."""
        ties = self._ties_with(row_R)
        row_A, cluster_A = ties.code_A // len(self.ids_CK), ties.code_A % len(self.ids_CK)
        pull_A = ties.weight_A - self._own_N[row_A]
        wish = ((pull_A > 0) & (cluster_A != self.cluster_N[row_A])).nonzero().flatten()
        rows, partners, gains = [wish[:0]], [wish[:0]], [pull_A[:0]]
        for part in wish.split(_ROWS_AT_ONCE):
            partner_SK = self.ids_CK[cluster_A[part]]
            gain_SK = pull_A[part][:, None] + self._gain_of_partners(row_A[part], partner_SK.clamp(min=0), ties)
            best = gain_SK.masked_fill_(partner_SK == PADDING, -torch.inf).max(dim=1)
            useful = best.values > _LEAST_GAIN
            rows.append(row_A[part][useful])
            partners.append(partner_SK.gather(1, best.indices[:, None]).flatten()[useful])
            gains.append(best.values[useful])
        return torch.cat(rows), torch.cat(partners), torch.cat(gains)

    def _gain_of_partners(self, row_S: Tensor, partner_SK: Tensor, ties: _Ties) -> Tensor:
        """(S, K) what each partner's move to the row's cluster brings, less the edge between the two, which is lost."""
        back_SK = ties(partner_SK, self.cluster_N[row_S][:, None]) - self._own_N[partner_SK]
        return back_SK - 2 * self._between(row_S[:, None], partner_SK)

    def _between(self, row: Tensor, other: Tensor) -> Tensor:
        """Weight of the edge between two rows; 0 where there is none."""
        code = torch.minimum(row, other) * self.edges.n_rows + torch.maximum(row, other)
        return _look_up(self._edge_code_E, self.edges.weight_E, code)

    def gains(self, first_S: Tensor, second_S: Tensor) -> Tensor:
        """(S,) what each swap would bring as the clusters are now."""
        first_C, second_C = self.cluster_N[first_S], self.cluster_N[second_S]
        gain_S = self._pull(first_S, second_C, first_C) + self._pull(second_S, first_C, second_C)
        gain_S -= 2 * self._between(first_S, second_S)
        return gain_S.masked_fill_(first_C == second_C, 0)

    def _pull(self, row_S: Tensor, to_S: Tensor, own_S: Tensor) -> Tensor:
        """(S,) how much more weight ties each row to one cluster than to another."""
        pair_A, near_A, weight_A = self._arcs_of(row_S)
        cluster_A = self.cluster_N[near_A]
        weight_A = weight_A * ((cluster_A == to_S[pair_A]).float() - (cluster_A == own_S[pair_A]).float())
        return weight_A.new_zeros(len(row_S)).index_add_(0, pair_A, weight_A)

    def swap(self, first_S: Tensor, second_S: Tensor) -> None:
        """Let each pair change places."""
        position_N = torch.empty_like(self.cluster_N)
        filled_CK = self.ids_CK != PADDING
        position_N[self.ids_CK[filled_CK]] = filled_CK.flatten().nonzero().flatten()
        self.ids_CK.view(-1)[position_N[first_S]] = second_S
        self.ids_CK.view(-1)[position_N[second_S]] = first_S
        to_first_S, to_second_S = self.cluster_N[second_S], self.cluster_N[first_S]
        self.cluster_N[first_S], self.cluster_N[second_S] = to_first_S, to_second_S
        self._changed_C[to_first_S] = True
        self._changed_C[to_second_S] = True


class _Ties:
    """Weight of the edges between rows and clusters, looked up by (row, cluster)."""

    def __init__(self, row_A: Tensor, cluster_A: Tensor, weight_A: Tensor, n_clusters: int) -> None:
        self.n_clusters = n_clusters
        self.code_A, index_A = (row_A * n_clusters + cluster_A).unique(return_inverse=True)
        self.weight_A = weight_A.new_zeros(len(self.code_A)).index_add_(0, index_A, weight_A)

    def __call__(self, row: Tensor, cluster: Tensor) -> Tensor:
        return _look_up(self.code_A, self.weight_A, row * self.n_clusters + cluster)


def _look_up(code_A: Tensor, weight_A: Tensor, code: Tensor) -> Tensor:
    """The weight that stands at each code of sorted ``code_A``; 0 where it is absent."""
    if len(code_A) == 0:
        return weight_A.new_zeros(code.shape)
    place = torch.searchsorted(code_A, code).clamp_(max=len(code_A) - 1)
    return torch.where(code_A[place] == code, weight_A[place], 0.0)


def _independent(first_S: Tensor, second_S: Tensor, gain_S: Tensor, n_clusters: int) -> Tensor:
    """Pick swaps, best first, that share no cluster; ties go to the earlier swap. Takes and gives positions."""
    order_S = gain_S.argsort(descending=True, stable=True)
    first_S, second_S = first_S[order_S], second_S[order_S]
    picked = []
    left = torch.arange(len(order_S), device=order_S.device)
    taken_C = torch.zeros(n_clusters, dtype=torch.bool, device=order_S.device)
    while len(left):
        best_C = order_S.new_full((n_clusters,), len(order_S))
        best_C.scatter_reduce_(0, first_S[left], left, "amin").scatter_reduce_(0, second_S[left], left, "amin")
        wins = left[(best_C[first_S[left]] == left) & (best_C[second_S[left]] == left)]
        picked.append(wins)
        taken_C[first_S[wins]] = True
        taken_C[second_S[wins]] = True
        left = left[~taken_C[first_S[left]] & ~taken_C[second_S[left]]]
    return order_S[torch.cat(picked)]
