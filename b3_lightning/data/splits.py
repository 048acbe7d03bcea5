"""One split of the data, read and checked: its pairs, and what tells whether two items are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from b3_lightning.data.images import CheckImages, ImageCheck, check_images
from b3_lightning.data.pairs import (
    TEXT_AND_IMAGE,
    Item,
    Modality,
    PairSource,
    PairTable,
    TeacherPrompts,
    load_pairs,
    modality_of,
    task_codes,
)
from b3_lightning.mining import KnownTargets, fingerprint, within_tasks
from b3_lightning.types import PADDING

Content = tuple[str, str]
Value = TypeVar("Value", Content, str)


@dataclass(frozen=True)
class Split:
    """Rows with their ``contents`` (text, image digest) by side, and ``keys`` (N,) of query, target and group.

    Equal contents share a key, and so do rows of a task's group; the key of a row without group is -1.

    ``negative_keys`` are of the hard negatives of the files, equal to a target's where they hold the same.
    """

    pairs: PairTable
    keys: dict[str, Tensor]
    contents: dict[str, list[Content]]
    negative_contents: list[list[Content]]
    negative_keys: list[list[int]]

    @classmethod
    def read(
        cls,
        sources: str | PairSource | Sequence[str | PairSource],
        image_root: Path,
        image_check: ImageCheck,
        check: CheckImages = check_images,
        n_negatives: int | None = None,
    ) -> Split:
        """Read and check files, columns and images.

        Args:
            n_negatives: at most so many hard negatives of a row are kept, and their images checked; all where absent.
            check: gives the images' digests; ``check_images`` or what spares opening some.

        Raises:
            FileNotFoundError: where a file is missing.
            ValueError: on anything wrong with rows or images.
        """
        pairs = load_pairs(sources, n_negatives)
        digests = check(pairs.image_paths(), image_root, how=image_check)
        contents = {side: [_content(item, digests) for item in pairs.items(side)] for side in TEXT_AND_IMAGE}
        codes: dict[str, dict[Content, int]] = {side: {} for side in contents}
        keys = {side: torch.tensor([_code(content, codes[side]) for content in contents[side]]) for side in contents}
        groups, of_groups = pairs.groups or [None] * len(pairs), dict[str, int]()
        group_N = torch.tensor([PADDING if group is None else _code(group, of_groups) for group in groups])
        keys["group"] = within_tasks(group_N, task_codes(pairs))
        negatives = [[_content(item, digests) for item in items] for items in pairs.negatives]
        negative_keys = [[_code(content, codes["target"]) for content in listed] for listed in negatives]
        return cls(pairs, keys, contents, negatives, negative_keys)

    def with_prompts(self, given: TeacherPrompts) -> Split:
        """The same rows as another model reads them; what is the same as what is still told by the rows' own texts."""
        pairs = self.pairs.with_prompts(given)
        contents = {
            side: [(item.text, digest) for item, (_, digest) in zip(pairs.items(side), own, strict=True)]
            for side, own in self.contents.items()
        }
        return replace(self, pairs=pairs, contents=contents)

    def modalities(self, n_file_negatives: int = 0) -> set[Modality]:
        """What the pairs hold: text, images, both in one item; the first few negatives of every row included."""
        found = {modality_of(item) for side in TEXT_AND_IMAGE for item in self.pairs.items(side)}
        return found | {modality_of(item) for items in self.pairs.negatives for item in items[:n_file_negatives]}

    @cached_property
    def known(self) -> KnownTargets:
        """Right answers of the rows that stand in other rows of their task, or among the files' hard negatives."""
        query_N = within_tasks(self.keys["query"], task_codes(self.pairs))
        negatives = torch.tensor([key for keys in self.negative_keys for key in keys], dtype=torch.int64)
        return KnownTargets([self.keys["target"], query_N, self.keys["group"]], elsewhere=negatives)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rows in their order: of all that mining and validation depend on.

        Hard negatives of the files are none of that, and a plan serves whatever number of them is trained on. Each row
        has an empty list instead, so that plans and ranks of before remain those of these pairs.
        """
        empty: list[list[str]] = [[]] * len(self.pairs)
        return fingerprint(tasks=self.pairs.tasks, groups=self.pairs.groups, negatives=empty, **self.contents)

    @cached_property
    def negatives_fingerprint(self) -> str:
        """SHA-256 of the hard negatives that are kept."""
        return fingerprint(negatives=self.negative_contents)


def _content(item: Item, digests: dict[str, str]) -> Content:
    return item.text, digests[item.image] if item.image else ""


def _code(value: Value, codes: dict[Value, int]) -> int:
    return codes.setdefault(value, len(codes))
