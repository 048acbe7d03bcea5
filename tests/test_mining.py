"""``mine()``: hand-computed cases, properties over random inputs, agreement with trusted references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import igraph
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from b3_lightning.mining import MinedPlan, MiningSettings, cpu, mine
from b3_lightning.mining.clusters import HOMELESS, cut_clusters
from b3_lightning.mining.edges import arcs_by_tile, build_edges, tie_lone_rows
from b3_lightning.mining.neighbors import find_neighbors
from b3_lightning.mining.window import rank_window
from b3_lightning.types import PADDING, Edges, Embeddings, Neighbors, Window


def vectors(n_rows: int, n_dims: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n_rows, n_dims)).astype(np.float32)


def small(**changes: object) -> MiningSettings:
    return MiningSettings(**{"first_rank": 1, "n_ranks": 6, "cluster_size": 4, **changes})  # type: ignore[arg-type]


def brute_force(query: Tensor, target: Tensor, keys: Tensor, width: int) -> Tensor:
    # of the vectors as they are kept, rounded to a grid: that moves near-ties of the vectors as given
    kept = Embeddings.from_arrays(query, target)
    for given_ND, kept_ND in ((query, kept.query_ND), (target, kept.target_ND)):
        torch.testing.assert_close(kept_ND, torch.nn.functional.normalize(given_ND.float(), dim=1), rtol=0, atol=1e-6)
    score = (kept.query_ND.double() @ kept.target_ND.double().T).float()
    score[keys[:, None] == keys] = -torch.inf
    best = score.sort(dim=1, descending=True, stable=True)
    return best.indices.masked_fill(best.values == -torch.inf, -1)[:, :width]


@given(n_rows=st.integers(2, 40), width=st.integers(1, 50), n_keys=st.integers(1, 60), seed=st.integers(0, 10_000))
@example(n_rows=21, width=6, n_keys=3, seed=3578)  # two targets 5e-10 apart
@settings(max_examples=80, deadline=None)
def test_neighbours_are_those_of_a_float64_brute_force(n_rows: int, width: int, n_keys: int, seed: int) -> None:
    query, target = (torch.tensor(vectors(n_rows, seed=seed + side)) for side in (0, 1))
    keys = torch.tensor(np.random.default_rng(seed).integers(0, n_keys, n_rows))
    embeddings = Embeddings.from_arrays(query, target)
    ids_NW, scores_NW = find_neighbors(
        embeddings.query_ND, embeddings.target_ND, n_neighbors=width, exclude=[(keys, keys)], memory_budget_gib=1e-7
    )
    expected = torch.full((n_rows, width), -1)
    exact = brute_force(query, target, keys, width)
    expected[:, : exact.shape[1]] = exact
    assert torch.equal(ids_NW, expected)
    assert bool((scores_NW.diff(dim=1)[ids_NW[:, 1:] >= 0] <= 0).all())


def test_ties_go_to_the_lowest_ids_also_when_all_rows_are_equal() -> None:
    same = np.ones((60, 4), dtype=np.float32)
    unit, keys = Embeddings.from_arrays(same, same).query_ND, torch.arange(60)
    ids_NW, _ = find_neighbors(unit, unit, n_neighbors=5, exclude=[(keys, keys)])
    assert ids_NW[0].tolist() == [1, 2, 3, 4, 5]
    assert ids_NW[3].tolist() == [0, 1, 2, 4, 5]


def six_rows() -> Neighbors:
    """Rows 0-1-2 and 3-4-5 rank one another; 2 also ranks 3, which does not rank 2."""
    ids = torch.tensor([[1, 2], [0, 2], [1, 3], [4, 5], [3, 5], [4, 3]])
    return Neighbors(ids, torch.zeros(6, 2), torch.ones(6))


def all_ranks(n_rows: int, n_ranks: int) -> Window:
    return Window(torch.ones(n_rows, n_ranks, dtype=torch.bool), torch.zeros(n_rows, n_ranks, dtype=torch.bool))


def test_edges_by_hand() -> None:
    mutual = build_edges(six_rows(), all_ranks(6, 2), kind="mutual")
    assert list(zip(mutual.source_E.tolist(), mutual.target_E.tolist(), strict=True)) == [
        (0, 1),
        (1, 2),
        (3, 4),
        (3, 5),
        (4, 5),
    ]
    either = build_edges(six_rows(), all_ranks(6, 2), kind="either")
    assert len(either) == 7
    late = build_edges(six_rows(), rank_window(six_rows(), MiningSettings(), first_rank=1, n_ranks=1), kind="mutual")
    assert (late.source_E.tolist(), late.target_E.tolist()) == ([3], [5])


@pytest.mark.parametrize("algorithm", ["louvain", "leiden", "metis", "kaminpar", "none"])
def test_planted_blocks_become_clusters(algorithm: str) -> None:
    rng = np.random.default_rng(0)
    centers = np.eye(8, dtype=np.float32)
    block = np.repeat(np.arange(8), 8)
    query, target = (centers[block] + 0.05 * rng.normal(size=(64, 8)).astype(np.float32) for _ in range(2))
    order = rng.permutation(64)
    mined = mine(
        query[order],
        target[order],
        settings=MiningSettings(first_rank=0, n_ranks=7, cluster_size=8, communities=algorithm),  # type: ignore[arg-type]
    )
    for ids_K in mined.clusters.ids_CK:
        assert len(set(block[order][ids_K])) == 1
    assert mined.summary()["kept_frac"] == 1


def test_a_plan_is_summed_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mined = mine(vectors(40), vectors(40, seed=1), settings=small(), batch_size=8)
    mined.save(tmp_path)
    first = mined.summary()

    def again(edges: Edges, label_N: Tensor) -> Edges:
        raise AssertionError("counted again")

    monkeypatch.setattr(Edges, "within", again)
    mined.summary().clear()
    assert mined.summary() == MinedPlan.load(tmp_path).summary() == first
    with pytest.raises(AssertionError, match="counted again"):
        replace(mined, hardness={}).summary()


def test_louvain_is_as_good_as_igraph_on_a_random_graph() -> None:
    rng = np.random.default_rng(1)
    pairs = np.unique(np.sort(rng.integers(0, 300, size=(1500, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    edges = Edges(torch.tensor(pairs[:, 0]), torch.tensor(pairs[:, 1]), torch.ones(len(pairs)), 300)
    graph = igraph.Graph(n=300, edges=pairs.tolist())
    ours = graph.modularity(cpu.louvain(edges, resolution=1.0, seed=0).tolist())
    theirs = graph.community_multilevel().modularity
    assert ours >= 0.95 * theirs


@given(
    n_rows=st.integers(14, 60),
    cluster_size=st.integers(2, 9),
    algorithm=st.sampled_from(["louvain", "leiden", "metis", "kaminpar", "none"]),
    kind=st.sampled_from(["mutual", "either"]),
    n_tasks=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_row_once_sizes_exact_and_repeatable(
    n_rows: int, cluster_size: int, algorithm: str, kind: str, n_tasks: int, seed: int
) -> None:
    query, target = vectors(n_rows, seed=seed), vectors(n_rows, seed=seed + 1)
    tasks = [f"task {row % n_tasks if row < n_rows // 2 else 0}" for row in range(n_rows)]  # the others may be small
    chosen = small(cluster_size=cluster_size, communities=algorithm, edges=kind, seed=seed)
    mined = mine(query, target, settings=chosen, tasks=tasks)
    ids_CK = mined.clusters.ids_CK
    assert sorted(ids_CK[ids_CK >= 0].tolist()) == list(range(n_rows))
    for task in range(n_tasks):
        of_task = ids_CK[mined.task_N[ids_CK[:, 0]] == task]
        assert len(of_task) == math.ceil(sum(name == f"task {task}" for name in tasks) / cluster_size)
        assert bool((of_task[:-1] >= 0).all())
    for ids_K in ids_CK:
        assert len({tasks[row] for row in ids_K.tolist() if row >= 0}) == 1
    again = mine(query, target, settings=chosen, tasks=tasks)
    assert torch.equal(again.clusters.ids_CK, ids_CK)
    assert torch.equal(again.communities.label_N, mined.communities.label_N)


def test_rows_with_equal_targets_are_no_neighbours_and_scores_are_cosines() -> None:
    query, target = vectors(40), vectors(40, seed=1)
    keys = [row // 2 for row in range(40)]
    mined = mine(query, target, settings=small(), target_keys=keys)
    for row in range(40):
        assert row ^ 1 not in mined.neighbors.ids_NW[row].tolist()
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (query, target)]
    assert np.allclose(mined.neighbors.positive_score_N, (unit[0] * unit[1]).sum(axis=1), atol=1e-6)


def test_a_graph_without_edges_still_gives_full_clusters_in_no_order_of_the_file() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    edges = Edges(nothing, nothing, torch.empty(0), 64)
    part_N = torch.full((64,), HOMELESS)
    clusters = cut_clusters(edges, part_N, cluster_size=4, seed=0)
    assert sorted(clusters.ids_CK.flatten().tolist()) == list(range(64))
    assert not torch.equal(clusters.ids_CK, cut_clusters(edges, part_N, cluster_size=4, seed=1).ids_CK)
    assert int((clusters.ids_CK.diff(dim=1) == 1).sum()) < 16, "rows next to one another were put together"


def test_rows_without_an_edge_are_tied_to_the_first_entries_of_their_windows() -> None:
    # 0-1-2 and 4-5-6 are joined; 3 and 7 are not, and have (5, 0) and (1, 4) in their windows
    edges = Edges(torch.tensor([0, 0, 1, 4, 4, 5]), torch.tensor([1, 2, 2, 5, 6, 6]), torch.ones(6), 8)
    ids_NW = torch.full((8, 3), PADDING)
    ids_NW[3], ids_NW[7] = torch.tensor([6, 5, 0]), torch.tensor([2, 1, 4])
    hard_NW = torch.zeros(8, 3, dtype=torch.bool)
    hard_NW[[3, 7], 1:] = True
    neighbors = Neighbors(ids_NW, torch.zeros(8, 3), torch.ones(8))
    window = Window(hard_NW, torch.zeros_like(hard_NW))
    tied = tie_lone_rows(edges, neighbors, window, n_entries=1)
    pairs = list(zip(tied.source_E.tolist(), tied.target_E.tolist(), tied.weight_E.tolist(), strict=True))
    assert pairs == [(0, 1, 1), (0, 2, 1), (1, 2, 1), (1, 7, 0.25), (3, 5, 0.25), (4, 5, 1), (4, 6, 1), (5, 6, 1)]
    both = tie_lone_rows(edges, neighbors, window, n_entries=2)
    assert {(0, 3), (4, 7)} == set(zip(both.source_E.tolist(), both.target_E.tolist(), strict=True)) - {
        pair[:2] for pair in pairs
    }
    part_N = torch.tensor([0, 0, 0, HOMELESS, 1, 1, 1, HOMELESS])
    clusters = cut_clusters(tied, part_N, cluster_size=4, seed=0)
    assert [sorted(ids_K) for ids_K in clusters.ids_CK.tolist()] == [[0, 1, 2, 7], [3, 4, 5, 6]]


def test_most_rows_without_a_mutual_edge_share_a_cluster_with_a_hard_one() -> None:
    rng = np.random.default_rng(0)
    topic = rng.normal(size=(40, 16))[rng.integers(0, 40, 1200)]
    query, target = (topic + rng.normal(size=topic.shape) for _ in range(2))
    mined = mine(query, target, settings=MiningSettings(first_rank=5, n_ranks=20, cluster_size=8, backend="cpu"))
    alone_N = ~mined.edges.is_joined()
    assert int(alone_N.sum()) > 100
    filler_N = mined.filler_N
    cluster_N, hard = mined.clusters.cluster_of_row(), mined.window.hard_NW
    near_NW = (cluster_N[mined.neighbors.ids_NW] == cluster_N[:, None]) & hard
    near_N = near_NW.any(dim=1)
    near_N[mined.neighbors.ids_NW[near_NW]] = True
    assert torch.equal(filler_N, ~near_N)
    assert float(filler_N[alone_N].float().mean()) < 0.2


def test_louvain_and_swaps_keep_more_edges_than_the_recipe_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(60, 16))
    vector = centers[rng.integers(0, 60, 1200)] + 0.8 * rng.normal(size=(1200, 16))
    noisy = vector + 0.3 * rng.normal(size=vector.shape)
    kept = {
        (name, rounds): mine(
            vector,
            noisy,
            settings=MiningSettings(
                first_rank=2, n_ranks=30, cluster_size=8, communities=name, swap_rounds=rounds, backend="cpu"
            ),
        ).summary()["kept_frac"]
        for name in ("louvain", "metis")
        for rounds in (0, 30)
    }
    assert kept["louvain", 0] > 1.2 * kept["metis", 0]
    assert kept["louvain", 30] > 1.03 * kept["louvain", 0]


def test_a_plan_survives_its_folder(tmp_path: Path) -> None:
    mined = mine(vectors(30), vectors(30, seed=1), settings=small(), tasks=["a"] * 14 + ["b"] * 16)
    mined.save(tmp_path / "plan")
    loaded = MinedPlan.load(tmp_path / "plan")
    assert torch.equal(loaded.clusters.ids_CK, mined.clusters.ids_CK)
    assert torch.equal(loaded.neighbors.ids_NW, mined.neighbors.ids_NW)
    assert torch.equal(loaded.neighbors.scores_NW, mined.neighbors.scores_NW)
    assert torch.equal(loaded.edges.source_E, mined.edges.source_E)
    assert torch.equal(loaded.communities.label_N, mined.communities.label_N)
    assert torch.equal(loaded.task_N, mined.task_N)
    assert (loaded.task_names, loaded.settings) == (("a", "b"), mined.settings)


def test_a_damaged_or_foreign_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no plan\.json"):
        MinedPlan.load(tmp_path)
    mine(vectors(30), vectors(30, seed=1), settings=small()).save(tmp_path)
    path = tmp_path / "plan.parquet"
    path.write_bytes(path.read_bytes()[:-7] + b"changed")
    with pytest.raises(ValueError, match="SHA-256 differs"):
        MinedPlan.load(tmp_path)
    description = tmp_path / "plan.json"
    description.write_text(description.read_text().replace('"format_version": 3', '"format_version": 99'))
    with pytest.raises(ValueError, match="format version 99"):
        MinedPlan.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:300], r"plan\.json is damaged"),
        (lambda text: "", r"plan\.json is damaged"),
        (lambda text: text.replace('"cluster_size": 4', '"cluster_size": 8'), r"plan\.json is not what was written"),
    ],
)
def test_a_description_that_was_changed_is_refused(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    mine(vectors(30), vectors(30, seed=1), settings=small()).save(tmp_path)
    description = tmp_path / "plan.json"
    assert change(description.read_text()) != description.read_text()
    description.write_text(change(description.read_text()))
    with pytest.raises(ValueError, match=message):
        MinedPlan.load(tmp_path)


def test_tasks_are_named_by_their_text_and_none_is_missing() -> None:
    with pytest.raises(ValueError, match=r"tasks names none for row\(s\) 1, 3; every row needs one"):
        mine(vectors(30), vectors(30, seed=1), settings=small(), tasks=["a", None, "b", float("nan"), *["a"] * 26])
    mined = mine(vectors(30), vectors(30, seed=1), settings=small(), tasks=[1] * 14 + ["1"] * 16)
    assert mined.task_names == ("1",)


def test_a_plan_says_in_a_line_what_it_is() -> None:
    mined = mine(vectors(30), vectors(30, seed=1), settings=small())
    n_fillers = int(mined.filler_N.sum())
    counted = f"n_rows=30, n_edges={len(mined.edges)}, n_clusters={len(mined.clusters)}, n_fillers={n_fillers}"
    assert repr(mined) == f"MinedPlan({counted}, cluster_size=4, tasks=['default'])"


def _with(value: float, row: int) -> npt.NDArray[np.float32]:
    broken = vectors(30)
    broken[row] = value
    return broken


@pytest.mark.parametrize(
    ("query", "target", "changes", "message"),
    [
        (_with(np.nan, 3), vectors(30), {}, r"query vectors hold NaN.*row\(s\) 3"),
        (vectors(30), _with(0.0, 7), {}, r"target vectors hold.*only zeros.*row\(s\) 7"),
        (vectors(30), vectors(29), {}, r"\(30, 8\) and target vectors \(29, 8\)"),
        (vectors(30), vectors(30, 9), {}, "same dimension"),
        (vectors(30), vectors(30)[0], {}, "needed: .rows, dimensions."),
        (vectors(3), vectors(3), {"first_rank": 0, "n_ranks": 1}, "3 rows are fewer than cluster_size=4"),
        (vectors(7), vectors(7), {}, r"7 rows of task .* are too few.*more than 7 rows"),
    ],
)
def test_bad_input_is_refused_with_what_and_where(
    query: npt.NDArray[np.float32], target: npt.NDArray[np.float32], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mine(query, target, settings=small(**changes))


@pytest.mark.parametrize(
    "changes", [{"first_rank": -1}, {"n_ranks": 0}, {"cluster_size": 1}, {"communities": "metsi"}, {"resolution": 0}]
)
def test_bad_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        small(**changes)


def test_settings_that_nothing_reads_are_refused() -> None:
    for chosen, other in (
        (MiningSettings(min_recall=0.9), "neighbors=exact"),
        (MiningSettings(random_negatives=0.5), "n_negatives=0"),
        (MiningSettings(communities="metis", cut="louvain"), "communities=metis"),
        (MiningSettings(backend="cpu", max_level=9), "backend=cpu"),
        (MiningSettings(ranked="rows", label_share=0.5, per_task={"a": {"first_rank": 1}}), "ranked=rows"),
        (MiningSettings(ranked="labels", first_rank=5), "ranked=labels"),
        (MiningSettings(ranked="labels", edges="either", per_task={"a": {"n_ranks": 9}}), "ranked=labels"),
    ):
        with pytest.raises(ValueError, match=f"is without effect with data.mining.{other}: change that, or leave"):
            chosen.check_used()
    MiningSettings(neighbors="approximate", min_recall=0.9, threshold=1e-3).check_used()
    MiningSettings(ranked="rows", label_share=0.5, per_task={"a": {"ranked": "labels"}}).check_used()
    MiningSettings(ranked="labels", first_rank=5, per_task={"a": {"ranked": "rows"}}).check_used()
    of_one = MiningSettings(
        per_task={"a": {"ranked": "labels", "n_ranks": 9}, "b": {"ranked": "labels", "first_rank": 9}}
    )
    with pytest.raises(
        ValueError, match="per_task: first_rank of 'b' is without effect with ranked=labels: change that"
    ):
        of_one.check_used()


def test_arcs_leave_out_missing_ranks() -> None:
    neighbors = Neighbors(torch.tensor([[1, -1], [0, -1]]), torch.zeros(2, 2), torch.ones(2))
    ((from_A, to_A),) = arcs_by_tile(neighbors, rank_window(neighbors, MiningSettings(), first_rank=0, n_ranks=2))
    assert (from_A.tolist(), to_A.tolist()) == ([0, 1], [1, 0])


def test_unit_vectors_are_not_copied_and_all_bad_rows_are_named() -> None:
    embeddings = Embeddings.from_arrays(vectors(100), vectors(100, seed=1))
    again = Embeddings.from_arrays(embeddings.query_ND, embeddings.target_ND)
    assert again.query_ND.data_ptr() == embeddings.query_ND.data_ptr()
    assert torch.equal(again.target_ND, embeddings.target_ND)
    exact = torch.nn.functional.normalize(torch.tensor(vectors(100)).double(), dim=1)
    assert torch.allclose(embeddings.query_ND.double(), exact, atol=2e-7)
    broken = vectors(100)
    broken[[3, 50, 99]] = np.nan
    with pytest.raises(ValueError, match=r"rows? ?\(?s?\)? 3, 50, 99"):
        Embeddings.from_arrays(broken, vectors(100))


@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e22, 1e37])
def test_rows_of_any_length_become_unit_rows(scale: float) -> None:
    plain = vectors(5)
    scaled = plain.copy()
    scaled[2] *= scale
    kept = Embeddings.from_arrays(scaled, plain)
    torch.testing.assert_close(kept.query_ND, kept.target_ND, rtol=0, atol=1e-6)
