"""Ranks over all unique targets: by hand, against brute force, and under the traps of cosine scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from b3_lightning.model.metrics import RetrievalMetrics
from b3_lightning.model.ranks import positive_ranks


def test_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    target = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.6, 0.8]])
    # targets 1 and 2 are one; query 2 scores all below 0, its own less badly
    rank = positive_ranks(query, target, torch.arange(3), torch.tensor([0, 1, 1]))
    assert rank.tolist() == [0, 0, 0]


def test_a_tie_counts_against_the_query() -> None:
    same = torch.ones(4, 2)
    assert positive_ranks(same, same, torch.arange(4), torch.arange(4)).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("n_rows", "n_dims"), [(7, 384), (9, 32), (9, 768), (1025, 64)])
def test_equal_vectors_tie_though_a_product_rounds_them_apart(n_rows: int, n_dims: int) -> None:
    one = torch.nn.functional.normalize(torch.randn(1, n_dims, generator=torch.Generator().manual_seed(0)), dim=1)
    same, keys = one.expand(n_rows, -1).contiguous(), torch.arange(n_rows)
    assert positive_ranks(same, same, keys, keys).unique().tolist() == [n_rows - 1]


def test_other_positives_of_the_same_query_are_not_counted() -> None:
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    assert positive_ranks(query, target, torch.tensor([7, 7]), torch.arange(2)).tolist() == [0, 0]
    assert positive_ranks(query, target, torch.arange(2), torch.arange(2)).tolist() == [0, 1]


def test_targets_of_the_same_group_are_not_counted() -> None:
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.9, 0.1]])
    rank = positive_ranks(query, target, torch.arange(3), torch.arange(3), torch.tensor([4, 4, -1]))
    assert rank.tolist() == [1, 0, 1]
    assert positive_ranks(query, target, torch.arange(3), torch.arange(3), torch.full((3,), -1)).tolist() == [2, 0, 1]


def test_pairs_beyond_the_queries_are_candidates() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0], [0.9, 0.1], [0.6, 0.8]])
    # the third is right for query 0 too, the fourth beats its own; the fifth equals the own target of query 1
    rank = positive_ranks(query, target, torch.tensor([0, 1, 0, 2, 3]), torch.tensor([0, 1, 2, 3, 1]))
    assert rank.tolist() == [1, 0]


@given(n_rows=st.integers(1, 40), n_keys=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_equal_to_a_brute_force(n_rows: int, n_keys: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(0, n_keys, (n_rows,), generator=generator)
    other = torch.randint(0, n_keys, (n_rows,), generator=generator)
    query = torch.randn(n_rows, 4, generator=generator)
    target = torch.randn(n_keys, 4, generator=generator)[key]
    rank = positive_ranks(query, target, other, key)
    for row in range(n_rows):
        mine = {int(key[i]) for i in range(n_rows) if other[i] == other[row]}
        unique = {int(key[i]): target[i] for i in range(n_rows)}
        own = query[row] @ target[row]
        better = sum(1 for name, vector in unique.items() if name not in mine and query[row] @ vector >= own - 1e-6)
        worse = sum(1 for name, vector in unique.items() if name not in mine and query[row] @ vector >= own + 1e-6)
        assert worse <= int(rank[row]) <= better


def test_values_and_rows_that_a_sampler_repeats() -> None:
    metrics = RetrievalMetrics()
    query, target = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    for rows in ([0, 1], [2, 0]):
        index = torch.tensor(rows)
        keys = {f"{name}_B": index for name in ("row", "query_key", "target_key")}
        metrics.update(query[index], target[index], **keys, group_key_B=torch.full_like(index, -1))
    values = {name: float(value) for name, value in metrics.compute().items()}
    # query 0 has rank 0; 1 and 2 have rank 2, since a tie at 0 counts against them
    assert values["hit@1"] == float(torch.tensor(1 / 3))
    assert values["hit@5"] == 1
    assert abs(values["mrr"] - (1 + 1 / 3 + 1 / 3) / 3) < 1e-6
    assert abs(values["ndcg@10"] - (1 + 0.5 + 0.5) / 3) < 1e-6
    e = math.e  # all three targets stand against every query, also those of the other batch
    expected = (-math.log(e / (e + 2)) - 2 * math.log(1 / (e + 2))) / 3
    assert abs(values["loss"] - expected) < 1e-6


def test_the_loss_leaves_out_right_answers_and_goes_by_the_temperature() -> None:
    metrics = RetrievalMetrics()
    metrics.temperature = 0.5
    # rows 0 and 1 are of one query, rows 2 and 3 of one group: neither is the other's negative
    keys = {"row_B": torch.arange(4), "query_key_B": torch.tensor([0, 0, 1, 2]), "target_key_B": torch.arange(4)}
    metrics.update(torch.eye(4), torch.eye(4), **keys, group_key_B=torch.tensor([-1, -1, 5, 5]))
    expected = math.log(1 + 2 * math.exp(-2))
    assert abs(float(metrics.compute()["loss"]) - expected) < 1e-6


def test_vectors_that_are_not_finite_are_refused_by_row() -> None:
    vector = torch.eye(3)
    vector[1, 0] = torch.nan
    metrics, key = RetrievalMetrics(), torch.arange(3)
    metrics.update(
        vector, torch.eye(3), row_B=key + 7, query_key_B=key, target_key_B=key, group_key_B=torch.full((3,), -1)
    )
    with pytest.raises(ValueError, match=r"vectors of 1 of 3 rows are not finite \(row\(s\) 8\)"):
        metrics.compute()
