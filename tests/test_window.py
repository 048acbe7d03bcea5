"""Which neighbours count: rank window, score filters, keys, labels, ``auto``, hard negatives, hardness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from b3_lightning.mining import MinedPlan, MiningSettings, mine
from b3_lightning.mining.alike import Alike
from b3_lightning.mining.hardness import TEMPERATURE, best_hardness, mean_hardness
from b3_lightning.mining.negatives import draw_negatives
from b3_lightning.mining.window import rank_window
from b3_lightning.types import PADDING, Clusters, Embeddings, Neighbors, Window


def vectors(n_rows: int, n_dims: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n_rows, n_dims)).astype(np.float32)


def ranked(scores: list[list[float]], positive: list[float]) -> Neighbors:
    ids = torch.arange(len(scores[0])).expand(len(scores), -1).contiguous()
    return Neighbors(ids, torch.tensor(scores), torch.tensor(positive))


@pytest.mark.parametrize(
    ("filters", "hard", "masked"),
    [
        ({}, [[0, 1, 1, 1]] * 2, [[1, 0, 0, 0]] * 2),
        # of a positive of 0.8 the limit is 0.72; of one of -0.2 it is -0.22, below the positive and not above it
        ({"max_relative_score": 0.9}, [[0, 0, 1, 1], [0, 0, 0, 1]], [[1, 1, 0, 0], [1, 1, 1, 0]]),
        ({"min_margin": 0.1}, [[0, 0, 1, 1], [0, 0, 0, 1]], [[1, 1, 0, 0], [1, 1, 1, 0]]),
        ({"max_score": 0.5}, [[0, 0, 1, 1], [0, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ({"min_score": -0.25}, [[0, 1, 1, 1], [0, 1, 1, 0]], [[1, 0, 0, 0]] * 2),
    ],
)
def test_score_filters_by_hand(filters: dict[str, float], hard: list[list[int]], masked: list[list[int]]) -> None:
    neighbors = ranked([[0.9, 0.75, 0.4, 0.1], [0.1, -0.1, -0.21, -0.4]], [0.8, -0.2])
    window = rank_window(neighbors, MiningSettings(**filters), first_rank=1, n_ranks=3)  # type: ignore[arg-type]
    assert window.hard_NW.int().tolist() == hard
    assert window.masked_NW.int().tolist() == masked


def test_same_query_target_or_group_is_never_a_neighbour() -> None:
    n_rows = 60
    targets, queries = ([row // size for row in range(n_rows)] for size in (2, 3))
    groups = [row % 5 if row % 2 else None for row in range(n_rows)]
    chosen = MiningSettings(first_rank=0, n_ranks=40, cluster_size=4, n_negatives=3)
    mined = mine(
        vectors(n_rows), vectors(n_rows, seed=1),
        settings=chosen, target_keys=targets, query_keys=queries, groups=groups,
    )  # fmt: skip
    for row, ids in enumerate(torch.cat([mined.neighbors.ids_NW, mined.negative_NH], dim=1).tolist()):
        for other in (other for other in ids if other >= 0):
            assert targets[row] != targets[other]
            assert queries[row] != queries[other]
            assert groups[row] is None or groups[row] != groups[other]
    missing = float("nan")  # the one that pandas puts in every such row
    for values in ([missing if group is None else group for group in groups], np.array(groups, dtype=np.float64)):
        same = mine(
            vectors(n_rows), vectors(n_rows, seed=1),
            settings=chosen, target_keys=targets, query_keys=queries, groups=values,
        )  # fmt: skip
        assert torch.equal(same.neighbors.ids_NW, mined.neighbors.ids_NW)


def test_no_negative_has_a_target_that_is_masked_under_another_row() -> None:
    ids_NW = torch.tensor([[2, 3], [4, 3], [0, 1], [0, 1], [0, 1], [0, 1]])
    masked_NW = torch.zeros(6, 2, dtype=torch.bool)
    masked_NW[0, 0] = True  # row 2, whose target is row 4's too
    drawn_NH = draw_negatives(
        Clusters(torch.tensor([[0, 1], [2, 3], [4, 5]])),
        Neighbors(ids_NW, torch.zeros(6, 2), torch.ones(6)),
        Window(~masked_NW, masked_NW),
        Alike([torch.tensor([0, 1, 2, 3, 2, 5])]),
        MiningSettings(cluster_size=2, n_negatives=1),
    )
    assert set(drawn_NH[:2].flatten().tolist()) <= {3, PADDING}
    assert 3 in drawn_NH[:2]


def test_masked_ids_are_the_ranks_before_the_window() -> None:
    mined = mine(vectors(50), vectors(50, seed=1), settings=MiningSettings(first_rank=6, n_ranks=20, cluster_size=4))
    ids_B = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:30]
    assert torch.equal(mined.masked_ids(ids_B), mined.neighbors.ids_NW[ids_B, :6])


@pytest.mark.parametrize("first_rank", [0, 1, 3, 5, 7])
def test_no_copy_of_a_masked_target_is_hard(first_rank: int) -> None:
    """Twelve targets in five rows each: what is masked is masked whichever row holds it."""
    key = np.arange(60) // 5
    settings = MiningSettings(first_rank=first_rank, n_ranks=20, cluster_size=4, n_negatives=2, edges="either")
    mined = mine(vectors(60), vectors(12, seed=1)[key], settings=settings, target_keys=key)
    n_hard = []
    for row in range(60):
        masked = {key[other] for other in mined.neighbors.ids_NW[row][mined.window.masked_NW[row]].tolist()}
        hard = mined.neighbors.ids_NW[row][mined.window.hard_NW[row]].tolist()
        negatives = [other for other in mined.negative_NH[row].tolist() if other >= 0]
        assert not masked & {key[other] for other in (*hard, *negatives)}
        assert len(masked) == -(-first_rank // 5)
        n_hard.append(len(hard))
    assert set(n_hard) == {20 - -first_rank % 5}


def labelled(n_rows: int, n_labels: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_labels, 8)).astype(np.float32), rng.integers(0, n_labels, n_rows)


def test_few_labels_are_ranked_as_labels_and_meet_in_clusters() -> None:
    label_vectors, label = labelled(600, 10)
    query = label_vectors[label] + vectors(600, seed=2)
    mined = mine(query, label_vectors[label], settings=MiningSettings(cluster_size=4), target_keys=label, batch_size=16)
    choice = mined.ranks["default"]
    assert (choice.labels, choice.first_rank, choice.n_ranks) == (True, 0, 3)  # 30% of the nine other labels
    assert "10 targets serve 600 rows" in choice.reason
    unit = label_vectors / np.linalg.norm(label_vectors, axis=1, keepdims=True)
    score = (query / np.linalg.norm(query, axis=1, keepdims=True)) @ unit.T
    score[np.arange(600), label] = -np.inf
    nearest = np.argsort(-score, axis=1)[:, :3]
    assert (label[mined.neighbors.ids_NW.numpy()] == nearest).all()
    assert len(mined.edges) <= 600 * 3
    different = [len({int(label[row]) for row in ids if row >= 0}) for ids in mined.clusters.ids_CK.tolist()]
    assert np.mean(different) > 3.5  # of four; drawn at random it would be 3.4
    assert mined.hardness["mined"] > mined.hardness["random"]


@pytest.mark.parametrize("alike", ["query_keys", "groups"])
def test_labels_of_an_equal_query_or_group_are_left_out_and_no_others(alike: str) -> None:
    label_vectors, label = labelled(400, 6)
    chosen = MiningSettings(cluster_size=4, label_share=1.0)
    pairs: dict[str, Any] = {alike: [row // 2 if row < 200 else None for row in range(400)]}  # then alone, each
    mined = mine(vectors(400), label_vectors[label], settings=chosen, target_keys=label, **pairs)
    right = [{int(label[row]), int(label[row ^ 1 if row < 200 else row])} for row in range(400)]
    for row, ids in enumerate(mined.neighbors.ids_NW.tolist()):
        found = [int(label[other]) for other in ids if other >= 0]
        assert set(found) == set(range(6)) - right[row]
        assert len(found) == len(set(found))


def test_first_rank_auto_finds_where_planted_false_negatives_end() -> None:
    rng = np.random.default_rng(0)
    topic = np.repeat(rng.normal(size=(150, 32)), 12, axis=0)  # twelve rows each ask and say nearly the same
    noise = 0.05 * rng.normal(size=(2, *topic.shape))
    chosen = MiningSettings(first_rank="auto", n_ranks="auto", cluster_size=8)
    choice = mine(topic + noise[0], topic + noise[1], settings=chosen).ranks["default"]
    assert 8 <= choice.first_rank <= 12
    assert choice.n_ranks == 56
    assert choice.suspicious[5] > 0.9
    assert choice.suspicious[20] < 0.01
    clean = mine(rng.normal(size=(1800, 32)), rng.normal(size=(1800, 32)), settings=chosen).ranks["default"]
    assert clean.first_rank == 0


def test_first_rank_auto_on_few_rows_and_where_no_rank_is_clean() -> None:
    rng = np.random.default_rng(0)
    chosen = MiningSettings(first_rank="auto", n_ranks=4, cluster_size=4)
    for n_alike, expected in ((5, 4), (30, 6)):  # of 60 rows 6 ranks are looked at
        topic = np.repeat(rng.normal(size=(60 // n_alike, 32)), n_alike, axis=0)
        noise = 0.05 * rng.normal(size=(2, 60, 32))
        choice = mine(topic + noise[0], topic + noise[1], settings=chosen).ranks["default"]
        assert choice.first_rank == expected
    assert "at all ranks below 6, the last looked at, 1% or more" in choice.reason


def test_a_task_has_its_own_settings() -> None:
    tasks = ["a"] * 40 + ["b"] * 60
    chosen = MiningSettings(first_rank=2, n_ranks=10, cluster_size=4, per_task={"b": {"first_rank": 5, "n_ranks": 20}})
    mined = mine(vectors(100), vectors(100, seed=1), settings=chosen, tasks=tasks)
    assert {name: (choice.first_rank, choice.n_ranks) for name, choice in mined.ranks.items()} == {
        "a": (2, 10),
        "b": (5, 20),
    }
    assert mined.neighbors.ids_NW.shape == (100, 25)
    assert mined.window.masked_NW.sum(dim=1).tolist() == [2] * 40 + [5] * 60
    with pytest.raises(ValueError, match=r"per_task.b sets cluster_size; a task can have its own communities"):
        MiningSettings(per_task={"b": {"cluster_size": 8}})
    with pytest.raises(ValueError, match=r"unknown tasks \['c'\]; the tasks are \['a', 'b'\]"):
        mine(vectors(100), vectors(100), settings=MiningSettings(per_task={"c": {}}, n_ranks=5), tasks=tasks)


@given(
    n_rows=st.integers(30, 80),
    of=st.sampled_from(["cluster", "row"]),
    n_negatives=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    n_keys=st.integers(20, 200),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_hard_negatives_are_never_right_masked_or_in_the_cluster(
    n_rows: int, of: str, n_negatives: int, share: float, n_keys: int, seed: int
) -> None:
    keys = np.random.default_rng(seed).integers(0, n_keys, n_rows)
    chosen = MiningSettings(
        first_rank=3, n_ranks=12, cluster_size=4, n_negatives=n_negatives, negatives_of=of,  # type: ignore[arg-type]
        random_negatives=share, seed=seed, ranked="rows",
    )  # fmt: skip
    mined = mine(vectors(n_rows, seed=seed), vectors(n_rows, seed=seed + 1), settings=chosen, target_keys=keys)
    cluster_N = mined.clusters.cluster_of_row()
    n_random = round(share * n_negatives)
    for row, negatives in enumerate(mined.negative_NH.tolist()):
        drawn = [other for other in negatives if other >= 0]
        members = (cluster_N == cluster_N[row]).nonzero().flatten().tolist() if of == "cluster" else [row]
        near = mined.neighbors.ids_NW[members]
        assert len(drawn) == len(set(drawn))
        assert not {int(keys[other]) for other in drawn} & {int(keys[member]) for member in members}
        assert not set(drawn) & set(near[mined.window.masked_NW[members]].tolist())
        assert all(cluster_N[other] != cluster_N[row] for other in drawn)
        hard = [other for other in negatives[: n_negatives - n_random] if other >= 0]
        assert set(hard) <= set(near[mined.window.hard_NW[members]].tolist())
    assert mined.summary()["n_negatives_lacking"] == int((mined.negative_NH == -1).sum())
    again = mine(vectors(n_rows, seed=seed), vectors(n_rows, seed=seed + 1), settings=chosen, target_keys=keys)
    assert torch.equal(again.negative_NH, mined.negative_NH)


def test_a_cluster_draws_what_more_of_its_rows_find_hard() -> None:
    """Row 8 is hard for all four rows of the cluster, rows 9 to 20 for one each: of 16 tickets 8 holds 4."""
    ids = torch.full((24, 4), -1)
    ids[:4] = torch.tensor([[8, 9 + 3 * row, 10 + 3 * row, 11 + 3 * row] for row in range(4)])
    neighbors = Neighbors(ids, torch.zeros(24, 4), torch.ones(24))
    window = rank_window(neighbors, MiningSettings(), first_rank=0, n_ranks=4)
    clusters = Clusters(torch.arange(24).view(6, 4))
    firsts = []
    for seed in range(400):
        chosen = MiningSettings(n_negatives=1, seed=seed)
        negative_NH = draw_negatives(clusters, neighbors, window, Alike([torch.arange(24)]), chosen)
        assert negative_NH[4:].tolist() == [[-1]] * 20
        firsts.append(int(negative_NH[0, 0]))  # the first ticket drawn goes to the first row
    assert 70 < firsts.count(8) < 130


def test_hardness_is_the_mean_loss_without_what_training_leaves_out() -> None:
    embeddings = Embeddings.from_arrays(vectors(40), vectors(40, seed=1))
    row = torch.arange(40)
    keys = [row // 2, torch.where(row % 3 == 0, row // 9, -1)]
    masked = torch.stack([(row + 5) % 40, torch.full((40,), -1)], dim=1)
    ids_MB = torch.randperm(40, generator=torch.Generator().manual_seed(0)).view(4, 10)

    def alike(one: int, other: int) -> bool:
        mates = [mate for mate in range(40) if mate == one or keys[1][mate] == keys[1][one] >= 0]
        right = {int(keys[0][mate]) for mate in mates} | {int(keys[0][masked[one, 0]])}
        return other in mates or int(keys[0][other]) in right

    losses = []
    for batch in ids_MB.tolist():
        for one in batch:
            others = [other for other in batch if not alike(one, other)]
            logits = [float(embeddings.query_ND[one] @ embeddings.target_ND[o]) / TEMPERATURE for o in [one, *others]]
            losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[0])
    found = mean_hardness(embeddings, Alike(keys), ids_MB, lambda ids_B: masked[ids_B])
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_best_hardness_by_hand() -> None:
    neighbors = ranked([[0.9, 0.5, 0.2]], [0.6])
    window = rank_window(neighbors, MiningSettings(), first_rank=1, n_ranks=2)
    expected = math.log(sum(math.exp(score / TEMPERATURE) for score in (0.6, 0.5, 0.2))) - 0.6 / TEMPERATURE
    rows = torch.tensor([False])
    assert best_hardness(neighbors, window, 3, rows) == pytest.approx(expected, rel=1e-5)
    filled = math.log(sum(math.exp(s / TEMPERATURE) for s in (0.6, 0.5, 0.2, 0.2, 0.2))) - 0.6 / TEMPERATURE
    assert best_hardness(neighbors, window, 5, rows) == pytest.approx(filled, rel=1e-5)
    # of a label that ranks first, a batch may hold nothing but copies
    copies = math.log(sum(math.exp(s / TEMPERATURE) for s in (0.6, 0.5, 0.5, 0.5, 0.5))) - 0.6 / TEMPERATURE
    assert best_hardness(neighbors, window, 5, ~rows) == pytest.approx(copies, rel=1e-5)
    # what ranks behind a window that filters left empty scores at most as its last rank
    empty = rank_window(neighbors, MiningSettings(max_score=0.1), first_rank=0, n_ranks=3)
    behind = math.log(sum(math.exp(s / TEMPERATURE) for s in (0.6, 0.2, 0.2))) - 0.6 / TEMPERATURE
    assert best_hardness(neighbors, empty, 3, rows) == pytest.approx(behind, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_score": 0.4, "n_ranks": 50},
        {"max_relative_score": 0.8},
        {"ranked": "labels"},
        {"edges": "either"},
        {"min_score": 0.9},
    ],
)
def test_no_batch_is_harder_than_the_best(changes: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 20, 400)
    target = vectors(20, seed=1)[label] if "ranked" in changes else vectors(400, seed=1)
    chosen = MiningSettings(**{"first_rank": 0, "n_ranks": 20, "cluster_size": 8} | changes)
    keys = label if "ranked" in changes else np.arange(400)
    mined = mine(vectors(400) + target, target, settings=chosen, target_keys=keys, batch_size=64)
    assert max(mined.hardness["mined"], mined.hardness["random_masked"]) <= mined.hardness["best"]


def test_a_masked_target_is_hard_in_none_of_its_spellings() -> None:
    """An uncased teacher sees A and a alike, and ties go by row, so copies of one spelling are no neighbours."""
    one = np.repeat(vectors(40), 4, axis=0)
    keys = [text for row in range(40) for text in (f"A{row}", f"a{row}", f"A{row}", f"a{row}")]
    mined = mine(one, one, settings=MiningSettings(first_rank=2, n_ranks=20, cluster_size=4), target_keys=keys)
    code = {text: number for number, text in enumerate(dict.fromkeys(keys))}
    key_N = torch.tensor([code[text] for text in keys])
    ids_NW = mined.neighbors.ids_NW
    for row in range(160):
        hard, masked = (
            key_N[ids_NW[row][mark[row]]].tolist() for mark in (mined.window.hard_NW, mined.window.masked_NW)
        )
        assert not {*hard} & {*masked}


def test_a_window_must_fit_one_task_by_its_own_values() -> None:
    settings = MiningSettings(per_task={"a": {"first_rank": 0, "n_ranks": 10}, "late": {"first_rank": 1000}})
    settings.check_fits({"a": (100, 100)})
    settings.check_fits({"late": (100, 100), "a": (11, 11)})
    settings.check_fits({"b": (131, 131)})
    settings.check_fits({"b": (120, 12)})  # labels, found by their number, have no such window
    with pytest.raises(ValueError, match=r"100 rows of task 'late' .* first_rank=1000 \+ n_ranks=100: more than 1100"):
        settings.check_fits({"late": (100, 100)})
    with pytest.raises(ValueError, match=r"130 rows of task 'b' .* first_rank=30 \+ n_ranks=100"):
        settings.check_fits({"b": (130, 130)})
    with pytest.raises(ValueError, match="25 rows of task '0' are too few"):  # 150 in all
        settings.check_fits({str(task): (25, 25) for task in range(6)})
    MiningSettings(ranked="labels").check_fits({"a": (20, 20)})


def test_random_negatives_are_drawn_where_few_rows_allow_any() -> None:
    query, target = vectors(150, seed=3), vectors(150, seed=4)
    chosen = MiningSettings(cluster_size=8, n_negatives=1, random_negatives=1.0, communities="none")
    mined = mine(query, target, settings=chosen)  # 30 ranks before the window are masked for each of 8 rows
    assert mined.summary()["n_negatives_lacking"] == 0


def test_families_longer_than_the_ranks_looked_at_are_no_chance() -> None:
    random = np.random.default_rng(0)
    family = np.repeat(random.normal(size=(3, 32)), 150, axis=0) + 0.01 * random.normal(size=(450, 32))
    query = np.concatenate([family, random.normal(size=(550, 32))])
    chosen = MiningSettings(first_rank="auto", n_ranks=20, cluster_size=8)
    choice = mine(query, query + 0.01 * random.normal(size=query.shape), settings=chosen).ranks["default"]
    assert choice.first_rank == 100
    assert "at all ranks below 100" in choice.reason


def test_mined_batches_are_harder_than_random_ones_and_not_than_the_best() -> None:
    query = vectors(400)
    mined: MinedPlan = mine(
        query,
        query + 0.5 * vectors(400, seed=1),
        settings=MiningSettings(first_rank=0, n_ranks=30, cluster_size=8),
        batch_size=16,
    )
    assert mined.hardness["random"] < mined.hardness["mined"] < mined.hardness["best"]
    assert mined.summary()["hardness_mined"] == mined.hardness["mined"]


def test_answers_of_the_same_question_are_no_evidence_against_first_ranks() -> None:
    """They are never ranked, so none of them can be hard by mistake."""
    rng = np.random.default_rng(0)
    question = np.repeat(rng.normal(size=(360, 32)), 5, axis=0)
    answers = question + 0.6 * rng.normal(size=question.shape)
    chosen = MiningSettings(first_rank="auto", n_ranks="auto", cluster_size=8)
    keys = np.repeat(np.arange(360), 5)
    known = mine(question, answers, settings=chosen, query_keys=keys).ranks["default"]
    assert known.first_rank == 0
    assert "counted as evidence" in known.reason
    unknown = mine(question, answers, settings=chosen).ranks["default"]
    assert unknown.first_rank >= 4


@pytest.mark.parametrize("of", ["cluster", "row"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_target_is_a_hard_negative_of_a_row_twice(of: str, share: float) -> None:
    """Every target serves five rows, with vectors of their own."""
    keys = np.arange(300) // 5
    chosen = MiningSettings(
        first_rank=1, n_ranks=60, cluster_size=4, n_negatives=4, negatives_of=of,  # type: ignore[arg-type]
        random_negatives=share, ranked="rows",
    )  # fmt: skip
    target = np.repeat(vectors(60, seed=1), 5, axis=0)
    mined = mine(vectors(300), target, settings=chosen, target_keys=keys)
    drawn = [[int(keys[other]) for other in row if other >= 0] for row in mined.negative_NH.tolist()]
    assert all(len(row) == len(set(row)) for row in drawn)
    assert sum(map(len, drawn)) > 1000
