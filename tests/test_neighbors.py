"""Neighbours against a float64 brute force: every path, tile, budget and thread count gives the same bits."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from b3_lightning.mining.approximate import find_neighbors_approximately
from b3_lightning.mining.candidates import Bounds, Panels
from b3_lightning.mining.exact import order_keys, read_keys, to_grid
from b3_lightning.mining.exclusions import Exclusions
from b3_lightning.mining.neighbors import TargetIndex, find_neighbors, positive_scores
from b3_lightning.mining.rerank import FoundNeighbors, find_neighbors_with
from b3_lightning.types import Embeddings

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Pairs = list[tuple[Tensor, Tensor]]


def unit(vector_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector_ND.float(), dim=1)


def clustered(n_rows: int, *, n_dims: int = 24, n_centers: int = 4, spread: float = 0.3, seed: int = 0) -> Tensor:
    """Unit vectors about a few centers; a spread of 1e-4 is below what bfloat16 can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    center_CD = unit(torch.randn(n_centers, n_dims, generator=generator))
    label_N = torch.randint(0, n_centers, (n_rows,), generator=generator)
    return unit(center_CD[label_N] + spread * torch.randn(n_rows, n_dims, generator=generator) / n_dims**0.5)


def some_keys(n_rows: int, n_keys: int, seed: int) -> Tensor:
    return torch.randint(0, n_keys, (n_rows,), generator=torch.Generator().manual_seed(seed))


def brute_force(query_ND: Tensor, target_MD: Tensor, width: int, exclude: Pairs) -> tuple[Tensor, Tensor]:
    """All float64 scores of the vectors as given, rounded to float32; ties by id."""
    score_NM = (query_ND.double() @ target_MD.double().T).float()
    for query_key_N, target_key_M in exclude:
        score_NM[query_key_N[:, None] == target_key_M] = -torch.inf
    best = torch.sort(score_NM, dim=1, descending=True, stable=True)
    ids_NW = torch.full((len(query_ND), width), -1)
    scores_NW = torch.full((len(query_ND), width), -torch.inf)
    ids_NW[:, : len(target_MD)] = best.indices.masked_fill(best.values == -torch.inf, -1)[:, :width]
    scores_NW[:, : len(target_MD)] = best.values[:, :width]
    return ids_NW, scores_NW


def assert_same_but_for_ties(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0] == -1, expected[0] == -1)
    assert torch.equal(found[1] == -torch.inf, expected[1] == -torch.inf)
    there = expected[0] >= 0
    assert torch.allclose(found[1][there], expected[1][there], atol=1e-6, rtol=0)
    for row in ((found[0] != expected[0]) & there).any(dim=1).nonzero().flatten().tolist():
        only = set(found[0][row].tolist()) ^ set(expected[0][row].tolist())
        worst = float(expected[1][row][there[row]][-1])
        for target in only & set(expected[0][row].tolist()):
            assert float(expected[1][row][expected[0][row] == target]) <= worst + 1e-6
        assert len(set(found[0][row][there[row]].tolist())) == int(there[row].sum())


