"""``HardnessMonitor``: figures by hand, suspects of a run, warnings."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from conftest import Run

from b3_lightning.callbacks import HardnessMonitor
from b3_lightning.callbacks.hardness_monitor import NAMES, BatchHardness

SMALL = "--model.embedder={hidden_sizes: [8, 16], image_size: 32}"


def test_figures_by_hand() -> None:
    score = torch.tensor([[0.9, 0.5, 0.1, 0.3], [0.8, 0.6, 0.2, 0.4]])
    ignore = torch.tensor([[False, True, False, False], [False, False, False, False]])
    there = torch.ones(4, dtype=torch.bool)
    found = BatchHardness.measure(score, ignore, there, 0)
    assert found.own_B.tolist() == pytest.approx([0.9, 0.6])
    assert found.hardest_B.tolist() == pytest.approx([0.3, 0.8])
    assert found.column_B.tolist() == [3, 0]
    assert found.mean_B.tolist() == pytest.approx([0.2, 1.4 / 3])
    assert float(found.masked_frac) == pytest.approx(1 / 6)
    second = BatchHardness.measure(score, ignore, there, 2)  # the positives of the second process
    assert second.own_B.tolist() == pytest.approx([0.1, 0.4])


def test_a_row_without_negatives_is_not_suspicious() -> None:
    found = BatchHardness.measure(torch.eye(2), torch.ones(2, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool), 0)
    assert bool((found.own_B > found.hardest_B).all())


def test_a_run_logs_its_hardness_and_lists_suspects(fit: Run) -> None:
    run = fit(
        "image-text", SMALL, "--remine.enabled=true", "--hardness.every_n_steps=2", "--hardness.n_suspects=5",
        "--hardness.suspect_margin=0.0", "--trainer.max_epochs=3",
    )  # fmt: skip
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/in_batch_accuracy")]
    assert len(rows) == 9
    assert [int(row["step"]) for row in rows] == list(range(0, 18, 2))  # as the losses of the same batches, from 0
    assert all(0 <= float(row["train/in_batch_accuracy"]) <= 1 for row in rows)
    assert sum(bool(row.get("train/cohesion")) for row in rows) == 6  # not for the first batch of an epoch
    with (run / "suspects.csv").open(newline="") as file:
        suspects = list(csv.DictReader(file))
    assert [sum(int(row["epoch"]) == epoch for row in suspects) for epoch in range(3)] == [5, 5, 5]
    for row in suspects:
        assert row["row"] != row["other_row"]
        assert float(row["score_above_positive"]) > 0
        assert row["query"].endswith(".png")


def test_it_can_be_switched_off(fit: Run) -> None:
    run = fit("image-text", SMALL, "--data.batches=random", "--hardness.enabled=false", "--trainer.max_epochs=1")
    assert not (run / "suspects.csv").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": 0.001, "in_batch_accuracy": 1.0}, "too easy"),
        ({"loss": 2.0, "in_batch_accuracy": 0.6, "suspected_frac": 0.3}, "in 30% of the rows a negative scores"),
    ],
)
def test_warnings(values: dict[str, float], message: str, caplog: pytest.LogCaptureFixture) -> None:
    monitor = HardnessMonitor()
    sums = torch.tensor([*(values.get(name, 0.0) for name in NAMES), 1.0])
    monitor._sums[0] = sums * 3
    with caplog.at_level(logging.WARNING, logger="b3_lightning"):
        monitor._warn(["faq"])
    assert message in caplog.text
    assert "task 'faq'" in caplog.text


@pytest.mark.parametrize("sums", [[0.8, 0.1, 0.0, 0.0, 0.1, 0.5, 1.0], [0.1, -0.3, 0.0, 0.0, 0.9, 5.0, 1.0]])
def test_ordinary_batches_and_untrained_models_bring_no_warning(
    sums: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    monitor = HardnessMonitor()
    monitor._sums[0] = torch.tensor(sums)
    monitor._warn(["faq"])
    assert not caplog.text


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        HardnessMonitor(every_n_steps=0)
