"""A right answer of a query is no negative of it, whichever row holds it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from b3_lightning.data.collate import PairCollator
from b3_lightning.data.splits import Split
from b3_lightning.mining import Alike, KnownTargets, MiningSettings, mine
from b3_lightning.model.loss import Rows, same_key


def test_only_targets_that_rows_elsewhere_hold_are_listed() -> None:
    #                       q0 A  q0 B  q1 B  q2 C  q2 D  -  E  -  A
    target = torch.tensor([0, 1, 1, 2, 3, 4, 0])
    query = torch.tensor([0, 0, 1, 2, 2, -1, -1])
    assert KnownTargets([target, query])[:].tolist() == [[0, 1], [0, 1], *[[-1, -1]] * 5]
    assert not KnownTargets([target])
    assert not KnownTargets([target, torch.arange(7)])
    assert not KnownTargets([torch.arange(7), query])
    assert not KnownTargets([torch.empty(0, dtype=torch.int64)] * 2)


def right_answers(target: Tensor, others: list[Tensor]) -> list[set[int]]:
    """For every row the rows that hold its target, or that of a row with an equal key; by definition."""
    n_rows = len(target)
    alike = [
        {int(target[j]) for j in range(n_rows) if i == j or any(key[i] == key[j] >= 0 for key in others)}
        for i in range(n_rows)
    ]
    held = [{j for j in range(n_rows) if int(target[j]) in targets} for targets in alike]
    same = [{j for j in range(n_rows) if any(key[i] == key[j] >= 0 for key in others)} for i in range(n_rows)]
    return [one | other for one, other in zip(held, same, strict=True)]


@given(
    n_targets=st.integers(4, 40),
    n_queries=st.integers(8, 40),
    seed=st.integers(0, 999),
    how=st.sampled_from([
        {"neighbors": "exact"}, {"neighbors": "faiss"}, {"neighbors": "exact", "ranked": "labels"},
        {"neighbors": "exact", "first_rank": "auto"}, {"neighbors": "exact", "negatives_of": "row"},
    ]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_no_window_edge_or_negative_holds_a_right_answer(
    n_targets: int, n_queries: int, seed: int, how: dict[str, Any]
) -> None:
    random = torch.Generator().manual_seed(seed)
    target_key = torch.randint(n_targets, (40,), generator=random)
    query_key = torch.randint(n_queries, (40,), generator=random)
    group = torch.randint(-20, 10, (40,), generator=random).clamp(min=-1)
    groups = [None if value < 0 else int(value) for value in group]
    query, target = torch.randn(2, 40, 6, generator=random)
    target = target[target_key]  # one vector for one target
    chosen = MiningSettings(**{"first_rank": 0, "n_ranks": 6, "cluster_size": 4, "n_negatives": 3, "seed": seed} | how)
    keys: dict[str, Any] = {"target_keys": target_key, "query_keys": query_key, "groups": groups}
    mined = mine(query, target, settings=chosen, **keys)
    right = right_answers(target_key, [query_key, group])
    for row in range(40):
        hard = mined.neighbors.ids_NW[row][mined.window.hard_NW[row]].tolist()
        drawn = [one for one in mined.negative_NH[row].tolist() if one >= 0]
        assert not right[row] & {*hard, *drawn}


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_leaves_out_every_right_answer(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(12, (24,), generator=random)
    query = torch.randint(10, (24,), generator=random)
    group = torch.randint(-8, 5, (24,), generator=random).clamp(min=-1)
    known = KnownTargets([target, query, group])
    batch = torch.randperm(24, generator=random)[:12]
    rows = Rows(batch, query[batch], target[batch], group[batch])
    found = same_key(rows, rows, known[batch] if known else None)
    right = right_answers(target, [query, group])
    for a, b in itertools.product(range(12), repeat=2):
        assert bool(found[a, b]) == (int(batch[b]) in right[int(batch[a])])


def test_right_answers_are_told_within_a_task_alone(tmp_path: Path) -> None:
    """Two files number their groups from 0, ask the same and have the same labels."""
    asked, group = [f"q{row}" for row in range(8)], list(range(8))
    for name, labels in (("irony", ["yes", "no"] * 4), ("spam", ["no", "yes"] * 4)):
        pq.write_table(pa.table({"qry": asked, "pos_text": labels, "group": group}), tmp_path / f"{name}.parquet")
    split = Split.read([str(tmp_path / "irony.parquet"), str(tmp_path / "spam.parquet")], tmp_path, "decode")
    batch = PairCollator(split, tmp_path, lambda texts: {"texts": texts})([0, 1, 2, 3])
    rows = Rows.of(batch)
    assert same_key(rows, rows, batch.get("known_BM")).tolist() == [
        [(a - b) % 2 == 0 for b in range(4)] for a in range(4)
    ]
    mined = mine(
        *torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)), batch_size=4, tasks=["a"] * 8 + ["b"] * 8,
        target_keys=["yes", "no"] * 4 + ["no", "yes"] * 4, query_keys=asked * 2, groups=group * 2,
        settings=MiningSettings(first_rank=0, n_ranks=3, cluster_size=2, ranked="rows"),
    )  # fmt: skip
    assert min(mined.hardness[name] for name in ("mined", "random", "best")) > 0


def test_a_part_of_the_rows_knows_what_all_tell() -> None:
    target, query = (
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([0, 0, 1, 2]),
    )  # by row 1, row 2's target is right for row 0
    part = Alike([target, query]).take(torch.tensor([0, 2, 3]))
    rows = torch.arange(3)
    assert part.left_out(rows, rows).tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    assert not Alike([target, query]).take(torch.tensor([2, 3])).known


def test_a_batch_names_the_right_answers_that_other_rows_hold(tmp_path: Path) -> None:
    table = {"qry": ["q0", "q0", "q1", "q2"], "pos_text": ["A", "B", "B", "C"]}
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    split = Split.read(str(tmp_path / "pairs.parquet"), tmp_path, "decode")
    batch = PairCollator(split, tmp_path, lambda texts: {"texts": texts})([3, 0, 2])
    assert batch["known_BM"].tolist() == [[-1], [int(split.keys["target"][1])], [-1]]  # A stands in rows of q0 alone
    rows = Rows.of(batch)
    assert same_key(rows, rows, batch["known_BM"]).tolist() == [
        [True, False, False],
        [False, True, True],
        [False, False, True],
    ]


def test_a_right_answer_among_the_hard_negatives_of_a_file_is_no_negative(tmp_path: Path) -> None:
    """q0 has the answers A and B, and a row of it names B, of which no other query knows, as its hard negative."""
    table = {"qry": ["q0", "q0", "q1"], "pos_text": ["A", "B", "C"], "neg_text": ["B", "D", "A"]}
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    split = Split.read(str(tmp_path / "pairs.parquet"), tmp_path, "decode", n_negatives=1)
    collate = PairCollator(split, tmp_path, lambda texts: {"texts": texts}, n_file_negatives=1)
    batch = collate([0, 2])
    assert same_key(Rows.of(batch), Rows.of_negatives(batch), batch["known_BM"]).tolist() == [
        [True, True],  # B and, of q1's row, A
        [False, False],
    ]
    without = Split.read(str(tmp_path / "pairs.parquet"), tmp_path, "decode", n_negatives=0)
    assert not without.known
