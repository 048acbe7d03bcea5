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


def window_arcs(neighbors: Neighbors, window: Window, touching_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The hard neighbours as (from_A, to_A), int64; only those that touch a row of ``touching_N`` (bool), if given."""
    arcs = []
    for from_A, to_A in _arcs_by_tile(neighbors, window):
        keep_A = slice(None) if touching_N is None else touching_N[from_A] | touching_N[to_A]
        arcs.append((from_A[keep_A], to_A[keep_A]))
    return torch.cat([from_A for from_A, _ in arcs]), torch.cat([to_A for _, to_A in arcs])


def _arcs_by_tile(neighbors: Neighbors, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
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
        # low * N + high names a pair in one int64, so that set operations are sorts (N < 3e9)
        codes = []
        for from_A, to_A in _arcs_by_tile(neighbors, window):
            low_A = torch.minimum(from_A, to_A)
            here_A = (low_A >= first) & (low_A < first + rows_a_part)
            codes.append(low_A[here_A] * n_rows + torch.maximum(from_A, to_A)[here_A])
        pair_E, count_E = torch.cat(codes).unique(return_counts=True)
        pairs.append(pair_E[count_E == 2] if kind == "mutual" else pair_E)
    pair_E = torch.cat(pairs)
    return Edges(pair_E // n_rows, pair_E % n_rows, torch.ones_like(pair_E, dtype=torch.float32), n_rows)
