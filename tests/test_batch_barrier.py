"""The benchmark of mined against random batches: two tiny runs of its own, and its table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "batch_barrier.py"


@pytest.fixture(scope="module")
def barrier() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_barrier", SCRIPT)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch_barrier"] = module
    spec.loader.exec_module(module)
    return module


def test_two_runs_and_their_tables(
    tmp_path: Path, shapes: Path, models: dict[str, str], barrier: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = shapes / "text-text.parquet"
    np.save(tmp_path / "teacher.npy", np.random.default_rng(0).normal(size=(2, 96, 8)).astype(np.float32))
    monkeypatch.setattr(barrier, "_BLOCK", 8)
    given = barrier.parse(
        [
            *(f"--train={pairs}", f"--test={pairs}", f"--vectors={tmp_path}/teacher.npy"),
            *(f"--student={models['bert']}", f"--output={tmp_path}/out"),
            *("--static=4", "--mined=8", "--random=8", "--val-share=0.25"),
        ]
    )
    folder = tmp_path / "out"
    barrier.cut(given, folder / "data")
    train, val = (pq.read_table(folder / "data" / f"{part}.parquet")["qry"].to_pylist() for part in ("train", "val"))
    assert len(val) == 24
    assert sorted(train + val) == sorted(pq.read_table(pairs)["qry"].to_pylist())
    assert np.load(folder / "data" / "train.npy").shape == (2, 72, 8)
    barrier.make_student(given, folder / "student")
    mining = "{first_rank: 1, n_ranks: 10, cluster_size: 4}"
    bench = barrier.Bench(folder, 1, 1e-2, 0.1, (0,), mining, ("--hardness.enabled=false",))
    found, values = [], []
    for arm in barrier.arms_of(given, bench):
        runs = [bench.run(arm, barrier.Point(1e-2, 0.1), 0)]
        found.append(barrier.Searched(arm, barrier.Point(1e-2, 0.1), 1, runs))
        values.append([barrier.test_metrics(folder / "runs" / runs[0]["folder"] / "export", str(pairs))])
    lines = barrier.table(found, values)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| mined@8", "| random@8"]
    before = (folder / "runs" / runs[0]["folder"] / "result.json").stat().st_mtime_ns
    assert bench.run(arm, barrier.Point(1e-2, 0.1), 0) == runs[0]
    assert (folder / "runs" / runs[0]["folder"] / "result.json").stat().st_mtime_ns == before  # not run again


def test_differences_are_of_the_means_over_seeds(barrier: ModuleType) -> None:
    def seed(hits: list[float]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(barrier.METRICS, torch.tensor(hits, dtype=torch.float32))

    point = barrier.Point(1e-2, 0.1)
    found = [barrier.Searched(barrier.Arm(kind, 64), point, 1, []) for kind in ("b3", "random")]
    lines = barrier.differences(found, [[seed([1, 1]), seed([0, 0])], [seed([0, 0]), seed([0, 0])]])
    assert lines[2:] == ["| mined@64 | random@64 | " + " | ".join(["+50.0 [+50.0, +50.0]"] * 3) + " |"]


def test_search_doubles_or_halves_while_that_helps(barrier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, arm: Any, point: Any, seed: int) -> dict[str, float]:
        return {"mrr": -abs(np.log2(point.rate / 0.04)) - abs(np.log2(point.temperature / 0.025))}

    monkeypatch.setattr(barrier.Bench, "run", run)
    bench = barrier.Bench(Path(), 1, 0.01, 0.1, (0,), "")
    best, n_tried = bench.search(barrier.Arm("random", 64))
    assert (best.rate, best.temperature) == pytest.approx((0.04, 0.025))
    # 0.1; 0.2, 0.05, 0.025, 0.0125; then rates 0.02, 0.04, 0.08 (0.02 again)
    assert n_tried == 8