@given(
    n_queries=st.integers(1, 40),
    n_targets=st.one_of(st.integers(1, 40), st.integers(100, 700)),
    width=st.one_of(st.integers(1, 12), st.integers(1, 60)),
    spread=st.sampled_from([0.0, 1e-7, 1e-4, 0.01, 0.3, 3.0]),
    n_keys=st.sampled_from([1, 3, 50, 10_000]),
    n_key_pairs=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    budget=st.sampled_from([1e-7, 1e-3, 1.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=100, deadline=None)
def test_neighbours_are_those_of_a_brute_force(
    n_queries: int,
    n_targets: int,
    width: int,
    spread: float,
    n_keys: int,
    n_key_pairs: int,
    dtype: torch.dtype,
    budget: float,
    seed: int,
) -> None:
    query, target = clustered(n_queries, spread=spread, seed=seed), clustered(n_targets, spread=spread, seed=seed)
    exclude = [
        (some_keys(n_queries, n_keys, seed + side), some_keys(n_targets, n_keys, seed + 9 + side))
        for side in range(n_key_pairs)
    ]
    found = find_neighbors(
        query, target, n_neighbors=width, exclude=exclude, memory_budget_gib=budget, candidate_dtype=dtype
    )
    assert_same_but_for_ties(found, brute_force(query, target, width, exclude))
    on_grid = [to_grid(side).float() for side in (query, target)]
    expected = brute_force(on_grid[0], on_grid[1], width, exclude)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("spread", [1e-4, 0.02, 0.5])
def test_the_same_bits_from_any_path_tile_budget_and_number_of_threads(spread: float) -> None:
    target = clustered(1500, n_centers=20, spread=spread)
    query = unit(target[:100] + 0.01 * clustered(100, seed=1))
    exclude = [(torch.arange(100), torch.arange(1500))]
    expected = brute_force(to_grid(query).float(), to_grid(target).float(), 20, exclude)
    n_threads = torch.get_num_threads()
    try:
        for threads, dtype, budget in itertools.product((1, 2), DTYPES, (2e-4, 1.0)):
            torch.set_num_threads(threads)
            found = find_neighbors(
                query, target, n_neighbors=20, exclude=exclude, memory_budget_gib=budget, candidate_dtype=dtype
            )
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    finally:
        torch.set_num_threads(n_threads)
    index = TargetIndex(target, n_neighbors=20, target_keys=[exclude[0][1]])
    for size in (9, 100):
        rows = torch.arange(100).split(size)
        parts = [index.search(query[part], [part]) for part in rows]
        assert torch.equal(torch.cat([ids for ids, _ in parts]), expected[0])
        assert torch.equal(torch.cat([scores for _, scores in parts]), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_duplicates_leave_a_path_that_cannot_tell_them_apart(dtype: torch.dtype) -> None:
    target = clustered(2000, n_centers=1, spread=0.02)
    index = TargetIndex(target, n_neighbors=5, candidate_dtype=dtype)
    tier = index._tier(dtype)
    _, sure = tier.search(target[:50], [])
    assert bool(sure.any()) == (dtype == torch.float32)
    expected = brute_force(to_grid(target[:50]).float(), to_grid(target).float(), 5, [])
    assert torch.equal(index.search(target[:50])[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_well_separated_rows_need_the_first_path_only(dtype: torch.dtype) -> None:
    target = clustered(3000, n_dims=128, n_centers=300, spread=0.5)
    _, sure = TargetIndex(target, n_neighbors=5, candidate_dtype=dtype)._tier(dtype).search(target[:200], [])
    assert bool(sure.all())


def test_scores_outside_their_bound_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    target = clustered(3000, n_dims=128, n_centers=300, spread=0.5)
    expected = brute_force(to_grid(target[:50]).float(), to_grid(target).float(), 5, [])
    product = Panels.scores
    monkeypatch.setattr(Panels, "scores", lambda *args: product(*args).mul_(0.9))
    index = TargetIndex(target, n_neighbors=5, candidate_dtype=torch.bfloat16)
    _, sure = index._tier(torch.bfloat16).search(target[:50], [])
    assert not bool(sure.any())
    assert torch.equal(index.search(target[:50])[0], expected[0])


def test_a_lower_precision_of_float32_products_widens_the_bound() -> None:
    target = clustered(500)
    exact = Bounds.measure(target, torch.float32, 64).eps(target, torch.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        assert bool((Bounds.measure(target, torch.float32, 64).eps(target, torch.float32) > 20 * exact).all())
        found = find_neighbors(target[:40], target, n_neighbors=10, candidate_dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], find_neighbors(target[:40], target, n_neighbors=10)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_dims", [16, 384])
def test_products_stay_within_the_bound(dtype: torch.dtype, n_dims: int) -> None:
    query, target = clustered(200, n_dims=n_dims, seed=1), clustered(1000, n_dims=n_dims, seed=1)
    eps_Q = Bounds.measure(target, dtype, 300).eps(query, dtype)
    score_QM = (query.to(dtype) @ target.to(dtype).T).double()
    rounding = torch.finfo(dtype).eps / 2 * 1.01 * score_QM.abs()
    assert bool(((score_QM - query.double() @ target.double().T).abs() <= eps_Q[:, None] + rounding).all())


def test_all_rows_equal_rank_by_id() -> None:
    same = unit(torch.ones(900, 8))
    ids_NW, _ = find_neighbors(same, same, n_neighbors=3, exclude=[(torch.arange(900), torch.arange(900))])
    assert ids_NW[0].tolist() == [1, 2, 3]
    assert ids_NW[899].tolist() == [0, 1, 2]


def test_one_target() -> None:
    vector, key = unit(torch.ones(1, 8)), torch.zeros(1, dtype=torch.int64)
    assert find_neighbors(vector, vector, n_neighbors=2)[0].tolist() == [[0, -1]]
    ids, scores = find_neighbors(vector, vector, n_neighbors=2, exclude=[(key, key)])
    assert ids.tolist() == [[-1, -1]]
    assert scores.tolist() == [[-torch.inf, -torch.inf]]


def test_a_row_with_many_excluded_targets_still_gets_its_neighbours() -> None:
    target, key = clustered(6000, n_dims=8), torch.zeros(6000, dtype=torch.int64)
    key[5950:] = torch.arange(1, 51)
    found = find_neighbors(target[:300], target, n_neighbors=40, exclude=[(key[:300], key)], memory_budget_gib=0.01)
    expected = brute_force(to_grid(target[:300]).float(), to_grid(target).float(), 40, [(key[:300], key)])
    assert torch.equal(found[0], expected[0])
    assert int(found[0].min()) >= 5950


def test_the_pairs_of_a_large_key_come_in_bounded_pieces() -> None:
    score = torch.zeros(300, 2000)
    key = torch.arange(2000) // 1000
    Exclusions([key]).blank(score, [torch.ones(300, dtype=torch.int64)], 0, 2000)
    assert bool((score[:, :1000] == 0).all())
    assert bool((score[:, 1000:] == -torch.inf).all())


def test_keys_order_by_score_then_by_lowest_id() -> None:
    scores = torch.tensor([[0.5, -0.5, 0.0, -0.0, 0.5, -torch.inf, 1.0, -1.0]])
    ids = torch.tensor([[9, 1, 5, 4, 3, 8, 7, 2]])
    found, ordered = read_keys(order_keys(scores, ids).sort(dim=1, descending=True).values)
    assert found.tolist() == [[7, 3, 9, 4, 5, 1, 2, -1]]
    assert ordered.tolist() == [[1.0, 0.5, 0.5, 0.0, 0.0, -0.5, -1.0, -torch.inf]]


def test_positive_scores_are_those_of_the_rows() -> None:
    query, target = clustered(30), clustered(30, seed=1)
    assert torch.allclose(positive_scores(query, target), (query * target).sum(dim=1), atol=1e-6)


@pytest.mark.parametrize(
    ("query", "target", "keys", "message"),
    [
        (2 * torch.eye(4), torch.eye(4), [], r"query vectors are longer than 1.*row\(s\) 0"),
        (torch.eye(4), torch.eye(4) * torch.nan, [], "target vectors are longer than 1 or not finite"),
        (torch.eye(4), torch.eye(4)[:, :3], [], r"queries are \(4, 4\) and targets \(4, 3\)"),
        (torch.eye(4), torch.eye(4), [(torch.zeros(4).long(), torch.zeros(3).long())], "3 target keys for 4 targets"),
        (torch.eye(4), torch.eye(4), [(torch.zeros(3).long(), torch.zeros(4).long())], r"keys of lengths \[3\]"),
    ],
)
def test_bad_input_is_refused(query: Tensor, target: Tensor, keys: Pairs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_neighbors(query, target, n_neighbors=1, exclude=keys)


def test_memory_stays_within_the_budget() -> None:
    """60,000 x 64 with 0.05 GiB: their scores alone would be 14 GB."""
    code = """
import resource, torch
from b3_lightning.mining.rerank import FoundNeighbors, find_neighbors_with
from b3_lightning.mining.neighbors import TargetIndex, fast_dtype
target = torch.nn.functional.normalize(torch.randn(60_000, 64), dim=1)
small = target[:500].clone()
for dtype in (torch.bfloat16, torch.float32):  # libraries allocate for themselves at their first calls
    TargetIndex(small, n_neighbors=20, candidate_dtype=dtype).search(small)
keys = torch.zeros(60_000, dtype=torch.int64)
keys[10_000:] = torch.arange(1, 50_001)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for dtype in (torch.bfloat16, torch.float32):
    TargetIndex(
        target, n_neighbors=100, target_keys=[keys], memory_budget_gib=0.05, candidate_dtype=dtype
    ).search(target[:300], [keys[:300]])
print((peak() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 0.05


def test_inverted_lists_reach_the_recall_that_was_asked_for() -> None:
    target = clustered(4000, n_centers=60, spread=0.3)
    keys = torch.arange(4000)
    keys[:100] = 0
    search = functools.partial(
        find_neighbors_approximately, target, target, n_neighbors=10, exclude=[(keys, keys)], n_lists=96, n_sampled=300
    )
    found = search(min_recall=0.9)
    exact_ids, exact_scores = find_neighbors(target, target, n_neighbors=10, exclude=[(keys, keys)])
    hits = (found.ids_NW[:, :, None] == exact_ids[:, None]).any(dim=2).float().mean()
    assert found.recall >= 0.9
    assert abs(float(hits) - found.recall) < 0.05
    assert bool((found.ids_NW[:100] >= 100).all())
    same = found.ids_NW == exact_ids
    assert torch.equal(found.scores_NW[same], exact_scores[same])
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = search(min_recall=0.9)
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(again.ids_NW, found.ids_NW)
    with pytest.raises(ValueError, match="reached a recall of"):
        search(min_recall=1.01)


@pytest.mark.parametrize("n_rows", [2, 3, 10])
@pytest.mark.parametrize("how", ["approximate", "faiss"])
def test_few_rows_and_rows_without_a_neighbour_are_searched_like_any(n_rows: int, how: str) -> None:
    vector = torch.nn.functional.normalize(torch.randn(n_rows, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    by_faiss = functools.partial(find_neighbors_with, "faiss")
    find: Callable[..., FoundNeighbors] = find_neighbors_approximately if how == "approximate" else by_faiss
    for keys in (torch.arange(n_rows), torch.zeros(n_rows, dtype=torch.int64)):  # of one target, none is a neighbour
        found = find(vector, vector, n_neighbors=3, exclude=[(keys, keys)])
        expected, _ = find_neighbors(vector, vector, n_neighbors=3, exclude=[(keys, keys)])
        assert torch.equal(found.ids_NW, expected)
        assert found.recall == 1


def test_targets_that_tie_for_the_last_ranks_are_found_whichever_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, 41)
    key = torch.multinomial(share, 2000, replacement=True, generator=generator)
    target = torch.randn(40, 32, generator=generator)[key]
    embeddings = Embeddings.from_arrays(target + 0.8 * torch.randn(2000, 32, generator=generator), target)
    query, target = embeddings.query_ND, embeddings.target_ND
    exact, _ = find_neighbors(query, target, n_neighbors=20, exclude=[(key, key)])
    found = find_neighbors_with("faiss", query, target, n_neighbors=20, exclude=[(key, key)], min_recall=1.0)
    assert found.recall == 1.0
    assert not torch.equal(found.ids_NW.sort(dim=1).values, exact.sort(dim=1).values)
