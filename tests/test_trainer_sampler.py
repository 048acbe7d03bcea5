"""A plan's batches in sentence-transformers' real trainer, and as accelerate hands them to processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import DataLoader

from b3_lightning import B3BatchSampler, MinedPlan, MiningSettings, mine
from b3_lightning.data.trainer_sampler import SamplerFactory

N_ROWS, BATCH = 70, 16
SETTINGS = MiningSettings(first_rank=1, n_ranks=10, cluster_size=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are faster so."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def _plan(tasks: list[str] | None = None) -> MinedPlan:
    query_ND, target_ND = np.random.default_rng(0).normal(size=(2, N_ROWS, 16))
    return mine(query_ND, target_ND, settings=SETTINGS, tasks=tasks)


def _dataset(rows: range) -> Dataset:
    return Dataset.from_dict(
        {"anchor": [f"query {row}" for row in rows], "positive": [f"target {row}" for row in rows]}
    )


class _Seen(MultipleNegativesRankingLoss):
    """Keeps the tokens of the queries and targets that the model is asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.batches: list[tuple[list[str], list[str]]] = []

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        sides = (self.model.tokenizer.batch_decode(part["input_ids"], skip_special_tokens=True)
                 for part in sentence_features)  # fmt: skip
        # the tiny model's pieces: "Ġ" is the space
        query, target = ([text.replace(" ", "").replace("Ġ", " ") for text in side] for side in sides)
        self.batches.append((query, target))
        return super().forward(sentence_features, labels)


def _train(model: str, folder: Path, train: Any, *, resume: bool = False, **arguments: Any) -> _Seen:
    student = SentenceTransformer(model, device="cpu")
    loss = _Seen(student)
    settings = SentenceTransformerTrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=BATCH, seed=3, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="steps", save_steps=6, logging_strategy="no", **arguments,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model=student, args=settings, train_dataset=train, loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    return loss


def _expected(plan: MinedPlan, n: int) -> list[tuple[list[str], list[str]]]:
    """The first batches of the plan's epochs, end to end."""
    batches = plan.batches(batch_size=BATCH, seed=3)
    ids_MB = torch.cat([batches.epoch(epoch) for epoch in range(4)])[:n].tolist()
    return [([f"query {row}" for row in ids], [f"target {row}" for row in ids]) for ids in ids_MB]


def test_the_model_sees_the_plans_batches_in_the_plans_order_and_again_after_a_crash(
    models: dict[str, str], tmp_path: Path
) -> None:
    plan = _plan()
    plan.save(tmp_path / "plan")
    sampler = B3BatchSampler.of(tmp_path / "plan")
    # 70 rows are 4 batches an epoch and 6 rows, so the plan's third epoch has 5: the trainer's has 4 all the same
    seen = _train(models["bert"], tmp_path, _dataset(range(N_ROWS)), batch_sampler=sampler)
    assert seen.batches == _expected(plan, 12)
    first, second = ({frozenset(query) for query, _ in seen.batches[start : start + 4]} for start in (0, 4))
    assert first != second, "every epoch combines the clusters anew"
    resumed = _train(models["bert"], tmp_path, _dataset(range(N_ROWS)), batch_sampler=sampler, resume=True)
    assert resumed.batches == [], "the run was finished"
    (tmp_path / "checkpoint-12").rename(tmp_path / "finished")
    resumed = _train(models["bert"], tmp_path, _dataset(range(N_ROWS)), batch_sampler=sampler, resume=True)
    assert resumed.batches == _expected(plan, 12)[6:]


def test_several_datasets_are_the_plans_tasks(models: dict[str, str], tmp_path: Path) -> None:
    plan = _plan(["a"] * 36 + ["b"] * 34)
    parts = DatasetDict({"first": _dataset(range(36)), "second": _dataset(range(36, N_ROWS))})
    sampler = B3BatchSampler.of(plan)
    seen = _train(models["bert"], tmp_path, parts, multi_dataset_batch_sampler=sampler)
    assert seen.batches == _expected(plan, 12)
    turned = DatasetDict({"second": parts["second"], "first": parts["first"]})
    with pytest.raises(ValueError, match=r"\[34, 36\] rows, in this order; the plan's tasks are \{'a': 36, 'b': 34\}"):
        _train(models["bert"], tmp_path, turned, multi_dataset_batch_sampler=sampler)


def _sampler(factory: SamplerFactory, batch_size: int = BATCH, **about: Any) -> Any:
    return factory(_dataset(range(N_ROWS)), batch_size=batch_size, drop_last=False, seed=3, **about)


@pytest.mark.parametrize("split", [False, True])
def test_processes_share_global_batches(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("b3_lightning.data.trainer_sampler._n_processes", lambda: 2)
    plan = _plan()
    expected = torch.cat([plan.batches(batch_size=2 * 8, seed=3).epoch(epoch) for epoch in range(3)])
    shares = []
    for process in range(2):
        loader: Any = DataLoader(range(N_ROWS), batch_sampler=_sampler(B3BatchSampler.of(plan), 8))  # type: ignore[arg-type]
        loader = prepare_data_loader(
            loader, num_processes=2, process_index=process, split_batches=split, even_batches=False
        )
        loader.set_epoch(1)
        shares.append([batch.tolist() for batch in loader])
    if split:
        halves = [[*first, *second] for first, second in zip(*shares, strict=True)]
        steps = [sorted(one + other) for one, other in zip(halves[::2], halves[1::2], strict=True)]
        assert steps == expected[4:8].sort().values.tolist()
    else:
        assert [first + second for first, second in zip(*shares, strict=True)] == expected[4:8].tolist()


def test_a_process_that_is_not_told_the_epoch_does_not_train_on_another_ones() -> None:
    with pytest.raises(ValueError, match="did not tell the epoch"):
        iter(_sampler(B3BatchSampler.of(_plan())))


def test_other_rows_are_refused_or_random_where_said(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = _dataset(range(30))
    with pytest.raises(ValueError, match=r"mined from 70 rows, the dataset has 30.*unplanned='random'"):
        B3BatchSampler.of(_plan())(evaluation, batch_size=8, drop_last=False)
    sampler = B3BatchSampler.of(_plan(), unplanned="random")(evaluation, batch_size=8, drop_last=False)
    assert sorted(row for batch in sampler for row in batch) == list(range(30))
    assert [len(batch) for batch in sampler] == [8, 8, 8, 6]
    assert "If it is the training set, give the pairs that were mined" in caplog.text, "the first set, so it may be"
    caplog.clear()
    factory = B3BatchSampler.of(_plan(), unplanned="random")
    factory(_dataset(range(70)), batch_size=8, drop_last=False)
    factory(evaluation, batch_size=8, drop_last=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


Broken = Callable[[], Any]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: _sampler(B3BatchSampler.of(_plan()), 18), "batch_size=18 must be a multiple of cluster_size=4"),
        (lambda: _sampler(B3BatchSampler.of(_plan()), 80), "70 rows, fewer than batch_size=80"),
        (lambda: B3BatchSampler.of("absent"), "absent holds no mined plan"),
    ],
)
def test_mistakes_are_told(broken: Broken, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        broken()


def test_weights_and_pickling(caplog: pytest.LogCaptureFixture) -> None:
    """The trainer pickles its arguments into every checkpoint."""
    factory = B3BatchSampler.of(_plan(["a"] * 36 + ["b"] * 34), task_weights={"b": 2.0})
    sampler = _sampler(pickle.loads(pickle.dumps(factory)))
    assert len(sampler) == 36 // 16 + 68 // 16
    assert len(pickle.dumps(factory)) < 20 * N_ROWS * 8
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
