"""What the framework adds to a training step, and what GradCache does to memory.

    python benchmarks/training.py step --model MODEL --pairs PAIRS.parquet [--steps 20] [--rounds 3]
    python benchmarks/training.py remine --model MODEL --pairs PAIRS.parquet
    python benchmarks/training.py memory --model MODEL --pairs PAIRS.parquet [--chunk 32]

``step``: seconds from one batch to the next in ``fit`` (sampler, masks, gather, logging, hardness monitor) and in a
bare torch loop that tokenizes, embeds, computes the cross-entropy and steps the same optimiser on the same rows. The
two take turns; medians. ``memory``: the largest resident memory of |B| = 64 and 1,024 in chunks, and of 64 whole, each
in a process of its own, and what of it came on top of the loaded model. ``remine``: mining by the student against a
loop that only encodes every distinct text and ranks.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from statistics import median
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from b3_lightning.callbacks import HardnessMonitor, Remine
from b3_lightning.data import PairsDataModule
from b3_lightning.data.miner import MiningRequest
from b3_lightning.mining import MiningSettings
from b3_lightning.mining.neighbors import find_neighbors
from b3_lightning.model import ContrastiveModule, LoadSettings
from b3_lightning.model.loss import LossSettings
from b3_lightning.types import ChunkSettings


class Clock(L.Callback):
    """When every batch began, and the rows of it."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.begun.append(time.perf_counter())
        self.rows.append(batch["row_B"].tolist())


def trained(
    given: argparse.Namespace, batch_size: int, chunks: ChunkSettings | None, folder: str, *more: L.Callback
) -> tuple[Any, Clock]:
    """Train for a few steps; the module and its clock."""
    clock, callbacks = Clock(), [HardnessMonitor(), Remine(), *more]
    data = PairsDataModule(
        train_pairs=given.pairs,
        batch_size=batch_size,
        batches="b3" if given.vectors else "random",
        teacher=given.vectors or "student",
        mining=MiningSettings(first_rank=5, cluster_size=8),
    )
    load = LoadSettings(max_seq_length=given.max_seq_length)
    module = ContrastiveModule(given.model, load=load, loss=LossSettings(temperature=0.05), chunks=chunks)
    trainer = L.Trainer(
        max_steps=given.steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[*callbacks, clock],
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module, clock


def bare_loop(module: Any, data: PairsDataModule, rows: list[list[int]]) -> list[float]:
    """Seconds a step without the framework, on the same rows."""
    model = module.embedder
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    texts = [[item.text for item in data.pairs("train").items(side)] for side in ("query", "target")]
    begun = []
    for ids in rows:
        features = [model.preprocess([side[row] for row in ids]) for side in texts]
        begun.append(time.perf_counter())
        query_BD, target_BD = (F.normalize(model(part)["sentence_embedding"], dim=1) for part in features)
        loss = F.cross_entropy(query_BD @ target_BD.T / 0.05, torch.arange(len(ids)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return between(begun)


def between(begun: list[float]) -> list[float]:
    """Seconds from one to the next, the first few left out."""
    return [after - before for before, after in itertools.pairwise(begun[3:])]


def step(given: argparse.Namespace) -> None:
    """Print medians of both and their ratio, pair by pair of equal rows."""
    ratios, seconds = [], []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            module, clock = trained(given, 64, None, folder)
        ours, bare = between(clock.begun), bare_loop(module, module.trainer.datamodule, clock.rows)
        ratios.append(median(a / b for a, b in zip(ours, bare, strict=True)))
        seconds.append((median(ours), median(bare)))
    ours, bare = (median(column) for column in zip(*seconds, strict=True))
    print(f"| | seconds a step |\n|---|---|\n| fit | {ours:.4f} |\n| bare loop | {bare:.4f} |")
    print(f"\nratio, median of {given.rounds} rounds: {median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)})")


class RemineClock(L.Callback):
    """Mines with the student as re-mining does, then does the same by hand."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        data = trainer.datamodule
        start = time.perf_counter()
        data._miner().mine(MiningRequest("student"))
        self.seconds["re-mining"] = time.perf_counter() - start
        start = time.perf_counter()
        sides = [[item.text for item in data.pairs("train").items(side)] for side in ("query", "target")]
        texts = sorted(set(sides[0]) | set(sides[1]), key=len)
        pl_module.eval()
        with torch.no_grad():
            parts = [texts[first : first + 256] for first in range(0, len(texts), 256)]
            vectors = torch.cat([pl_module.encode(pl_module.preprocess(part)) for part in parts])
        self.seconds["encoding alone"] = time.perf_counter() - start
        place = {text: index for index, text in enumerate(texts)}
        query_ND, target_ND = (F.normalize(vectors[[place[text] for text in side]], dim=1) for side in sides)
        find_neighbors(query_ND, target_ND, n_neighbors=105, exclude=[(data._splits["train"].keys["target"],) * 2])
        self.seconds["encoding and neighbours"] = time.perf_counter() - start
        trainer.should_stop = True


def remine(given: argparse.Namespace) -> None:
    """Print the seconds of both."""
    clock = RemineClock()
    given.steps = 1
    with tempfile.TemporaryDirectory() as folder:
        trained(given, 64, None, folder, clock)
    print("| | seconds |\n|---|---|")
    for name, seconds in clock.seconds.items():
        print(f"| {name} | {seconds:.1f} |")
    print(f"\nratio {clock.seconds['re-mining'] / clock.seconds['encoding and neighbours']:.3f}")


class Peak:
    """The largest resident memory, looked at every 20 ms."""

    def __init__(self) -> None:
        self.process, self.gib = psutil.Process(), 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.gib = max(self.gib, self.process.memory_info().rss / 2**30)
            time.sleep(0.02)


def memory(given: argparse.Namespace) -> None:
    """Print the table; with ``--batch-size``, measure one."""
    if given.batch_size:
        from sentence_transformers import SentenceTransformer

        SentenceTransformer(given.model, device="cpu")
        before = psutil.Process().memory_info().rss / 2**30
        peak = Peak()
        chunks = ChunkSettings(items=given.chunk) if given.chunk else None
        with tempfile.TemporaryDirectory() as folder:
            _, clock = trained(given, given.batch_size, chunks, folder)
        print(f"measured {peak.gib} {peak.gib - before} {clock.begun[-1] - clock.begun[-2]}")
        return
    print("| batch size | chunk | peak GiB | of it in training | seconds of a step |\n|---|---|---|---|---|")
    for batch_size, chunk in ((64, given.chunk), (1024, given.chunk), (64, 0)):
        command = [sys.executable, *sys.argv, "--batch-size", str(batch_size), "--steps", "3", "--chunk", str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = next(line for line in done.stdout.splitlines() if line.startswith("measured")).split()[1:]
        peak, training, seconds = (float(value) for value in found)
        print(f"| {batch_size:,} | {chunk or 'none'} | {peak:.2f} | {training:.2f} | {seconds:.2f} |", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "remine", "memory"))
    parser.add_argument("--model", required=True, help="folder or name of a text model")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--vectors", help="a teacher's vectors, to train on mined batches with masks")
    parser.add_argument("--max-seq-length", type=int, default=64, help="tokens a text is cut to (default: 64)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    {"step": step, "remine": remine, "memory": memory}[given.what](given)


if __name__ == "__main__":
    main()
