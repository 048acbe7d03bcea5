"""Training with Lightning's own objects, as docs/api/trainer.md shows it."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from sentence_transformers import SentenceTransformer

from b3_lightning import B3Trainer, ContrastiveModule, PairsDataModule
from b3_lightning.callbacks import Export
from b3_lightning.checkpoints import BestCheckpoint, CheckedCheckpointIO, LastCheckpoint
from b3_lightning.data import checks
from b3_lightning.evaluation.encode import EvalModel
from b3_lightning.model import LoadSettings, OptimSettings, SmallEmbedder

PAGE = Path(__file__).parents[1] / "docs" / "api" / "trainer.md"
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 2,
}  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.parquet and val.parquet in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, rows in {"train": range(256), "val": range(256, 288)}.items():
        table = {"qry": [f"question {row} of {row % 7}" for row in rows], "pos_text": [f"answer {row}" for row in rows]}
        pq.write_table(pa.table(table), f"{name}.parquet")


class Seen(L.Callback):
    """The rows of every batch, by epoch."""

    def __init__(self) -> None:
        self.batches: dict[int, list[list[int]]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.setdefault(trainer.current_epoch, []).append(batch["row_B"].tolist())


def random_rows() -> PairsDataModule:
    return PairsDataModule(train_pairs="train.parquet", batches="random", batch_size=64)


@pytest.mark.usefixtures("pairs")
def test_the_example_of_the_docs_trains() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    quiet = "accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, "
    exec(code.replace("B3Trainer(", f"B3Trainer({quiet}"), {})
    assert SentenceTransformer("runs/python/export", device="cpu").encode("answer 3").shape == (128,)
    assert sorted(path.name for path in Path("runs/python/plans").glob("epoch-*")) == ["epoch-0001", "epoch-0002"]


@pytest.mark.usefixtures("pairs")
def test_every_epoch_has_batches_of_its_own() -> None:
    seen = Seen()
    B3Trainer(callbacks=[seen], **QUIET).fit(ContrastiveModule(SmallEmbedder()), random_rows())
    first, second = seen.batches[0], seen.batches[1]
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == list(range(256))
    assert first != second


@pytest.mark.usefixtures("pairs")
def test_a_trainer_that_would_repeat_the_first_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs=0 would train later epochs on the batches"):
        L.Trainer(**QUIET).fit(ContrastiveModule(SmallEmbedder()), random_rows())
    L.Trainer(**QUIET | {"max_epochs": 1}).fit(ContrastiveModule(SmallEmbedder()), random_rows())


class Ruin(L.Callback):
    """One vector for all from the second epoch's first step on."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:
            for parameter in pl_module.embedder.parameters():
                torch.nn.init.ones_(parameter)


class Validated(L.Callback):
    """What each validation found."""

    def __init__(self) -> None:
        self.mrr: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mrr.append(float(trainer.callback_metrics["val/mrr"]))


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("best", [True, False])
def test_the_card_tells_of_the_weights_that_are_exported(best: bool) -> None:
    data = PairsDataModule(train_pairs="train.parquet", val_pairs="train.parquet", batches="random", batch_size=64)
    validated = Validated()
    keeper = [BestCheckpoint(dirpath="kept", monitor="val/mrr", mode="max")] if best else []
    about = QUIET | {"enable_checkpointing": best, "num_sanity_val_steps": 0}
    trainer = B3Trainer(callbacks=[Ruin(), validated, Export(), *keeper], **about)
    trainer.fit(ContrastiveModule(SmallEmbedder(), optim=OptimSettings(learning_rate=0.02)), data)
    first, last = validated.mrr
    assert first > last + 0.01
    card = Path("export/README.md").read_text()
    assert f"| val/mrr | {first if best else last:.4f} |" in card
    assert f", after {4 if best else 8} optimiser steps." in card


@pytest.mark.usefixtures("pairs")
def test_weights_alone_are_exported_without_figures_and_begin_no_schedule() -> None:
    data = PairsDataModule(train_pairs="train.parquet", val_pairs="train.parquet", batches="random", batch_size=64)
    keeper = BestCheckpoint(dirpath="kept", monitor="val/mrr", mode="max", save_weights_only=True)
    about = QUIET | {"enable_checkpointing": True, "num_sanity_val_steps": 0, "plugins": [CheckedCheckpointIO()]}
    module = ContrastiveModule(SmallEmbedder())
    B3Trainer(callbacks=[Export(), keeper], **about).fit(module, data)
    assert "Weights: best checkpoint" in Path("export/README.md").read_text()
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        B3Trainer(**about).fit(module, data, ckpt_path=keeper.best_model_path)


@pytest.mark.usefixtures("pairs")
def test_a_fit_that_begins_anew_counts_its_own_steps() -> None:
    module, about = ContrastiveModule(SmallEmbedder()), QUIET | {"enable_checkpointing": True}
    for max_epochs, ckpt_path in ((2, None), (3, "kept/last.ckpt")):
        keeper = LastCheckpoint(dirpath="kept", filename="last", enable_version_counter=False)
        trainer = B3Trainer(callbacks=[keeper], plugins=[CheckedCheckpointIO()], **about | {"max_epochs": max_epochs})
        trainer.fit(module, random_rows(), ckpt_path=ckpt_path)
    rates: list[float] = []

    def watch(trainer: L.Trainer, *_: Any) -> None:
        rates.append(float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]))

    B3Trainer(callbacks=[LambdaCallback(on_train_batch_start=watch)], **QUIET).fit(module, random_rows())
    assert rates[1:] == pytest.approx([1e-4 * (1 - step / 7) for step in range(7)])


def test_a_trainer_that_would_share_out_shares_is_refused() -> None:
    trainer = SimpleNamespace(
        reload_dataloaders_every_n_epochs=1,
        world_size=2,
        _accelerator_connector=L.Trainer(**QUIET)._accelerator_connector,
    )
    with pytest.raises(ValueError, match="use_distributed_sampler=True would share out batches"):
        checks._check_reloading(trainer)
    trainer._accelerator_connector = B3Trainer(**QUIET)._accelerator_connector
    checks._check_reloading(trainer)


@pytest.mark.usefixtures("pairs")
def test_a_student_that_nobody_asks_to_mine_is_refused() -> None:
    data = PairsDataModule(train_pairs="train.parquet", teacher="student", batch_size=64)
    with pytest.raises(ValueError, match=r"needs the callback Remine\(enabled=True\)"):
        B3Trainer(**QUIET).fit(ContrastiveModule(SmallEmbedder()), data)


@pytest.mark.parametrize(
    ("precision", "capabilities", "told"),
    [
        ("bf16-mixed", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ("bf16-true", {"architecture": "aarch64", "bf16": False, "sve_max_length": 0}, True),
        ("bf16-mixed", {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ("32-true", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
    ],
)
def test_a_processor_that_has_no_bfloat16_is_told_of(
    precision: Any,
    capabilities: dict[str, Any],
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    B3Trainer(**QUIET, precision=precision)
    assert ("has no instructions for bfloat16" in caplog.text) == told


def test_evaluate_tells_of_it_too(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "amx_bf16": False})
    EvalModel.load(models["bert"], LoadSettings(), torch.device("cpu"))
    assert not caplog.text
    EvalModel.load(models["bert"], LoadSettings(dtype="bfloat16"), torch.device("cpu"))
    assert "--dtype bfloat16: this processor has no instructions for bfloat16" in caplog.text
