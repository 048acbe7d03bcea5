"""What only a GPU can show. Run with: pytest tests/gpu (needs a CUDA device and the extra gpu-cu13)."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from b3_lightning.mining import MiningSettings, mine
from b3_lightning.mining.backends import choose_backend
from b3_lightning.mining.communities import find_communities
from b3_lightning.mining.neighbors import find_neighbors
from b3_lightning.mining.selftest import Planted, check_backend
from b3_lightning.types import Edges, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.timeout(1800),
]

log = logging.getLogger(__name__)
SETTINGS = MiningSettings(first_rank=2, n_ranks=30, cluster_size=8, ranked="rows", backend="gpu")


def test_planted_blocks_and_rows_without_edges_are_found() -> None:
    assert [check.outcome for check in check_backend(choose_backend(SETTINGS)) if not check.passed] == []


@pytest.fixture(scope="module")
def edges() -> Edges:
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(20_000, 32)).astype(np.float32)
    return mine(vector, vector + 0.3, settings=replace(SETTINGS, backend="cpu")).edges


@pytest.mark.parametrize("algorithm", ["louvain", "leiden"])
def test_twenty_runs_are_equal_and_another_seed_is_not(edges: Edges, algorithm: Any) -> None:
    settings = replace(SETTINGS, communities=algorithm)
    backend = choose_backend(settings)
    here = to_device(edges, backend.device)
    first = find_communities(here, settings, backend).label_N
    for _ in range(19):
        assert torch.equal(find_communities(here, settings, backend).label_N, first)
    assert not torch.equal(find_communities(here, replace(settings, seed=1), backend).label_N, first)


def test_modularity_is_within_one_percent_of_igraph_s(edges: Edges) -> None:
    igraph = pytest.importorskip("igraph")
    graph = igraph.Graph(n=edges.n_rows, edges=torch.stack([edges.source_E, edges.target_E], dim=1).tolist())
    backend = choose_backend(SETTINGS)
    label_N = find_communities(to_device(edges, backend.device), SETTINGS, backend).label_N
    assert graph.modularity(label_N.tolist()) > 0.99 * graph.community_multilevel().modularity


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_neighbours_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    vector = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(30_000, 128)).astype(np.float32)))
    keys = torch.arange(len(vector)) // 2
    about: dict[str, Any] = {"n_neighbors": 130, "exclude": [(keys, keys)]}
    expected = find_neighbors(vector, vector, **about)
    found = find_neighbors(vector, vector, device=torch.device("cuda"), candidate_dtype=dtype, **about)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("library", ["faiss", "cuvs"])
def test_neighbours_by_name_are_the_exact_ones(library: Any) -> None:
    pytest.importorskip(library)
    planted = Planted.draw(8192, 64)
    vectors = planted.embeddings.query_ND, planted.embeddings.target_ND
    expected = mine(*vectors, settings=SETTINGS).neighbors
    found = mine(*vectors, settings=replace(SETTINGS, neighbors=library, min_recall=0.999)).neighbors
    assert torch.equal(found.ids_NW, expected.ids_NW)


@pytest.mark.parametrize("communities", ["metis", "kaminpar", "none"])
def test_the_plan_is_the_cpu_s_where_the_algorithm_is_the_same(communities: Any) -> None:
    planted = Planted.draw(4096, 64)
    vectors = planted.embeddings.query_ND, planted.embeddings.target_ND
    settings = replace(SETTINGS, communities=communities, n_negatives=2)
    on_gpu, on_cpu = mine(*vectors, settings=settings), mine(*vectors, settings=replace(settings, backend="cpu"))
    assert torch.equal(on_gpu.edges.source_E, on_cpu.edges.source_E)
    assert torch.equal(on_gpu.clusters.ids_CK, on_cpu.clusters.ids_CK)
    assert torch.equal(on_gpu.negative_NH, on_cpu.negative_NH)


def test_a_million_rows() -> None:
    rng = np.random.default_rng(0)
    center = rng.normal(size=(20_000, 256)).astype(np.float32)[rng.integers(0, 20_000, 10**6)]
    query, target = (center + rng.normal(size=center.shape).astype(np.float32) for _ in range(2))
    start = time.perf_counter()
    mined = mine(query, target, settings=replace(SETTINGS, first_rank=30, n_ranks=100, cut="louvain"))
    peak = torch.cuda.max_memory_allocated() / 2**30
    log.warning("1M x 256: %.0f s, %.1f GiB of torch's memory, %s", time.perf_counter() - start, peak, mined.seconds)
    assert mined.summary()["kept_frac"] > 0.1
