"""SLURM jobs that are queued again: who asks for it, and that the same command then goes on with its run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from b3_lightning.checkpoints import existing_checkpoint, last_checkpoint

log = logging.getLogger(__name__)


class Requeue(Callback):
    """Queue the SLURM job again when it is told that its time ends (``#SBATCH --signal=SIGUSR1@300``).

    In place of Lightning's handler of that signal, which saves a checkpoint wherever the processes are, in the middle
    of a step too, from where none goes on exactly, and lets them wait there for each other. Nothing is saved here:
    SLURM ends a job that is queued again by SIGTERM, and what is lost then ``run.checkpoint_every_n_steps`` limits.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._process = os.getpid()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        environment: Any = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        number = environment.requeue_signal
        if number is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(number) in (None, signal.SIG_DFL):  # another's, such as submitit's, stays
            signal.signal(number, self._on_signal if trainer.is_global_zero else signal.SIG_IGN)
            self._signal = number

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._signal is not None:
            signal.signal(self._signal, signal.SIG_DFL)
            self._signal = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # SLURM tells every process of the job, and those that load data have inherited this handler
        if os.getpid() == self._process:
            threading.Thread(target=queue_again).start()  # not here, where this thread may be about to write a line


def queue_again() -> None:
    """Have SLURM end this job and start it again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    log.info("SLURM says that the time of job %s ends: it is queued again", job)
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        why = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        why = str(error)
    if why:
        log.warning("SLURM does not queue job %s again: %s", job, why)


def where_to_begin(folder: Path, settings: str, given: str | None) -> str | None:
    """The checkpoint that a run begins from: the one given, or, where SLURM started its job again, its own last one.

    Args:
        folder: of the run.
        settings: of the run, as ``config.yaml`` holds them: only a run of the same settings is the job's own.
        given: ``ckpt_path``.

    Returns:
        None where it begins from nothing.

    Raises:
        FileNotFoundError: where the checkpoint that is given does not exist.
        ValueError: where the folder holds another run, or the checkpoint is of a run in another, with its own plans.
    """
    if given is not None:
        path = existing_checkpoint(given, folder)
        other = _run_of(Path(path))
        if other is not None and (other / "plans").is_dir() and not _has_plans_of(folder, Path(path)):
            raise ValueError(
                f"ckpt_path={given} goes on with the plans of its run, and run.dir={folder} is another: set "
                f"--run.dir={other}, or begin anew from its export: --model.embedder={other / 'export'}"
            )
        return path
    if not holds_run(folder):
        return None
    last, restart = last_checkpoint(folder), os.environ.get("SLURM_RESTART_COUNT", "0")
    if restart != "0" and _same_settings(folder / "config.yaml", settings):
        if last is not None:
            log.info("SLURM started this job again (restart %s): it goes on from %s", restart, last)
            return str(last)
        if not any(folder.rglob("*.ckpt")):
            log.info("SLURM started this job again (restart %s): no checkpoint yet, so it starts anew", restart)
            return None
    how = f"or go on with it: --ckpt_path={last}" if last is not None else "or remove it: it has no last checkpoint"
    raise ValueError(f"run.dir={folder} holds another run; set --run.dir to a new folder, {how}")


def holds_run(folder: Path) -> bool:
    """Did a run train here? One that only mined so far begins with the same command again."""
    return any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "export"))


def _run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, where it lies as ``fit`` left it."""
    run = checkpoint.absolute().parent.parent
    return run if checkpoint.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def _has_plans_of(folder: Path, checkpoint: Path) -> bool:
    """Is the checkpoint this folder's own, or are there plans here, which are compared with its own later?"""
    return (folder / "plans").is_dir() or (folder / "checkpoints").resolve() == checkpoint.resolve().parent


def _same_settings(path: Path, settings: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == settings
