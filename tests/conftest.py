"""Shared fixtures: small pairs files with pictures, tiny models, the command line in this process."""

from __future__ import annotations

import csv
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# tests run side by side, and threads that wait for one another on a busy machine take many times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "dryrun"  # offline by another name, of which transformers prints nothing into what is read
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from hypothesis import settings
from PIL import Image, ImageDraw

from b3_lightning.cli import main

# the same cases every time: whether a change passes is no matter of luck (--hypothesis-profile=default draws others)
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
# readline, which pytest imports, leaves it to the processes that run the tests: no terminal is of that width
os.environ.pop("COLUMNS", None)

COLORS = ("red", "green", "blue", "black", "orange", "purple", "brown", "teal")
SHAPES = ("circle", "square", "bar", "cross")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 pictures and one pairs file for each kind of pair, 96 rows each."""
    folder = tmp_path_factory.mktemp("shapes")
    images, texts = [], []
    for index in range(96):
        color, shape, step = COLORS[index % 8], SHAPES[index // 8 % 4], index // 32
        image = Image.new("RGB", (40, 40), "white")
        draw, inset = ImageDraw.Draw(image), 4 + 4 * step
        box = (inset, inset, 40 - inset, 40 - inset)
        if shape == "circle":
            draw.ellipse(box, fill=color)
        elif shape == "square":
            draw.rectangle(box, fill=color)
        else:
            draw.line(box if shape == "bar" else (inset, 20, 40 - inset, 20), fill=color, width=4 + step)
        images.append(f"{index:03d}.png")
        image.save(folder / images[-1])
        texts.append(f"{('large', 'medium', 'small')[step]} {color} {shape}")
    nothing = [""] * len(images)
    questions = [f"which picture looks like number {index}" for index in range(96)]
    kinds = {
        "text-text": (questions, nothing, texts, nothing),
        "image-text": (nothing, images, texts, nothing),
        "text-image": (texts, nothing, nothing, images),
        "both-image": (texts, images, nothing, images[1:] + images[:1]),
    }
    for kind, columns in kinds.items():
        names = ("qry", "qry_image_path", "pos_text", "pos_image_path")
        pq.write_table(pa.table(dict(zip(names, columns, strict=True))), folder / f"{kind}.parquet")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models on disk by family."""
    makers: dict[str, Callable[[Path], str]] = {
        "bert": tiny_models.bert,
        "bert_without_dropout": partial(tiny_models.bert, dropout=0.0),
        "clip": tiny_models.clip,
        "siglip": tiny_models.siglip,
        "qwen2_vl": tiny_models.qwen2_vl,
        "qwen2_5_vl": tiny_models.qwen2_5_vl,
        "qwen3_vl": tiny_models.qwen3_vl,
        "internvl": tiny_models.internvl,
    }
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


Run = Callable[..., Path]


@pytest.fixture
def fit(tmp_path: Path, shapes: Path) -> Run:
    """Run ``fit`` in this process on one kind of the shapes pairs; returns the run's folder."""

    def run(kind: str, *settings: str, name: str = "run", config: Path | None = None) -> Path:
        folder = tmp_path / name
        pairs = shapes / f"{kind}.parquet"
        main(
            [
                "fit",
                *([f"--config={config}"] if config else []),
                f"--run.dir={folder}",
                "--run.wandb=disabled",
                f"--data.train_pairs={pairs}",
                f"--data.val_pairs={pairs}",
                f"--data.image_root={shapes}",
                "--data.batch_size=16",
                "--data.mining.first_rank=1",
                "--data.mining.n_ranks=10",
                "--data.mining.cluster_size=4",
                "--trainer.accelerator=cpu",
                "--trainer.devices=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.num_sanity_val_steps=0",
                "--trainer.max_epochs=2",
                *settings,
            ]
        )
        return folder

    return run


def losses(run: Path) -> dict[int, str]:
    """Step -> training loss of a run, as written: equal where it is to the bit."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}


def validations(run: Path) -> dict[int, str]:
    """Step -> the validation's mean reciprocal rank, as written."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): row["val/mrr"] for row in csv.DictReader(file) if row.get("val/mrr")}


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(*command: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python process with pipes; where a test fails, it and all that it started are killed."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the process has written a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
