"""Hard neighbours in, a sparse undirected graph over the rows out (B3, section 4.1).

Shapes: N = rows, W = ranks kept, E = edges, A = arcs (directed window entries).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from b3_lightning.mining.settings import EdgeKind
from b3_lightning.types import Edges, Neighbors, Window

_ARCS_AT_ONCE = 2**23
"""Sorted together: bounds memory at about 400 MB; more arcs are taken by ranges of their lower end."""
_TILE_ROWS = 2**16


_ENTRY_WEIGHT = 0.25
"""A one-sided window entry counts a quarter of an edge."""


def arcs_by_tile(neighbors: Neighbors, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
    """The hard neighbours as (from_A, to_A), int64, of some rows after the other."""
    for start in range(0, len(neighbors), _TILE_ROWS):
        hard_QW = window.hard_NW[start : start + _TILE_ROWS]
        row_A, rank_A = hard_QW.nonzero(as_tuple=True)
        yield row_A + start, neighbors.ids_NW[start : start + _TILE_ROWS][row_A, rank_A]


def build_edges(neighbors: Neighbors, window: Window, *, kind: EdgeKind) -> Edges:
    """Join i and j where each is a hard neighbour of the other (``mutual``), or where one is (``either``).

    Every edge weighs 1, as in the paper.
    """
    n_rows = len(neighbors)
    n_parts = max(1, math.ceil(int(window.hard_NW.sum()) / _ARCS_AT_ONCE))
    rows_a_part = math.ceil(n_rows / n_parts)
    pairs = []
    for first in range(0, n_rows, rows_a_part):
        codes = []
        for from_A, to_A in arcs_by_tile(neighbors, window):
            code_A = _pair_codes(from_A, to_A, n_rows)
            codes.append(code_A[(code_A >= first * n_rows) & (code_A < (first + rows_a_part) * n_rows)])
        pair_E, count_E = torch.cat(codes).unique(return_counts=True)
        pairs.append(pair_E[count_E == 2] if kind == "mutual" else pair_E)
    pair_E = torch.cat(pairs)
    return Edges(pair_E // n_rows, pair_E % n_rows, torch.ones_like(pair_E, dtype=torch.float32), n_rows)


def tie_lone_rows(edges: Edges, neighbors: Neighbors, window: Window, *, n_entries: int) -> Edges:
    """The edges, and for every row without one its first hard neighbours, at a quarter of an edge's weight.

    With mutual edges alone a third of the rows may have none; so tied, they lie beside rows that are hard for them.
    """
    n_rows = len(neighbors)
    codes = [_pair_codes(edges.source_E, edges.target_E, n_rows)]
    for rows in (~edges.is_joined()).nonzero().flatten().split(_TILE_ROWS):
        hard_QW = window.hard_NW[rows]
        row_A, rank_A = (hard_QW & (hard_QW.cumsum(dim=1) <= n_entries)).nonzero(as_tuple=True)
        from_A, to_A = rows[row_A], neighbors.ids_NW[rows[row_A], rank_A]
        codes.append(_pair_codes(from_A, to_A, n_rows))
    pair_E = torch.cat(codes).unique()
    weight_E = torch.full_like(pair_E, _ENTRY_WEIGHT, dtype=torch.float32)
    weight_E[torch.searchsorted(pair_E, codes[0])] = edges.weight_E
    return Edges(pair_E // n_rows, pair_E % n_rows, weight_E, n_rows)


def _pair_codes(from_A: Tensor, to_A: Tensor, n_rows: int) -> Tensor:
    """low * N + high: a pair in one int64, so that set operations are sorts (N < 3e9)."""
    return torch.minimum(from_A, to_A) * n_rows + torch.maximum(from_A, to_A)
