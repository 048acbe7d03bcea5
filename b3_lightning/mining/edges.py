"""Neighbours in, a sparse undirected graph over the rows out (B3, section 4.1).

Shapes: N = rows, W = window ranks, E = edges, A = arcs (directed window entries).
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.mining.settings import EdgeKind
from b3_lightning.types import PADDING, Edges, Neighbors


def window_arcs(neighbors: Neighbors, *, first_rank: int, n_ranks: int) -> tuple[Tensor, Tensor]:
    """The directed entries of the rank window: (from_A, to_A), int64."""
    ids_NW = neighbors.window(first_rank, n_ranks)
    from_A = torch.arange(len(ids_NW))[:, None].expand_as(ids_NW)
    filled_NW = ids_NW != PADDING
    return from_A[filled_NW], ids_NW[filled_NW]


def build_edges(neighbors: Neighbors, *, first_rank: int, n_ranks: int, kind: EdgeKind) -> Edges:
    """Join i and j where each lies in the other's window (``mutual``), or where one does (``either``).

    Every edge weighs 1, as in the paper.
    """
    n_rows = len(neighbors)
    from_A, to_A = window_arcs(neighbors, first_rank=first_rank, n_ranks=n_ranks)
    # from * N + to names an arc in one int64, so that set operations are sorts (N < 3e9)
    pair_A = torch.minimum(from_A, to_A) * n_rows + torch.maximum(from_A, to_A)
    pair_E, count_E = pair_A.unique(return_counts=True)
    if kind == "mutual":
        pair_E = pair_E[count_E == 2]
    weight_E = torch.ones(len(pair_E), dtype=torch.float32)
    return Edges(pair_E // n_rows, pair_E % n_rows, weight_E, n_rows)
