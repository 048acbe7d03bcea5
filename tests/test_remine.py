"""Re-mining: when it is skipped, what a failure does, and what changes from epoch to epoch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, free_port
from stages_worker import share_and_fail
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from b3_lightning.callbacks import Remine
from b3_lightning.data import miner
from b3_lightning.data.miner import MiningRequest, mix
from b3_lightning.mining import BatchPlan, MinedPlan, mine
from b3_lightning.types import Clusters, Embeddings, by_epoch

SMALL = "--model.embedder={hidden_sizes: [8, 16], image_size: 32}"


def _plans(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "plans").iterdir())


def test_unchanged_weights_are_not_mined_again(fit: Run, models: dict[str, str]) -> None:
    run = fit(
        "text-text", f"--model.embedder={models['bert']}", "--data.teacher=student", "--remine.enabled=true",
        "--remine.start_epoch=1", "--trainer.max_epochs=4", "--model.optim.learning_rate=0",
    )  # fmt: skip
    assert _plans(run) == ["epoch-0001"]


def test_the_teacher_mines_again_only_for_another_window(fit: Run, models: dict[str, str]) -> None:
    run = fit(
        "text-text", f"--model.embedder={models['bert']}", f"--data.teacher={models['bert']}", "--remine.enabled=true",
        "--remine.miner=teacher", "--remine.first_rank={2: 5}", "--trainer.max_epochs=4",
    )  # fmt: skip
    assert _plans(run) == ["epoch-0000", "epoch-0002"]
    ranks = [MinedPlan.load(run / "plans" / name).settings.first_rank for name in _plans(run)]
    assert ranks == [1, 5]


@pytest.mark.parametrize("on_error", ["keep", "stop"])
def test_a_failure_keeps_the_plan_or_stops(
    on_error: str, fit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, calls = mine, []

    def fails_once(*args: Any, **kwargs: Any) -> MinedPlan:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(miner, "mine", fails_once)
    settings = (SMALL, "--remine.enabled=true", f"--remine.on_error={on_error}", "--trainer.max_epochs=4")
    if on_error == "stop":
        with pytest.raises(RuntimeError, match="out of memory"):
            fit("image-text", *settings)
        return
    run = fit("image-text", *settings)
    assert _plans(run) == ["epoch-0001", "epoch-0003"]
    with (run / "metrics.csv").open(newline="") as file:
        failed = [row["epoch"] for row in csv.DictReader(file) if row.get("mining/failed")]
    assert failed == ["2.0"]


def test_where_one_process_fails_none_waits_for_ever(tmp_path: Path) -> None:
    spawn(share_and_fail, (free_port(), str(tmp_path)), nprocs=2)
    assert [Path(tmp_path, str(rank)).read_text() for rank in (0, 1)] == ["PeerError", "ValueError"]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixed_vectors_have_the_weighted_cosines(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def unit(n_dims: int) -> torch.Tensor:
        return F.normalize(torch.randn(6, n_dims, generator=generator), dim=1)

    teacher, student = Embeddings.from_arrays(unit(8), unit(8)), Embeddings.from_arrays(unit(5), unit(5))
    mixed = mix(teacher, student, weight)
    expected = weight * teacher.query_ND @ teacher.target_ND.T + (1 - weight) * student.query_ND @ student.target_ND.T
    assert torch.allclose(mixed.query_ND @ mixed.target_ND.T, expected, atol=1e-6)


def test_the_student_mines_with_a_teacher_beside_it(fit: Run, models: dict[str, str]) -> None:
    run = fit(
        "text-text", f"--model.embedder={models['bert']}", f"--data.teacher={models['bert']}", "--remine.enabled=true",
        "--remine.teacher_weight={1: 0.5}",
    )  # fmt: skip
    assert _plans(run) == ["epoch-0000", "epoch-0001"]
    with pytest.raises(SystemExit, match="mixes a teacher into the student's ranks"):
        fit("image-text", SMALL, "--remine.enabled=true", "--remine.teacher_weight={1: 0.5}", name="other")


def test_requests_follow_their_epochs() -> None:
    remine = Remine(enabled=True, teacher_weight={1: 0.5, 3: 0.0}, first_rank={2: 7})
    assert remine.request(0) == MiningRequest("student", 0.0, None)
    assert remine.request(2) == MiningRequest("student", 0.5, 7)
    assert remine.request(9) == MiningRequest("student", 0.0, 7)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Remine(teacher_weight={0: 2.0})
    with pytest.raises(ValueError, match="epochs count from 0"):
        by_epoch({-1: 3}, 0, 1)


@pytest.mark.parametrize(
    ("frac", "n_rows", "weight"), [(0.0, 96, 1.0), (0.5, 96, 1.0), (1.0, 96, 2.0), (0.25, 90, 1.5)]
)
def test_a_share_of_the_clusters_is_kept_and_every_row_drawn_once(frac: float, n_rows: int, weight: float) -> None:
    ids_CK = torch.full((-(-n_rows // 4), 4), -1)
    ids_CK.view(-1)[:n_rows] = torch.arange(n_rows)
    plan = BatchPlan(
        Clusters(ids_CK), batch_size=8, seed=0, task_weights={"default": weight}, mined_frac={0: 1.0, 1: frac}
    )
    whole = {frozenset(ids) for ids in ids_CK.tolist()}
    kept = []
    for epoch in range(3):
        rows = plan.epoch(epoch)
        assert all(len(set(batch)) == 8 for batch in rows.tolist())
        clusters = rows.view(-1, 4).tolist()
        kept.append(sum(frozenset(ids) in whole for ids in clusters) / len(clusters))
    if weight == 1 and n_rows == 96:
        drawn = torch.cat([plan.epoch(epoch).flatten() for epoch in range(3)])
        assert drawn.bincount().tolist() == [3] * n_rows
        assert kept[0] == 1
        assert abs(kept[1] - frac) < 0.1
        assert abs(kept[2] - frac) < 0.1


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="mined_frac"):
        BatchPlan(Clusters(torch.arange(8).view(2, 4)), batch_size=4, seed=0, mined_frac={0: 1.5})
