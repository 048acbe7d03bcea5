"""Mistakes as users meet them: what is said instead of a usage of 200 lines or a traceback."""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch.distributed import DistError

from b3_lightning.callbacks import Remine
from b3_lightning.callbacks.export import is_export
from b3_lightning.callbacks.requeue import holds_run
from b3_lightning.checkpoints import last_checkpoint
from b3_lightning.data import PairsDataModule, PairSource
from b3_lightning.data.pairs import TeacherPrompts
from b3_lightning.mining import MinedPlan, MiningSettings
from b3_lightning.model.embedder import LoadSettings, LoraSettings, SmallEmbedder
from b3_lightning.options import COMMAND, as_known, nearest
from b3_lightning.reports.compare import SHOWN
from b3_lightning.stopping import noted_signal, started_processes
from b3_lightning.types import ChunkSettings

log = logging.getLogger(__name__)


_NESTED: tuple[Any, ...] = (PairSource, TeacherPrompts, LoraSettings, LoadSettings, SmallEmbedder, ChunkSettings)
"""Settings that are given as one value."""


class Parser(LightningArgumentParser):
    """Tells a wrong setting in a line or two, with the settings whose names come near; takes dashes for underscores."""

    _reading: Any = None
    """The file that is being read: what is told of a mistake in its YAML names it."""

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else args
        return super().parse_args(as_known(given, self._option_string_actions), *others, **kwargs)

    def parse_path(self, path: Any, *others: Any, **kwargs: Any) -> Any:
        self._reading = path
        read = super().parse_path(path, *others, **kwargs)
        self._reading = None
        return read

    def add_lightning_class_args(self, lightning_class: Any, nested_key: str, *args: Any, **kwargs: Any) -> list[str]:
        """Add a class's arguments; what those of the data name are files of pairs, which are not read as settings."""
        if isinstance(lightning_class, type) and issubclass(lightning_class, L.LightningDataModule):
            added: list[str] = self.add_class_arguments(lightning_class, nested_key, fail_untyped=False)
            return added
        return list(super().add_lightning_class_args(lightning_class, nested_key, *args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [action.dest for action in parser._actions]
        unknown = re.search(r"does not accept \w+ '([\w.]+)'|recognized arguments: --([\w.-]+)", message)
        command = parser.prog.replace(" [options]", "")
        if unknown:
            name = unknown[1] or unknown[2]
            message = f"there is no setting {name}{nearest(name, known)}"
        key = re.fullmatch(r"Option '(\w+)[\w.]*' is not accepted", message)
        if key:  # of a parser for one value, which names neither the setting nor the command
            keys = dict.fromkeys(field.name for kind in _NESTED for field in fields(kind))
            message = f"no setting takes {key[1]!r}{nearest(key[1], keys)}"
        if not command.startswith(COMMAND):
            command = COMMAND
        absent = re.search(r"arguments are required: (\w+)\.(\w+)$", message)
        if absent:
            message, command = f"{absent[1]} needs --{absent[2]}", f"{COMMAND} {absent[1]}"
        message = _as_kind(_as_choice(message))
        if self._reading is not None:
            message = message.replace('"<unicode string>"', str(self._reading))
        sys.stderr.write(f"error: {message}\n{command} --help lists all\n")
        sys.exit(2)


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list, such as [1,2],",
    "collections.abc.Sequence": "a list, such as [1,2],",
}


def _as_choice(message: str) -> str:
    """What may be chosen, in a line, where jsonargparse lists every type that a value is not."""
    wrong = re.search(
        r'key "([\w.]+)":\n\s+Does not validate.*?Subtypes: ([^\n]*)\n.*Given value: ([^\n]*)', message, re.S
    )
    if wrong is None:
        return message
    name, types, value = wrong.groups()
    of_class = r"<class '([\w.]+)'>"
    kinds = sorted(re.findall(of_class, types), key="NoneType".__eq__)  # null, which versions list anywhere, last
    if "float" in kinds:
        kinds = [kind for kind in kinds if kind != "int"]  # which is a number too
    words = [(_KINDS | {"NoneType": "null"}).get(kind) for kind in kinds]
    if kinds != ["NoneType"] and all(words) and re.sub(of_class, "", types).strip("[], ") == "":
        return f"{name}={value.strip()}: {' or '.join(map(str, words))} is needed"
    literals = r"typing\.Literal\[([^]]*)\]"
    if re.sub(literals, "", types).strip("[], ") not in ("", "<class 'NoneType'>"):
        return message
    choices = dict.fromkeys(one for listed in re.findall(literals, types) for one in re.findall(r"[\w-]+", listed))
    return f"{name}={value} is none of {', '.join(choices)}"


def _as_kind(message: str) -> str:
    """What a value should be, in words instead of Python's types."""
    wrong = re.fullmatch(
        r"""(?:Parser )?key "([\w.]+)":\s+Expected a <class '([\w.]+)'>\. Got value: (.*)""", message, re.S
    )
    if wrong is None or wrong[2] not in _KINDS:
        return message
    return f"{wrong[1]}={wrong[3].strip()}: {_KINDS[wrong[2]]} is needed"


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuse GPUs that are not there.

    Raises:
        ValueError: saying what torch sees.
    """
    if accelerator not in ("gpu", "cuda"):
        return
    n_seen = torch.cuda.device_count()
    if n_seen == 0 and not torch.backends.mps.is_available():
        raise ValueError(
            f"trainer.accelerator={accelerator}, but torch {torch.__version__} sees no GPU: set "
            "--trainer.accelerator=cpu or auto, or mend driver, CUDA_VISIBLE_DEVICES or the torch build (nvidia-smi)"
        )
    if isinstance(devices, int) and devices > n_seen > 0:
        raise ValueError(f"trainer.devices={devices}, but torch sees {n_seen} GPUs: set --trainer.devices={n_seen}")


def check_monitors(trainer: L.Trainer, *, validates: bool) -> None:
    """Refuse callbacks that wait for a figure of the validation that is not there, such as EarlyStopping.

    Args:
        validates: whether there are validation pairs.

    Raises:
        ValueError: naming the figures.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and name.startswith("val/") and not (validates and name in SHOWN):
            there = f"there are {', '.join(SHOWN)}" if validates else "without data.val_pairs there is none"
            raise ValueError(f"{type(callback).__name__} monitors {name}: {there}")


def check_peers(subcommand: str, trainer: L.Trainer, run: Path, error: RuntimeError) -> None:
    """Where the error is that another process, which this one started, is gone: name that one in place of it.

    Raises:
        ChildProcessError: with how to go on.
    """
    processes = started_processes(trainer)
    if not processes or not (isinstance(error, DistError) or "gloo" in str(error)):
        return
    if noted_signal(trainer) == signal.SIGINT:  # the second Ctrl-C ended them, while this one waited for them
        tell_interrupted(subcommand, run)
        raise KeyboardInterrupt from error
    deadline = time.monotonic() + 2  # its connection breaks before the system counts it as ended
    while time.monotonic() < deadline and not any(process.poll() for process in processes):
        time.sleep(0.05)
    gone = [(process.returncode > 0, rank, process.returncode)
            for rank, process in enumerate(processes, start=1) if process.returncode]  # fmt: skip
    if not gone:
        return
    _, rank, status = min(gone)  # by a signal, before those that failed without it
    how = "failed, and said why" if status > 0 else f"was ended by {signal.Signals(-status).name}"
    memory = ", as the system does where memory runs out" if -status == signal.SIGKILL else ""
    goes_on = _goes_on(subcommand, run)
    raise ChildProcessError(
        f"the process of rank {rank}, of {len(processes) + 1}, {how}{memory}{f'; {goes_on}' if goes_on else ''}"
    ) from error


def tell_interrupted(subcommand: str, run: Path) -> None:
    """Say how a command goes on that Ctrl-C or SIGTERM ended."""
    goes_on = _goes_on(subcommand, run)
    if goes_on is not None:
        log.warning("ended by a signal: %s", goes_on)


def _goes_on(subcommand: str, run: Path) -> str | None:
    last = last_checkpoint(run)
    if subcommand == "fit" and last is not None:
        return f"--ckpt_path={last} goes on from there"
    if subcommand in ("mine", "plan") or (subcommand == "fit" and not holds_run(run)):
        return "what was finished is kept, and the same command goes on from there"
    return None


def tell_weights(ckpt_path: str | None, embedder: str | SmallEmbedder, run: Path, *, can_load: bool = True) -> None:
    """Say which weights are used: untrained ones by mistake would pass for a run that has learned nothing.

    Args:
        ckpt_path: whose weights take the place of the embedder's, if any.
        embedder: as set.
        run: the folder of the run, whose checkpoints or export are named where none was given.
        can_load: whether the command takes a checkpoint.
    """
    if ckpt_path is not None:
        log.info("weights: those of the checkpoint %s", ckpt_path)
    elif isinstance(embedder, str) and is_export(Path(embedder)):
        log.info("weights: those of the export %s", embedder)
    else:
        what = f"model.embedder={embedder} as loaded" if isinstance(embedder, str) else "random, of a small embedder"
        kept = sorted((run / "checkpoints").glob("*.ckpt"))  # the best comes before the last
        trained = f"--ckpt_path={kept[0] if kept else 'RUN/checkpoints/FILE.ckpt'}"
        if not can_load:
            trained = f"--model.embedder={run / 'export' if is_export(run / 'export') else 'RUN/export'}"
        log.warning("weights: %s, which no run has trained; those of a run: %s", what, trained)


def tell_idle(data: PairsDataModule, remine: Remine) -> None:
    """Warn of settings that random batches or a plan leave without effect: a baseline shares them with its rival."""
    given = {
        "data.mining": data.mining != MiningSettings(),
        "data.teacher": data.teacher != "student",
        "data.plan": data.plan_folder is not None,
        "data.mined_frac": bool(data.mined_frac),
        "remine": remine.enabled,
    }
    n_epochs = data.trainer.max_epochs if data.trainer is not None else None
    if data.batches == "b3" and remine.enabled and n_epochs is not None and 0 <= n_epochs <= remine.start_epoch:
        log.warning(
            "remine.start_epoch=%d lies beyond the last of trainer.max_epochs=%d epochs, counted from 0: %s",
            remine.start_epoch, n_epochs,
            "all train on random batches" if data.teacher == "student" and data.plan_folder is None
            else "nothing is mined again",
        )  # fmt: skip
    idle = [name for name, changed in given.items() if changed]
    if data.batches == "random" and idle:
        log.warning("data.batches=random mines nothing; without effect: %s", ", ".join(idle))
    elif data.plan_folder is not None and not remine.enabled:
        _tell_other_plan(data.mining, data.plan_folder)


def _tell_other_plan(mining: MiningSettings, folder: str) -> None:
    """Warn of settings of mining that somebody changed, where the plan was mined with others and stays."""
    planned, default = MinedPlan.settings_of(folder), MiningSettings()
    names = [field.name for field in fields(mining)]
    other = [name for name in names if getattr(mining, name) not in (getattr(planned, name), getattr(default, name))]
    if other:
        log.warning(
            "data.plan=%s was mined with %s: data.mining is without effect there, since nothing is mined again",
            folder,
            ", ".join(f"{name}={getattr(planned, name)}, not {getattr(mining, name)}" for name in other),
        )
