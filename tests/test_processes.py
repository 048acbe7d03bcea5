"""The command line on two processes, against one: what is trained, and what validation finds."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_cli import command

from b3_lightning.checkpoints import CheckedCheckpointIO
from b3_lightning.cli import main

TEXTS = ["a large red circle", "which picture looks like number 7", "small teal bar"]


def _fit(folder: Path, shapes: Path, model: str, *settings: str) -> Path:
    pairs = shapes / "text-text.parquet"
    arguments = [
        "fit", f"--run.dir={folder}", "--run.wandb=disabled", f"--model.embedder={model}", f"--data.teacher={model}",
        f"--data.train_pairs={pairs}", f"--data.val_pairs={pairs}", "--data.batch_size=12",
        "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4, n_negatives: 2}", "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu", "--trainer.precision=64-true", "--trainer.enable_progress_bar=false",
        "--trainer.gradient_clip_val=0.5", "--model.loss={temperature: 0.05, symmetric: true, mask_margin: 0.2}",
        "--model.optim.learning_rate=0.001", "--trainer.log_every_n_steps=1", *settings,
    ]  # fmt: skip
    if "--trainer.devices=1" in settings:
        main(arguments)
    else:
        done = command(*arguments, cwd=folder.parent)
        assert done.returncode == 0, done.stderr
    return folder


def _validations(run: Path) -> list[list[float]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/mrr")]
    return [[float(row[name]) for name in ("val/hit@1", "val/hit@10", "val/mrr")] for row in rows]


def _losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def _vectors(run: Path) -> np.ndarray[Any, Any]:
    return np.asarray(SentenceTransformer(str(run / "export"), device="cpu").encode(TEXTS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes: Path, models: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return _fit(folder, shapes, models["bert_without_dropout"], "--trainer.devices=1")


@pytest.mark.parametrize(
    "settings",
    [
        ("--trainer.devices=1", "--model.chunks.items=5"),
        ("--trainer.devices=2",),  # a BERT has a pooler that nothing uses
        ("--trainer.devices=2", "--trainer.strategy=ddp", "--model.chunks.items=5"),
    ],
    ids=["chunks", "processes", "chunks-and-processes"],
)
def test_chunks_and_processes_train_what_one_does_whole(
    settings: tuple[str, ...], whole: Path, shapes: Path, models: dict[str, str], tmp_path: Path
) -> None:
    run = _fit(tmp_path / "run", shapes, models["bert_without_dropout"], *settings)
    assert np.allclose(_vectors(run), _vectors(whole), atol=1e-6)
    assert np.allclose(_validations(run), _validations(whole), atol=1e-6)
    assert np.allclose(_losses(run), _losses(whole), atol=1e-6)  # of the global batch, whoever holds its rows
    start = SentenceTransformer(models["bert_without_dropout"], device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert not np.allclose(_vectors(whole), start, atol=1e-2)


def test_a_run_goes_on_with_weights_cut_over_processes(
    whole: Path, shapes: Path, models: dict[str, str], tmp_path: Path
) -> None:
    ways = {"one": ["--trainer.devices=1"], "cut": ["--trainer.devices=2", "--trainer.strategy=fsdp2"]}
    runs = {}
    for name, settings in ways.items():
        shutil.copytree(whole, tmp_path / name)
        settings += ["--trainer.max_epochs=3", f"--ckpt_path={whole / 'checkpoints' / 'last.ckpt'}"]
        if name == "cut":
            settings.append("--model.chunks.items=5")
        runs[name] = _fit(tmp_path / name, shapes, models["bert_without_dropout"], *settings)
    assert np.allclose(_vectors(runs["cut"]), _vectors(runs["one"]), atol=1e-6)
    assert np.allclose(_validations(runs["cut"]), _validations(runs["one"]), atol=1e-6)
    read = CheckedCheckpointIO().load_checkpoint
    one, cut, before = (read(run / "checkpoints" / "last.ckpt") for run in (runs["one"], runs["cut"], whole))
    for (name, value), other in zip(_state(one), _state(cut), strict=True):
        assert torch.allclose(value, other[1], rtol=0, atol=1e-12), name
    assert (before["global_step"], one["global_step"]) == (16, 24)
    pairs = zip(_state(one), _state(before), strict=True)
    assert any(not torch.allclose(value, old[1], atol=1e-4) for (_, value), old in pairs), "a third epoch was trained"


def _state(checkpoint: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Weights and first moments."""
    moments = checkpoint["optimizer_states"][0]["state"].items()
    return [*checkpoint["state_dict"].items(), *((f"moment {name}", state["exp_avg"]) for name, state in moments)]
