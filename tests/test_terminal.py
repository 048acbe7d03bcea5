"""What the commands print, and what they leave out."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from b3_lightning import MinedPlan
from b3_lightning.cli import main
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.terminal import quieten


def test_weights_are_read_and_written_without_bars_and_downloads_with(
    models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enable_progress_bar()
    quieten()
    load_embedder(models["bert"], LoadSettings(), None).save_pretrained(str(tmp_path), create_model_card=False)
    assert "".join(capfd.readouterr()) == ""
    assert not are_progress_bars_disabled()


def test_a_trainer_says_what_it_runs_on_and_advertises_nothing(tmp_path: Path) -> None:
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, ear = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Ear()
    quieten()
    log.addHandler(ear)
    try:
        L.Trainer(accelerator="cpu", logger=[], default_root_dir=tmp_path)
    finally:
        log.removeHandler(ear)
    assert any("GPU available" in line for line in said)
    assert not any("Tip" in line or "litlogger" in line for line in said)


def test_vectors_are_mined_without_a_model(shapes: Path, tmp_path: Path) -> None:
    enable_progress_bar()
    np.save(tmp_path / "teacher.npy", np.random.default_rng(0).normal(size=(2, 96, 8)))
    main(
        [
            "mine", f"--output={tmp_path / 'plan'}", f"--data.train_pairs={shapes / 'text-text.parquet'}",
            f"--data.teacher={tmp_path / 'teacher.npy'}", "--data.batch_size=16",
            "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    assert MinedPlan.load(tmp_path / "plan").n_rows == 96
    assert not is_progress_bar_enabled(), "main did not quieten the libraries"
