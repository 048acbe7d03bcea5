"""Gradients over processes, in chunks, or both, against those of the whole batch in one process."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from b3_lightning.data import PairsDataModule
from b3_lightning.data.collate import Features, prepare
from b3_lightning.data.pairs import Item
from b3_lightning.model import ContrastiveModule
from b3_lightning.model.contrast import contrast_batch
from b3_lightning.model.distributed import average_gradients
from b3_lightning.model.embedder import LoadSettings, LoraSettings, load_embedder
from b3_lightning.model.gradcache import GradCache, check_chunkable
from b3_lightning.model.loss import LossSettings
from b3_lightning.types import ChunkSettings

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


def _texts(n_texts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 50, (n_texts, 7), generator=generator)
    length = torch.randint(1, 8, (n_texts, 1), generator=generator)
    return words * (torch.arange(7) < length)


def _batch(rank: int, world_size: int, *, sparse: bool = False) -> dict[str, Tensor]:
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
        "query": _texts(N_ROWS, 1),
        "target": _texts(N_ROWS, 2),
        "negative": _texts(2 * N_ROWS, 3),
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


def _loss(vectors: list[Tensor], batch: dict[str, Tensor], rank: int) -> Tensor:
    query, target, negative = vectors
    about: dict[str, Any] = {"settings": SETTINGS, "temperature": SETTINGS.temperature, "rank": rank}
    return contrast_batch(query, target, negative, batch, **about)[0]


def _backward(model: nn.Module, rank: int, world_size: int, chunk: int | None, *, sparse: bool) -> None:
    batch = _batch(rank, world_size, sparse=sparse)
    cache = None if chunk is None else GradCache(lambda features: model(features["words"]))

    def embed(words: Tensor) -> Tensor:
        parts = words.split(chunk or len(words))
        vectors = [model(part) if cache is None else cache.encode({"words": part}) for part in parts]
        return F.normalize(torch.cat(vectors), dim=1)

    vectors = [embed(batch[side]) for side in SIDES[:2]]
    there = bool((batch["negative_row_N"] >= 0).any())
    vectors.append(embed(batch["negative"]) if there else vectors[0].new_zeros(len(batch["negative"]), 6))
    _loss(vectors, batch, rank).backward()
    if cache is not None:
        cache.backward()
        average_gradients(model.parameters())


WAYS_OVER_PROCESSES: dict[int, list[tuple[int | None, bool]]] = {
    2: [(None, False), (5, False), (None, True), (5, True)],
    3: [(None, False)],
}
"""By number of processes: chunk, and whether one process has no hard negative."""


def _worker(rank: int, world_size: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for way, (chunk, sparse) in enumerate(WAYS_OVER_PROCESSES[world_size]):
        plain = Bag(dropout=0.0)
        model: nn.Module = plain if chunk is not None else nn.parallel.DistributedDataParallel(plain)
        _backward(model, rank, world_size, chunk, sparse=sparse)
        torch.save([parameter.grad for parameter in plain.parameters()], Path(folder) / f"gradient-{way}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_over_processes_equal_those_of_the_whole_batch(world_size: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, (world_size, port, str(tmp_path)), nprocs=world_size)
    for way, (_, sparse) in enumerate(WAYS_OVER_PROCESSES[world_size]):
        model = Bag(dropout=0.0)
        _backward(model, 0, 1, None, sparse=sparse)
        for rank in range(world_size):
            found = torch.load(tmp_path / f"gradient-{way}-{rank}.pt", weights_only=True)
            _assert_equal(model, found, 1e-10)


def _assert_equal(model: nn.Module, gradients: list[Any], tolerance: float) -> None:
    """Relative to the largest gradient: that of a key's bias is 0 but for rounding."""
    expected = [parameter.grad for parameter in model.parameters()]
    assert [gradient is None for gradient in expected] == [found is None for found in gradients]
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    assert largest > 0
    for gradient, found in zip(expected, gradients, strict=True):
        assert gradient is None or float((gradient - found).abs().max()) < tolerance * largest


