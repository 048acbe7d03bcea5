"""The benchmark of mined against random batches: two tiny runs of its own, and its table."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
QUICK = ("--epochs=1", "--rate=1e-2", "--seeds=0", "--search", "--val-share=0.25", "--fit=--hardness.enabled=false")


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # as when one of them is run: they import each other
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def barrier() -> ModuleType:
    return load("batch_barrier")


def test_two_runs_their_tables_and_what_was_foreseen(
    tmp_path: Path, shapes: Path, models: dict[str, str], barrier: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = shapes / "text-text.parquet"
    np.save(tmp_path / "teacher.npy", np.random.default_rng(0).normal(size=(2, 96, 8)).astype(np.float32))
    monkeypatch.setattr(barrier, "_BLOCK", 8)
    folder = tmp_path / "out"
    given = barrier.parse(
        [
            *(f"--train={pairs}", f"--test={pairs}", f"--vectors={tmp_path}/teacher.npy"),
            *(f"--student={models['bert']}", f"--output={folder}", "--static=4"),
            *("--mined=8", "--random=8", "--mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", *QUICK),
        ]
    )
    bench = barrier.prepare(given)
    train, val = (pq.read_table(folder / "data" / f"{part}.parquet")["qry"].to_pylist() for part in ("train", "val"))
    assert len(val) == 24
    assert sorted(train + val) == sorted(pq.read_table(pairs)["qry"].to_pylist())
    assert np.load(folder / "data" / "train.npy").shape == (2, 72, 8)
    found = [bench.arm(arm) for arm in barrier.arms_of(given, bench)]
    assert [(one.n_tried, one.best) for one in found] == [(0, barrier.Point(1e-2 * (8 / 64) ** 0.25, 0.1))] * 2
    values = [[barrier.metrics_of(bench, run["folder"], str(pairs)) for run in one.runs] for one in found]
    assert [line.split(" | ")[0] for line in barrier.table(found, values)[2:]] == ["| mined@8", "| random@8"]
    run = found[0].runs[0]
    before = (folder / "runs" / run["folder"] / "result.json").stat().st_mtime_ns
    assert bench.run(found[0].arm, found[0].best, 0) == run
    assert (folder / "runs" / run["folder"] / "result.json").stat().st_mtime_ns == before  # not run again
    val = barrier.metrics_of(bench, run["folder"], None)
    assert val["mrr"].shape == (24,)
    assert float(val["mrr"].mean()) == pytest.approx(run["mrr"])
    _check_against_sentence_transformers(folder / "runs" / run["folder"] / "export", pairs, values[0][0])
    _check_more_candidates(barrier, bench, run["folder"], pairs)
    _check_what_if(folder)


def _check_against_sentence_transformers(export: Path, pairs: Path, found: dict[str, torch.Tensor]) -> None:
    model = SentenceTransformer(str(export), device="cpu")
    rows = pq.read_table(pairs).to_pydict()
    score_NN = (
        model.encode(rows["qry"], convert_to_tensor=True) @ model.encode(rows["pos_text"], convert_to_tensor=True).T
    )
    is_first_N = (score_NN > score_NN.diagonal()[:, None] + 1e-6).sum(dim=1) == 0
    assert torch.equal(found["hit@1"] > 0, is_first_N)


def _check_more_candidates(barrier: ModuleType, bench: Any, name: str, pairs: Path) -> None:
    """The validation part among all targets of the file that it was cut from, its own right ones counted once."""
    export, val = (bench.folder / path for path in (f"runs/{name}/export", "data/val.parquet"))
    model = SentenceTransformer(str(export), device="cpu")
    own, texts = (pq.read_table(file).to_pydict() for file in (val, pairs))
    target_of: dict[str, set[str]] = {query: set() for query in texts["qry"]}
    for query, target in zip(texts["qry"], texts["pos_text"], strict=True):
        target_of[query].add(target)
    score = dict(zip(texts["pos_text"], model.encode(texts["pos_text"]), strict=True))
    beaten = [
        sum(
            float(vector @ other) > float(vector @ score[target]) + 1e-6
            for text, other in score.items()
            if text not in target_of[query]
        )
        for query, target, vector in zip(own["qry"], own["pos_text"], model.encode(own["qry"]), strict=True)
    ]
    among_all = barrier.metrics_of(bench, name, None, str(pairs))["mrr"]
    assert among_all.tolist() == pytest.approx([1 / (1 + n) for n in beaten])
    assert among_all.mean() < barrier.metrics_of(bench, name, None)["mrr"].mean()


def _check_what_if(folder: Path) -> None:
    what_if = load("what_if")
    results = what_if.trained(folder)
    assert set(results) == {(8, 1, 10, 4), (8, -1, -1, -1)}
    guesses = what_if.foreseen(folder, list(results))
    assert guesses[8, 1, 10, 4]["hardness"] > guesses[8, -1, -1, -1]["hardness"]


def test_a_config_brings_its_own_student(
    tmp_path: Path, shapes: Path, models: dict[str, str], barrier: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barrier, "_BLOCK", 8)
    config = tmp_path / "own.yaml"
    config.write_text(f"model: {{embedder: {models['clip']}}}\ndata: {{teacher: student}}\n")
    pairs = shapes / "image-text.parquet"
    given = barrier.parse(
        [
            *(f"--config={config}", f"--train={pairs}", f"--test={pairs}", f"--output={tmp_path}/out"),
            *("--mined", "--random=8", f"--fit=--data.image_root={shapes}", *QUICK),
        ]
    )
    bench = barrier.prepare(given)
    (arm,) = barrier.arms_of(given, bench)
    run = bench.arm(arm).runs[0]
    assert barrier.metrics_of(bench, run["folder"], str(pairs))["hit@1"].shape == (96,)
    written = (tmp_path / "out" / "data" / "train.parquet").stat().st_mtime_ns
    assert barrier.prepare(given) == bench
    assert (tmp_path / "out" / "data" / "train.parquet").stat().st_mtime_ns == written  # not cut again
    given.val_share = 0.5
    with pytest.raises(SystemExit, match=r"was made with other settings .*give --output another folder"):
        barrier.prepare(given)
    with pytest.raises(SystemExit):
        barrier.parse([f"--config={config}", "--student=x", "--vectors=y", "--train=a", "--test=b", "--output=c"])


def test_a_variant_takes_several_settings(tmp_path: Path, barrier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    mined: list[list[str]] = []
    monkeypatch.setattr(barrier, "b3", mined.append)
    hard = "--data.mining={first_rank: 0, n_negatives: 1}"
    wanted = ("--train=a", "--vectors=b", "--student=c", "--output=d", "--mined=16", "--random")
    variants = (f"--variant=hard@16=--remine.enabled=true {hard}", "--variant=hard=--data.mining.n_ranks=7")
    bench = barrier.Bench(tmp_path, ("--data.teacher=b",), 1, barrier.Point(0.1, 0.1), (0,), (), "{n_ranks: 9}")
    default, arm, other = barrier.arms_of(barrier.parse([*wanted, *variants]), bench)
    assert [command[-1] for command in mined[1:]] == [hard, "--data.mining.n_ranks=7"]
    assert arm.name == "mined@16 hard"
    # one name, other settings: another plan, of which runs and miner know the same folder
    plans = [one.settings[-1].removeprefix("--data.plan=") for one in (default, arm, other)]
    outputs = [next(word for word in command if word.startswith("--output=")) for command in mined]
    assert outputs == [f"--output={plan}" for plan in plans]
    assert len(set(plans)) == 3
    assert arm.settings == ("--remine.enabled=true", hard, f"--data.plan={plans[1]}")


def test_differences_are_of_the_means_over_seeds(barrier: ModuleType) -> None:
    def seed(hits: list[float]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(barrier.METRICS, torch.tensor(hits, dtype=torch.float32))

    point = barrier.Point(1e-2, 0.1)
    found = [barrier.Searched(barrier.Arm(kind, 64), point, 1, []) for kind in ("b3", "random")]
    lines = barrier.differences(found, [[seed([1, 1]), seed([0, 0])], [seed([0, 0]), seed([0, 0])]])
    assert lines[2:] == ["| mined@64 | random@64 | " + " | ".join(["+50.0 [+50.0, +50.0]"] * 3) + " |"]


def test_search_doubles_or_halves_while_that_helps(barrier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, arm: Any, point: Any, seed: int, fit: Any) -> dict[str, float]:
        return {"mrr": -abs(np.log2(point.rate / 0.04)) - abs(np.log2(point.temperature / 0.025))}

    monkeypatch.setattr(barrier.Bench, "run", run)
    start = barrier.Point(0.01, 0.1)
    bench = barrier.Bench(Path(), (), 1, start, (0,), ("temperature", "rate"), "")
    best, n_tried = bench.search(barrier.Arm("random", 64))
    assert (best.rate, best.temperature) == pytest.approx((0.04, 0.025))
    # 0.1; 0.2, 0.05, 0.025, 0.0125; then rates 0.02, 0.04, 0.08 (0.02 again)
    assert n_tried == 8
