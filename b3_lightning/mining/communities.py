"""A graph in, one community label a row out."""

from __future__ import annotations

import math

from b3_lightning.mining import cpu, gpu, many_gpus
from b3_lightning.mining.backends import Backend, on_host
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import Communities, Edges


def find_communities(edges: Edges, settings: MiningSettings, backend: Backend) -> Communities:
    """Group rows that are hard for one another.

    ``louvain`` and ``leiden`` find groups of any size, ``metis`` about N / K groups of about K rows (B3's own choice);
    ``kaminpar`` and ``none`` leave all rows in one group, to be cut as a whole. A row without edges is a community of
    its own under ``louvain`` and ``leiden``, which run where the backend is; the others run on the host.
    """
    algorithm, device = settings.communities, edges.source_E.device
    if algorithm in ("kaminpar", "none") or len(edges) == 0:
        return Communities(edges.source_E.new_zeros(edges.n_rows))
    if algorithm == "metis":
        n_parts = math.ceil(edges.n_rows / settings.cluster_size)
        label_N = cpu.metis_parts(on_host(edges, "METIS"), n_parts=n_parts, seed=settings.seed)
        return Communities.from_labels(label_N.to(device))
    if backend.many is not None:
        label_N = many_gpus.communities(on_host(edges, "Dask"), backend.many, settings).to(device)
    elif backend.libraries is not None:
        label_N = gpu.communities(edges, backend.libraries, settings)
    else:
        find = cpu.louvain if algorithm == "louvain" else cpu.leiden
        label_N = find(edges, resolution=settings.resolution, seed=settings.seed)
    return Communities.from_labels(label_N)
