"""How processes end: at once on SIGTERM, where files are their checkpoints; with, or by, the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_WATCHER = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
watched, message, *others = sys.argv[1:]
while os.getppid() == int(watched):
    time.sleep(0.05)
for other in others:
    try:
        os.kill(int(other), signal.SIGKILL)
    except ProcessLookupError:
        pass
if sys.stdout.isatty():
    sys.stdout.write("\\x1b[?25h\\n")  # a progress bar hides the cursor
sys.stderr.write(message + "\\n")
"""
"""Outlives the process that it watches; needs nothing but the standard library, so it is there in 20 ms."""


@contextmanager
def ends_at_once(
    message: str, *, others: Sequence[int] = (), tells: bool = True, due: int | None = None
) -> Iterator[None]:
    """Let SIGTERM end this process within the block, whatever it is in the middle of, with the system's exit status.

    Ctrl-C is a KeyboardInterrupt there, as anywhere in Python: where someone sits, a notebook may hold more than this.

    A handler in Python would not do: Python calls it between two steps of its own, and a process may be in one step for
    minutes (a partitioner, waiting for another process). So the system ends the process, and a small watcher says so,
    whatever the signal was. Only files that are written whole or not at all may be open.

    Args:
        message: to say on standard error.
        others: ids of processes that this one started for the same work, which the watcher kills.
        tells: whether there is a watcher; without one, nothing is said and the ``others`` stay.
        due: a signal that came before, and was noted only: it ends the process here.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are not its business
        yield
        return
    watcher = None
    if tells:
        command = [sys.executable, "-ISc", _WATCHER, str(os.getpid()), message, *map(str, others)]
        watcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    # the system spares the first process of a container, unless that has a handler
    before = signal.signal(signal.SIGTERM, _end if os.getpid() == 1 else signal.SIG_DFL)
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt):  # else it is ignored, or ends the process
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if due is not None:
            signal.raise_signal(due)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if callable(interrupt):
            signal.signal(signal.SIGINT, interrupt)
        if watcher is not None:
            watcher.kill()
            watcher.wait()


def end_with_parent() -> None:
    """Let this process end within a second or so of the one that started it, whatever it waits for."""
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(128 + signal.SIGTERM)


def end_by_parent_alone(worker: int) -> None:
    """Spare a process that loads data a SIGTERM or Ctrl-C that its whole group gets: the one that it loads for ends it.

    Args:
        worker: its number; torch calls this as ``worker_init_fn``.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        threading.Thread(target=_heed_parent, args=(os.getppid(),), daemon=True).start()


def _heed_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)
