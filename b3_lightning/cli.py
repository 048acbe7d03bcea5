"""The command line: which command is meant, what it logs, and what is told of a mistake.

What needs a trainer is imported when it is called: that takes seconds, which the other commands need not wait for.
"""

from __future__ import annotations

import difflib
import dis
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from b3_lightning.options import COMMAND
from b3_lightning.signals import end_with_parent
from b3_lightning.verbs import TRAINER_COMMANDS, VERBS, run_verb

OUT_OF_MEMORY = (
    "the GPU ran out of memory. Embed a batch in chunks, which keeps |B| as it is: --model.chunks.items=16 (smaller "
    "chunks need less); for validation and mining lower data.eval_batch_size; model.load.gradient_checkpointing=true, "
    "model.load.max_seq_length and --trainer.precision=bf16-mixed help too"
)


def main(args: list[str] | None = None) -> None:
    """Run one command; ``args`` default to those of the process."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent()  # another process of a run, which would wait for the first as long as one may mine
    given = list(sys.argv[1:] if args is None else args)
    show_log()
    try:
        check_command(given, [*TRAINER_COMMANDS, *VERBS])
        if given[0] in VERBS:
            run_verb(given[0], given[1:])
        else:
            from b3_lightning.lightning_cli import run_lightning

            run_lightning(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except _tellable() as error:
        message = told(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def check_command(given: Sequence[str], commands: Sequence[str]) -> None:
    """Refuse a command line that begins with an unknown command or none.

    Raises:
        ValueError: naming the commands.
    """
    listed = f"the commands are {', '.join(commands)}"
    words = [word for word in given if not word.startswith("-")]
    if not given:
        raise ValueError(f"name a command: {listed}. Begin with: {COMMAND} --help")
    if words and words[0] == given[0] and words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1)
        raise ValueError(f"there is no command {words[0]!r}{f'; did you mean {near[0]}?' if near else ''} ({listed})")


def _tellable() -> tuple[type[Exception], ...]:
    return (ValueError, OSError, RuntimeError, *_misconfigured())


def _misconfigured() -> tuple[type[Exception], ...]:
    """Lightning's own error of that kind, where Lightning is loaded: elsewhere nothing raises it."""
    kind = _loaded("lightning.fabric.utilities.exceptions", "MisconfigurationException", None)
    return () if kind is None else (kind,)


_OF_A_BLOCK = "Does not validate against any of the Union subtypes"
"""So jsonargparse begins where a block of settings that may be left out refuses its values."""


def told(error: Exception) -> str | None:
    """What to tell of an error in a line; None where it is a bug, whose traceback is wanted."""
    if isinstance(error, _loaded("torch", "OutOfMemoryError", ())):
        return f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})"
    if isinstance(error, ValueError) and str(error).startswith(_OF_A_BLOCK):
        causes: list[str] = re.findall(r"^  - (.*)", str(error), re.MULTILINE)
        return next((cause for cause in causes if "Expected a" not in cause), None)
    return str(error) if isinstance(error, _misconfigured()) or _is_ours(error) else None


def _is_ours(error: Exception) -> bool:
    """Does it come from a ``raise`` in this package? Then it tells of a mistake in settings or data, not of a bug."""
    if not isinstance(error, ValueError | OSError):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or not str(place.tb_frame.f_globals.get("__name__")).startswith("b3_lightning."):
        return False
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


class _ToStderr(logging.Handler):
    """Looks ``sys.stderr`` up for each line, since a live progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")

    def filter(self, record: logging.LogRecord) -> bool:
        """Only warnings from other processes than the first, as Lightning counts them under any launcher."""
        return record.levelno >= logging.WARNING or _rank() == 0


def _rank() -> int:
    counted = _loaded("lightning.fabric.utilities.rank_zero", "rank_zero_only", None)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0
    return int(rank if counted is None else counted.rank)


def _loaded(module: str, name: str, otherwise: Any) -> Any:
    """Something of a library, where that is loaded already."""
    return getattr(sys.modules.get(module), name, otherwise)


def show_log() -> None:
    """Show what the package logs: once, not from every process."""
    log = logging.getLogger("b3_lightning")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())
