"""Each validation query's rank at the best validation, so that ``compare`` can say how sure a difference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from b3_lightning.data import datamodule_of
from b3_lightning.mining.store import write_atomic
from b3_lightning.model import ContrastiveModule


class KeepRanks(Callback):
    """Write ``val_ranks.safetensors`` where ``val/mrr`` is the best so far: ``row`` and ``rank`` (N,), ranks from 0."""

    def __init__(self) -> None:
        self.best = -1.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not isinstance(pl_module, ContrastiveModule):
            return
        mrr = float(trainer.callback_metrics.get("val/mrr", -1.0))
        if mrr <= self.best:
            return
        self.best = mrr
        if not trainer.is_global_zero:
            return
        row_N, rank_N = pl_module.metrics.rank_of_row_N2.T.contiguous()
        tensors = {"row": row_N, "rank": rank_N}
        about = {"pairs": datamodule_of(trainer).fingerprint("val"), "step": str(trainer.global_step)}
        path = Path(trainer.default_root_dir) / "val_ranks.safetensors"
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=about))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
