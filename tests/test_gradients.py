"""Gradients over processes, in chunks, or both, against those of the whole batch in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import free_port
from gradients_worker import SIDES, WAYS_OVER_PROCESSES, Bag, backward_of, batch_of, loss_of, train_in_process
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from b3_lightning.data import PairsDataModule
from b3_lightning.data.collate import Features, prepare
from b3_lightning.data.pairs import Item
from b3_lightning.model import ContrastiveModule
from b3_lightning.model.embedder import LoadSettings, LoraSettings, load_embedder
from b3_lightning.model.gradcache import GradCache, check_chunkable
from b3_lightning.types import ChunkSettings


def test_gradients_over_processes_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    world_size = 3
    spawn(train_in_process, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    for way, (_, sparse) in enumerate(WAYS_OVER_PROCESSES):
        model = Bag(dropout=0.0)
        backward_of(model, 0, 1, None, sparse=sparse)
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
    batch = batch_of(0, 1)
    vectors = [F.normalize(torch.cat([whole(part) for part in batch[side].split(5)]), dim=1) for side in SIDES]
    loss_of(vectors, batch, 0).backward()
    after = torch.rand(1)
    torch.manual_seed(7)
    backward_of(chunked, 0, 1, 5, sparse=False)
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
