"""One process at a time in a folder; the system takes the lock from a process that was killed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout


class FolderLock:
    """A lock on a folder, which tells who has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file, self._holder = folder / ".lock", folder / ".holder.json"
        self._lock = FileLock(self._file)

    def take(self, *, seconds: float = -1) -> bool:
        """Make the folder where it is absent, and lock it.

        Args:
            seconds: to wait for another process that has it; -1 waits until it ends.

        Returns:
            False where another process still has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            return False
        self._holder.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}), encoding="utf-8")
        return True

    def holder(self) -> str:
        """Who has it, in words."""
        try:
            told = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"process {told['process']} on {told['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    def release(self, *, empty: bool = False) -> None:
        """Let others have it; without effect where it was not taken. With ``empty``, a folder without files goes."""
        if not self._lock.is_locked:
            return
        self._holder.unlink(missing_ok=True)
        if empty and [path.name for path in self.folder.iterdir()] == [self._file.name]:
            self._file.unlink()
            self.folder.rmdir()
        self._lock.release()
