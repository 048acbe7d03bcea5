"""Rows in, what the embedder eats out; runs in the loader's workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from sentence_transformers.base.modality import infer_modality
from torch import Tensor
from torch.utils.data import Dataset

from b3_lightning.data.images import load_image
from b3_lightning.data.pairs import Item, Modality, modality_of
from b3_lightning.data.splits import Split
from b3_lightning.mining import MinedPlan, keys_of
from b3_lightning.types import OF_FILE, PADDING, ROW_VALUES, ChunkSettings

Preprocess = Callable[[Sequence[Any]], dict[str, Any]]
"""``SentenceTransformer.preprocess``: texts, images or dicts of both -> tensors."""


def model_input(item: Item, image_root: Path) -> Any:
    """What sentence-transformers takes: a text, an image, or ``{"image", "text"}``.

    The image comes first, as VLM2Vec and B3 have it: the words of a causal model see only what stands before them.

    A text that is nothing but a web address or a file name would be fetched and read as a picture by
    sentence-transformers; a space before it keeps it a text.
    """
    if not item.image:
        return item.text if infer_modality(item.text) == "text" else f" {item.text}"
    image = load_image(item.image, image_root)
    return {"image": image, "text": item.text} if item.text else image


class Features(NamedTuple):
    """One kind of input of a batch, ready for the embedder: which of the batch's positions, and their tensors."""

    position_P: Tensor
    tensors: dict[str, Any]


def prepare(
    items: Sequence[Item], image_root: Path, preprocess: Preprocess, chunks: ChunkSettings | None = None
) -> list[Features]:
    """Load and preprocess items; texts, images and both go separately, since a model takes one kind at a time.

    With ``chunks``, each kind is cut further, items of like length together.
    """
    kinds: dict[Modality, list[int]] = {}
    for position, item in enumerate(items):
        kinds.setdefault(modality_of(item), []).append(position)
    found = []
    for positions in kinds.values():
        inputs = {position: model_input(items[position], image_root) for position in positions}
        if chunks is None:
            parts = [positions]
        elif chunks.items is not None:
            by_length = sorted(positions, key=lambda position: -len(items[position].text))
            parts = [by_length[start : start + chunks.items] for start in range(0, len(by_length), chunks.items)]
        else:
            assert chunks.tokens is not None
            parts = _by_tokens(positions, preprocess(list(inputs.values())), chunks.tokens)
        for part in parts:
            found.append(Features(torch.tensor(part), preprocess([inputs[position] for position in part])))
    return found


def _by_tokens(positions: Sequence[int], tensors: Mapping[str, Any], n_tokens: int) -> list[list[int]]:
    """Positions, longest first, in parts whose items times longest item is at most ``n_tokens``."""
    if "attention_mask" not in tensors or len(tensors["attention_mask"]) != len(positions):
        raise ValueError("model.chunks.tokens needs a model that counts tokens of every item; set model.chunks.items")
    lengths = dict(zip(positions, tensors["attention_mask"].sum(dim=1).tolist(), strict=True))
    parts: list[list[int]] = []
    for position in sorted(positions, key=lambda position: -lengths[position]):
        if not parts or lengths[parts[-1][0]] * (len(parts[-1]) + 1) > n_tokens:
            parts.append([])
        parts[-1].append(position)
    return parts


