"""Few candidates a row that provably hold its best targets, from one fast matrix product of low precision.

Let q', t' be the vectors as the product sees them (bfloat16, or float32). A score v of the product is within

    eps = |q - q'| max|t'| + |q| max|t - t'| + 2 D 2^-24 |q'| max|t'|      (Cauchy-Schwarz; sums in float32, any order)

of the true score, before it is rounded to the product's own type (relative error u). Norms of the rounding errors are
measured, not assumed. W targets score at least tau, so the W-th best true score is at least tau - u|tau| - eps, and
whatever can be among the best W has v >= tau - u|tau| - 2 eps. tau comes from the maxima of groups of columns: W groups
whose maximum reaches tau hold W such targets, and only groups that reach the bar are looked at again.

Shapes: Q = queries of a tile, M = targets, D = dimensions, C = columns of a panel, G = groups of a panel,
g = columns of a group, W = neighbours kept, V = candidates of a row, P = groups or candidates of all rows in one list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from b3_lightning.mining.exact import check_unit, to_grid
from b3_lightning.mining.precision import full_float32

_FLOAT32_ULP = 1e-6
"""Float32 arithmetic of the bounds, and scores that differ in float64 only."""
_GROUP = 64


def max_candidates(n_neighbors: int) -> int:
    """Rows with more candidates than this are left to the next, more precise search."""
    return 4 * n_neighbors + 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the targets contribute to eps, for one type of product."""

    max_norm: float
    max_residual: float
    on_grid: bool

    @classmethod
    def measure(cls, target_MD: Tensor, dtype: torch.dtype, piece_rows: int) -> Bounds:
        """One pass over the targets.

        Raises:
            ValueError: where a target is longer than 1 or not finite.
        """
        max_norm, max_residual, on_grid = 0.0, 0.0, True
        for start in range(0, len(target_MD), piece_rows):
            piece = target_MD[start : start + piece_rows]
            max_norm = max(max_norm, float(check_unit("target", piece, start).max()))
            exact = to_grid(piece)
            on_grid = on_grid and bool((exact == piece).all())
            max_residual = max(max_residual, float((exact - seen_by_product(piece, dtype)).norm(dim=1).max()))
        return cls(max_norm + max_residual, max_residual, on_grid)

    def eps(self, query_QD: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q,) how far a score of the product, before its own rounding, can be from the true one."""
        seen_QD = seen_by_product(query_QD, dtype).double()
        exact_QD = to_grid(query_QD)
        sums = 2 * query_QD.shape[1] * 2.0**-24 * seen_QD.norm(dim=1) * self.max_norm
        rounding = (exact_QD - seen_QD).norm(dim=1) * self.max_norm + exact_QD.norm(dim=1) * self.max_residual
        eps_Q: Tensor = ((sums + rounding) * 1.0001 + _FLOAT32_ULP).float()
        return eps_Q


def seen_by_product(vector_QD: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors as a product of ``dtype`` reads them, or off by as much as the farthest that it may read."""
    if dtype == torch.float32 and not full_float32(vector_QD.device):
        # that setting allows bfloat16 and TF32, rounded or cut off
        vector_QD = vector_QD * (1 + 2.0**-8)
    return vector_QD.to(dtype)


