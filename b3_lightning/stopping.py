"""How a training is stopped: by SIGTERM or Ctrl-C, after a whole step, by all processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import ReduceOp


class StopSignals(_SignalConnector):
    """Takes a note of SIGTERM, and of the first Ctrl-C, while a model is trained; ``StopTogether`` heeds it.

    In place of Lightning's handler, which sends a message to the other processes from the middle of whatever its own
    is doing. Where all get the signal, as from SLURM, ``torchrun`` or a terminal, such messages cross with those of the
    training, and the processes wait for each other or abort.

    Whatever else a trainer does holds nothing worth saving: there signals end it at once.
    """

    noted: int | None = None
    """The signal that is not heeded yet, or was."""

    def register_signal_handlers(self) -> None:
        self.noted = None
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.received_sigterm = False
            return
        super().register_signal_handlers()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or another's
            self._register_signal(signal.SIGINT, self._on_interrupt)

    def _sigterm_notifier_fn(self, number: int, frame: FrameType | None) -> None:
        self._note(number)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.noted is not None:
            signal.default_int_handler(number, frame)
        self._note(number)

    def _note(self, number: int) -> None:
        if self.noted is None and self.trainer.is_global_zero:
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            said = f"\n{signal.Signals(number).name}: the run ends after this step{again}\n"
            os.write(2, said.encode())  # a stream may be in the middle of a line, and refuse another one
        self.noted = number


class StopTogether(Callback):
    """Ends a training that got a signal where all processes are at the same place, from which it can go on exactly.

    That is after an optimiser step, or after a batch of the validation which follows one; whichever process got it.
    """

    def __init__(self) -> None:
        self._n_common = 0
        """Batches that every process has yet to validate before the first of them has its last."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if _may_stop(trainer):
            _agree(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._n_common = 0
        if _may_stop(trainer):
            # what was agreed before would end a validation of two batches, but not another process's of one
            trainer._signal_connector.received_sigterm = False
            n_batches = sum(map(int, trainer.num_val_batches))
            self._n_common = _reduced(n_batches, ReduceOp.MIN, trainer) - 1

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._n_common > 0:
            self._n_common -= 1
            _agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _may_stop(trainer):
            _agree(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning's exit is 0. Of other processes it stays so: one that fails has the first killed
        if isinstance(exception, SIGTERMException) and trainer.is_global_zero:
            exception.code = 128 + (noted_signal(trainer) or signal.SIGTERM)


def noted_signal(trainer: Trainer) -> int | None:
    """The signal that a training is to end by, but does not yet."""
    return getattr(trainer._signal_connector, "noted", None)


def started_processes(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The other processes of the run that this one started, by rank from 1 on; none where something else did."""
    return getattr(trainer.strategy.launcher, "procs", [])


def _may_stop(trainer: Trainer) -> bool:
    """Not between batches whose gradients are added up, nor where what goes on would have no step left to make."""
    trains = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return trains and trainer.global_step != trainer.max_steps and not trainer.fit_loop._should_accumulate()


def _agree(trainer: Trainer) -> None:
    signals: Any = trainer._signal_connector
    number = _reduced(noted_signal(trainer) or 0, ReduceOp.MAX, trainer)
    signals.received_sigterm = number > 0
    if number > 0:  # else one may have come meanwhile, which the next time is for
        signals.noted = number


def _reduced(number: int, how: Any, trainer: Trainer) -> int:
    if trainer.world_size == 1:  # a tensor on a GPU, which is read after every step, would have it wait
        return number
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op=how))
