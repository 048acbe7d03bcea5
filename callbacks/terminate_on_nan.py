"""The end of a run that has diverged, before its weights take the place of good ones."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor


class TerminateOnNaN(Callback):
    """End a run whose weights are no longer finite: no later step mends them, and every comparison with them is false.

    Looked at where the loss of a logged step is not finite, before a validation, before a checkpoint is written (so
    that the last one stays good) and at the end. A loss that is not finite while the weights are, as where a scaler of
    gradients leaves a step out, ends nothing.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logged = trainer.global_step % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]
        if logged and not torch.isfinite(outputs["loss"]):
            refuse_diverged(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            refuse_diverged(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_diverged(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        refuse_diverged(trainer, pl_module)


@torch.no_grad()
def refuse_diverged(trainer: Trainer, module: LightningModule) -> None:
    """Let nothing more be saved of weights that are not finite.

    Raises:
        ValueError: where a trained weight of this process is not finite.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
    n_broken = sum(not bool(torch.isfinite(parameter).all()) for parameter in local)
    if not n_broken:
        return
    checkpoints: list[Any] = trainer.checkpoint_callbacks
    for checkpoint in checkpoints:
        checkpoint.save_on_exception = False
    kept = [one.last_model_path or one.best_model_path for one in checkpoints]
    good = next((path for path in kept if path), None)
    raise ValueError(
        f"training has diverged: {n_broken} of {len(trained)} trained weights are not finite after step "
        f"{trainer.global_step}; lower model.optim.learning_rate, warm up for longer, or set "
        f"trainer.gradient_clip_val (the loss before is in metrics.csv"
        + (f"; weights of before: {good})" if good else ")")
    )
