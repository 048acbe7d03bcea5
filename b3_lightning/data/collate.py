"""Rows in, what the embedder eats out; runs in the loader's workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.modality import infer_modality
from torch import Tensor
from torch.utils.data import Dataset

from b3_lightning.data.images import load_image
from b3_lightning.data.pairs import Item, Modality, PairTable, modality_of

Preprocess = Callable[[Sequence[Any]], dict[str, Any]]
"""``SentenceTransformer.preprocess``: texts, images or dicts of both -> tensors."""


def model_input(item: Item, image_root: Path) -> Any:
    """What sentence-transformers takes: a text, an image, or ``{"text", "image"}``.

    A text that is nothing but a web address or a file name would be fetched and read as a picture by
    sentence-transformers; a space before it keeps it a text.
    """
    if not item.image:
        return item.text if infer_modality(item.text) == "text" else f" {item.text}"
    image = load_image(item.image, image_root)
    return {"text": item.text, "image": image} if item.text else image


class Features(NamedTuple):
    """One kind of input of a batch, ready for the embedder: which of the batch's positions, and their tensors."""

    position_P: Tensor
    tensors: dict[str, Any]


def prepare(items: Sequence[Item], image_root: Path, preprocess: Preprocess) -> list[Features]:
    """Load and preprocess items; texts, images and both go separately, since a model takes one kind at a time."""
    kinds: dict[Modality, list[int]] = {}
    for position, item in enumerate(items):
        kinds.setdefault(modality_of(item), []).append(position)
    return [
        Features(torch.tensor(positions), preprocess([model_input(items[i], image_root) for i in positions]))
        for positions in kinds.values()
    ]


class PairDataset(Dataset[int]):
    """Row ids; the collator does the work, once a batch."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> int:
        return row


class PairCollator:
    """Turn row ids into ``{"query", "target", "row_B", "query_key_B", "target_key_B"}``."""

    def __init__(self, pairs: PairTable, keys: Mapping[str, Tensor], image_root: Path, preprocess: Preprocess) -> None:
        self.items = {side: pairs.items(side) for side in ("query", "target")}
        self.keys, self.image_root, self.preprocess = keys, image_root, preprocess

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        row_B = torch.tensor(rows)
        batch: dict[str, Any] = {
            side: prepare([items[row] for row in rows], self.image_root, self.preprocess)
            for side, items in self.items.items()
        }
        keys = {f"{side}_key_B": key_N[row_B] for side, key_N in self.keys.items()}
        return batch | keys | {"row_B": row_B}


class ItemCollator:
    """Turn positions in a list of items into ``(positions, features)``, for encoding."""

    def __init__(self, items: Sequence[Item], image_root: Path, preprocess: Preprocess) -> None:
        self.items, self.image_root, self.preprocess = items, image_root, preprocess

    def __call__(self, positions: Sequence[int]) -> tuple[Tensor, list[Features]]:
        items = [self.items[position] for position in positions]
        return torch.tensor(positions), prepare(items, self.image_root, self.preprocess)
