"""A model that is evaluated, the processes that share its work, and the vectors of a set's items."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from b3_lightning.data.teacher import Embed, Encoding, encode_items, encoder_fingerprint, teacher_embed
from b3_lightning.evaluation.sets import EvalSet
from b3_lightning.mining import PATIENCE, Processes, Progress, Stages, fingerprint
from b3_lightning.mining.precision import tell_slow_bfloat16
from b3_lightning.model.embedder import LoadSettings, check_supports, load_embedder
from b3_lightning.model.fused import FusedEmbedder

log = logging.getLogger(__name__)

_PART_BATCHES = 4
_BOTH = ("image", "text")


@dataclass(frozen=True)
class EvalModel:
    """A SentenceTransformer in evaluation mode.

    Args:
        fingerprint: of its weights and all else that decides its vectors.
    """

    name: str
    embedder: Any
    embed: Embed
    fingerprint: str

    @classmethod
    def load(cls, path: str, load: LoadSettings, device: torch.device, *, fuse: bool = False) -> EvalModel:
        """Load from a folder or a hub name.

        Args:
            fuse: of an item with image and text that the model cannot take at once, add the unit vectors of both.

        Raises:
            FileNotFoundError: where a path is no folder.
        """
        if path.startswith((".", "/", "~")) and not Path(path).is_dir():
            raise FileNotFoundError(f"--model {path} is no folder (looked from {Path.cwd()})")
        if load.dtype == "bfloat16":
            tell_slow_bfloat16(device, "--dtype bfloat16", "float32")
        embedder: Any = load_embedder(path, load, None)
        if fuse and not embedder.supports(_BOTH):
            embedder = FusedEmbedder(embedder)
        return cls(path, embedder, teacher_embed(embedder, device), encoder_fingerprint(embedder))

    def tell_unused_prompts(self) -> None:
        """Warn of prompts that the model holds, since sets are encoded with those asked for alone."""
        own = {name: prompt for name, prompt in self.embedder.prompts.items() if prompt}
        if own:
            log.warning(
                "%s holds the prompts %s; here only --query_prompt and --target_prompt are put before texts",
                self.name,
                own,
            )

    def takes(self, eval_set: EvalSet) -> None:
        """Refuse a set with items that the model cannot take."""
        try:
            check_supports(self.embedder, self.name, eval_set.modalities())
        except ValueError as error:
            note = "; or, without texts before pictures, --no_target_prompts; or add the vectors of both: --fuse"
            both = _BOTH in eval_set.modalities()
            raise ValueError(f"{eval_set.name}: {error}{note if both else ''}") from error


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
        return {"model": self.model.fingerprint, "batch_size": self.batch_size}

    def encode(self, eval_set: EvalSet) -> Tensor:
        """(U, D) unit vectors of the set's items, on the CPU."""
        self.model.takes(eval_set)
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
        vector_UD = encode_items(stage, eval_set.items, self.model.embedder.preprocess, self.model.embed, how)
        return torch.nn.functional.normalize(vector_UD, dim=1)

    def forget(self) -> None:
        """Remove the parts of a finished set; by one process."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Those that torchrun started; elsewhere only this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
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
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"--device {wanted} cannot be used ({first}); cpu can, or leave it out") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
