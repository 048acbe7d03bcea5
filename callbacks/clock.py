"""What a run has cost so far, logged beside its metrics, so that runs can be compared at equal rows or seconds."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Clock(Callback):
    """Log ``train/rows_seen`` (of all processes) and ``train/seconds`` since ``fit`` began.

    Seconds include mining and validation. A resumed run goes on counting from its checkpoint.
    """

    def __init__(self) -> None:
        self.n_rows, self.seconds = 0, 0.0
        self._began = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic() - self.seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.n_rows += len(batch["row_B"]) * trainer.world_size
        self._log(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        self.seconds = time.monotonic() - self._began
        pl_module.log("train/rows_seen", float(self.n_rows))
        pl_module.log("train/seconds", self.seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"n_rows": self.n_rows, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.n_rows, self.seconds = state_dict["n_rows"], state_dict["seconds"]
