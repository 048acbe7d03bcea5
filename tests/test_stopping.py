"""SIGTERM and Ctrl-C in training: all processes end after the same step, and a run goes on as if never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Run, losses, validations
from lightning.pytorch.trainer.states import TrainerFn

from b3_lightning.checkpoints import CheckedCheckpointIO, validates_after
from b3_lightning.mistakes import check_peers
from b3_lightning.model import ContrastiveModule
from b3_lightning.stopping import StopSignals
from b3_lightning.trainer import B3Trainer


def _settings(model: str, *others: str) -> list[str]:
    """2 epochs of 6 batches, with 6 more of the validation after each."""
    return [
        f"--model.embedder={model}", "--data.batches=random", "--trainer.log_every_n_steps=1",
        "--data.eval_batch_size=16", "--trainer.num_sanity_val_steps=0", *others,
    ]  # fmt: skip


def _terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _fail() -> None:
    raise RuntimeError("on purpose")


def _once(act: Callable[[], None], name: str, step: int, n_calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Act where the module's method is called for the n-th time after so many optimiser steps."""
    method = getattr(ContrastiveModule, name)
    calls: list[int] = []

    def acting(module: ContrastiveModule, *given: Any) -> Any:
        calls.extend([1] * (module.trainer.global_step == step))
        if module.trainer.global_step == step and len(calls) == n_calls:
            act()
        return method(module, *given)

    monkeypatch.setattr(ContrastiveModule, name, acting)


@pytest.fixture(scope="module")
def wholes() -> dict[tuple[str, ...], tuple[dict[int, str], dict[int, str]]]:
    """Settings -> losses and validations of a run that was never stopped."""
    return {}


@pytest.mark.parametrize(
    ("act", "name", "step", "n_calls", "goes_on_at", "settings"),
    [
        (_interrupt, "training_step", 8, 1, 9, ()),
        (_terminate, "training_step", 3, 1, 4, ("--trainer.accumulate_grad_batches=2",)),
        (_terminate, "training_step", 11, 1, 12, ()),  # the last one: its validation is cut short
        (_terminate, "validation_step", 6, 2, 6, ()),
        (_terminate, "validation_step", 6, 6, 6, ()),
        (_fail, "validation_step", 6, 2, 6, ()),
        (_fail, "on_validation_model_eval", 6, 1, 6, ()),
        (_fail, "on_validation_epoch_end", 6, 1, 6, ()),
        (_terminate, "validation_step", 2, 3, 2, ("--trainer.val_check_interval=2",)),
    ],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_losses_and_validations(
    act: Callable[[], None],
    name: str,
    step: int,
    n_calls: int,
    goes_on_at: int,
    settings: tuple[str, ...],
    wholes: dict[tuple[str, ...], tuple[dict[int, str], dict[int, str]]],
    tmp_path: Path,
    fit: Run,
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))  # whatever the tests run under
    command = _settings(models["bert"], *settings)
    if settings not in wholes:
        whole = fit("text-text", *command, name="whole")
        wholes[settings] = losses(whole), validations(whole)
    with monkeypatch.context() as patch:
        _once(act, name, step, n_calls, patch)
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            fit("text-text", *command)
    if act is not _fail:
        number = signal.SIGTERM if act is _terminate else signal.SIGINT
        assert isinstance(ended.value, SystemExit)
        assert ended.value.code == 128 + number
        assert f"{number.name}: the run ends after this step" in capfd.readouterr().err
        assert "ended by a signal: --ckpt_path=" in caplog.text
    before = validations(tmp_path / "run")
    run = fit("text-text", *command, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}")
    all_losses, all_validations = wholes[settings]
    assert losses(run) == {at: loss for at, loss in all_losses.items() if at >= goes_on_at}
    assert {**before, **validations(run)} == all_validations


@pytest.mark.parametrize(
    ("epoch", "loaded", "n_batches", "pairs", "expected"),
    [
        (1, None, [], ["pairs"], True),  # Lightning has not asked for them yet
        (1, None, [], [], False),
        (1, [], [], [], False),
        (1, ["pairs"], [3], ["pairs"], True),
        (1, ["pairs"], [0], ["pairs"], False),
        (0, ["pairs"], [3], ["pairs"], False),
    ],
)
def test_a_validation_is_foreseen_before_the_first_one_too(
    epoch: int, loaded: Any, n_batches: list[int], pairs: list[str], expected: bool
) -> None:
    trainer: Any = SimpleNamespace(
        val_check_batch=4, check_val_every_n_epoch=2, current_epoch=epoch, val_dataloaders=loaded,
        num_val_batches=n_batches, enable_validation=True, datamodule=SimpleNamespace(val_dataloader=lambda: pairs),
    )  # fmt: skip
    assert validates_after(trainer, 3) == expected
    assert not validates_after(trainer, 2)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = B3Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    signals = trainer._signal_connector
    assert isinstance(signals, StopSignals)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        trainer.state.fn = TrainerFn.VALIDATING
        signals.register_signal_handlers()
        with pytest.raises(KeyboardInterrupt):  # there is nothing to save
            signal.raise_signal(signal.SIGINT)
        trainer.state.fn = TrainerFn.FITTING
        signals.register_signal_handlers()
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "\nSIGINT: the run ends after this step; Ctrl-C again ends it at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.teardown()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_another_process_was_killed_it_is_named_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    ends = ("sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "")
    processes = [subprocess.Popen([sys.executable, "-c", f"import os, signal, sys; {end}"]) for end in ends]
    for process in processes:
        process.wait()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=processes)))
    lost = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"
    )
    expected = r"rank 2, of 4, was ended by SIGKILL, as the system .*; --ckpt_path=.*last.ckpt goes on from there"
    with pytest.raises(ChildProcessError, match=expected):
        check_peers("fit", trainer, tmp_path, lost)
    del processes[1]
    with pytest.raises(ChildProcessError, match=r"rank 1, of 3, failed, and said why$"):
        check_peers("test", trainer, tmp_path, lost)
    check_peers("fit", trainer, tmp_path, RuntimeError("an error of this process alone"))


@pytest.mark.parametrize(("strategy", "number"), [("ddp", signal.SIGTERM), ("fsdp2", signal.SIGINT)])
def test_two_processes_that_all_get_a_signal_end_after_the_same_step(
    strategy: str, number: signal.Signals, tmp_path: Path, shapes: Path, models: dict[str, str]
) -> None:
    pairs, last = shapes / "text-text.parquet", tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "b3_lightning", "fit", *_settings(models["bert"]), "--run.wandb=disabled",
            "--run.dir=run", f"--data.train_pairs={pairs}", f"--data.val_pairs={pairs}", "--data.batch_size=4",
            "--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={strategy}",
            "--trainer.max_epochs=100000", "--trainer.enable_progress_bar=false",
        ],
        cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # where the tests run in the background the shell has the interrupt ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not last.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        time.sleep(0.5)  # somewhere in the next epoch
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert output.endswith("ended by a signal: --ckpt_path=run/checkpoints/last.ckpt goes on from there\n")
    assert CheckedCheckpointIO().load_checkpoint(last)["global_step"] == 1 + max(losses(tmp_path / "run"))
