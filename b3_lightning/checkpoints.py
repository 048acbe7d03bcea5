"""Checkpoint files: whole or absent, checked when they are read, and never unpickled."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from b3_lightning.mining.store import write_atomic

log = logging.getLogger(__name__)


class MovableCheckpoint(ModelCheckpoint):
    """Knows its files where a run was moved or copied to: Lightning would look for them at their old place, and forget
    how good the best one was."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        folder = Path(self.dirpath)
        best = _moved(state_dict["best_model_path"], folder)
        if not best:
            if state_dict["best_model_path"] and self.monitor is not None:
                log.warning(
                    "%s, the best until now, is neither there nor in %s: the best is sought anew from here on",
                    state_dict["best_model_path"],
                    folder,
                )
            return
        kept = {_moved(path, folder): score for path, score in state_dict["best_k_models"].items()}
        places = {name: _moved(state_dict[name], folder) for name in ("kth_best_model_path", "last_model_path")}
        about = {"dirpath": self.dirpath, "best_model_path": best, "best_k_models": kept}
        super().load_state_dict(state_dict | about | places)


def _moved(path: str, folder: Path) -> str:
    """A file's path in this folder, if it is there; else its old path, if it is there; else none."""
    places = [folder / Path(path).name, Path(path)] if path else []
    return next((str(place) for place in places if place.is_file()), "")


class BestCheckpoint(MovableCheckpoint):
    """Keeps the best by validation."""


class _WithinEpoch(MovableCheckpoint):
    """Saves within an epoch: after the validation that follows a step, which would be left out from before it."""

    _waits = False
    """For that validation."""

    def _save(self, trainer: Trainer) -> None:
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits:
            self._waits = False
            self._save(trainer)


class LastCheckpoint(_WithinEpoch):
    """Saves where a run is interrupted too, once it trains: before, there is nothing to go on with.

    Not by an error in one of several processes: the others may wait for it elsewhere, and none saves alone.

    Also where ``max_steps``, ``max_time`` or a callback such as EarlyStopping end it within an epoch: Lightning then
    counts the epoch as done, and from a checkpoint of its end would never train on the rest.
    """

    trains = False
    """Since the run trains; before, there is nothing new to go on with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.trains = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the save at the epoch's end leaves itself out where the step is the same
        self._waits = self._ends_within_epoch(trainer) and _validates_after(trainer, batch_idx)
        if self._ends_within_epoch(trainer) and not self._waits:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what stops by a validation's result says so in there, and checkpoints come last
        self._waits = self._waits or (self.trains and self._ends_within_epoch(trainer))
        super().on_validation_end(trainer, pl_module)

    def _ends_within_epoch(self, trainer: Trainer) -> bool:
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        return (stops or trainer.global_step == trainer.max_steps) and not trainer.is_last_batch

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # all are at the same place where the run is stopped by a signal (``StopTogether``); a second Ctrl-C may come in
        # the middle of an optimiser step
        agreed = isinstance(exception, SIGTERMException)
        if self.trains and (agreed or (trainer.world_size == 1 and isinstance(exception, Exception))):
            super().on_exception(trainer, pl_module, exception)


class StepCheckpoint(_WithinEpoch):
    """Saves every so many steps, but not where Lightning could not go on exactly.

    Not between two batches whose gradients are added up, which it would lose; and not after an epoch's last batch: at
    an epoch's end another callback saves.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._waits = False
        within_step = (batch_idx + 1) % trainer.accumulate_grad_batches
        if trainer.is_last_batch or within_step:
            return
        if _validates_after(trainer, batch_idx):
            self._waits = trainer.global_step % self._every_n_train_steps == 0
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _validates_after(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch; batches are counted over epochs without ``check_val_every_n_epoch``."""
    every, every_n_epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not isinstance(every, int):
        return False
    if every_n_epochs is None:
        due = (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % every == 0
    else:
        due = (trainer.current_epoch + 1) % every_n_epochs == 0 and (batch_idx + 1) % every == 0
    return due and _has_validation(trainer)


def _has_validation(trainer: Trainer) -> bool:
    if trainer.val_dataloaders is not None:
        return any(trainer.num_val_batches)
    # Lightning asks for the data in the first epoch that validates, when it does
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return trainer.enable_validation and bool(source.dataloader())


class CheckedCheckpointIO(TorchCheckpointIO):
    """Write atomically; refuse what is truncated, changed, or holds more than tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one file; what stood there before stays until the new one is whole."""
        if storage_options is not None:
            raise TypeError("a checkpoint is written to a local path, without storage_options")
        write_atomic(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is always on.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it is damaged or not one.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no checkpoint {file}")
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch itself does not compare the checksums that it wrote
            if damaged is not None:
                raise ValueError(f"{file} is damaged (checksum of {damaged}); resume from another checkpoint")
            checkpoint: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True)
        except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise ValueError(f"{file} is truncated or no checkpoint ({error}); resume from another one") from error
        except pickle.UnpicklingError as error:
            raise ValueError(f"{file} holds more than tensors and plain values, so it is not read") from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{file} is no checkpoint of a run: it has no state_dict")
        return checkpoint


def last_checkpoint(run: Path) -> Path | None:
    """What a run goes on from unless told otherwise; None where it has none."""
    last = run / "checkpoints" / "last.ckpt"
    return last if last.is_file() else None


def existing_checkpoint(given: str, run: Path) -> str:
    """The path of a checkpoint that is given as ``ckpt_path``: a file, or ``last`` or ``best`` of the run's folder.

    Raises:
        FileNotFoundError: where it is none; for a folder it names the checkpoints in there.
    """
    named = sorted((run / "checkpoints").glob(f"{given}*.ckpt")) if given in ("last", "best") else []
    if named:
        return str(named[-1])
    path = Path(given)
    if path.is_file():
        return given
    there = sorted(map(str, path.rglob("*.ckpt"))) if path.is_dir() else []
    hint = f"it is a folder; in it: {', '.join(there[:5])}" if there else f"looked from {Path.cwd()}"
    raise FileNotFoundError(f"no checkpoint ckpt_path={given} ({hint})")


def check_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse the weights of another model than the one that is to take them.

    Raises:
        ValueError: naming the first that differ.
    """
    differing = [
        f"{name} ({_size(found.get(name))} there, {_size(expected.get(name))} here)"
        for name in sorted({*found, *expected})
        if _size(found.get(name)) != _size(expected.get(name))
    ]
    if differing:
        raise ValueError(
            f"the checkpoint holds weights of another model; {len(differing)} differ, such as "
            f"{', '.join(differing[:2])}. Give model.embedder, model.lora and model.loss as in its run's config.yaml"
        )


def _size(weight: torch.Tensor | None) -> str:
    return "none" if weight is None else "x".join(map(str, weight.shape)) or "a number"


def begin_validation_anew(checkpoint: dict[str, Any], *, cut_short: bool) -> None:
    """Let a validation that was cut short run from its beginning, once the run goes on from there.

    Lightning goes by counts of batches since the epoch began: where one was begun and not done it goes on in the
    middle, without what came before, and elsewhere it leaves the validation out.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.val_loop.batch_progress")
    if progress is not None:
        progress["current"] |= dict.fromkeys(progress["current"], 0)
        done = 0 if cut_short else 1
        progress["total"] |= {"ready": 1, "started": 1, "processed": done, "completed": done}


def best_checkpoint(trainer: Trainer) -> str | None:
    """The file that a run keeps as its best by validation; None where it keeps none."""
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.monitor and keeper.best_model_path:
        return str(keeper.best_model_path)
    return None