class Panels:
    """Targets in panels of columns, cast to the product's type, each panel's rows dealt to its groups in turn.

    Target ``start + j G + i`` of a panel is column ``i g + j``: rows next to one another, often alike, come into
    different groups, which keeps tau tight.
    """

    def __init__(self, target_MD: Tensor, dtype: torch.dtype, *, columns: int, n_neighbors: int, cached: bool) -> None:
        self.target_MD = target_MD
        self.dtype = dtype
        self.columns = min(columns, len(target_MD))
        self.group = _GROUP
        while self.group > 1 and self.columns // self.group < 4 * n_neighbors:
            self.group //= 2
        self.starts = range(0, len(target_MD), self.columns)
        self._cached = [self._build(start) for start in self.starts] if cached else None

    def stop(self, start: int) -> int:
        return min(start + self.columns, len(self.target_MD))

    def n_groups(self, start: int) -> int:
        return math.ceil((self.stop(start) - start) / self.group)

    def column_of(self, start: int, id_P: Tensor) -> Tensor:
        n_groups = self.n_groups(start)
        return (id_P - start) % n_groups * self.group + (id_P - start) // n_groups

    def id_of(self, start: int, column_P: Tensor) -> Tensor:
        return start + column_P % self.group * self.n_groups(start) + column_P // self.group

    def scores(self, query_QD: Tensor, start: int, out: Tensor) -> Tensor:
        """(Q, G g) products with a panel in ``out``'s memory; columns beyond the last target are -inf."""
        n_groups = self.n_groups(start)
        panel_CD = self._build(start) if self._cached is None else self._cached[start // self.columns]
        score_QC = out[: len(query_QD) * len(panel_CD)].view(len(query_QD), len(panel_CD))
        torch.mm(query_QD, panel_CD.T, out=score_QC)
        unused = torch.arange(self.stop(start), start + n_groups * self.group, device=score_QC.device)
        if len(unused):
            score_QC[:, self.column_of(start, unused)] = -torch.inf
        return score_QC

    def _build(self, start: int) -> Tensor:
        part = self.target_MD[start : self.stop(start)]
        n_groups = self.n_groups(start)
        panel = part.new_empty(n_groups, self.group, part.shape[1], dtype=self.dtype)
        whole = len(part) // n_groups
        panel[:, :whole] = part[: whole * n_groups].reshape(whole, n_groups, -1).transpose(0, 1)
        panel[:, whole:] = 0
        if whole < self.group:
            rest = part[whole * n_groups :]
            panel[: len(rest), whole] = rest.to(self.dtype)
        return panel.view(n_groups * self.group, -1)


class Shortlist:
    """The best candidates so far of every row of a tile, best first, and which rows it can vouch for."""

    def __init__(self, eps_Q: Tensor, dtype: torch.dtype, n_neighbors: int) -> None:
        self.eps_Q, self.dtype, self.n_neighbors = eps_Q, dtype, n_neighbors
        self.limit = max_candidates(n_neighbors)
        self.score_QV = eps_Q.new_empty(len(eps_Q), 0)
        self.ids_QV = torch.empty(len(eps_Q), 0, dtype=torch.int64, device=eps_Q.device)
        self.sure_Q = torch.ones(len(eps_Q), dtype=torch.bool, device=eps_Q.device)

    def add(self, panels: Panels, start: int, score_QC: Tensor) -> None:
        """Take in what can be among the best of one panel's scores."""
        n_rows, group = len(score_QC), panels.group
        # as whole numbers, positive floats of 16 bits keep their order, and maxima are several times faster
        ordered_QC = score_QC.view(torch.int16) if self.dtype.itemsize == 2 else score_QC
        top_QG = ordered_QC.view(n_rows, -1, group).amax(dim=2)
        known_QG = torch.cat([self.score_QV[:, : self.n_neighbors], top_QG.view(self.dtype).float()], dim=1)
        bar_Q = self._bar(known_QG)
        self.sure_Q &= bar_Q > (1e-30 if self.dtype.itemsize == 2 else -torch.inf)
        bar_Q = torch.where(self.sure_Q, bar_Q, torch.inf).to(self.dtype).view(ordered_QC.dtype)
        hit_QG = top_QG >= bar_Q[:, None]
        self.sure_Q &= hit_QG.sum(dim=1, dtype=torch.int32) <= self.limit
        row_P, group_P = (hit_QG & self.sure_Q[:, None]).nonzero().unbind(1)
        part_Pg = ordered_QC.view(-1, group).index_select(0, row_P * top_QG.shape[1] + group_P)
        hit_Pg = part_Pg >= bar_Q[row_P][:, None]
        self._drop_crowded(row_P, hit_Pg)
        flat_P = hit_Pg.view(-1).nonzero().flatten()
        found_P = part_Pg.view(-1)[flat_P].view(self.dtype).float()
        picked_P = flat_P // group
        ids_P = panels.id_of(start, group_P[picked_P] * group + flat_P % group)
        self._merge(row_P[picked_P], found_P, ids_P)

    def _drop_crowded(self, row_P: Tensor, hit_Pg: Tensor) -> None:
        """Before hits become lists, give up the rows with too many: this bounds the lists."""
        hits_P = hit_Pg.sum(dim=1, dtype=torch.uint8).long()  # 64 at most; a sum in int64 copies all hits first
        self.sure_Q &= torch.zeros_like(self.sure_Q, dtype=torch.int64).index_add_(0, row_P, hits_P) <= self.limit
        if not bool(self.sure_Q.all()):
            hit_Pg &= self.sure_Q[row_P][:, None]

    def counts(self) -> Tensor:
        """(Q,) how many of a row's candidates can be among its best W; 0 for rows that it cannot vouch for."""
        bar_Q = self._bar(self.score_QV).to(self.dtype).float()
        self.sure_Q &= bar_Q > -torch.inf
        count_Q = (self.score_QV >= bar_Q[:, None]).sum(dim=1)
        self.sure_Q &= count_Q <= self.limit
        return count_Q.masked_fill_(~self.sure_Q, 0)

    def confirms(self, score_QV: Tensor) -> Tensor:
        """(Q,) whether all true scores (-inf: not computed) lie within the bound: guards what the bound assumes."""
        slack_QV = self.eps_Q[:, None] + self._rounding(self.score_QV)
        within_QV = (score_QV - self.score_QV).abs() <= slack_QV
        return (within_QV | (score_QV == -torch.inf)).all(dim=1)

    def _rounding(self, score: Tensor) -> Tensor:
        return 1.01 * torch.finfo(self.dtype).eps / 2 * score.abs()

    def _bar(self, known_QG: Tensor) -> Tensor:
        """(Q,) the least score that can belong to a row's best W, given scores of that many distinct targets or more.

        -inf where fewer than W are known.
        """
        if known_QG.shape[1] < self.n_neighbors:
            return torch.full_like(self.eps_Q, -torch.inf)
        tau_Q = known_QG.topk(self.n_neighbors, dim=1, sorted=False).values.amin(dim=1)
        return torch.where(tau_Q == -torch.inf, tau_Q, tau_Q - self._rounding(tau_Q) - 2 * self.eps_Q)

    def _merge(self, row_P: Tensor, score_P: Tensor, ids_P: Tensor) -> None:
        n_rows = len(self.eps_Q)
        count_Q = torch.bincount(row_P, minlength=n_rows)
        place_P = torch.arange(len(row_P), device=row_P.device) - (count_Q.cumsum(0) - count_Q)[row_P]
        width = int(count_Q.max())
        score_QV = self.score_QV.new_full((n_rows, width), -torch.inf)
        ids_QV = self.ids_QV.new_zeros(n_rows, width)
        score_QV[row_P, place_P] = score_P
        ids_QV[row_P, place_P] = ids_P
        score_QV = torch.cat([self.score_QV, score_QV], dim=1)
        ids_QV = torch.cat([self.ids_QV, ids_QV], dim=1)
        best = score_QV.topk(min(score_QV.shape[1], self.limit + 1), dim=1)
        self.score_QV, self.ids_QV = best.values, ids_QV.gather(1, best.indices)
