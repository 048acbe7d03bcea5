"""Vectors for mining from a model, each distinct item encoded once; those that a user brings: vectors.py."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from b3_lightning.data.collate import Features, ItemCollator, PairDataset, Preprocess
from b3_lightning.data.pairs import Item, PairTable, TeacherPrompts
from b3_lightning.data.vectors import VECTOR_SUFFIXES, load_vectors
from b3_lightning.mining import Progress, fingerprint
from b3_lightning.mining.stages import Stage, Stages
from b3_lightning.mining.store import sha256, write_atomic
from b3_lightning.types import Embeddings, round_to_grid_

PART_ITEMS = 4096
"""Items a part of the encoding: what a killed run may lose."""
Embed = Callable[[list[Features]], Tensor]
"""Features of a batch -> (B, D) vectors on any device."""


@dataclass(frozen=True)
class PairEncoder:
    """Encodes queries and targets, each distinct content (text, image) once, long texts first.

    Args:
        contents: text and image content of every row, by side: what the vectors depend on beside the model.
        precision: of the trainer.
        batch_size: items embedded at once; padding differs with it, and so do the last bits.
        stages: keeps finished parts of ``PART_ITEMS`` items and shares them out over processes.
    """

    pairs: PairTable
    image_root: Path
    contents: Mapping[str, list[tuple[str, str]]]
    precision: str
    batch_size: int
    num_workers: int
    stages: Stages
    progress: Progress | None = None

    def encode(self, model: Any, embed: Embed, model_fingerprint: str) -> Embeddings:
        """The vectors that ``embed`` gives for what ``model`` preprocesses; its ``encoder_fingerprint`` names them."""
        # by content alone, as the fingerprint is: pictures may have got other names since parts were kept
        item_of = {
            of: item
            for side, contents in self.contents.items()
            for of, item in zip(contents, self.pairs.items(side), strict=True)
        }
        distinct = sorted(item_of, key=lambda of: (-len(of[0]), of))
        content = fingerprint(
            model=model_fingerprint,
            precision=self.precision,
            batch_size=self.batch_size,
            distinct=distinct,
        )
        stage = self.stages.stage("vectors", content)
        how = Encoding(self.image_root, self.batch_size, self.num_workers, progress=self.progress)
        position = {of: index for index, of in enumerate(distinct)}
        position_2N = torch.tensor([[position[of] for of in self.contents[side]] for side in ("query", "target")])
        n_parts = encode_parts(stage, [item_of[of] for of in distinct], model.preprocess, embed, how)
        if stage.folder is None:
            vector_2ND = join_parts(stage, n_parts)[position_2N]
            return Embeddings.from_arrays(vector_2ND[0], vector_2ND[1])
        return map_rows(stage, n_parts, position_2N)


@dataclass(frozen=True)
class Encoding:
    """How items become vectors.

    Args:
        batch_size: items embedded at once.
        part_items: of a part, which one process encodes and a killed run may lose.
        progress: told of every batch, as the stage ``label``.
    """

    image_root: Path
    batch_size: int
    num_workers: int
    part_items: int = PART_ITEMS
    progress: Progress | None = None
    label: str = "encoding"


def encode_items(stage: Stage, items: list[Item], preprocess: Preprocess, embed: Embed, how: Encoding) -> Tensor:
    """(U, D) vectors of items, on the CPU; parts that the stage has are not encoded again.

    Every process of the stage encodes its share and returns all.
    """
    return join_parts(stage, encode_parts(stage, items, preprocess, embed, how))


def encode_parts(stage: Stage, items: list[Item], preprocess: Preprocess, embed: Embed, how: Encoding) -> int:
    """Encode this process's share of the items into the stage; how many parts all of them make."""
    n_parts = math.ceil(len(items) / how.part_items)
    batches = _batches_of_parts(stage.missing(n_parts), len(items), how)
    loader = DataLoader(
        PairDataset(len(items)),
        batch_sampler=batches,
        num_workers=how.num_workers,
        collate_fn=ItemCollator(items, how.image_root, preprocess),
    )
    n_all, n_done = sum(len(batch) for batch in batches), 0
    vectors: list[Tensor] = []
    for positions, features in loader:
        vectors.append(embed(features).float().cpu())
        n_done += len(positions)
        if how.progress is not None:
            how.progress(how.label, n_done, n_all)
        last = int(positions[-1])
        if (last + 1) % how.part_items == 0 or last + 1 == len(items):
            stage.put(last // how.part_items, {"vector_UD": torch.cat(vectors)})
            vectors = []
    return n_parts


def join_parts(stage: Stage, n_parts: int) -> Tensor:
    """(U, D) the vectors of all parts."""
    return torch.cat([part["vector_UD"] for part in stage.collect(n_parts)])


def map_rows(stage: Stage, n_parts: int, position_2N: Tensor) -> Embeddings:
    """The vectors of every row's query and target, in one file beside the parts that all processes map.

    So a machine holds them once, however many processes it runs, and can drop what is not read just then. The first
    process writes the file anew each time, since only the parts have checksums.

    Args:
        position_2N: where in the parts the queries' and the targets' vectors lie.
    """
    assert stage.folder is not None
    path = stage.folder / "rows.npy"
    if stage.processes.rank == 0:
        write_atomic(path, lambda temporary: _write_rows(temporary, stage.collect(n_parts), position_2N))
    else:
        stage.processes.barrier()  # that of ``collect``
    stage.processes.barrier()
    return load_vectors(path)


def _write_rows(path: Path, parts: Iterator[dict[str, Tensor]], position_2N: Tensor) -> None:
    """Write (2, N, D) unit vectors, a part at a time; what cannot be scaled becomes NaN, which is refused when read."""
    sorted_2N, row_2N = (tensor.numpy() for tensor in position_2N.sort(dim=1))
    rows: Any = None
    begin = 0
    for part in parts:
        vector_PD = part["vector_UD"]
        unit_PD = round_to_grid_(vector_PD / vector_PD.norm(dim=1, keepdim=True)).numpy()
        if rows is None:
            shape = (*position_2N.shape, vector_PD.shape[1])
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        end = begin + len(vector_PD)
        for side in (0, 1):
            first, last = np.searchsorted(sorted_2N[side], [begin, end])
            rows[side, row_2N[side, first:last]] = unit_PD[sorted_2N[side, first:last] - begin]
        begin = end
    rows.flush()


def _batches_of_parts(parts: list[int], n_items: int, how: Encoding) -> list[list[int]]:
    """Positions in batches, none of which crosses the border of a part."""
    n, size = how.part_items, how.batch_size
    return [
        list(range(start, min(start + size, n_items, (part + 1) * n)))
        for part in parts
        for start in range(part * n, min((part + 1) * n, n_items), size)
    ]


def encoder_fingerprint(model: Any) -> str:
    """SHA-256 of all that decides a SentenceTransformer's vectors: weights, modules, tokenizers, image settings.

    Weights count with their dtype and wherever they lie; one at a time is held whole. Where they are cut over the
    processes, every process must call it.
    """
    files: dict[str, str] = {}
    attention = set()
    for name, module in model.named_modules():
        attention.add(str(getattr(getattr(module, "config", None), "_attn_implementation", "")))
        for kind in ("tokenizer", "processor"):
            tool: Any = getattr(module, kind, None)
            if hasattr(tool, "save_pretrained"):
                with tempfile.TemporaryDirectory(prefix="b3_lightning_") as folder:
                    tool.save_pretrained(folder)
                    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                        files[f"{name}.{kind}/{path.relative_to(folder)}"] = sha256(path)
            elif hasattr(tool, "to_str"):
                files[f"{name}.{kind}"] = tool.to_str()
    weights = {name: fingerprint(weight=_whole(weight)) for name, weight in model.state_dict().items()}
    about = {
        "modules": str(model),
        "attention": sorted(attention),
        "files": files,
        "prompts": model.prompts,
        "length": str(model.max_seq_length),
    }
    return fingerprint(about=about, weights=weights)


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def teacher_embed(teacher: Any, device: torch.device) -> Embed:
    """How a SentenceTransformer embeds, in evaluation mode on ``device``."""
    teacher.to(device).eval()

    @torch.inference_mode()
    def embed(features: list[Features]) -> Tensor:
        moved = move_data_to_device(features, device)
        vector_PD = torch.cat([teacher(dict(part.tensors))["sentence_embedding"] for part in moved])
        return vector_PD[torch.cat([part.position_P for part in moved]).argsort()]

    return embed


@contextmanager
def student_embed(trainer: Any) -> Iterator[Embed]:
    """How the model in training embeds, in evaluation mode, in the trainer's precision."""
    module = trainer.lightning_module

    @torch.no_grad()
    def embed(features: list[Features]) -> Tensor:
        with trainer.precision_plugin.forward_context():
            vectors: Tensor = module.embed(move_data_to_device(features, trainer.strategy.root_device))
        return vectors

    was_training = module.training
    module.eval()
    try:
        with module.whole_weights():  # the processes encode uneven shares
            yield embed
    finally:
        module.train(was_training)


def check_teacher(teacher: str, given: TeacherPrompts) -> None:
    """Refuse no teacher, and prompts for one that reads no texts, or that is the student and has its own."""
    if teacher in ("", "null", "None"):
        raise ValueError(
            f"data.teacher={teacher}: name a model, a file of vectors, or 'student'; see --data.batches=random"
        )
    if given != TeacherPrompts() and (teacher == "student" or teacher.endswith(VECTOR_SUFFIXES)):
        raise ValueError(
            f"data.teacher_prompts are without effect where data.teacher={teacher}: leave them out, or name a model. "
            "The student's are query_prompt and target_prompt of the sources"
        )
