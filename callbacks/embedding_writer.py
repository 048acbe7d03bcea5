"""What ``predict`` leaves: one file of vectors and row ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file

from b3_lightning.mining.store import write_atomic


class EmbeddingWriter(BasePredictionWriter):
    """Write ``embeddings.safetensors`` with ``row`` (N,), ``query`` and ``target`` (N, D) into the run's folder."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        tensors = {
            name: torch.cat([batch[name].cpu() for batch in predictions]).contiguous()
            for name in ("row", "query", "target")
        }
        suffix = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"embeddings{suffix}.safetensors"
        write_atomic(path, lambda temporary: save_file(tensors, temporary))
