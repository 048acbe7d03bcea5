"""Hard negatives for every row, drawn from the window (B3++, section 4.3).

In the paper one distribution serves a whole batch: how often a target stands in the windows of its queries. Here it is
counted over each cluster, as in the authors' code, since every epoch combines other clusters into batches.

Shapes: N = rows, G = groups of rows that share a distribution, K = rows of a group, W = ranks kept,
H = negatives a row, P = (group, candidate) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.mining.alike import Alike
from b3_lightning.mining.groups import place_in_group
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import PADDING, Clusters, Neighbors, Window

_RANKS_AT_ONCE = 2**22
"""(row, rank) entries looked at together: bounds memory at about 300 MB."""

_FEW = 16
"""Up to so many rows a draw, all rows are looked at instead: of few, most may be ruled out."""


def draw_negatives(
    clusters: Clusters, neighbors: Neighbors, window: Window, alike: Alike, settings: MiningSettings
) -> Tensor:
    """(N, H) int64, H = ``n_negatives``: rows whose targets are each row's negatives; -1 where too few can be drawn.

    No negative lies in its row's cluster (it is in the batch anyway), is alike to a row of the group, is masked
    for one of them or known to be right, or has the target of another one of the group.
    """
    device = clusters.ids_CK.device
    groups_GK = (
        clusters.ids_CK if settings.negatives_of == "cluster" else torch.arange(len(neighbors), device=device)[:, None]
    )
    n_random = settings.n_random_negatives
    n_hard = settings.n_negatives - n_random
    generator = torch.Generator().manual_seed(settings.seed)
    cluster_N = clusters.cluster_of_row()
    negative_NH = clusters.ids_CK.new_full((len(neighbors), settings.n_negatives), PADDING)
    if settings.n_negatives == 0:
        return negative_NH
    for part_GK in groups_GK.split(max(1, _RANKS_AT_ONCE // (groups_GK.shape[1] * neighbors.ids_NW.shape[1]))):
        group = _Group(part_GK, neighbors, window, alike, cluster_N)
        hard_P, count_P = group.distinct(group.allowed(group.codes(window.hard_NW)))
        hard_GKH = group.deal(hard_P, count_P, n_hard, generator)
        chosen_P = group.targets(_codes(hard_GKH.flatten(1), len(neighbors)))
        random_P = group.allowed(group.random_codes(4 * n_random * part_GK.shape[1] + 16, generator))
        random_P, _ = group.distinct(random_P[~torch.isin(group.targets(random_P), chosen_P)])
        random_GKH = group.deal(random_P, torch.ones_like(random_P), n_random, generator)
        filled_GK = part_GK != PADDING
        negative_NH[part_GK[filled_GK]] = torch.cat([hard_GKH, random_GKH], dim=2)[filled_GK]
    return negative_NH


def _codes(row_GP: Tensor, n_rows: int) -> Tensor:
    """Each (group, row) as one number, padding left out."""
    group_GP = torch.arange(len(row_GP), device=row_GP.device)[:, None].expand_as(row_GP)
    filled_GP = row_GP != PADDING
    return group_GP[filled_GP] * n_rows + row_GP[filled_GP]


class _Group:
    """Groups of rows, and which rows may be their negatives; candidates are codes, group x N + row."""

    def __init__(
        self,
        part_GK: Tensor,
        neighbors: Neighbors,
        window: Window,
        alike: Alike,
        cluster_N: Tensor,
    ) -> None:
        self._part_GK, self._near_NW, self._alike = part_GK, neighbors.ids_NW, alike
        self._n_rows = len(neighbors)
        self._cluster_G, self._cluster_N = cluster_N[part_GK[:, 0]], cluster_N
        self._wrong_P = self.targets(self.codes(window.masked_NW))
        if alike.known:
            known_GKM = alike.known[part_GK.clamp(min=0).flatten()].view(*part_GK.shape, -1)
            known_GKM = known_GKM.masked_fill((part_GK == PADDING)[:, :, None], PADDING)
            self._wrong_P = torch.cat([self._wrong_P, _codes(known_GKM.flatten(1), int(alike.target_N.max()) + 1)])

    def codes(self, mark_NW: Tensor) -> Tensor:
        """The marked neighbours of every group's rows; one that several rows mark stands there several times."""
        row_GK = self._part_GK.clamp(min=0)
        marked_GKW = mark_NW[row_GK] & (self._part_GK != PADDING)[:, :, None]
        near_GKW = self._near_NW[row_GK].masked_fill(~marked_GKW, PADDING)
        return _codes(near_GKW.flatten(1), self._n_rows)

    def random_codes(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` rows for every group, uniform over all rows; all of them where they are few."""
        if self._n_rows <= _FEW * n:
            row_N = torch.arange(self._n_rows, device=self._part_GK.device)
            return _codes(row_N.expand(len(self._part_GK), -1), self._n_rows)
        row_GP = torch.randint(self._n_rows, (len(self._part_GK), n), generator=generator, device="cpu")
        return _codes(row_GP.to(self._part_GK.device), self._n_rows)

    def allowed(self, code_P: Tensor) -> Tensor:
        """The candidates that are surely no positive of any row of the group and not in its cluster."""
        group_P, row_P = code_P // self._n_rows, code_P % self._n_rows
        wrong_P = torch.isin(self.targets(code_P), self._wrong_P)  # by whatever row the target is named
        ok_P = (self._cluster_N[row_P] != self._cluster_G[group_P]) & ~wrong_P
        for key_N in self._alike.keys:
            n_keys = int(key_N.max()) + 1
            own_GK = key_N[self._part_GK.clamp(min=0)].masked_fill(self._part_GK == PADDING, PADDING)
            ok_P &= ~torch.isin(group_P * n_keys + key_N[row_P], _codes(own_GK, n_keys))
        return code_P[ok_P]

    def targets(self, code_P: Tensor) -> Tensor:
        """Each candidate's group and target as one number."""
        key_N = self._alike.target_N
        return code_P // self._n_rows * (int(key_N.max()) + 1) + key_N[code_P % self._n_rows]

    def distinct(self, code_P: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidates of each group, the first row of every target, and how often the target stands there."""
        _, target_P, count_T = self.targets(code_P).unique(return_inverse=True, return_counts=True)
        first_T = count_T.new_full(count_T.shape, len(self._part_GK) * self._n_rows)
        first_T = first_T.scatter_reduce(0, target_P, code_P, "amin")
        first_T, order_T = first_T.sort()
        return first_T, count_T[order_T]

    def deal(self, code_P: Tensor, count_P: Tensor, n_each: int, generator: torch.Generator) -> Tensor:
        """(G, K, n_each): draw without replacement, weighted by the counts, and deal round the group."""
        # Gumbel's trick: the largest of log(weight) + noise are a weighted draw without replacement
        drawn_P = torch.rand(len(code_P), generator=generator, device="cpu").clamp_(1e-9, 1 - 1e-7)
        noise_P = -torch.log(-torch.log(drawn_P)).to(code_P.device)
        order_P = (count_P.log() + noise_P).argsort(descending=True, stable=True)
        order_P = order_P[(code_P[order_P] // self._n_rows).argsort(stable=True)]
        group_P, row_P = code_P[order_P] // self._n_rows, code_P[order_P] % self._n_rows
        place_P = place_in_group(group_P, len(self._part_GK))
        size_P = (self._part_GK != PADDING).sum(dim=1)[group_P]
        take_P = place_P < size_P * n_each
        dealt_GKH = self._part_GK.new_full((*self._part_GK.shape, n_each), PADDING)
        place_P, size_P = place_P[take_P], size_P[take_P]
        dealt_GKH[group_P[take_P], place_P % size_P, place_P // size_P] = row_P[take_P]
        return dealt_GKH
