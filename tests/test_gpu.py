"""The GPU backend without a GPU: its very functions on CPU arrays (gpu_twin.py), choice of backend, memory, devices."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_twin
import numpy as np
import pytest
import torch

from b3_lightning.cli import main
from b3_lightning.mining import MiningSettings, Stages, backends, gpu, many_gpus, mine, pipeline
from b3_lightning.mining.backends import CPU, SLIM, Backend, check_fits, choose_backend, gpu_bytes, missing
from b3_lightning.mining.neighbors import TargetIndex, find_neighbors
from b3_lightning.mining.selftest import Planted, check_backend
from b3_lightning.mining.tables import EDGE_COLUMNS, count_edges, read_edges
from b3_lightning.types import Communities, Edges

TWINS = {"pylibcugraph": False, "cudf": True}
SMALL = MiningSettings(first_rank=0, n_ranks=30, cluster_size=8, ranked="rows", n_negatives=2)


def graph(n_rows: int = 7) -> Edges:
    """Two triangles and, last, a row without an edge."""
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]])
    return Edges(pairs[:, 0], pairs[:, 1], torch.tensor([1.0, 0.1, 1.0, 0.3, 1.0, 1.0]), n_rows)


def found(edges: Edges, tables: bool, algorithm: Any = "louvain", seed: int = 0) -> list[int]:
    label_N = gpu.communities(
        edges, gpu_twin.libraries(tables=tables), MiningSettings(communities=algorithm, seed=seed)
    )
    return Communities.from_labels(label_N).label_N.tolist()


@pytest.mark.parametrize("tables", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("algorithm", ["louvain", "leiden"])
def test_two_triangles_and_a_row_without_an_edge(tables: bool, algorithm: str) -> None:
    assert found(graph(), tables, algorithm) == [0, 0, 0, 1, 1, 1, 2]
    assert found(graph(), tables, algorithm, seed=5) == [0, 0, 0, 1, 1, 1, 2]


def test_the_seed_permutes_the_vertices_and_weights_lie_on_the_grid() -> None:
    arcs, other = gpu._arcs(graph(), 0), gpu._arcs(graph(), 1)
    assert not torch.equal(arcs.permutation_N, other.permutation_N)
    assert arcs.from_A.dtype == arcs.to_A.dtype == arcs.vertex_N.dtype == torch.int32
    assert arcs.weight_A.dtype == torch.float64
    assert torch.equal(arcs.weight_A * 2**20, (arcs.weight_A * 2**20).round())
    order = arcs.from_A.long() * 7 + arcs.to_A.long()
    assert torch.equal(order, order.sort().values)
    back = {int(vertex): row for row, vertex in enumerate(arcs.permutation_N)}
    rows = {(back[int(a)], back[int(b)]) for a, b in zip(arcs.from_A, arcs.to_A, strict=True)}
    assert rows == {(a, b) for s, t, _ in zip(*graph().both_directions(), strict=True) for a, b in [(int(s), int(t))]}


def test_ids_get_64_bits_where_32_would_overflow() -> None:
    assert gpu.arc_dtype(10**6, 2**31 - 2) == torch.int32
    assert gpu.arc_dtype(10**6, 2**31 - 1) == torch.int64
    assert gpu.arc_dtype(2**31, 5) == torch.int64


def test_a_lost_vertex_is_an_error_and_a_wrong_argument_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    short = gpu_twin.libraries(tables=False)
    monkeypatch.setattr(short.pylibcugraph, "louvain", lambda **_: (np.arange(3), np.arange(3), 0.0))
    with pytest.raises(RuntimeError, match="labelled 3 of 7 vertices"):
        gpu.communities(graph(), short, MiningSettings(max_level=9))
    with pytest.raises(TypeError, match="random_state"):
        gpu_twin.bind("cugraph.louvain", "graph", random_state=1)


def test_many_gpus_put_the_rows_without_edges_back_and_end_what_they_begin() -> None:
    log: list[str] = []
    settings = MiningSettings(graph_gpus=4)
    for communities in ("louvain", "leiden"):
        label_N = many_gpus.communities(
            graph(9), gpu_twin.dask_libraries(log), replace(settings, communities=communities)
        )
        assert Communities.from_labels(label_N).label_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4]
    assert log[:6] == ["enter 4 workers", "enter client", "comms", "comms ended", "exit client", "exit 4 workers"]


@pytest.mark.parametrize("tables", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("cut", ["kaminpar", "louvain"])
def test_a_whole_plan_by_the_gpu_backend_holds_what_the_cpu_s_holds(
    tables: bool, cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted.draw(320, 16)
    vectors = planted.embeddings.query_ND, planted.embeddings.target_ND
    expected = mine(*vectors, settings=replace(SMALL, backend="cpu", cut=cut), batch_size=16)
    twin = Backend("gpu", torch.device("cpu"), "twin", gpu_twin.libraries(tables=tables))
    monkeypatch.setattr(pipeline, "choose_backend", lambda _: twin)
    # tensors made without a device would come to life on another than the inputs'; mixing them is an error
    with torch.device("meta"):
        mined = pipeline._mine_task(*_task(planted, twin, replace(SMALL, cut=cut)))
    assert torch.equal(mined.neighbors.ids_NW, expected.neighbors.ids_NW)
    assert torch.equal(mined.edges.source_E, expected.edges.source_E)
    assert torch.equal(mined.window.hard_NW, expected.window.hard_NW)
    kept = [plan.summary()["kept_frac"] for plan in (mined, expected)]
    assert kept[0] > 0.95 * kept[1]
    assert mine(*vectors, settings=SMALL).settings.backend == "gpu"


def _task(planted: Planted, backend: Backend, settings: MiningSettings) -> tuple[Any, Any]:
    with torch.device("cpu"):
        rows = pipeline.Rows.check(planted.embeddings.query_ND, planted.embeddings.target_ND, settings)
        task = next(rows.by_task())
    return task, pipeline.Search(settings, backend, Stages(), None)


def test_auto_says_why_and_gpu_names_the_remedy(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_backend(MiningSettings()).name == "cpu"
    assert "mining on the CPU: torch sees no CUDA device" in caplog.text
    with pytest.raises(
        ValueError, match=r"backend=gpu cannot be had: torch sees no CUDA device.*Set it to cpu or auto"
    ):
        choose_backend(MiningSettings(backend="gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "missing", list)
    with pytest.raises(ValueError, match=r"cupy, pylibcugraph not installed: pip install 'b3_lightning\[gpu-cu13\]'"):
        choose_backend(MiningSettings(backend="gpu"))
    assert "pylibcugraph not installed" in choose_backend(MiningSettings()).reason
    with pytest.raises(ValueError, match="graph_gpus=2 needs the GPU backend"):
        choose_backend(MiningSettings(graph_gpus=2))


def test_a_gpu_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * 2**30, 80 * 2**30))
    monkeypatch.setattr(backends, "missing", lambda names: [name for name in names if name in backends.TABLES])
    monkeypatch.setattr(gpu.Libraries, "load", lambda tables: gpu_twin.libraries(tables=tables))
    chosen = choose_backend(MiningSettings())
    assert (chosen.name, str(chosen.device), chosen.reason) == ("gpu", "cuda:1", "H100, edges as bare arrays")
    assert chosen.libraries is not None
    assert chosen.libraries.cudf is None
    assert chosen.budget_gib(MiningSettings()) == 20
    with pytest.raises(ValueError, match="on a GPU the exact search is faster"):
        choose_backend(MiningSettings(neighbors="approximate"))
    with pytest.raises(ValueError, match=r"graph_gpus=3 cannot be had: 2 CUDA devices, missing packages: cugraph"):
        choose_backend(MiningSettings(graph_gpus=3))


def test_memory_of_a_million_and_of_ten_million_rows() -> None:
    million = gpu_bytes(10**6, 768, 130)
    assert million["neighbours"] == 10**6 * (4 * 768 + 24) + 2**28
    assert million["graph"] == 10**6 * 130 * 14 + 48 * 130 * 10**6
    assert max(million.values()) < 9 * 2**30
    check_fits(10**6, 3584, 130, 75 * 2**30)
    check_fits(10**7, 768, 130, 79 * 2**30)
    with pytest.raises(ValueError, match=r"10,000,000 rows x 3584 with 130 ranks need 134.* where 75.0 GiB are free"):
        check_fits(10**7, 3584, 130, 75 * 2**30)


def test_out_of_memory_halves_the_tiles_and_gives_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planted = Planted.draw(1024, 16)
    vectors = planted.embeddings.query_ND, planted.embeddings.target_ND
    expected = find_neighbors(*vectors, n_neighbors=20)
    search, left = TargetIndex._search, [2]

    def out_of_memory(self: TargetIndex, *args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(self, *args)

    monkeypatch.setattr(TargetIndex, "_search", out_of_memory)
    ids_NW, _ = find_neighbors(*vectors, n_neighbors=20, memory_budget_gib=1.0)
    assert torch.equal(ids_NW, expected[0])
    assert "tiles are halved, to 512 MiB" in caplog.text
    assert "to 256 MiB" in caplog.text
    left[0] = 99
    with pytest.raises(torch.OutOfMemoryError):
        find_neighbors(*vectors, n_neighbors=20)


def test_products_are_summed_in_float32_and_the_users_setting_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    seen: list[bool] = []
    search = TargetIndex._search

    def watched(self: TargetIndex, *args: Any) -> Any:
        seen.append(matmul.allow_fp16_reduced_precision_reduction)
        return search(self, *args)

    monkeypatch.setattr(TargetIndex, "_search", watched)
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction_split_k
    planted = Planted.draw(64, 8)
    find_neighbors(planted.embeddings.query_ND, planted.embeddings.target_ND, n_neighbors=3)
    assert seen == [False]
    after = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction_split_k
    assert after == before


def test_neighbours_by_faiss_are_the_exact_ones() -> None:
    planted = Planted.draw(320, 16)
    vectors = planted.embeddings.query_ND, planted.embeddings.target_ND
    keys = [row // 3 for row in range(len(planted.block_N))]
    expected = mine(*vectors, settings=SMALL, target_keys=keys)
    mined = mine(*vectors, settings=replace(SMALL, neighbors="faiss", min_recall=0.999), target_keys=keys)
    assert torch.equal(mined.neighbors.ids_NW, expected.neighbors.ids_NW)
    assert torch.equal(mined.neighbors.scores_NW, expected.neighbors.scores_NW)
    with pytest.raises(ValueError, match=r"neighbors='cuvs' needs (cuvs: pip install 'b3_lightning|the GPU backend)"):
        mine(*vectors, settings=replace(SMALL, neighbors="cuvs"))


def test_faiss_of_the_cpu_and_too_many_neighbours_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(ValueError, match="needs faiss-gpu in the place of faiss-cpu"):
            gpu.FaissTargets(torch.eye(4))
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: None, raising=False)
    with pytest.raises(ValueError, match="can find 2048 at most and 2049 are needed"):
        gpu.FaissTargets(torch.eye(4)).scan(torch.eye(4), 2049)


def test_poor_candidates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted.draw(320, 16)
    vectors = planted.embeddings.query_ND, planted.embeddings.target_ND
    last = torch.arange(len(vectors[0]))[-(30 + 32) :]
    poor = dataclasses.make_dataclass(
        "Poor", [], namespace={"scan": lambda _, query, n: last[:n].repeat(len(query), 1)}
    )
    monkeypatch.setattr("b3_lightning.mining.rerank._source", lambda *_: poor())
    with pytest.raises(ValueError, match=r"neighbors='faiss' found 0\.\d+ of the neighbours of 321 sampled rows"):
        mine(*vectors, settings=replace(SMALL, neighbors="faiss"))


def test_the_self_test_passes_on_the_cpu_and_notices_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in check_backend(CPU, n_rows=1024, n_dims=32))
    monkeypatch.setattr(
        "b3_lightning.mining.selftest._search",
        lambda planted, *_: (
            torch.zeros(len(planted.block_N), 5, dtype=torch.int64),
            torch.zeros(len(planted.block_N), 5),
        ),
    )
    checks = {check.name: check.passed for check in check_backend(CPU, n_rows=1024, n_dims=32)}
    assert not checks["neighbours"]
    assert not checks["communities"]


def test_doctor_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--rows=512"])
    text = capsys.readouterr().out
    assert "torch sees no CUDA device" in text
    assert re.search(r"cpu, \d+ threads \W+(no )?bfloat16", text)
    assert missing(SLIM) == [] or "b3_lightning[gpu-cu13]" in text
    assert "16 found, 16 planted" in text or "17 found, 17 planted" in text
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--rows=512", "--backend=gpu"])
    assert stop.value.code == 1


def test_edges_as_a_table_of_pyarrow_pandas_and_shadow_cudf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted.draw(320, 16)
    tasks = ["a"] * 150 + ["b"] * 171
    mined = mine(planted.embeddings.query_ND, planted.embeddings.target_ND, settings=SMALL, tasks=tasks)
    mined.save(tmp_path)
    monkeypatch.setitem(sys.modules, "cudf", gpu_twin.shadow_cudf())
    tables = [read_edges(tmp_path, library) for library in ("pyarrow", "pandas", "cudf")]
    assert [str(table.implementation) for table in tables] == ["pyarrow", "pandas", "cudf"]
    assert tables[0].rows() == tables[1].rows() == tables[2].rows()
    assert tables[0].columns == list(EDGE_COLUMNS)
    assert tables[0]["source"].to_list() == sorted(mined.edges.source_E.tolist())
    expected = []
    for name, task in (("a", 0), ("b", 1)):
        here = mined.task_N[mined.edges.source_E] == task
        inside = [
            int((label_N[mined.edges.source_E] == label_N[mined.edges.target_E])[here].sum())
            for label_N in (mined.communities.label_N, mined.clusters.cluster_of_row())
        ]
        expected.append((name, int(here.sum()), *inside))
    assert [count_edges(table).rows() for table in tables] == [expected] * 3
