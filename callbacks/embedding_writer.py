"""What ``predict`` leaves: one file of vectors and row ids, however many processes embedded them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import load_file, save_file
from torch import Tensor

from b3_lightning.data.miner import processes_of
from b3_lightning.mining.store import write_atomic

log = logging.getLogger(__name__)

Share = dict[str, Tensor]


class EmbeddingWriter(BasePredictionWriter):
    """Write ``embeddings.safetensors`` with ``row`` (N,), ``query`` and ``target`` (N, D) into the run's folder.

    Every row once, in order. Several processes write their shares there, and the first puts them together.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        own = {name: torch.cat([batch[name].cpu() for batch in predictions]) for name in ("row", "query", "target")}
        folder, processes = Path(trainer.default_root_dir), processes_of(trainer)
        path = folder / "embeddings.safetensors"
        if processes.world_size == 1:
            _write_all(path, [own])
            return
        shares = [folder / f"embeddings-of-process-{rank}.safetensors" for rank in range(processes.world_size)]
        with processes.failing_together():
            _write(shares[processes.rank], own)
            processes.barrier()
            if processes.rank == 0:
                _write_all(path, [load_file(share) for share in shares])
                for share in shares:
                    share.unlink()
            processes.barrier()


def join(shares: Sequence[Share]) -> Share:
    """Put shares together, in the order of ``row``; a row that several have counts once."""
    whole = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    row_R, order_R = whole["row"].sort(stable=True)
    first_R = torch.ones(len(row_R), dtype=torch.bool)
    first_R[1:] = row_R[1:] != row_R[:-1]
    return {name: values[order_R[first_R]].contiguous() for name, values in whole.items()}


def _write_all(path: Path, shares: Sequence[Share]) -> None:
    whole = join(shares)
    _write(path, whole)
    n_rows, n_dims = whole["query"].shape
    log.info("embeddings: %s (row, query and target of %s rows, %d dimensions)", path, f"{n_rows:,}", n_dims)


def _write(path: Path, tensors: Share) -> None:
    write_atomic(path, partial(save_file, tensors))
