"""The draw of batches: nothing lost, nothing twice, from (seed, epoch) alone."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from b3_lightning.data.sampler import EpochBatches
from b3_lightning.mining import BatchPlan, HandOver, MiningSettings, mine, random_clusters
from b3_lightning.model.loss import Rows, same_key
from b3_lightning.types import Clusters


def clusters(n_rows: int, size: int, first: int = 0) -> torch.Tensor:
    padded = torch.full((-(-n_rows // size) * size,), -1)
    padded[:n_rows] = first + torch.randperm(n_rows, generator=torch.Generator().manual_seed(n_rows))
    return padded.view(-1, size)


@given(n_rows=st.integers(4, 120), size=st.integers(1, 6), per_batch=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_epochs_hand_out_every_row_once_but_for_the_counted_carry(
    n_rows: int, size: int, per_batch: int, seed: int
) -> None:
    batch_size = size * per_batch
    assume(n_rows >= 2 * batch_size)
    plan = BatchPlan(Clusters(clusters(n_rows, size)), batch_size=batch_size, seed=seed)
    drawn: Counter[int] = Counter()
    for epoch in range(4):
        ids_MB = plan.epoch(epoch)
        assert len(ids_MB) == plan.n_batches(epoch)
        for ids_B in ids_MB.tolist():
            assert len(set(ids_B)) == batch_size
        drawn.update(ids_MB.flatten().tolist())
        waiting = Counter(plan.carried_after(epoch).tolist())
        assert drawn + waiting == Counter(dict.fromkeys(range(n_rows), epoch + 1))
        assert sum(waiting.values()) == (epoch + 1) * n_rows % batch_size


@given(n_rows=st.integers(20, 60), n_targets=st.integers(2, 20), n_queries=st.integers(5, 60), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_rows_with_one_target_query_or_group_meet_only_masked(
    n_rows: int, n_targets: int, n_queries: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    target_key = torch.randint(n_targets, (n_rows,), generator=random)
    query_key = torch.randint(n_queries, (n_rows,), generator=random)
    group_key = torch.randint(-1, n_queries, (n_rows,), generator=random)
    keys = (query_key, target_key, group_key)
    query, target = torch.randn(2, n_rows, 6, generator=random)
    chosen = MiningSettings(first_rank=1, n_ranks=6, cluster_size=4, seed=seed)
    plan = mine(query, target, settings=chosen, target_keys=target_key).batches(batch_size=8, seed=seed)
    for ids_B in plan.epoch(0):
        rows = Rows(ids_B, *(key[ids_B] for key in keys))
        ignored = same_key(rows, rows)
        for a, b in itertools.product(range(8), repeat=2):
            same = any(key[ids_B[a]] == key[ids_B[b]] >= 0 for key in keys)
            assert bool(ignored[a, b]) == same


def test_batches_are_whole_clusters_combined_anew_every_epoch() -> None:
    plan = BatchPlan(Clusters(clusters(64, 4)), batch_size=16, seed=0)
    whole = {frozenset(ids) for ids in plan.clusters.ids_CK.tolist()}
    batches = []
    for epoch in range(3):
        for ids_B in plan.epoch(epoch).tolist():
            assert all(frozenset(ids_B[start : start + 4]) in whole for start in range(0, 16, 4))
        batches.append({frozenset(ids_B) for ids_B in plan.epoch(epoch).tolist()})
    assert batches[0] != batches[1] != batches[2]


def test_same_seed_same_batches_other_seed_others() -> None:
    first, again, other = (BatchPlan(random_clusters(40), batch_size=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.epoch(3), again.epoch(3))
    assert not torch.equal(first.epoch(3), other.epoch(3))


def test_a_batch_holds_one_task_and_weights_count_passes() -> None:
    table = torch.cat([clusters(32, 4), clusters(64, 4, first=32)])
    task_N = (torch.arange(96) >= 32).long()
    plan = BatchPlan(
        Clusters(table), batch_size=8, seed=0, task_N=task_N, task_names=("a", "b"), task_weights={"a": 2, "b": 0.5}
    )
    ids_MB = plan.epoch(0)
    assert all(len(set(task_N[ids_B].tolist())) == 1 for ids_B in ids_MB)
    assert Counter(task_N[ids_MB[:, 0]].tolist()) == {0: 8, 1: 4}
    both = Counter(torch.cat([plan.epoch(0), plan.epoch(1)]).flatten().tolist())
    assert all(both[row] == (4 if row < 32 else 1) for row in range(96))


def test_a_new_plan_begins_with_the_rows_that_the_old_one_carried() -> None:
    old = BatchPlan(Clusters(clusters(50, 4)), batch_size=16, seed=0)
    carried = old.carried_after(1)
    new = BatchPlan(random_clusters(50), batch_size=16, seed=0, begun=old.hand_over(2))
    assert new.n_batches(2) == old.n_batches(2)
    drawn = Counter(new.epoch(2).flatten().tolist()) + Counter(new.carried_after(2).tolist())
    assert drawn == Counter(range(50)) + Counter(carried.tolist())


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 1.5])
def test_rows_are_trained_on_about_equally_often_when_every_epoch_has_another_plan(weight: float) -> None:
    """A pass that a plan begins is not gone on with by the next one, whose clusters are others."""
    generator, begun = torch.Generator().manual_seed(0), HandOver()
    task_N = (torch.arange(384) >= 320).long()
    trained = torch.zeros(384, dtype=torch.int64)
    for epoch in range(8):
        table = torch.cat([torch.randperm(320, generator=generator).view(-1, 4), clusters(64, 4, first=320)])
        plan = BatchPlan(
            Clusters(table), batch_size=16, seed=0, task_N=task_N, task_names=("a", "b"), task_weights={"a": weight},
            begun=begun,
        )  # fmt: skip
        trained += torch.bincount(plan.epoch(epoch).flatten(), minlength=384)
        begun = plan.hand_over(epoch + 1)
    assert (begun.offered_N is None) == weight.is_integer()
    assert (trained[320:] == 8).all()
    # drawn anew each epoch, 0.5 would give from 0 to 8 times, and 1.5 from 8 to 16
    assert (trained[:320] - 8 * weight).abs().max() <= (0 if weight.is_integer() else 2)


def test_other_clusters_are_kept_each_pass_whatever_was_offered_before() -> None:
    clusters_of_8 = Clusters(torch.randperm(512, generator=torch.Generator().manual_seed(0)).view(-1, 8))
    begun = BatchPlan(clusters_of_8, batch_size=64, seed=1, task_weights={"default": 0.5}).hand_over(1)
    plan = BatchPlan(
        clusters_of_8, batch_size=64, seed=0, task_weights={"default": 0.5}, begun=begun, mined_frac={0: 0.5}
    )
    cluster_N = clusters_of_8.cluster_of_row()
    kept = []
    for first in (1, 3, 5, 7):  # a pass is two epochs
        cluster_CK = cluster_N[torch.cat([plan.epoch(first), plan.epoch(first + 1)]).flatten()].view(-1, 8)
        kept.append({int(one[0]) for one in cluster_CK if len(set(one.tolist())) == 1})
    assert [len(one) for one in kept] == [32] * 4
    assert len(set.intersection(*kept)) < 10


def test_a_plan_that_hands_over_at_once_hands_on_what_it_was_given() -> None:
    begun = HandOver(3, torch.tensor([1, 2]), torch.arange(32) % 2)
    plan = BatchPlan(random_clusters(32), batch_size=16, seed=0, begun=begun)
    assert plan.hand_over(3) is begun


@pytest.mark.parametrize(
    ("batch_size", "names", "weights", "message"),
    [
        (10, ("a",), {}, "batch_size=10 must be a multiple of cluster_size=4; nearest: 8"),
        (64, ("a",), {}, "task 'a' has 32 rows, fewer than batch_size=64"),
        (8, ("a",), {"b": 1.0}, r"unknown tasks \['b'\]"),
        (8, ("a",), {"a": 0.0}, "weight of task 'a' is 0.0"),
    ],
)
def test_bad_batches_are_refused(batch_size: int, names: tuple[str], weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(Clusters(clusters(32, 4)), batch_size=batch_size, seed=0, task_names=names, task_weights=weights)


def test_ranks_share_a_batch_equally_and_without_overlap() -> None:
    ids_MB = torch.arange(24).view(3, 8)
    shares = [list(EpochBatches(ids_MB, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == ids_MB.tolist()
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of the 3 processes"):
        EpochBatches(ids_MB, world_size=3)
