"""Read a W&B run from the ``.wandb`` file that it leaves, synced or not.

The file is a LevelDB log of protocol buffers: a header of 7 bytes, then blocks of 32 KiB that hold pieces of records,
each with checksum, length and kind. wandb 0.31 ships the message classes, but no reader in Python any more.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 2**15
_PIECE = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineRun:
    """A run's name, its settings (nested), and one dict of values for every call that logged."""

    name: str
    config: dict[str, Any]
    history: list[dict[str, Any]]


def read_offline_run(path: Path) -> OfflineRun:
    """Read a ``run-ID.wandb`` file; what a killed run left unfinished at its end is not there yet and is left out.

    Raises:
        ValueError: where the file is none of W&B's or is damaged.
    """
    from wandb.proto import wandb_internal_pb2

    name = path.stem
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for payload in _records(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name or record.run.run_id
        if kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            for item in update:
                config[item.key or ".".join(item.nested_key)] = _value(item.value_json)
        elif kind == "history":
            history.append(_row(record.history.item))
    return OfflineRun(name, config, history)


def _row(items: Any) -> dict[str, Any]:
    """Values by name; of a picture, table or page the parts as a dict under its one name."""
    row: dict[str, Any] = {}
    for item in items:
        name, *inner = item.nested_key or [item.key]
        value = _value(item.value_json)
        if inner:
            row.setdefault(name, {})[".".join(inner)] = value
        else:
            row[name] = value
    return row


def _value(text: str) -> Any:
    value = json.loads(text)
    # W&B writes what JSON lacks as words
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def is_number(value: Any) -> TypeGuard[float]:
    """Is it a figure, and not a picture or a table?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _records(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    if not content.startswith(_HEADER):
        raise ValueError(f"{path} is not a file of W&B (it begins with {content[:7]!r})")
    place, parts = len(_HEADER), b""
    while place + _PIECE.size <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _PIECE.size:
            place += left
            continue
        checksum, length, kind = _PIECE.unpack_from(content, place)
        start, place = place + _PIECE.size, place + _PIECE.size + length
        if place > len(content):
            return
        piece = content[start:place]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(
                f"{path} is damaged at byte {start - _PIECE.size}: copy it again, or name metrics.csv's run"
            )
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts
