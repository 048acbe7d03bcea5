"""Where a run saves within an epoch, so that what goes on from there trains on all of it and knows its best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from b3_lightning import B3Trainer, ContrastiveModule, PairsDataModule
from b3_lightning.checkpoints import BestCheckpoint, CheckedCheckpointIO, LastCheckpoint, StepCheckpoint
from b3_lightning.model import OptimSettings, SmallEmbedder

KEPT = Path("kept")
ABOUT: dict[str, Any] = {"dirpath": KEPT, "filename": "last", "enable_version_counter": False}  # as ``fit`` has them


@pytest.fixture(autouse=True)
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 rows, six batches of 16 an epoch."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "qry": [f"question {row} of {row % 7}" for row in range(96)],
        "pos_text": [f"row {row}" for row in range(96)],
    }
    pq.write_table(pa.table(rows), "pairs.parquet")


class Steps(L.Callback):
    """The step of every training batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.global_step)


class Stop(L.Callback):
    """As EarlyStopping does, after the second validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= 4


class Recorded(StepCheckpoint):
    """Notes the steps at which it saves, and whether it does within a validation, at its end."""

    def __init__(self) -> None:
        super().__init__(**ABOUT, every_n_train_steps=2)
        self.saved: list[tuple[int, bool]] = []

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.saved.append((trainer.global_step, trainer.validating))
        super()._save_checkpoint(trainer, filepath)


class Rates(L.Callback):
    """The rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.seen.append(round(pl_module.lr_schedulers().get_last_lr()[0], 9))


CONSTANT = OptimSettings(learning_rate=0.01, schedule="constant", warmup_frac=0.0)


def fit(
    *callbacks: L.Callback,
    validate: bool = True,
    ckpt_path: str | None = None,
    optim: OptimSettings = CONSTANT,
    **about: Any,
) -> None:
    data = PairsDataModule(
        train_pairs="pairs.parquet", val_pairs="pairs.parquet" if validate else None, batches="random", batch_size=16
    )
    trainer = B3Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=True, plugins=[CheckedCheckpointIO()], callbacks=list(callbacks), **about,
    )  # fmt: skip
    trainer.fit(ContrastiveModule(SmallEmbedder(), optim=optim), data, ckpt_path=ckpt_path)


@pytest.mark.parametrize(
    ("about", "saved"),
    [
        ({"val_check_interval": 2, "validate": False, "max_epochs": 1}, [(2, False), (4, False)]),
        (
            {"val_check_interval": 2, "check_val_every_n_epoch": 2, "max_epochs": 2},
            [(2, False), (4, False), (8, True), (10, True)],
        ),
        ({"val_check_interval": 2, "max_epochs": 1}, [(2, True), (4, True)]),
        ({"max_epochs": 1}, [(2, False), (4, False)]),
    ],
    ids=["nothing to validate", "another epoch", "after validation", "at the end"],
)
def test_every_so_many_steps_whether_a_validation_follows_or_not(
    about: dict[str, Any], saved: list[tuple[int, bool]]
) -> None:
    recorded = Recorded()
    fit(recorded, **about)
    assert recorded.saved == saved


def keepers() -> list[L.Callback]:
    best = BestCheckpoint(
        dirpath=KEPT, monitor="val/mrr", mode="max", filename="best-{step}", save_on_train_epoch_end=False
    )
    return [best, LastCheckpoint(**ABOUT, save_on_train_epoch_end=True)]


def test_what_ends_at_max_steps_knows_the_validation_of_its_last_step() -> None:
    fit(*keepers(), val_check_interval=2, max_epochs=1, max_steps=4)
    [best] = KEPT.glob("best-*.ckpt")
    assert best.name == "best-step=4.ckpt"
    state = CheckedCheckpointIO().load_checkpoint(KEPT / "last.ckpt")["callbacks"]
    known = next(one for name, one in state.items() if name.startswith("BestCheckpoint"))
    assert Path(known["best_model_path"]).name == best.name


def test_what_a_validation_stops_within_an_epoch_goes_on_with_the_rest_of_it() -> None:
    first, second = Steps(), Steps()
    fit(first, Stop(), *keepers(), val_check_interval=2, max_epochs=2)
    assert first.seen == [1, 2, 3, 4]
    fit(second, *keepers(), val_check_interval=2, max_epochs=2, ckpt_path=str(KEPT / "last.ckpt"))
    assert second.seen == list(range(5, 13))


@pytest.mark.parametrize(
    ("max_steps", "n_left"), [(-1, 9), (4, 10)], ids=["from an epoch's end", "from within an epoch"]
)
def test_the_rate_falls_to_the_end_of_a_run_that_goes_on_with_other_steps(
    max_steps: int, n_left: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Six steps of an epoch, or four, are done; what is left takes two batches a step."""
    fit(*keepers(), max_epochs=1, max_steps=max_steps)
    rates, linear = Rates(), OptimSettings(learning_rate=0.01, schedule="linear", warmup_frac=0.0)
    about: dict[str, Any] = {"max_epochs": 4, "accumulate_grad_batches": 2, "ckpt_path": str(KEPT / "last.ckpt")}
    fit(rates, *keepers(), optim=linear, **about)
    n_done = 6 if max_steps < 0 else 4
    total = n_done + n_left
    expected = [0.01 * (1 - max(0, step - 1) / (total - 1)) for step in range(n_done, total)]
    assert rates.seen == pytest.approx(expected, abs=1e-8)
    assert "model.optim.schedule is linear from here on; it was constant" in caplog.text
    assert "learning_rate" not in caplog.text
