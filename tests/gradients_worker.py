"""A batch, a model and its gradients, in any number of processes, which import this anew and no library of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from b3_lightning.model.contrast import contrast_batch
from b3_lightning.model.distributed import average_gradients
from b3_lightning.model.gradcache import GradCache
from b3_lightning.model.loss import LossSettings

N_ROWS = 12
SIDES = ("query", "target", "negative")
SETTINGS = LossSettings(temperature=0.1, symmetric=True, mask_margin=0.3, hardness=2.0, matryoshka_dims=[3])


class Bag(nn.Module):
    """Texts as rows of word ids padded with 0, of uneven lengths; dropout, so that random numbers matter."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 8, padding_idx=0)
        self.out = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6))
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        hidden: Tensor = self.out(self.words(words).sum(dim=1) / (words > 0).sum(dim=1, keepdim=True))
        return hidden


def texts(n_texts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 50, (n_texts, 7), generator=generator)
    length = torch.randint(1, 8, (n_texts, 1), generator=generator)
    return words * (torch.arange(7) < length)


def batch_of(rank: int, world_size: int, *, sparse: bool = False) -> dict[str, Tensor]:
    """This process's share of 12 rows with 2 hard negatives each, some of them lacking, and rows to be left out.

    ``sparse``: the second half of the rows has no hard negative.
    """
    masked = torch.full((N_ROWS, 2), -1)
    masked[3], masked[8] = torch.tensor([3, 0]), torch.tensor([100, -1])
    negative = torch.arange(100, 100 + 2 * N_ROWS)
    negative[5] = -1
    if sparse:
        negative[N_ROWS:] = -1
    whole = {
        "query": texts(N_ROWS, 1),
        "target": texts(N_ROWS, 2),
        "negative": texts(2 * N_ROWS, 3),
        "row_B": torch.arange(N_ROWS),
        "query_key_B": torch.arange(N_ROWS) // 2,
        "target_key_B": torch.arange(N_ROWS) // 3,
        "group_key_B": torch.where(torch.arange(N_ROWS) % 5 == 0, 0, -1),
        "negative_row_N": negative,
        "negative_query_key_N": negative,
        "negative_target_key_N": torch.where(negative % 7 == 0, 1, negative),
        "negative_group_key_N": torch.where(negative % 11 == 0, 0, -1),
        "masked_BM": masked,
    }
    return {name: values.chunk(world_size)[rank] for name, values in whole.items()}


def loss_of(vectors: list[Tensor], batch: dict[str, Tensor], rank: int) -> Tensor:
    query, target, negative = vectors
    about: dict[str, Any] = {"settings": SETTINGS, "temperature": SETTINGS.temperature, "rank": rank}
    return contrast_batch(query, target, negative, batch, **about)[0]


def backward_of(model: nn.Module, rank: int, world_size: int, chunk: int | None, *, sparse: bool) -> None:
    batch = batch_of(rank, world_size, sparse=sparse)
    cache = None if chunk is None else GradCache(lambda features: model(features["words"]))

    def embed(words: Tensor) -> Tensor:
        parts = words.split(chunk or len(words))
        vectors = [model(part) if cache is None else cache.encode({"words": part}) for part in parts]
        return F.normalize(torch.cat(vectors), dim=1)

    vectors = [embed(batch[side]) for side in SIDES[:2]]
    there = bool((batch["negative_row_N"] >= 0).any())
    vectors.append(embed(batch["negative"]) if there else vectors[0].new_zeros(len(batch["negative"]), 6))
    loss_of(vectors, batch, rank).backward()
    if cache is not None:
        cache.backward()
        average_gradients(model.parameters())


WAYS_OVER_PROCESSES: list[tuple[int | None, bool]] = [(None, False), (3, False), (None, True), (3, True)]
"""Chunk, and whether some processes have few hard negatives or none."""


def train_in_process(rank: int, world_size: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for way, (chunk, sparse) in enumerate(WAYS_OVER_PROCESSES):
        plain = Bag(dropout=0.0)
        model: nn.Module = plain if chunk is not None else nn.parallel.DistributedDataParallel(plain)
        backward_of(model, rank, world_size, chunk, sparse=sparse)
        torch.save([parameter.grad for parameter in plain.parameters()], Path(folder) / f"gradient-{way}-{rank}.pt")
    dist.barrier()  # all are done before the first takes its connections down
    dist.destroy_process_group()
