"""Long stages in parts that outlive a killed run: each is a file, checked when it is read, computed by one process.

A stage lies in a folder named after its fingerprint: the content of all it depends on. So what is found there is
valid, and anything that changes leads to another folder. Under several processes each computes its share of the parts
into the folder, which all must see, and then reads them all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from b3_lightning.mining.lock import FolderLock
from b3_lightning.mining.store import remove_unfinished, write_bytes

log = logging.getLogger(__name__)

PATIENCE = timedelta(days=1)
"""How long a process waits for others; torch's half hour is shorter than one of them may mine alone."""

Tensors = dict[str, Tensor]
_PART_FORMAT = "1"
_BYTES_AT_ONCE = 2**26


class PeerError(ChildProcessError):
    """Another process failed in work that all share."""


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; ``all_true`` returns, when all have come to it, whether each brought True."""

    rank: int = 0
    world_size: int = 1
    all_true: Callable[[bool], bool] = bool

    def owns(self, part: int) -> bool:
        """Is this part computed here?"""
        return part % self.world_size == self.rank

    def barrier(self) -> None:
        """Wait for all.

        Raises:
            PeerError: where one of them failed instead of coming here.
        """
        if not self.all_true(True):
            raise PeerError("another process failed in work that all share; its own log says why")

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others, who wait at a barrier, of a failure in here, so that none of them waits for ever."""
        told = False
        try:
            yield
            told = True
        except PeerError:
            told = True
            raise
        finally:
            if not told:
                self.all_true(False)


class Stages:
    """Where finished parts are kept.

    Args:
        folder: of all stages; None keeps nothing, which only a single process can do.
        processes: that share the work.
    """

    def __init__(self, folder: Path | None = None, processes: Processes | None = None) -> None:
        self.folder, self.processes = folder, processes or Processes()
        if folder is None and self.processes.world_size > 1:
            raise ValueError(f"{self.processes.world_size} processes share their work through files: give a folder")

    def stage(self, name: str, fingerprint: str) -> Stage:
        """The stage of this content."""
        folder = None if self.folder is None else self.folder / f"{name}-{fingerprint[:16]}"
        return Stage(name, fingerprint, folder, self.processes)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one run at a time works in the folder; another waits, and says for whom."""
        if self.folder is None:
            yield
            return
        lock = FolderLock(self.folder)
        if self.processes.rank == 0:
            if not lock.take(seconds=0):
                log.warning("waiting: %s is in use by %s", self.folder, lock.holder())
                lock.take()
            remove_unfinished(*self.folder.glob("*/"))
        self.processes.barrier()
        try:
            yield
        finally:
            lock.release()


class Stage:
    """The parts of one stage; without a folder they are kept in memory."""

    def __init__(self, name: str, fingerprint: str, folder: Path | None, processes: Processes) -> None:
        self.name, self.fingerprint, self.folder, self.processes = name, fingerprint, folder, processes
        self._in_memory: dict[int, Tensors] = {}

    def missing(self, n_parts: int) -> list[int]:
        """The parts that this process has to compute: those of its share that are not there whole."""
        own = [part for part in range(n_parts) if self.processes.owns(part)]
        missing = [part for part in own if self._read(part) is None]
        if len(missing) < len(own):
            log.info("%s: %d of %d parts are finished in %s", self.name, len(own) - len(missing), len(own), self.folder)
        return missing

    def put(self, part: int, tensors: Tensors) -> None:
        """Keep a finished part."""
        if self.folder is None:
            self._in_memory[part] = tensors
            return
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"format": _PART_FORMAT, "fingerprint": self.fingerprint, "sha256": fingerprint(**tensors)}
        payload = save(tensors, metadata=about)
        write_bytes(self._path(part), payload)

    def collect(self, n_parts: int) -> Iterator[Tensors]:
        """All parts in order, once every process has done its share."""
        self.processes.barrier()
        for part in range(n_parts):
            tensors = self._read(part)
            if tensors is None:
                raise FileNotFoundError(
                    f"{self._path(part)} of another process is not there: all processes must see one folder"
                )
            yield tensors

    def each(self, n_parts: int, compute: Callable[[int], Tensors]) -> Iterator[Tensors]:
        """Compute what is missing, then collect; without a folder, compute each part when it is asked for."""
        if self.folder is None:
            return (compute(part) for part in range(n_parts))
        for part in self.missing(n_parts):
            self.put(part, compute(part))
        return self.collect(n_parts)

    def _path(self, part: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{part:06d}.safetensors"

    def _read(self, part: int) -> Tensors | None:
        if self.folder is None:
            return self._in_memory.get(part)
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError:
            tensors, about = {}, {}
        expected = {"format": _PART_FORMAT, "fingerprint": self.fingerprint, "sha256": fingerprint(**tensors)}
        if about != expected:
            log.warning("%s is truncated, changed or of another version: it is computed again", path)
            return None
        return tensors


def fingerprint(**content: Any) -> str:
    """SHA-256 of tensors (type, shape, bytes) and of anything that JSON can hold, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(content.items()):
        digest.update(f"{name}:".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            for rows in value.reshape(-1).split(_BYTES_AT_ONCE // value.element_size()):
                digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy())
        else:
            digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()
