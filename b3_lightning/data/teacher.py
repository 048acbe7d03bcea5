"""Vectors for mining: from a model (each distinct item encoded once), or from files that the user brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from b3_lightning.data.collate import Features, ItemCollator, PairDataset, Preprocess
from b3_lightning.data.pairs import PairTable
from b3_lightning.mining import Progress
from b3_lightning.types import Embeddings

VECTOR_SUFFIXES = (".npy", ".safetensors", ".parquet")
Embed = Callable[[list[Features]], Tensor]
"""Features of a batch -> (B, D) vectors on any device."""


def encode_pairs(
    pairs: PairTable,
    image_root: Path,
    *,
    preprocess: Preprocess,
    embed: Embed,
    batch_size: int,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Embeddings:
    """Encode queries and targets, each distinct (text, image) once, long texts first."""
    items = {side: pairs.items(side) for side in ("query", "target")}
    distinct = sorted(set(items["query"]) | set(items["target"]), key=lambda item: (-len(item.text), item))
    loader = DataLoader(
        PairDataset(len(distinct)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=ItemCollator(distinct, image_root, preprocess),
    )
    parts: list[Tensor] = []
    n_done = 0
    for positions, features in loader:
        parts.append(embed(features).float().cpu())
        n_done += len(positions)
        if progress is not None:
            progress("encoding", n_done, len(distinct))
    vector_UD = torch.cat(parts)
    position = {item: index for index, item in enumerate(distinct)}
    query, target = (vector_UD[[position[item] for item in items[side]]] for side in ("query", "target"))
    return Embeddings.from_arrays(query, target)


def load_vectors(path: Path) -> Embeddings:
    """Read vectors: .npy of shape (2, N, D), queries first; .safetensors, .parquet with ``query`` and ``target``."""
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.ndim != 3 or len(array) != 2:
            raise ValueError(f"{path} has shape {array.shape}; (2, rows, dimensions) is needed: queries, then targets")
        return Embeddings.from_arrays(array[0], array[1])
    if path.suffix == ".safetensors":
        found: dict[str, Any] = dict(load_file(path))
    else:
        table = pq.read_table(path)
        found = {name: np.stack(table[name].to_numpy()) for name in table.column_names if name in ("query", "target")}
    missing = [name for name in ("query", "target") if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it needs 'query' and 'target', one vector a row")
    return Embeddings.from_arrays(found["query"], found["target"])


def teacher_embed(teacher: Any, device: torch.device) -> Embed:
    """How a SentenceTransformer embeds, in evaluation mode on ``device``."""
    teacher.to(device).eval()

    @torch.inference_mode()
    def embed(features: list[Features]) -> Tensor:
        moved = move_data_to_device(features, device)
        vector_PD = torch.cat([teacher(dict(part.tensors))["sentence_embedding"] for part in moved])
        return vector_PD[torch.cat([part.position_P for part in moved]).argsort()]

    return embed
