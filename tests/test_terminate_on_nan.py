"""A run ends where its weights are broken, not where a scaler of gradients left a step out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from b3_lightning.callbacks import TerminateOnNaN


class _Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)


def test_only_broken_weights_that_are_trained_end_a_run(tmp_path: Path) -> None:
    module, guard = _Module(), TerminateOnNaN()
    kept = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True)
    kept.last_model_path, kept.best_model_path = str(tmp_path / "last.ckpt"), str(tmp_path / "absent.ckpt")
    (tmp_path / "last.ckpt").touch()
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = cast(
        Any,
        SimpleNamespace(
            global_step=50, log_every_n_steps=50, checkpoint_callbacks=[kept], interrupted=False, strategy=strategy
        ),
    )
    outputs = {"loss": torch.tensor(torch.nan)}
    module.frozen.weight.data.fill_(torch.nan)
    guard.on_train_batch_end(trainer, module, outputs, None, 49)
    guard.on_save_checkpoint(trainer, module, {})
    module.trained.bias.data[1] = torch.inf
    trainer.global_step = 51
    guard.on_train_batch_end(trainer, module, outputs, None, 50)  # between logged steps nothing is looked at
    with pytest.raises(ValueError, match=r"1 trained weights are .* after step 51; .*weights of before: .*/last.ckpt"):
        guard.on_save_checkpoint(trainer, module, {})
    trainer.interrupted = True
    guard.on_save_checkpoint(trainer, module, {})  # raises nothing where Lightning is about to tear down
    guard.on_exception(trainer, module, KeyboardInterrupt())
    assert kept.save_on_exception is False
    trainer.strategy.reduce_boolean_decision = lambda decision, all: True
    trainer.state = SimpleNamespace(fn="fit")
    with pytest.raises(ValueError, match="trained weights of another process are not finite"):
        guard.on_validation_start(trainer, _Module())
