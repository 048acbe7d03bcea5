"""Files that are whole or absent: written beside their place, flushed, then renamed; checked by SHA-256 when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}. What was finished before is kept: mend this and run again"
        raise OSError(error.errno, reason) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(*folders: Path) -> None:
    """Remove what a process that was killed had begun to write there: under the lock of whoever writes there now."""
    for folder in folders:
        for temporary in folder.glob(".*.tmp"):
            temporary.unlink()


def check_folder(folder: Path) -> None:
    """Refuse a folder's name that a file has, or a folder above it, before anything is computed for it."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{path} is a file, so nothing can be written into {folder}; name another folder")
            return


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, payload: bytes) -> None:
    """Write atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(payload)

    write_atomic(path, write)


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON atomically."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256(path: Path) -> str:
    """Checksum of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is missing or not what was written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; mine again, or copy the whole folder")
    if sha256(path) != expected:
        raise ValueError(f"{path} was changed or truncated after it was written (SHA-256 differs); mine again")
