"""The graph cut into parts of about K rows, of which clusters of exactly K are then made.

KaMinPar keeps most edges, on the host. Louvain again and again inside the communities that are too large runs wherever
Louvain does, the GPU included.

Shapes: N = rows, R = rows of communities that are too large.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from b3_lightning.mining import cpu
from b3_lightning.mining.backends import Backend, on_host
from b3_lightning.mining.clusters import HOMELESS
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.groups import permutation
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import Communities, Edges

_ROUNDS = 12
_FINER = 2.0
"""Each round's resolution over the last one's."""


def cut_into_parts(edges: Edges, communities: Communities, settings: MiningSettings, backend: Backend) -> Tensor:
    """(N,) int64, numbered from 0: parts of about K rows each, within the communities; ``HOMELESS`` without an edge.

    METIS's communities are such parts already; under ``none`` all rows are dealt out at random.
    """
    device, n_parts = communities.label_N.device, math.ceil(edges.n_rows / settings.cluster_size)
    if settings.communities == "none":
        return permutation(edges.n_rows, settings.seed, device) * n_parts // edges.n_rows
    if settings.communities == "metis":
        part_N = communities.label_N
    elif settings.cut == "louvain" and settings.communities != "kaminpar":
        part_N = louvain_parts(edges, communities, settings, backend)
    else:
        part_N = kaminpar_parts(edges, communities, n_parts=n_parts, seed=settings.seed)
    return torch.where(edges.is_joined(), part_N, HOMELESS)  # to a partitioner, such rows are mere weight


def kaminpar_parts(edges: Edges, communities: Communities, *, n_parts: int, seed: int) -> Tensor:
    """(N,) parts within the communities by KaMinPar, on the device of the edges."""
    inside = on_host(edges.within(communities.label_N), "KaMinPar")
    return cpu.kaminpar_parts(inside, n_parts=n_parts, seed=seed).to(edges.source_E.device)


def louvain_parts(edges: Edges, communities: Communities, settings: MiningSettings, backend: Backend) -> Tensor:
    """(N,) parts: communities of more than K rows are divided at ever higher resolutions."""
    for _ in range(_ROUNDS):
        settings = replace(settings, resolution=_FINER * settings.resolution)
        label_N = communities.label_N
        row_R = (torch.bincount(label_N)[label_N] > settings.cluster_size).nonzero().flatten()
        if len(row_R) == 0:
            break
        found = find_communities(_subgraph(edges.within(label_N), row_R), settings, backend)
        finer_N = label_N.clone()
        finer_N[row_R] = found.label_N + len(communities)
        communities = Communities.from_labels(finer_N)
    return communities.label_N


def _subgraph(edges: Edges, row_R: Tensor) -> Edges:
    """The edges between these rows, renumbered; ``row_R`` is ascending."""
    place_N = torch.full((edges.n_rows,), -1, dtype=torch.int64, device=row_R.device)
    place_N[row_R] = torch.arange(len(row_R), device=row_R.device)
    source_E, target_E = place_N[edges.source_E], place_N[edges.target_E]
    keep_E = (source_E >= 0) & (target_E >= 0)
    return Edges(source_E[keep_E], target_E[keep_E], edges.weight_E[keep_E], len(row_R))
