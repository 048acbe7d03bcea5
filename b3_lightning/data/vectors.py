"""Vectors that a user brings in a file, checked against what is needed before anything is mined from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.torch import load_file

from b3_lightning.data.tables import is_list, read_file, unreadable
from b3_lightning.types import Embeddings, name_rows

VECTOR_SUFFIXES = (".npy", ".safetensors", ".parquet")
SIDES = ("query", "target")
_STACKED = "numpy.save(FILE, numpy.stack([query, target])) makes one"


def check_vectors(path: str, n_rows: int) -> Embeddings:
    """Read vectors from a file and refuse another number of rows; errors as of ``load_vectors``."""
    embeddings = load_vectors(Path(path))
    if len(embeddings) != n_rows:
        raise ValueError(
            f"{path} holds vectors of {len(embeddings)} rows, the pairs have {n_rows}: needed is one for each row, in "
            "the order of the pairs; embed these pairs anew"
        )
    return embeddings


def load_vectors(path: Path) -> Embeddings:
    """Read vectors: .npy of shape (2, N, D), queries first; .safetensors, .parquet with ``query`` and ``target``.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is truncated or damaged, of another kind or shape, or holds what is no vector.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of vectors {path} (looked from {Path.cwd()})")
    readers = dict(zip(VECTOR_SUFFIXES, (_read_npy, _read_safetensors, _read_parquet), strict=True))
    if path.suffix not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}; vectors are read from {', '.join(readers)}")
    query, target = readers[path.suffix](path)
    try:
        return Embeddings.from_arrays(query, target)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_npy(path: Path) -> tuple[Any, Any]:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise unreadable(path, error) from error
    if array.ndim != 3 or len(array) != 2:
        raise ValueError(
            f"{path} has shape {array.shape}; (2, rows, dimensions) is needed: queries, then targets. {_STACKED}"
        )
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {array.dtype}; numbers are needed, such as float32")
    return array[0], array[1]


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    missing = [name for name in SIDES if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it needs 'query' and 'target', each of shape (rows, dimensions)")
    return found["query"], found["target"]


def _read_parquet(path: Path) -> tuple[Any, Any]:
    table = read_file(path, SIDES)
    query, target = (_stacked(table[name].combine_chunks(), name, path) for name in SIDES)
    return query, target


def _stacked(column: pa.Array, name: str, path: Path) -> Any:
    """(N, D) of a column that holds a list of numbers a row."""
    numbers = (pa.types.is_floating, pa.types.is_integer)
    if not is_list(column.type) or not any(kind(column.type.value_type) for kind in numbers):
        raise ValueError(f"{path}: column {name!r} holds {column.type}; a list of numbers a row is needed: one vector")
    length_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(length_N != (length_N[0] if len(length_N) else 0))
    if len(odd):
        raise ValueError(
            f"{path}: column {name!r} has vectors of {length_N[0]} dimensions and of others, or none, in "
            f"{name_rows(odd.tolist())}; embed these again with one model"
        )
    # a copy, since torch takes no array that it may not write to
    return pc.list_flatten(column).to_numpy(zero_copy_only=False).reshape(len(column), -1).copy()
