"""SIGTERM and Ctrl-C in training: all processes end after the same step, and a run goes on as if never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run, free_port, losses, started, validations, wait_for
from lightning.pytorch.trainer.states import TrainerFn
from stopping_worker import once, stop_and_go_on
from torch.multiprocessing.spawn import spawn

from b3_lightning.checkpoints import CheckedCheckpointIO
from b3_lightning.mistakes import check_peers
from b3_lightning.stopping import StopSignals, StopTogether
from b3_lightning.trainer import B3Trainer


def _settings(model: str, *others: str) -> list[str]:
    """2 epochs of 6 batches, with 6 more of the validation after each."""
    return [
        f"--model.embedder={model}", "--data.batches=random", "--trainer.log_every_n_steps=1",
        "--data.eval_batch_size=16", "--trainer.num_sanity_val_steps=0", *others,
    ]  # fmt: skip


_TWO_BATCHES_A_STEP = "--trainer.accumulate_grad_batches=2"


def _terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _interrupt_at_once() -> None:
    raise KeyboardInterrupt


def _fail() -> None:
    raise RuntimeError("on purpose")


@pytest.fixture(scope="module")
def wholes() -> dict[tuple[str, ...], tuple[dict[int, str], dict[int, str]]]:
    """Settings -> losses and validations of a run that was never stopped."""
    return {}


@pytest.mark.parametrize(
    ("act", "name", "step", "n_calls", "goes_on_at", "settings"),
    [
        (_interrupt, "training_step", 8, 1, 9, ()),
        (_terminate, "training_step", 3, 1, 4, (_TWO_BATCHES_A_STEP,)),
        (_terminate, "validation_step", 1, 1, 2, (_TWO_BATCHES_A_STEP, "--trainer.val_check_interval=3")),
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
    with once(act, name, step, n_calls), pytest.raises((SystemExit, RuntimeError)) as ended:
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


def test_the_last_step_of_a_run_is_finished_with_its_validation(fit: Run, models: dict[str, str]) -> None:
    """What goes on from there would have no step left to make, and would not validate."""
    with once(_terminate, "validation_step", 3, 2):
        run = fit("text-text", *_settings(models["bert"], "--trainer.max_steps=3"))
    assert sorted(losses(run)) == [0, 1, 2]
    assert (run / "export" / "modules.json").is_file()


def test_a_signal_that_comes_while_processes_agree_is_heeded_the_next_time() -> None:
    signals = SimpleNamespace(noted=None, received_sigterm=False)

    def reduce(number: torch.Tensor, reduce_op: Any) -> torch.Tensor:
        signals.noted = signal.SIGTERM
        return number

    trainer: Any = SimpleNamespace(
        _signal_connector=signals, state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, global_step=1,
        max_steps=-1, world_size=2,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
        strategy=SimpleNamespace(reduce=reduce, root_device=torch.device("cpu")),
    )  # fmt: skip
    for heeded in (False, True):
        StopTogether().on_train_batch_end(trainer)
        assert (signals.noted, signals.received_sigterm) == (signal.SIGTERM, heeded)


def test_what_a_second_ctrl_c_ends_is_not_saved(fit: Run, models: dict[str, str], tmp_path: Path) -> None:
    """It may come in the middle of an optimiser step."""
    with once(_interrupt_at_once, "training_step", 8, 1), pytest.raises(SystemExit) as ended:
        fit("text-text", *_settings(models["bert"]))
    assert ended.value.code == 130
    last = CheckedCheckpointIO().load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 6  # the epoch's end


def test_a_run_that_is_stopped_twice_in_an_epoch_validates_once_after_each_step(
    fit: Run, models: dict[str, str], tmp_path: Path
) -> None:
    command = _settings(models["bert"], "--trainer.val_check_interval=2")
    last = f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    found: list[int] = []
    for step, n_calls, goes_on in ((2, 3, ()), (4, 6, (last,))):
        with once(_terminate, "validation_step", step, n_calls), pytest.raises(SystemExit):
            fit("text-text", *command, *goes_on)
        found += validations(tmp_path / "run")
    found += validations(fit("text-text", *command, last))
    assert found == [1, 3, 5, 7, 9, 11]


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
    launcher, noted = SimpleNamespace(procs=processes), SimpleNamespace(noted=None)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), _signal_connector=noted)
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
    noted.noted = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        check_peers("fit", trainer, tmp_path, lost)


def test_a_signal_to_one_of_two_processes_ends_both_where_they_go_on_to_the_same_losses(
    tmp_path: Path, shapes: Path, models: dict[str, str]
) -> None:
    """Their shares of the 37 rows to validate are 19 and 18: two batches and one."""
    pq.write_table(pq.read_table(shapes / "text-text.parquet").slice(0, 37), tmp_path / "val.parquet")
    command = [
        "fit", *_settings(models["bert"]), "--run.wandb=disabled", f"--data.train_pairs={shapes / 'text-text.parquet'}",
        "--data.val_pairs=val.parquet", "--data.batch_size=16", "--data.eval_batch_size=18",
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    moments = {
        # before a validation, in a step, and in the first batch of a validation, after which only one has another
        "ddp": [("training_step", 5, 15), ("training_step", 8, 2), ("validation_step", 12, 15)],
        "fsdp2": [("training_step", 2, 15), ("validation_step", 6, 2)],
    }
    running = spawn(stop_and_go_on, (free_port(), str(tmp_path), command, moments), nprocs=2, join=False)
    assert running is not None
    deadline = time.monotonic() + 240
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in running.processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for strategy, signals in moments.items():
        found = first[strategy]
        assert found["codes"] == [*(128 + number for _, _, number in signals), 0], strategy
        assert second[strategy]["codes"] == [0] * (len(signals) + 1), strategy
        assert {name: found[name] for name in found["whole"]} == found["whole"], strategy


def test_two_processes_that_both_get_a_signal_end_after_the_same_step(
    tmp_path: Path, shapes: Path, models: dict[str, str]
) -> None:
    pairs, last = shapes / "text-text.parquet", tmp_path / "run" / "checkpoints" / "last.ckpt"
    command = [
        "-m", "b3_lightning", "fit", *_settings(models["bert"]), "--run.wandb=disabled", "--run.dir=run",
        f"--data.train_pairs={pairs}", f"--data.val_pairs={pairs}", "--data.batch_size=4", "--trainer.accelerator=cpu",
        "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=100000",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    with started(*command, cwd=tmp_path) as process:
        wait_for(last, process)
        time.sleep(0.5)  # somewhere in the next epoch
        os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in output + errors
    assert errors.endswith("ended by a signal: --ckpt_path=run/checkpoints/last.ckpt goes on from there\n")
    assert CheckedCheckpointIO().load_checkpoint(last)["global_step"] == 1 + max(losses(tmp_path / "run"))
