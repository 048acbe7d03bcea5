"""A small graph of which everything is known, mined on a backend: what ``doctor`` and tests/gpu run.

Shapes: N = rows, D = dimensions, W = neighbours, S = sampled rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from b3_lightning.mining.backends import Backend
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.edges import build_edges
from b3_lightning.mining.neighbors import find_neighbors, positive_scores
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.mining.window import rank_window
from b3_lightning.types import Communities, Embeddings, Neighbors, to_device

BLOCK = 32
"""Rows of a planted community."""
_N_SAMPLED = 200
_SETTINGS = MiningSettings(first_rank=0, n_ranks=BLOCK - 2, cluster_size=BLOCK, ranked="rows")


class Check(NamedTuple):
    """What was tested, what came out, and whether that is right."""

    name: str
    outcome: str
    passed: bool


@dataclass(frozen=True)
class Planted:
    """Rows in blocks that lie far apart; the last row alone, so that a vertex without an edge is among them."""

    embeddings: Embeddings
    block_N: torch.Tensor

    @classmethod
    def draw(cls, n_rows: int, n_dims: int, seed: int = 0) -> Planted:
        """The same rows for the same arguments."""
        rng = np.random.default_rng(seed)
        n_blocks = n_rows // BLOCK
        block_N = np.append(np.repeat(np.arange(n_blocks), BLOCK), n_blocks)
        center = rng.normal(size=(n_blocks + 1, n_dims))[block_N]
        query, target = (center + 0.3 * rng.normal(size=center.shape) for _ in range(2))
        return cls(Embeddings.from_arrays(query.astype(np.float32), target.astype(np.float32)), torch.tensor(block_N))


def check_backend(backend: Backend, *, n_rows: int = 8192, n_dims: int = 64) -> list[Check]:
    """Neighbours against brute force in float64, communities against the planted ones, twice."""
    planted = Planted.draw(n_rows, n_dims)
    query_ND, target_ND = planted.embeddings.query_ND, planted.embeddings.target_ND
    keys = torch.arange(len(query_ND))
    _search(planted, backend, keys)  # libraries are loaded, kernels compiled
    start = time.perf_counter()
    ids_NW, scores_NW = _search(planted, backend, keys)
    seconds = time.perf_counter() - start
    speed = f"{len(query_ND) / seconds:,.0f} rows/s"
    neighbors = Neighbors(ids_NW, scores_NW, positive_scores(query_ND, target_ND))
    wrong = _differing(planted.embeddings, ids_NW)
    found = [_communities(neighbors, backend, seed=0) for _ in range(2)]
    recovered = bool(torch.equal(found[0].label_N, Communities.from_labels(planted.block_N).label_N))
    repeated = torch.equal(found[0].label_N, found[1].label_N)
    return [
        Check("neighbours", f"{wrong} of {_N_SAMPLED} differ from brute force, {speed}", wrong == 0),
        Check("communities", f"{len(found[0])} found, {int(planted.block_N.max()) + 1} planted", recovered),
        Check("same again", "two runs agree" if repeated else "two runs differ", repeated),
    ]


def _search(planted: Planted, backend: Backend, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return find_neighbors(
        planted.embeddings.query_ND, planted.embeddings.target_ND, n_neighbors=_SETTINGS.cluster_size,
        exclude=[(keys, keys)], device=backend.device, memory_budget_gib=backend.budget_gib(_SETTINGS),
    )  # fmt: skip


def _differing(embeddings: Embeddings, ids_NW: torch.Tensor) -> int:
    """Rows of a sample whose neighbours are not those of numpy, but for ties within 1e-6."""
    query, target = embeddings.query_ND.double().numpy(), embeddings.target_ND.double().numpy()
    n_wrong = 0
    for row in np.linspace(0, len(query) - 1, _N_SAMPLED).astype(int):
        score = target @ query[row]
        score[row] = -np.inf
        best = np.sort(score)[::-1][: ids_NW.shape[1]]
        n_wrong += int(not np.allclose(score[ids_NW[row].numpy()], best, rtol=0, atol=1e-6))
    return n_wrong


def _communities(neighbors: Neighbors, backend: Backend, *, seed: int) -> Communities:
    settings = replace(_SETTINGS, seed=seed)
    here = to_device(neighbors, backend.device)
    window = rank_window(here, settings, first_rank=0, n_ranks=BLOCK - 2)
    edges = build_edges(here, window, kind="mutual")
    return to_device(find_communities(edges, settings, backend), torch.device("cpu"))