def test_chunks_repeat_the_random_numbers_of_dropout() -> None:
    whole, chunked = Bag(dropout=0.5), Bag(dropout=0.5)
    torch.manual_seed(7)
    batch = _batch(0, 1)
    vectors = [F.normalize(torch.cat([whole(part) for part in batch[side].split(5)]), dim=1) for side in SIDES]
    _loss(vectors, batch, 0).backward()
    after = torch.rand(1)
    torch.manual_seed(7)
    _backward(chunked, 0, 1, 5, sparse=False)
    assert torch.equal(torch.rand(1), after)  # the second pass leaves the generator where the first did
    _assert_equal(whole, [parameter.grad for parameter in chunked.parameters()], 1e-12)


KINDS = {
    "bert": [Item("a red circle", ""), Item("x", ""), Item("the blue bar and a circle", ""), Item("0123 0123", "")],
    "clip": [
        *(Item("", f"{index:03d}.png") for index in range(4)),
        *(Item(text, "") for text in ("a red circle", "the bar", "0123", "a blue square on white")),
    ],
    "vl": [
        Item("", "000.png"),
        *(Item(text, f"{len(text):03d}.png") for text in ("what colour", "the shape", "which of these", "0")),
        *(Item(text, "") for text in ("a bar", "a large blue square")),
    ],
}


WAYS = [
    *((kind, ChunkSettings(items=3)) for kind in ("bert", "clip", "siglip", "qwen2_vl", "qwen2_5_vl", "internvl")),
    *((kind, ChunkSettings(tokens=12)) for kind in ("bert", "qwen2_vl")),
    ("qwen2_vl-lora", ChunkSettings(items=1)),
    ("qwen3_vl", ChunkSettings(items=1)),
]


@pytest.mark.parametrize(("kind", "chunks"), WAYS)
def test_every_kind_of_model_in_chunks(kind: str, chunks: ChunkSettings, models: dict[str, str], shapes: Path) -> None:
    name = kind.removesuffix("-lora")
    load = LoadSettings(pooling="lasttoken" if name.endswith("vl") else None)
    lora = LoraSettings(r=2, dropout=0.0) if kind.endswith("-lora") else None
    items = KINDS.get(name, KINDS["vl" if name.endswith("vl") else "clip"])
    model = load_embedder(models[name], load, lora).eval()
    gradients = []
    for cut in (None, chunks):
        model.zero_grad()
        cache = None if cut is None else GradCache(lambda tensors: model(dict(tensors))["sentence_embedding"])
        features = prepare(items, shapes, model.preprocess, cut)
        assert cut is None or len(features) > len({str(item.image != "") for item in items})
        vectors = _embed(model, features, cache)
        (
            vectors @ _embed(model, prepare(items[::-1], shapes, model.preprocess, cut), cache).T
        ).square().sum().backward()
        if cache is not None:
            cache.backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for parameter, expected in zip(model.parameters(), gradients[0], strict=True):
        parameter.grad = expected
    _assert_equal(model, gradients[1], 1e-5)


def _embed(model: SentenceTransformer, features: list[Any], cache: GradCache | None) -> Tensor:
    encode = cache.encode if cache is not None else lambda tensors: model(dict(tensors))["sentence_embedding"]
    vector_PD = torch.cat([encode(tensors) for _, tensors in features])
    return vector_PD[torch.cat([position for position, _ in features]).argsort()]


def test_batch_normalisation_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"batch normalisation \(1 and 0 other layers\)"):
        check_chunkable(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


@pytest.mark.parametrize("wrong", [{}, {"items": 2, "tokens": 8}, {"items": 0}])
def test_chunks_are_of_items_or_of_tokens(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="items="):
        ChunkSettings(**wrong)


@pytest.mark.parametrize("chunks", [None, ChunkSettings(items=2)])
def test_only_the_chunk_at_hand_is_on_the_device(chunks: ChunkSettings | None) -> None:
    class Model(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Tensor]:
            return {"sentence_embedding": features["words"]}

    module = ContrastiveModule("any", chunks=chunks).to("meta")
    module.model = Model()
    trainer: Any = SimpleNamespace(lightning_module=module)
    data = PairsDataModule()
    data.trainer = trainer
    features = [Features(torch.arange(2), {"words": torch.ones(2, 3)})]
    batch = {"query": features, "negative": [], "row_B": torch.arange(2), "task": 0}
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    ((position_P, tensors),) = moved["query"]
    assert moved["row_B"].is_meta
    assert position_P.is_meta
    assert (moved["negative"], moved["task"]) == ([], 0)
    assert tensors["words"].is_meta == (chunks is None)
    assert module.encode(tensors).is_meta
