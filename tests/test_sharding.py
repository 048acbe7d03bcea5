"""Weights cut over processes (FSDP2): gradients against those of the whole batch, runs, and what is refused."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import free_port
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from b3_lightning.cli import main
from b3_lightning.data.collate import prepare
from b3_lightning.data.pairs import Item
from b3_lightning.lightning_cli import B3CLI
from b3_lightning.mining import PATIENCE
from b3_lightning.model import ContrastiveModule, LoadSettings, LoraSettings, SmallEmbedder
from b3_lightning.model.embedder import load_embedder
from b3_lightning.model.loss import LossSettings
from b3_lightning.model.sharding import EqualPasses, FullyShardedStrategy, clip_gradients, shard, whole_weights
from b3_lightning.trainer import B3Trainer
from b3_lightning.types import ROW_VALUES, ChunkSettings

N_ROWS = 8
LOSS = LossSettings(temperature=0.1, symmetric=True, mask_margin=0.3, learn_temperature="global")
TEXTS = ["a red circle", "x", "the blue bar and a circle", "0123 0123", "a bar", "large", "small teal bar", "0"]


def _items(side: str, kinds: str) -> list[Item]:
    """8 texts; of ``vl`` the first process's targets are pictures, the second's texts, and one is both."""
    texts = [f"{text} {side}" for text in TEXTS]
    if kinds != "vl" or side != "target":
        return [Item(text, "") for text in texts]
    pictures = [Item("", f"{index:03d}.png") for index in range(4)]
    return [*pictures, *(Item(text, "") for text in texts[4:7]), Item(texts[7], "007.png")]


def _batch(embedder: Any, folder: Path, kinds: str, rank: int, world_size: int, items: int | None) -> dict[str, Any]:
    """A process's share of 8 rows; only the rows of the first process have a hard negative each."""
    chunks = None if items is None else ChunkSettings(items=items)
    row = torch.arange(N_ROWS).chunk(world_size)[rank]
    start, n_rows = int(row[0]), len(row)
    there = [index for index in row.tolist() if index < N_ROWS // 2]
    negatives = [Item(f"no {TEXTS[index]}", "") for index in there]
    place = torch.where(row < N_ROWS // 2, 100 + row, -1)
    batch: dict[str, Any] = {
        side: prepare(_items(side, kinds)[start : start + n_rows], folder, embedder.preprocess, chunks)
        for side in ("query", "target")
    }
    batch["negative"] = prepare(negatives, folder, embedder.preprocess, chunks) if negatives else []
    keys = {"query_key_B": row // 2, "target_key_B": row, "row_B": row, "group_key_B": row}
    places = {f"negative_{name}_N": place for name in ROW_VALUES}
    return {**batch, **keys, **places, "task": 0}


def _module(path: str, kinds: str, chunks: int | None) -> ContrastiveModule:
    load = LoadSettings(pooling="lasttoken" if kinds == "vl" else None)
    module = ContrastiveModule(path, load, loss=LOSS, chunks=None if chunks is None else ChunkSettings(items=chunks))
    module.model = load_embedder(path, load, None).train()
    module.double()
    return module


def _backward(module: ContrastiveModule, batch: dict[str, Any]) -> None:
    """A training step and its backward pass, as Lightning makes them."""
    schedule = SimpleNamespace(get_last_lr=lambda: [0.0])
    plugin = SimpleNamespace(forward_context=lambda: torch.enable_grad())
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.lr_schedulers = lambda: schedule  # type: ignore[method-assign, assignment, return-value]
    rank = dist.get_rank() if dist.is_initialized() else 0
    data = SimpleNamespace(total_steps=lambda: 10)
    trainer = SimpleNamespace(
        precision="64-true", precision_plugin=plugin, gradient_clip_val=None, global_rank=rank, datamodule=data,
        max_epochs=1, max_steps=-1,
    )  # fmt: skip
    module._trainer = trainer  # type: ignore[assignment]
    module.backward(module.training_step(_as_double(batch), 0)["loss"])


def _as_double(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.double() if found.is_floating_point() else found
    if isinstance(found, dict):
        return {name: _as_double(value) for name, value in found.items()}
    if isinstance(found, list):
        return [(position, _as_double(tensors)) for position, tensors in found]
    return found


WAYS: list[tuple[str, int | None]] = [("text", 3), ("vl", None)]
"""Kinds of input, and items of a chunk; the processes lack different passes of each."""


def _worker(rank: int, port: int, folder: str, paths: dict[str, str], shapes: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for way, (kinds, chunks) in enumerate(WAYS):
        module = _module(paths[kinds], kinds, chunks)
        batch = _batch(module.embedder, Path(shapes), kinds, rank, 2, chunks)
        shard(module.embedder, mesh, "64-true")
        module._passes = EqualPasses(module.embedder)
        with whole_weights(module.embedder), torch.inference_mode():  # an uneven number of passes, before training
            found = [module.embed(_as_double(batch["query"])) for _ in range(1 + rank)]
        _backward(module, batch)
        assert all(isinstance(parameter, DTensor) for parameter in module.embedder.parameters())
        gradients = _whole_gradients(module)
        norm = clip_gradients(module.parameters(), 0.5)
        torch.save([found[0], gradients, norm, _whole_gradients(module)], Path(folder) / f"{way}-{rank}.pt")
        if way == 0:
            torch.save(_saved_and_restored(module), Path(folder) / f"state-{rank}.pt")
    dist.destroy_process_group()


def _saved_and_restored(module: ContrastiveModule) -> list[dict[str, Any]]:
    """What a checkpoint holds after a step, and after it was read back two steps later."""
    strategy = FullyShardedStrategy()
    strategy._lightning_module = module
    optimizer = module.configure_optimizers()["optimizer"]
    strategy.optimizers = [optimizer]
    optimizer.step()
    saved = _checkpoint(strategy, optimizer)
    optimizer.step()
    optimizer.step()
    assert not _equal(strategy.lightning_module_state_dict(), saved["state_dict"], 1e-6)
    strategy.load_model_state_dict(saved)
    strategy.load_optimizer_state_dict(saved)
    return [saved, _checkpoint(strategy, optimizer)]


def _checkpoint(strategy: FullyShardedStrategy, optimizer: Any) -> dict[str, Any]:
    optimizer_states = [strategy.optimizer_state(optimizer)]
    return {"state_dict": strategy.lightning_module_state_dict(), "optimizer_states": optimizer_states}


def _assert_same_checkpoint(found: dict[str, Any], module: ContrastiveModule, optimizer: torch.optim.Optimizer) -> None:
    assert _equal(found["state_dict"], module.state_dict(), 1e-9)
    (state,), expected = found["optimizer_states"], optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert _equal(state["state"][index], values, 1e-9)


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[name], value, rtol=0, atol=tolerance) for name, value in expected.items())


def _whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for name, grad in grads.items()}


def test_gradients_of_cut_weights_equal_those_of_the_whole_batch(
    models: dict[str, str], shapes: Path, tmp_path: Path
) -> None:
    paths = {"text": models["bert_without_dropout"], "vl": models["qwen2_vl"]}
    spawn(_worker, (free_port(), str(tmp_path), paths, str(shapes)), nprocs=2)
    for way, (kinds, _) in enumerate(WAYS):
        module = _module(paths[kinds], kinds, None)
        _backward(module, _batch(module.embedder, shapes, kinds, 0, 1, None))
        expected = _whole_gradients(module)
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        with torch.no_grad():
            query_BD = module.embed(_as_double(_batch(module.embedder, shapes, kinds, 0, 1, None)["query"]))
        for rank in range(2):
            vectors, gradients, found_norm, clipped = torch.load(tmp_path / f"{way}-{rank}.pt", weights_only=True)
            assert torch.allclose(vectors, query_BD.chunk(2)[rank], atol=1e-10)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert float((gradient - expected[name]).abs().max()) < 1e-10 * largest, (kinds, name)
            assert float(found_norm) == pytest.approx(float(norm), rel=1e-9)
            for name, gradient in _whole_gradients(module).items():
                assert torch.allclose(clipped[name], gradient, atol=1e-9 * largest)
        if kinds == "text":
            optimizer = module.configure_optimizers()["optimizer"]
            optimizer.step()
            for rank in range(2):
                for checkpoint in torch.load(tmp_path / f"state-{rank}.pt", weights_only=True):
                    _assert_same_checkpoint(checkpoint, module, optimizer)


@pytest.mark.parametrize(
    ("strategy", "settings", "about", "message"),
    [
        (ModelParallelStrategy(), {}, {}, "is a ModelParallelStrategy; it must be auto or ddp, or fsdp2"),
        (FSDPStrategy(), {}, {}, "is a FSDPStrategy"),
        (FullyShardedStrategy(), {"lora": LoraSettings()}, {}, "only the adapter is trained: use ddp"),
        (FullyShardedStrategy(), {"embedder": SmallEmbedder()}, {}, "a small embedder fits"),
        (FullyShardedStrategy(), {}, {"precision": "16-mixed"}, "no loss scaling for precision=16-mixed: use bf16"),
        (FullyShardedStrategy(), {}, {"gradient_clip_algorithm": "value"}, "clips gradients by norm"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    strategy: Any, settings: dict[str, Any], about: dict[str, Any], message: str
) -> None:
    module = ContrastiveModule(**{"embedder": "nowhere", **settings})
    trainer = {"strategy": strategy, "precision": "32-true", "gradient_clip_algorithm": None, **about}
    module._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        module.configure_model()


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_processes_wait_for_one_that_mines(
    strategy: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[timedelta] = []

    def before_fit(cli: B3CLI) -> None:
        waits.append(cli.trainer.strategy._timeout)  # type: ignore[attr-defined]
        sys.exit(0)

    monkeypatch.setattr(B3CLI, "before_fit", before_fit)
    with pytest.raises(SystemExit):
        main(
            [
                "fit", "--model.embedder=nowhere", f"--run.dir={tmp_path}", "--run.wandb=disabled",
                f"--data.train_pairs={shapes / 'text-text.parquet'}", "--data.batches=random",
                "--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={strategy}",
            ]
        )  # fmt: skip
    assert waits == [PATIENCE]


def test_what_a_strategy_was_given_stays() -> None:
    own = DDPStrategy(timeout=timedelta(minutes=5), find_unused_parameters=False)
    B3Trainer(strategy=own, accelerator="cpu", devices=2, logger=False)
    assert own._timeout == timedelta(minutes=5)
    assert own._ddp_kwargs == {"find_unused_parameters": False}
