"""A model that is evaluated, the processes that share its work, and the vectors of a set's items."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from b3_lightning.data.pairs import Item, modality_of
from b3_lightning.data.teacher import Embed, Encoding, encode_items, encoder_fingerprint, teacher_embed
from b3_lightning.evaluation.sets import EvalSet
from b3_lightning.mining import Processes, Progress, Stages, fingerprint
from b3_lightning.model.embedder import LoadSettings, check_supports, load_embedder

log = logging.getLogger(__name__)

_PART_BATCHES = 4
_BOTH = ("image", "text")


@dataclass(frozen=True)
class EvalModel:
    """A SentenceTransformer in evaluation mode.

    Args:
        fingerprint: of its weights and all else that decides its vectors.
        fuse: of an item with image and text that it cannot take at once, add the unit vectors of both.
    """

    name: str
    embedder: Any
    embed: Embed
    fingerprint: str
    fuse: bool = False

    @classmethod
    def load(cls, path: str, load: LoadSettings, device: torch.device, *, fuse: bool = False) -> EvalModel:
        """Load from a folder or a hub name.

        Raises:
            FileNotFoundError: where a path is no folder.
        """
        if path.startswith((".", "/", "~")) and not Path(path).is_dir():
            raise FileNotFoundError(f"--model {path} is no folder (looked from {Path.cwd()})")
        embedder = load_embedder(path, load, None)
        if embedder.default_prompt_name is not None:
            log.warning(
                "%s puts its prompt %r before texts by default; here only --query-prompt and --target-prompt are used",
                path,
                embedder.prompts[embedder.default_prompt_name],
            )
        about = encoder_fingerprint(embedder)
        fuse = fuse and not embedder.supports(_BOTH)
        return cls(path, embedder, teacher_embed(embedder, device), about, fuse)

    def takes(self, eval_set: EvalSet) -> None:
        """Refuse a set with items that the model cannot take."""
        unfit = eval_set.modalities() - ({_BOTH} if self.fuse else set())
        try:
            check_supports(self.embedder, self.name, unfit)
        except ValueError as error:
            note = "; or add the vectors of both: --fuse" if _BOTH in unfit and not self.fuse else ""
            raise ValueError(f"{eval_set.name}: {error}{note}") from error


@dataclass(frozen=True)
class Encoder:
    """Encodes a set's items, in parts that processes share and a killed run keeps.

    Args:
        folder: of unfinished work, which all processes must see.
    """

    model: EvalModel
    folder: Path
    processes: Processes
    batch_size: int
    num_workers: int
    progress: Progress | None = None

    def settings(self) -> dict[str, Any]:
        """What vectors depend on beside the items."""
        return {"model": self.model.fingerprint, "batch_size": self.batch_size, "fuse": self.model.fuse}

    def encode(self, eval_set: EvalSet) -> Tensor:
        """(U, D) unit vectors of the set's items, on the CPU."""
        self.model.takes(eval_set)
        items = eval_set.items
        if self.model.fuse:
            items = sorted({part for item in items for part in _halves(item)}, key=lambda item: (-len(item.text), item))
        stages = Stages(self.folder, self.processes)
        stage = stages.stage(eval_set.name, fingerprint(contents=eval_set.contents, **self.settings()))
        how = Encoding(
            eval_set.image_root,
            self.batch_size,
            self.num_workers,
            part_items=_PART_BATCHES * self.batch_size,
            progress=self.progress,
            label=eval_set.name,
        )
        vector_UD = encode_items(stage, items, self.model.embedder.preprocess, self.model.embed, how)
        if self.model.fuse:
            vector_UD = _fuse(vector_UD, items, eval_set.items)
        return torch.nn.functional.normalize(vector_UD, dim=1)

    def forget(self) -> None:
        """Remove the parts of a finished set; by one process."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _halves(item: Item) -> list[Item]:
    return [Item(item.text, ""), Item("", item.image)] if modality_of(item) == _BOTH else [item]


def _fuse(vector_PD: Tensor, parts: list[Item], items: list[Item]) -> Tensor:
    unit_PD = torch.nn.functional.normalize(vector_PD, dim=1)
    position = {part: index for index, part in enumerate(parts)}
    return torch.stack([unit_PD[[position[half] for half in _halves(item)]].sum(dim=0) for item in items])


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Those that torchrun started; elsewhere only this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), _all_true)
    finally:
        dist.destroy_process_group()


def _all_true(mine: bool) -> bool:
    told = torch.tensor(int(mine))
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)


def device_of(wanted: str | None) -> torch.device:
    """The device asked for; else this process's GPU, or the CPU where there is none."""
    if wanted is not None:
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
