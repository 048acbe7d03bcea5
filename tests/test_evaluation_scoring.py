"""Figures and their bootstrap: by hand, against independent scorers, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from b3_lightning.evaluation.bootstrap import compare
from b3_lightning.evaluation.published import MMEB, RETRIEVAL, STS
from b3_lightning.evaluation.results import Results, SetResult, TaskResult
from b3_lightning.evaluation.scoring import METRICS, OwnCandidates, ScoredPairs, SharedCandidates, check_vectors
from b3_lightning.evaluation.suites import SUITES
from b3_lightning.reports.evaluation import task_sheet

AXES = torch.eye(4)


def test_own_candidates_by_hand() -> None:
    """Items 0..3 are axes, 4 lies between 0 and 1: a win, a defeat, a tie, a double of the gold, a single candidate."""
    vector_UD = torch.cat([AXES, AXES[0:1] + AXES[1:2]])
    scoring = OwnCandidates([0, 0, 4, 1, 3], [[0, 1, 2], [1, 0], [0, 1, 2], [1, 1, 0], [2]])
    columns = scoring.columns(vector_UD)
    assert columns["hit@1"].tolist() == [1, 0, 1, 1, 1]
    assert columns["hit@1_strict"].tolist() == [1, 0, 0, 1, 1]


def _precision_at_1(vectors: Any, queries: list[int], candidates: list[list[int]]) -> float:
    """As VLM2Vec scores: its own arithmetic, nothing of the package."""
    n_right = 0
    for query, own in zip(queries, candidates, strict=True):
        scores = np.asarray([float(np.dot(vectors[query], vectors[one])) for one in own])
        n_right += int(np.argmax(scores) == 0)
    return n_right / len(queries)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_own_candidates_as_an_independent_scorer_has_it(data: st.DataObject) -> None:
    """Vectors of 16 signs have exact cosines, so that many are equal; lists of 1 to 30 with doubles."""
    seed = data.draw(st.integers(0, 2**31))
    generator = np.random.default_rng(seed)
    vectors = generator.choice([-0.25, 0.25], size=(25, 16 if seed % 2 else 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = generator.integers(25, size=data.draw(st.integers(1, 300))).tolist()
    candidates = [generator.integers(25, size=generator.integers(1, 30)).tolist() for _ in queries]
    columns = OwnCandidates(queries, candidates).columns(torch.tensor(vectors, dtype=torch.float32))
    assert columns["hit@1"].mean() == _precision_at_1(vectors, queries, candidates)
    for row, own in enumerate(candidates):
        others = [vectors[one] @ vectors[queries[row]] for one in own if one != own[0]]
        strict = all(vectors[own[0]] @ vectors[queries[row]] > other for other in others)
        assert columns["hit@1_strict"][row] == strict


def test_shared_candidates_by_hand() -> None:
    """Query 4 is as near to 0 as to 1; of equal cosines the first candidate wins, strictly both must be right."""
    vector_UD = torch.cat([AXES, AXES[0:1] + AXES[1:2]])
    relevance = [{0: 1.0}, {1: 1.0}, {0: 1.0, 1: 1.0}, {3: 1.0}]
    columns = SharedCandidates([4, 4, 4, 3], [0, 1, 2, 3], relevance).columns(vector_UD)
    assert columns["hit@1"].tolist() == [1, 0, 1, 1]
    assert columns["hit@1_strict"].tolist() == [0, 0, 1, 1]
    assert set(columns) == {"hit@1", "hit@1_strict"}


def test_linear_ndcg_by_hand_and_as_scikit_learn_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    vector_UD = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1)
    candidates = list(range(10, 30))
    relevance = [
        {10 + (query * 3 + step) % 20: float(1 + step % 2) for step in range(query % 7 + 1)} for query in range(10)
    ]
    scoring = SharedCandidates(list(range(10)), candidates, relevance, "ndcg_linear@5")
    found = scoring.columns(vector_UD)["ndcg_linear@5"]
    truth = [[row.get(candidate, 0.0) for candidate in candidates] for row in relevance]
    cosines = (vector_UD[:10] @ vector_UD[10:].T).numpy()
    for row in range(10):
        assert found[row] == pytest.approx(ndcg_score([truth[row]], [cosines[row]], k=5), abs=1e-9)
    second = SharedCandidates([0], [1, 2], [{2: 1.0}], "ndcg_linear@5")
    assert second.columns(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]))["ndcg_linear@5"] == pytest.approx(
        1 / math.log2(3)
    )


def test_spearman_as_scipy_has_it_with_ties() -> None:
    generator = torch.Generator().manual_seed(1)
    vector_UD = torch.randn(40, 8, generator=generator)
    scores = [float(row % 5) for row in range(30)]
    scoring = ScoredPairs(list(range(30)), [(row * 7 + 1) % 40 for row in range(30)], scores)
    columns = scoring.columns(vector_UD)
    assert float(METRICS["spearman"](columns)) == pytest.approx(spearmanr(columns["cosine"], scores).statistic)
    assert float(METRICS["spearman"](scoring.columns(torch.ones(40, 8)))) == 0.0, "a collapsed model tells nothing"
    first, second = vector_UD[3], vector_UD[22]
    assert columns["cosine"][3] == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-6)


def test_vectors_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity for 1 of 2 items"):
        check_vectors(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))


def _results(hits: dict[str, list[float]], rows: str = "rows", suite: str = "mmeb") -> Results:
    sets = []
    for name, values in hits.items():
        task = TaskResult("hit@1", {"hit@1": float(np.mean(values))}, {"hit@1": values})
        sets.append(SetResult(name, "of the model", rows, 1, {}, {name: task}))
    return Results(SUITES[suite], "a model", {}, sets)


def test_the_bootstrap_draws_queries_within_tasks_and_the_same_for_both() -> None:
    """One task all gained, one all lost: drawn within tasks, nothing varies. Equal results differ in no resample."""
    better, worse = [1.0] * 10, [0.0] * 10
    ours = _results({"GQA": better, "TextVQA": worse, "OVEN": better})
    groups, tasks = compare(ours, _results({"GQA": worse, "TextVQA": better, "CIRR": better}))
    assert set(groups) == {"vqa", "OOD", "all"}
    assert (groups["vqa"].low, groups["vqa"].value, groups["vqa"].high) == (0, 0, 0)
    assert (tasks["GQA"].low, tasks["GQA"].high, tasks["GQA"].p) == (1, 1, 1 / 2000)
    mixed = _results({"GQA": [0.0, 1.0] * 50})
    same, _ = compare(mixed, mixed)
    assert (same["all"].low, same["all"].high, same["all"].p) == (0, 0, 1)


def test_the_interval_is_the_normal_one_of_paired_differences() -> None:
    generator = np.random.default_rng(0)
    ours, other = ((generator.random(800) < share).astype(float) for share in (0.7, 0.6))
    found = compare(_results({"GQA": ours.tolist()}), _results({"GQA": other.tolist()}))[1]["GQA"]
    error = (ours - other).std() / np.sqrt(800)
    assert found.value == pytest.approx((ours - other).mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.3 * error)
    assert found.p < 0.01


def test_correlations_are_compared_too() -> None:
    score = [float(row % 6) for row in range(60)]
    noise = np.random.default_rng(0).normal(size=60)

    def results(cosines: Any) -> Results:
        columns = {"cosine": cosines, "score": np.asarray(score)}
        figures = {"spearman": float(METRICS["spearman"](columns))}
        task = TaskResult("spearman", figures, {name: values.tolist() for name, values in columns.items()})
        return Results(SUITES["sts"], "a model", {}, [SetResult("STSb", "", "rows", 1, {}, {"STSb": task})])

    good, bad = results(np.asarray(score) + 0.1 * noise), results(np.asarray(score) + 9 * noise)
    found = compare(good, bad)[0]["all"]
    assert found.value == pytest.approx(good.means()["all"].value - bad.means()["all"].value)
    assert 0 < found.low < found.value < found.high


def test_ties_are_told_of_hit_at_1_alone() -> None:
    figures = {"ndcg_linear@5": 0.41, "hit@1": 0.37, "hit@1_strict": 0.37}
    for metric, shown in (("hit@1", True), ("ndcg_linear@5", False)):
        task = TaskResult(metric, figures, {metric: [1.0, 0.0]})
        sheet = task_sheet(Results(SUITES["visdoc"], "a model", {}, [SetResult("x", "", "rows", 1, {}, {"x": task})]))
        assert ("ties lose" in sheet.header) == shown
        assert sheet.title == "visdoc: every task"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_results({"GQA": [1.0]}, rows="others"), "other rows in GQA"),
        (_results({"OVEN": [1.0]}), "no task of these: it has OVEN"),
        (_results({"GQA": [1.0]}, suite="retrieval"), "results of the suite retrieval; these are of mmeb"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(other: Results, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(_results({"GQA": [0.0]}), other)


def test_means_are_unweighted_and_say_what_they_lack() -> None:
    means = _results({"GQA": [1.0], "TextVQA": [0.0] * 99, "N24News": [1.0]}).means()
    assert (means["vqa"].value, means["vqa"].n_tasks, means["vqa"].n_group) == (0.5, 2, 10)
    assert means["all"].value == pytest.approx(2 / 3)
    assert set(means) == {"vqa", "classification", "IND", "OOD", "all"}
    assert not means["all"].complete


def test_published_means_are_those_of_their_parts() -> None:
    """A slip of the pen in a published row would show: a mean of 36 follows from its groups.

    The paper's row of the small teacher does not add up, and the teachers' tasks are of other runs than its Table 1.
    """
    groups = SUITES["mmeb"].groups
    for row in MMEB:
        slack = 0.8 if row.model == "VLM2Vec-2B (teacher)" else 0.08
        if len(row.values) > 1:
            by_split = (20 * row.values["IND"] + 16 * row.values["OOD"]) / 36
            by_meta = sum(len(groups[meta]) * row.values[meta] for meta in list(groups)[:4]) / 36
            assert row.values["all"] == pytest.approx(by_split, abs=slack), row.model
            assert row.values["all"] == pytest.approx(by_meta, abs=slack), row.model
        for group in groups if row.tasks else ():
            tasks = [row.tasks[name] for name in groups[group]]
            assert row.values[group] == pytest.approx(float(np.mean(tasks)), abs=1.4), (row.model, group)
    for row in STS:
        assert row.values["all"] == pytest.approx(float(np.mean(list(row.tasks.values()))), abs=0.01)
    assert all(0 < value < 100 for row in RETRIEVAL for value in row.tasks.values())
