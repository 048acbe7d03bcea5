"""The end of a run that has diverged, before its weights take the place of good ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.tensor import DTensor


class TerminateOnNaN(Callback):
    """End a run whose weights are no longer finite: no later step mends them, and every comparison with them is false.

    Looked at where the loss of a logged step is not finite, before a validation, before a checkpoint is written (so
    that the last one stays good) and at the end; processes decide together. A loss that is not finite while the weights
    are, as where a scaler of gradients leaves a step out, ends nothing.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            _end_if(0 if torch.isfinite(outputs["loss"]) else count_broken(pl_module), trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            _end_if(count_broken(pl_module), trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _end_if(count_broken(pl_module), trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.interrupted:
            _end_if(count_broken(pl_module), trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # comes before those that would save: nothing may be raised here, nor asked of processes that may be gone
        broken = count_broken(pl_module) > 0
        if isinstance(exception, SIGTERMException):  # all stop, at the same place
            broken = trainer.strategy.reduce_boolean_decision(broken, all=False)
        if broken:
            for checkpoint in trainer.checkpoint_callbacks:
                vars(checkpoint)["save_on_exception"] = False


@torch.no_grad()
def count_broken(module: LightningModule) -> int:
    """How many trained weights hold values of this process that are not finite."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
    return sum(not bool(torch.isfinite(parameter).all()) for parameter in local)


def _end_if(n_broken: int, trainer: Trainer) -> None:
    if not trainer.strategy.reduce_boolean_decision(n_broken > 0, all=False):
        return
    checkpoints: list[Any] = trainer.checkpoint_callbacks
    # a callback names a file before it is written, and this one may have been stopped in between
    kept = [path for one in checkpoints for path in (one.last_model_path, one.best_model_path) if Path(path).is_file()]
    which = f"{n_broken} trained weights" if n_broken else "trained weights of another process"
    raise ValueError(
        f"training has diverged: {which} are not finite after step {trainer.global_step}; lower "
        "model.optim.learning_rate, warm up for longer, or set trainer.gradient_clip_val"
        + (f" (weights of before: {kept[0]})" if kept else "")
    )
