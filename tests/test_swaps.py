"""The local search: sizes stay, kept edges only grow, and at its end no swap is left that helps."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from b3_lightning.mining import swaps
from b3_lightning.mining.swaps import improve_by_swaps
from b3_lightning.types import PADDING, Clusters, Edges


def graph(pairs: list[tuple[int, int]], n_rows: int, weights: list[float] | None = None) -> Edges:
    source, target = torch.tensor(sorted(pairs), dtype=torch.int64).view(-1, 2).T.contiguous()
    weight = torch.ones(len(pairs)) if weights is None else torch.tensor(weights)
    return Edges(source, target, weight, n_rows)


def kept(ids_CK: torch.Tensor, edges: Edges) -> float:
    return float(edges.within(Clusters(ids_CK).cluster_of_row()).weight_E.sum())


def random_case(n_rows: int, size: int, n_edges: int, seed: int) -> tuple[Clusters, Edges]:
    random = torch.Generator().manual_seed(seed)
    every = torch.combinations(torch.arange(n_rows))
    chosen = every[torch.randperm(len(every), generator=random)[:n_edges]].sort(dim=0, stable=True).values
    pairs = sorted({(min(a, b), max(a, b)) for a, b in chosen.tolist() if a != b})
    weights = (torch.rand(len(pairs), generator=random) + 0.1).tolist()
    ids = torch.full((-(-n_rows // size) * size,), PADDING)
    ids[:n_rows] = torch.randperm(n_rows, generator=random)
    return Clusters(ids.view(-1, size)), graph(pairs, n_rows, weights)


def test_two_rows_change_places_by_hand() -> None:
    # 0-2 and 1-3 are edges across {0, 1} and {2, 3}; one swap keeps both
    edges = graph([(0, 2), (1, 3)], 4)
    better = improve_by_swaps(Clusters(torch.tensor([[0, 1], [2, 3]])), edges, max_rounds=5)
    assert {frozenset(ids) for ids in better.ids_CK.tolist()} == {frozenset({0, 2}), frozenset({1, 3})}


def test_swapping_the_ends_of_one_edge_gains_nothing() -> None:
    # 0-1 is the only edge: exchanging its ends leaves it between the clusters, a filler has to move
    better = improve_by_swaps(Clusters(torch.tensor([[0, 2], [1, 3]])), graph([(0, 1)], 4), max_rounds=5)
    assert frozenset({0, 1}) in {frozenset(ids) for ids in better.ids_CK.tolist()}


def test_no_rounds_no_edges_or_one_cluster_change_nothing() -> None:
    clusters = Clusters(torch.tensor([[0, 1], [2, 3]]))
    assert improve_by_swaps(clusters, graph([(0, 2), (1, 3)], 4), max_rounds=0).ids_CK.equal(clusters.ids_CK)
    assert improve_by_swaps(clusters, graph([], 4), max_rounds=5).ids_CK.equal(clusters.ids_CK)
    one = Clusters(torch.tensor([[0, 1, 2, 3]]))
    assert improve_by_swaps(one, graph([(0, 2)], 4), max_rounds=5).ids_CK.equal(one.ids_CK)


@given(
    n_rows=st.integers(4, 24),
    size=st.integers(2, 6),
    n_edges=st.integers(1, 80),
    arcs_at_once=st.sampled_from([1, 20, 2**18]),
    seed=st.integers(0, 9999),
)
@example(17, 2, 79, 20, 2563)  # exchanging one end of two pairs gains what exchanging the other does
@settings(max_examples=200, deadline=None)
def test_sizes_stay_and_at_the_end_no_swap_is_left_that_helps(
    n_rows: int, size: int, n_edges: int, arcs_at_once: int, seed: int
) -> None:
    with mock.patch.object(swaps, "_ARCS_AT_ONCE", arcs_at_once):
        check_a_search(*random_case(n_rows, size, n_edges, seed))


def check_a_search(clusters: Clusters, edges: Edges) -> None:
    before = kept(clusters.ids_CK, edges)
    better = clusters
    while True:
        stepped = improve_by_swaps(better, edges, max_rounds=1)
        assert torch.equal(stepped.ids_CK == PADDING, clusters.ids_CK == PADDING)
        after = kept(stepped.ids_CK, edges)
        if stepped.ids_CK.equal(better.ids_CK):
            break
        assert after > before, "every round keeps more"
        better, before = stepped, after
    # all rounds at once look only at what has changed; of two swaps that gain the same they may make the other
    whole = improve_by_swaps(clusters, edges, max_rounds=100)
    assert torch.equal(whole.ids_CK == PADDING, clusters.ids_CK == PADDING)
    for found in (better, whole):
        check_that_no_swap_helps(found, edges)


def check_that_no_swap_helps(clusters: Clusters, edges: Edges) -> None:
    ids_P, before = clusters.ids_CK.flatten(), kept(clusters.ids_CK, edges)
    for first, second in itertools.combinations(range(len(ids_P)), 2):
        if PADDING in (ids_P[first], ids_P[second]):
            continue
        other_P = ids_P.clone()
        other_P[[first, second]] = ids_P[[second, first]]
        assert kept(other_P.view(clusters.ids_CK.shape), edges) <= before + 1e-4
