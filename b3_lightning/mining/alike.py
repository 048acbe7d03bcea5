"""Which rows of a batch are no negatives of one another, for all who score a batch: the loss, and what foretells it.

Shapes: N = all rows, B = rows that are asked about, C = rows of the batch, M = values that a row lists, padded with -1;
P = (query, target) pairs that are known, G = queries that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from b3_lightning.types import PADDING

_ALL = slice(None)


@dataclass(frozen=True)
class Alike:
    """What makes rows alike: they are no negatives of one another.

    Args:
        keys: (N,) int64 each, not negative but for -1, none: of the targets first, then of queries and groups; rows
            with an equal one are alike.
    """

    keys: Sequence[Tensor]

    @property
    def target_N(self) -> Tensor:
        """(N,) the keys of the targets."""
        return self.keys[0]

    @cached_property
    def known(self) -> KnownTargets:
        """Right answers of the rows that stand in other rows."""
        return KnownTargets(self.keys)

    def take(self, rows: Tensor) -> Alike:
        """These rows alone, with the right answers that any row tells of."""
        return self._with(self.known.take(rows), [key_N[rows] for key_N in self.keys])

    def to(self, device: torch.device) -> Alike:
        """The same on a device."""
        return self._with(self.known.to(device), [key_N.to(device) for key_N in self.keys])

    def _with(self, known: KnownTargets, keys: Sequence[Tensor]) -> Alike:
        made = Alike(keys)
        vars(made)["known"] = known
        return made

    def exclusions(
        self, queries: slice | Tensor = _ALL, targets: slice | Tensor = _ALL
    ) -> list[tuple[Tensor | KnownTargets, Tensor]]:
        """For the search of neighbours among ``targets``: what none of ``queries`` may have; rows, all unless given."""
        found: list[tuple[Tensor | KnownTargets, Tensor]] = [(key_N[queries], key_N[targets]) for key_N in self.keys]
        if self.known:
            found.append((self.known if queries is _ALL else self.known[queries], self.target_N[targets]))
        return found

    def left_out(self, ids_B: Tensor, ids_C: Tensor, masked_BM: Tensor | None = None) -> Tensor:
        """(B, C) bool: what training leaves out, the rows' own targets too.

        Args:
            masked_BM: rows that a plan masks for each of ``ids_B``, padded with -1; whoever else holds their targets is
                left out as well.
        """
        out_BC = torch.zeros(len(ids_B), len(ids_C), dtype=torch.bool, device=ids_B.device)
        for key_N in self.keys:
            out_BC |= equal(key_N[ids_B], key_N[ids_C])
        key_C = self.target_N[ids_C]
        if self.known:
            out_BC |= listed(self.known[ids_B], key_C)
        return out_BC if masked_BM is None else out_BC | listed(keys_of(masked_BM, self.target_N), key_C)


class KnownTargets:
    """Right answers that a row does not hold itself: targets of other rows with its query or its group.

    Those rows are told by their keys. But such a target may stand in rows elsewhere too, and is right there as well:
    only these targets are listed. Where there are any, ``known[rows]`` gives their keys: (B, M), padded with -1.

    Args:
        keys: (N,) each, not negative but for -1, none: of the targets first, then what makes rows alike.
        elsewhere: keys of targets that stand outside the rows too, such as hard negatives of the files, which no key of
            a query tells.
    """

    def __init__(self, keys: Sequence[Tensor], elsewhere: Tensor | None = None) -> None:
        tables = [_Table.of(key_N, keys[0], elsewhere) for key_N in keys[1:]]
        self._tables = [table for table in tables if table is not None]

    def __bool__(self) -> bool:
        """Is there any such target?"""
        return bool(self._tables)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return torch.cat([table.of_rows(rows) for table in self._tables], dim=1)

    def take(self, rows: Tensor) -> KnownTargets:
        """Of these rows, counted anew."""
        return self._of([replace(table, query_N=table.query_N[rows]) for table in self._tables])

    def to(self, device: torch.device) -> KnownTargets:
        """The same on a device."""
        return self._of([table.to(device) for table in self._tables])

    @staticmethod
    def _of(tables: Sequence[_Table]) -> KnownTargets:
        made = KnownTargets([])
        made._tables = [table for table in tables if table.query_N.any()]
        return made


@dataclass(frozen=True)
class _Table:
    """The targets of query g are the ``count_G[g]`` keys from ``start_G[g]`` on; query 0 has none."""

    query_N: Tensor
    start_G: Tensor
    count_G: Tensor
    target_P: Tensor

    @classmethod
    def of(cls, key_N: Tensor, target_N: Tensor, elsewhere: Tensor | None = None) -> _Table | None:
        """Targets of rows with equal keys, where these have several and one is held elsewhere; None without any."""
        if len(key_N) == 0:
            return None
        has_N, n_targets = key_N != PADDING, int(target_N.max()) + 1
        pair_P = (key_N[has_N] * n_targets + target_N[has_N]).unique()
        key_P, target_P = pair_P // n_targets, pair_P % n_targets
        n_holders_T = torch.bincount(target_P, minlength=n_targets)
        n_holders_T += torch.bincount(target_N[~has_N], minlength=n_targets)
        if elsewhere is not None:
            n_holders_T += torch.bincount(elsewhere[elsewhere < n_targets], minlength=n_targets)
        _, query_P, n_targets_G = key_P.unique_consecutive(return_inverse=True, return_counts=True)
        kept_P = (n_holders_T[target_P] > 1) & (n_targets_G[query_P] > 1)
        if not kept_P.any():
            return None
        key_G, count_G = key_P[kept_P].unique_consecutive(return_counts=True)
        found_N = torch.searchsorted(key_G, key_N).clamp(max=len(key_G) - 1)
        query_N = torch.where(key_G[found_N] == key_N, found_N + 1, 0)
        count_G = torch.cat([count_G.new_zeros(1), count_G])
        return cls(query_N, count_G.cumsum(0) - count_G, count_G, target_P[kept_P])

    def of_rows(self, rows: slice | Tensor) -> Tensor:
        """(B, M) keys, padded with -1."""
        query_B = self.query_N[rows]
        count_B = self.count_G[query_B]
        place_M = torch.arange(int(count_B.max()) if len(count_B) else 0, device=count_B.device)
        place_BM = (self.start_G[query_B][:, None] + place_M).clamp(max=len(self.target_P) - 1)
        return self.target_P[place_BM].masked_fill(place_M >= count_B[:, None], PADDING)

    def to(self, device: torch.device) -> _Table:
        parts = (self.query_N, self.start_G, self.count_G, self.target_P)
        return _Table(*(part.to(device) for part in parts))


def within_tasks(key_N: Tensor, task_N: Tensor) -> Tensor:
    """Keys that are equal within a task alone; rows of different tasks never share a batch."""
    n_tasks = int(task_N.max()) + 1 if len(task_N) else 1
    return torch.where(key_N == PADDING, PADDING, key_N * n_tasks + task_N)


def equal(own_B: Tensor, other_C: Tensor) -> Tensor:
    """(B, C) bool: equal values; -1 stands for none, and equals nothing."""
    return (own_B[:, None] == other_C) & (own_B[:, None] != PADDING)


def listed(listed_BM: Tensor, value_C: Tensor) -> Tensor:
    """(B, C) bool: is c's value among those that b lists? For values that are not negative."""
    sorted_C, order_C = value_C.sort()
    # a value can stand in several columns: those of one value are neighbours once sorted
    first_BM = torch.searchsorted(sorted_C, listed_BM)
    last_BM = torch.searchsorted(sorted_C, listed_BM, right=True)
    found_BM = (listed_BM >= 0) & (last_BM > first_BM)
    step_BC = torch.zeros(len(listed_BM), len(sorted_C) + 1, dtype=torch.int32, device=listed_BM.device)
    step_BC.scatter_add_(1, first_BM, found_BM.int())
    step_BC.scatter_add_(1, last_BM, -found_BM.int())
    inside_BC = step_BC.cumsum(1)[:, :-1] > 0
    return torch.empty_like(inside_BC).index_copy_(1, order_C, inside_BC)


def keys_of(ids: Tensor, key_N: Tensor) -> Tensor:
    """The keys of rows, in the shape of ``ids``; -1 where there is none."""
    return key_N[ids.clamp(min=0)].masked_fill(ids == PADDING, PADDING)
