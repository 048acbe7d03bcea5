"""What a run keeps for later comparison: rows and seconds over a resume, ranks of the best validation, plans' pages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from b3_lightning.callbacks import Clock, KeepRanks, MiningReport
from b3_lightning.cli import main
from b3_lightning.model import ContrastiveModule
from b3_lightning.model.embedder import SmallEmbedder
from b3_lightning.reports.runs import read_ranks


def test_a_resumed_run_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("b3_lightning.callbacks.clock.time.monotonic", lambda: now[0])
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log=logged.__setitem__)
    trainer: Any = SimpleNamespace(world_size=2, state=SimpleNamespace(fn="fit"), sanity_checking=False)

    def step(clock: Clock) -> None:
        now[0] += 3
        clock.on_train_batch_end(trainer, module, None, {"row_B": torch.arange(8)}, 0)

    first, second = Clock(), Clock()
    first.on_fit_start(trainer, module)
    step(first)
    assert logged == {"train/rows_seen": 16, "train/seconds": 3}
    now[0] = 5000.0
    second.load_state_dict(first.state_dict())
    second.on_fit_start(trainer, module)
    step(second)
    assert logged == {"train/rows_seen": 32, "train/seconds": 6}
    now[0] += 4
    second.on_validation_epoch_end(trainer, module)
    assert logged["train/seconds"] == 10
    trainer.sanity_checking = True
    logged.clear()
    second.on_validation_epoch_end(trainer, module)
    assert logged == {}


def test_ranks_are_kept_of_the_best_validation_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(fingerprint=lambda split: f"of {split}")
    monkeypatch.setattr("b3_lightning.callbacks.keep_ranks.datamodule_of", lambda trainer: data)
    module, keeper = ContrastiveModule(SmallEmbedder()), KeepRanks()
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, is_global_zero=True, default_root_dir=str(tmp_path),
        global_step=0, callback_metrics={},
    )  # fmt: skip

    def validate(mrr: float, ranks: list[int]) -> list[int]:
        trainer.global_step += 1
        trainer.callback_metrics["val/mrr"] = torch.tensor(mrr)
        module.metrics.rank_of_row_N2 = torch.stack([torch.arange(len(ranks)), torch.tensor(ranks)], dim=1)
        keeper.on_validation_end(trainer, module)
        kept = read_ranks(tmp_path)
        assert kept is not None
        assert kept.pairs == "of val"
        assert kept.row_N.tolist() == list(range(len(ranks)))
        return kept.rank_N.tolist()

    assert validate(0.5, [0, 3]) == [0, 3]
    assert validate(0.4, [9, 9]) == [0, 3]
    assert validate(0.6, [0, 1]) == [0, 1]
    with safe_open(tmp_path / "val_ranks.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"
    resumed = KeepRanks()
    resumed.load_state_dict(keeper.state_dict())
    keeper = resumed
    assert validate(0.55, [7, 7]) == [0, 1]


def test_mine_writes_a_page_beside_its_plan(tmp_path: Path, shapes: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((2, 96, 8)))
    main(
        [
            "mine", f"--output={tmp_path / 'plan'}", "--model.embedder={hidden_sizes: [8, 16], image_size: 32}",
            f"--data.teacher={tmp_path / 'vectors.npy'}", f"--data.train_pairs={shapes / 'image-text.parquet'}",
            f"--data.image_root={shapes}", "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}",
            "--data.batch_size=16", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
            "--report.limits.n_clusters=2",
        ]
    )  # fmt: skip
    page = (tmp_path / "plan" / "report.html").read_text()
    assert "<h1>Mined plan: plan</h1>" in page
    assert "2 of 24 clusters" in page
    assert page.count("data:image/webp") == 8


def test_a_report_that_is_switched_off_writes_nothing(tmp_path: Path) -> None:
    nothing: Any = None
    assert MiningReport(enabled=False).write(nothing, nothing, tmp_path, "title") is None
    assert list(tmp_path.iterdir()) == []