class PairDataset(Dataset[int]):
    """Row ids; the collator does the work, once a batch."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> int:
        return row


class Place(NamedTuple):
    """One hard negative: what it is, the row whose target it is (``OF_FILE`` for one of a file), its keys."""

    item: Item
    row: int
    query_key: int
    target_key: int
    group_key: int


class PairCollator:
    """Turn row ids into a batch.

    A batch is ``{"query", "target", "row_B", "query_key_B", "target_key_B", "group_key_B", "task"}``; with hard
    negatives ``negative`` and their rows and keys too (``negative_row_N``, -1 where one is lacking). ``known_BM`` are
    keys of ``KnownTargets``, where there are any, and ``masked_BM``, of any plan, those of targets that are likely
    right for a row; both padded with -1.

    Args:
        split: the rows.
        chunks: cuts what is preprocessed together.
        mined: the plan in use, with its hard negatives and masks.
        n_file_negatives: how many of a row's hard negatives in the pairs file are used.
    """

    def __init__(
        self,
        split: Split,
        image_root: Path,
        preprocess: Preprocess,
        *,
        chunks: ChunkSettings | None = None,
        mined: MinedPlan | None = None,
        n_file_negatives: int = 0,
    ) -> None:
        self.items = {side: split.pairs.items(side) for side in ("query", "target")}
        self.task_of = {name: task for task, name in enumerate(split.pairs.task_weights)}
        self.split, self.image_root, self.preprocess = split, image_root, preprocess
        self.chunks, self.mined, self.n_file_negatives = chunks, mined, n_file_negatives

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        row_B = torch.tensor(rows)
        batch: dict[str, Any] = {
            side: self._features([items[row] for row in rows]) for side, items in self.items.items()
        }
        batch |= {f"{side}_key_B": key_N[row_B] for side, key_N in self.split.keys.items()}
        if self.split.known:
            batch["known_BM"] = self.split.known[row_B]
        batch |= {"row_B": row_B, "task": self.task_of[self.split.pairs.tasks[rows[0]]]}
        places = self._file_places(rows)
        if self.mined is not None:
            batch["masked_BM"] = keys_of(self.mined.masked_ids(row_B), self.split.keys["target"])
            places += self._mined_places(self.mined.negative_NH[row_B].flatten().tolist())
        return batch | self._negatives(places) if places else batch

    def _features(self, items: Sequence[Item]) -> list[Features]:
        return prepare(items, self.image_root, self.preprocess, self.chunks)

    def _mined_places(self, rows: Sequence[int]) -> list[Place | None]:
        keys = [self.split.keys[name] for name in ("query", "target", "group")]
        return [
            None if row == PADDING else Place(self.items["target"][row], row, *(int(key_N[row]) for key_N in keys))
            for row in rows
        ]

    def _file_places(self, rows: Sequence[int]) -> list[Place | None]:
        places: list[Place | None] = []
        for row in rows:
            items, keys = self.split.pairs.negatives[row], self.split.negative_keys[row]
            own = [Place(item, OF_FILE, PADDING, key, PADDING) for item, key in zip(items, keys, strict=True)]
            own = own[: self.n_file_negatives]
            places += [*own, *[None] * (self.n_file_negatives - len(own))]
        return places

    def _negatives(self, places: Sequence[Place | None]) -> dict[str, Any]:
        """A lacking negative has a place and no vector, since every process must gather alike."""
        there_P = torch.tensor([index for index, place in enumerate(places) if place is not None], dtype=torch.int64)
        features = self._features([place.item for place in places if place is not None])
        placed = [Features(there_P[part.position_P], part.tensors) for part in features]
        about = torch.tensor([[PADDING] * len(ROW_VALUES) if place is None else place[1:] for place in places])
        names = [f"negative_{name}_N" for name in ROW_VALUES]
        return {"negative": placed, **dict(zip(names, about.unbind(1), strict=True))}


def move_batch(batch: Mapping[str, Any], device: torch.device, *, by_chunk: bool) -> dict[str, Any]:
    """A batch on a device; ``by_chunk`` leaves the features, all but their positions, for the model to move."""
    moved = {}
    for name, value in batch.items():
        waits = by_chunk and isinstance(value, list)
        moved[name] = (
            [Features(part.position_P.to(device), part.tensors) for part in value]
            if waits
            else move_data_to_device(value, device)
        )
    return moved


class ItemCollator:
    """Turn positions in a list of items into ``(positions, features)``, for encoding."""

    def __init__(self, items: Sequence[Item], image_root: Path, preprocess: Preprocess) -> None:
        self.items, self.image_root, self.preprocess = items, image_root, preprocess

    def __call__(self, positions: Sequence[int]) -> tuple[Tensor, list[Features]]:
        items = [self.items[position] for position in positions]
        return torch.tensor(positions), prepare(items, self.image_root, self.preprocess)
