"""A graph in, one community label a row out."""

from __future__ import annotations

import math

import torch

from b3_lightning.mining import cpu
from b3_lightning.mining.settings import CommunityAlgorithm
from b3_lightning.types import Communities, Edges


def find_communities(
    edges: Edges, *, algorithm: CommunityAlgorithm, resolution: float, cluster_size: int, seed: int
) -> Communities:
    """Group rows that are hard for one another.

    ``louvain`` and ``leiden`` find groups of any size, ``metis`` about N / K groups of about K rows (B3's own choice);
    ``kaminpar`` and ``none`` leave all rows in one group, to be cut as a whole. A row without edges is a community of
    its own under ``louvain`` and ``leiden``.
    """
    if algorithm in ("kaminpar", "none") or len(edges) == 0:
        return Communities(torch.zeros(edges.n_rows, dtype=torch.int64))
    if algorithm == "metis":
        n_parts = math.ceil(edges.n_rows / cluster_size)
        return Communities.from_labels(cpu.metis_parts(edges, n_parts=n_parts, seed=seed))
    find = cpu.louvain if algorithm == "louvain" else cpu.leiden
    return Communities.from_labels(find(edges, resolution=resolution, seed=seed))
