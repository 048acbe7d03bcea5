"""What mining will buy: hardness against a hand-written loss, shares of suspects, the random batch that is as hard."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer

from b3_lightning import MiningSettings, mine
from b3_lightning.cli import main
from b3_lightning.data.miner import PairMiner
from b3_lightning.data.pairs import TeacherPrompts
from b3_lightning.data.splits import Split
from b3_lightning.data.teacher import Encoding
from b3_lightning.mining.hardness import TEMPERATURE
from b3_lightning.mining.whatif import Figure, Questions, TaskAnswer, equal_random, what_if
from b3_lightning.reports.whatif import _page, _table, advice
from b3_lightning.types import Embeddings

SETTINGS = MiningSettings(first_rank=1, n_ranks=8, cluster_size=4)


def _vectors(n_rows: int) -> Any:
    """Ten topics, so that clusters exist; the positive is near its query."""
    generator = np.random.default_rng(0)
    topic = generator.normal(size=(10, 16))[np.arange(n_rows) % 10]
    query = topic + 0.7 * generator.normal(size=(n_rows, 16))
    return query, query + 0.3 * generator.normal(size=(n_rows, 16))


def test_hardness_of_all_rows_at_once_is_the_loss_by_hand() -> None:
    """Rows 0 and 1 have one target; 3's target lies where 2's does, so it is suspected."""
    query = torch.eye(8)[[0, 1, 2, 3, 4, 5]] + 0.1 * torch.eye(8)[[7, 7, 7, 7, 7, 7]]
    target = query.clone()
    target[1] = target[0]
    target[3] = target[2]
    questions = Questions(batch_sizes=(6,), cluster_sizes=(2,), first_ranks=(0,))
    settings = MiningSettings(first_rank=0, n_ranks=1, cluster_size=2)
    (answer,) = what_if(query, target, settings=settings, questions=questions, target_keys=[0, 0, 2, 3, 4, 5])
    unit = Embeddings.from_arrays(query, target)
    score = (unit.query_ND @ unit.target_ND.T / TEMPERATURE).double()
    same = torch.zeros(6, 6, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    suspect = torch.zeros(6, 6, dtype=torch.bool)
    suspect[2, 3] = suspect[3, 2] = True
    suspect[3, 2] = True
    (figure,) = [figure for figure in answer.random if figure.batch_size == 6]
    for left_out, got in ((same, figure.hardness), (same | suspect, figure.clean)):
        loss = score.masked_fill(left_out, -torch.inf).logsumexp(dim=1) - score.diagonal()
        assert got == pytest.approx(float(loss.mean()), rel=1e-4)
    assert figure.suspected == pytest.approx(2 / 6)


def test_figures_agree_with_a_plan_that_is_mined_and_measured() -> None:
    query, target = _vectors(200)
    questions = Questions(batch_sizes=(16, 40), cluster_sizes=(4, 8), first_ranks=(1,))
    settings = MiningSettings(first_rank=2, n_ranks=8, cluster_size=4)
    alike: dict[str, Any] = {
        "target_keys": [row // 2 for row in range(200)],
        "groups": [row % 9 or None for row in range(200)],
    }
    (answer,) = what_if(query, target, settings=settings, questions=questions, **alike)
    plan = mine(query, target, settings=settings, batch_size=16, **alike)
    (same,) = [figure for figure in answer.mined if figure.setting == (2, 8, 4) and figure.batch_size == 16]
    (random,) = [figure for figure in answer.random if figure.batch_size == 16]
    found = (same.hardness, random.hardness)
    assert found == pytest.approx((plan.hardness["mined"], plan.hardness["random"]), rel=1e-5)
    assert same.kept_frac == pytest.approx(plan.summary()["kept_frac"])
    assert {(figure.cluster_size, figure.batch_size) for figure in answer.mined} == {(4, 16), (8, 16), (4, 40), (8, 40)}
    hardness = [figure.hardness for figure in answer.random]
    assert hardness == sorted(hardness), "larger random batches are harder"
    assert answer.random[-1].batch_size == 200
    assert all(figure.clean <= figure.hardness and figure.as_random <= 200 for figure in answer.mined)
    assert same.as_random > 1.5 * 16, "topics make clusters harder than chance"


def test_what_the_plan_masks_is_left_out() -> None:
    """Every other row is ranked and too similar, so every negative of a mined batch is masked."""
    query, target = _vectors(100)
    questions = Questions(batch_sizes=(20,), cluster_sizes=(4,), first_ranks=(0,))
    settings = MiningSettings(first_rank=0, n_ranks=99, cluster_size=4, max_score=-1.1)
    (answer,) = what_if(query, target, settings=settings, questions=questions)
    assert [figure.hardness for figure in answer.mined] == pytest.approx([0.0], abs=1e-6)
    assert [figure.suspected for figure in answer.mined] == [0.0]
    assert answer.random[0].hardness > 0.001


def test_ranks_behind_a_window_are_masked_no_more_than_in_a_plan() -> None:
    """Neighbours are ranked once, for the latest window; what is too similar behind an early one is not looked at."""
    query, target = _vectors(200)
    settings = MiningSettings(first_rank=0, n_ranks=8, cluster_size=4, max_score=0.3)
    questions = Questions(batch_sizes=(16,), cluster_sizes=(4,), first_ranks=(0, 60))
    (answer,) = what_if(query, target, settings=settings, questions=questions)
    plan = mine(query, target, settings=settings, batch_size=16)
    (same,) = [figure for figure in answer.mined if figure.setting == (0, 8, 4)]
    assert same.hardness == pytest.approx(plan.hardness["mined"], rel=1e-5)
    assert plan.summary()["n_masked"] == 200 * 8


def test_large_tasks_are_sampled_and_small_ones_keep_their_rows() -> None:
    query, target = _vectors(200)
    questions = Questions(batch_sizes=(16,), cluster_sizes=(4,), first_ranks=(1,), max_rows=60)
    tasks = ["big"] * 150 + ["small"] * 50
    big, small = what_if(query, target, settings=SETTINGS, questions=questions, tasks=tasks)
    assert (big.n_rows, big.n_sampled, small.n_rows, small.n_sampled) == (150, 60, 50, 50)
    assert any("of the sample, which is about first_rank" in line for line in advice(big, 16))


def test_whether_labels_are_ranked_is_told_by_all_rows_of_a_sampled_task() -> None:
    query, target = _vectors(300)
    label = [row % 25 for row in range(300)]  # twelve rows a label, two in the sample
    questions = Questions(batch_sizes=(16,), cluster_sizes=(4,), first_ranks=(1,), max_rows=60)
    (answer,) = what_if(query, target, settings=SETTINGS, questions=questions, target_keys=label)
    assert (answer.n_sampled, answer.labels) == (60, True)
    assert mine(query, target, settings=SETTINGS, target_keys=label).ranks["default"].labels


def test_a_task_too_small_for_the_window_is_asked_about_with_what_it_has() -> None:
    query, target = _vectors(112)
    questions = Questions(batch_sizes=(8,), cluster_sizes=(4,), first_ranks=(5,))
    tasks = ["big"] * 100 + ["small"] * 10 + ["tiny"] * 2
    settings = replace(SETTINGS, first_rank=5, n_ranks=30)
    big, small, tiny = what_if(query, target, settings=settings, questions=questions, tasks=tasks)
    assert {figure.n_ranks for figure in big.mined} == {30}
    (window,) = {(figure.first_rank, figure.n_ranks) for figure in small.mined}
    assert sum(window) == 9  # all other targets of ten rows, and no more
    assert tiny.mined == []
    mine(query, target, settings=settings, tasks=tasks)  # which takes such a mixture too


def test_the_equal_random_batch_lies_between_the_measured_ones() -> None:
    curve = [Figure(16, 1.0, 1.0, 0.0), Figure(64, 2.0, 2.0, 0.0), Figure(256, 3.0, 3.0, 0.0)]
    assert equal_random(curve, 1.5) == pytest.approx(32)
    assert equal_random(curve, 0.5) == 16
    assert equal_random(curve, 9.0) == 256


def test_advice_prefers_hard_batches_that_are_not_full_of_suspects() -> None:
    random = [Figure(size, 0, 0, 0.0, as_random=size) for size in (16, 64, 1024)]
    mined = [
        Figure(16, 2, 2, 0.1, 5, 100, 8, 0.3, 300.0),
        Figure(64, 3, 3, 0.1, 5, 100, 8, 0.3, 1100.0),
        Figure(64, 4, 4, 0.9, 0, 100, 8, 0.3, 4000.0),
        Figure(64, 5, 5, 0.1, 5, 100, 16, 0.3, 4000.0),  # harder, and a quarter of the batch
        Figure(128, 4, 4, 0.1, 5, 100, 8, 0.3, 2000.0),
    ]
    answer = TaskAnswer("t", 5000, 5000, False, 0.1, 23, (0.25, 0.1), {}, random, mined)
    lines = advice(answer, 64)
    assert lines[0] == (
        "advised: cluster_size 8, first_rank 5 and n_ranks 100. Mined batches of 64 are then as hard as random ones of "
        "about 1,100"
    )
    assert "instead of random batches of 256: mined batches of 64" in lines
    assert "instead of random batches of 1,024: mined batches of 64" in lines
    assert "no smaller mined batch asked about is as hard as random ones of 4,096" in lines
    assert "would begin at 23, where" in lines[-1]
    part = replace(answer, n_rows=20_000)
    assert "would begin at 23 of the sample (about 92 of all rows), where" in advice(part, 64)[-1]
    assert "careful: 90%" in advice(TaskAnswer("t", 5000, 5000, False, 0.1, 0, (), {}, random, mined[2:3]), 64)[1]
    large = advice(TaskAnswer("t", 5000, 5000, False, 0.1, 0, (), {}, random, [replace(mined[3], as_random=40.0)]), 64)
    assert large[0].endswith("Mined batches of 64 are then as hard as random ones of about 40")
    assert large[1].startswith("careful: clusters of 16 are more than an eighth of |B| = 64")
    assert "nothing to advise" in advice(answer, 48)[0]
    assert not any("mined batches of 1,024" in line or "instead of random batches of 16" in line for line in lines)
    weak = replace(answer, beaten=0.8)
    assert any("own target first for only 20% of the queries" in line for line in advice(weak, 64))
    assert not any("own target first" in line for line in lines)


def _shown(answer: TaskAnswer) -> str:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(_table(answer, 64))
    return console.export_text() + _page([answer], 64)


def test_what_is_easier_than_random_batches_is_not_called_as_hard() -> None:
    random = [Figure(64, 1.0, 0.5, 0.5, as_random=64)]
    easy, hard = Figure(64, 0.2, 0.2, 0.1, 5, 100, 8, 0.3, 16.0), Figure(64, 0.9, 0.6, 0.4, 2, 100, 8, 0.3, 80.0)
    answer = TaskAnswer("t", 5000, 5000, False, 0.1, 0, (), {}, random, [easy])
    assert advice(answer, 64) == [
        "nothing is advised: mined batches of 64 are no harder than random ones here, with no setting asked about; "
        "easier with cluster_size 8, first_rank 5 and n_ranks 100"
    ]
    assert "(advised)" not in _shown(answer)
    assert "(advised)" in _shown(replace(answer, mined=[easy, hard]))
    filtered = replace(answer, mined=[hard], filters={"max_relative_score": 0.95})
    assert "n_ranks 100, max_relative_score 0.95 as set. Mined" in advice(filtered, 64)[0]
    # random batches have more suspects than the limit: what has no more than they may be advised
    assert "first_rank 2" in advice(replace(answer, mined=[easy, hard]), 64)[0]


def test_the_batch_size_that_is_set_is_asked_about_too() -> None:
    assert Questions(batch_sizes=(16, 64)).of(24).batch_sizes == (16, 24, 64)
    assert Questions(batch_sizes=(16, 64)).of(64).batch_sizes == (16, 64)


@pytest.mark.parametrize(
    "wrong", [{"batch_sizes": ()}, {"cluster_sizes": (1,)}, {"first_ranks": (-1,)}, {"max_rows": 1}]
)
def test_questions_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Questions(**wrong)


def test_the_command_line(tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"question {row},answer {row}\n" for row in range(60))
    (tmp_path / "pairs.csv").write_text("qry,pos_text\n" + rows)
    np.save(tmp_path / "vectors.npy", np.stack(_vectors(60)))
    main(
        [
            "plan", f"--run.dir={tmp_path / 'run'}", f"--model.embedder={models['bert']}", "--data.batch_size=16",
            f"--data.train_pairs={tmp_path / 'pairs.csv'}", f"--data.teacher={tmp_path / 'vectors.npy'}",
            "--data.mining={first_rank: 1, n_ranks: 8, cluster_size: 4}", "--trainer.accelerator=cpu",
            "--trainer.devices=1", "--trainer.enable_progress_bar=false", "--questions.batch_sizes=[16, 32]",
            "--questions.cluster_sizes=[4, 8]", "--questions.first_ranks=[0]",
        ]
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "advised: cluster_size" in said
    page = (tmp_path / "run" / "what_if" / "what_if.html").read_text()
    assert "<svg" in page
    assert "Mined batches of 16" in page
    figures = pq.read_table(tmp_path / "run" / "what_if" / "what_if.parquet").to_pylist()
    assert {(one["batches"], one["cluster_size"]) for one in figures} == {("random", -1), ("mined", 4), ("mined", 8)}


def test_two_processes_share_the_encoding_and_the_first_answers_as_one_does(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.csv").write_text("qry,pos_text\n" + "".join(f"question {i},answer {i}\n" for i in range(60)))
    train = Split.read(str(tmp_path / "pairs.csv"), tmp_path, "header")
    monkeypatch.setattr("b3_lightning.data.teacher.Encoding", partial(Encoding, part_items=20))  # 120 texts: 6 parts

    def ask(n_processes: int) -> tuple[list[list[TaskAnswer] | None], list[int]]:
        met, votes = threading.Barrier(n_processes, timeout=60), [True] * n_processes
        n_encoded = [0] * n_processes

        def vote(rank: int, value: bool) -> bool:
            votes[rank] = value
            met.wait()
            agreed = all(votes)
            met.wait()
            return agreed

        def load(rank: int, path: str, modalities: object) -> SentenceTransformer:
            model = SentenceTransformer(path, device="cpu")
            preprocess = model.preprocess

            def counted(inputs: Any) -> Any:
                n_encoded[rank] += len(inputs)
                return preprocess(inputs)

            model.preprocess = counted
            return model

        def work(rank: int) -> list[TaskAnswer] | None:
            module = SimpleNamespace(load_teacher=partial(load, rank))
            strategy = SimpleNamespace(reduce_boolean_decision=partial(vote, rank), root_device=torch.device("cpu"))
            trainer: Any = SimpleNamespace(
                global_rank=rank, world_size=n_processes, is_global_zero=rank == 0, progress_bar_callback=None,
                precision="32-true", strategy=strategy, lightning_module=module,
            )  # fmt: skip
            cache = tmp_path / f"cache-{n_processes}"
            miner = PairMiner(
                train=train, trainer=trainer, teacher=models["bert"], teacher_prompts=TeacherPrompts(), mining=SETTINGS,
                image_root=tmp_path, cache=cache, student_cache=cache, batch_size=16, eval_batch_size=8, num_workers=0,
            )  # fmt: skip
            return miner.what_if(Questions(batch_sizes=(16,), cluster_sizes=(4,), first_ranks=(0,)))

        with ThreadPoolExecutor(n_processes) as pool:
            return list(pool.map(work, range(n_processes))), n_encoded

    (alone,), _ = ask(1)
    (first, second), n_encoded = ask(2)
    assert (first, second) == (alone, None)
    assert n_encoded == [60, 60]
