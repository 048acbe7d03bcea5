"""SIGTERM while mining: the process ends at once, whatever it is in the middle of, and says how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, started, wait_for

from b3_lightning import cli
from b3_lightning.cli import main
from b3_lightning.data import miner
from b3_lightning.mining import MinedPlan, mine
from b3_lightning.signals import ends_at_once

BUSY = """
import ctypes, signal, subprocess, sys
from b3_lightning.signals import ends_at_once
signal.signal(signal.SIGTERM, lambda number, frame: None)  # as Lightning, which only takes a note
other = subprocess.Popen(["sleep", "600"])
with ends_at_once("the message", others=[other.pid], due=signal.SIGTERM if sys.argv[1] == "due" else None):
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(600)  # as a partitioner does, it keeps every thread of Python waiting
"""
FIRST_OF_A_CONTAINER = """
import os, time
from b3_lightning.signals import ends_at_once
os.getpid = lambda: 1
with ends_at_once("", tells=False):
    print("ready", flush=True)
    time.sleep(600)
"""
MINES_FOR_EVER = """
import sys, time
from pathlib import Path
from b3_lightning.cli import main
from b3_lightning.data import miner
def mine(*vectors, **about):
    Path("mining").touch()
    time.sleep(600)
miner.mine = mine
main()
"""


CHILD = """
import subprocess, sys, threading
from b3_lightning.signals import end_with_parent
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, "-c", sys.argv[2], "child", ""])
else:
    end_with_parent()
    print("ready", flush=True)
threading.Event().wait()
"""
"""A process and another that it starts, which both wait for ever."""

LOADS = """
import signal, time
from torch.utils.data import DataLoader
from b3_lightning.signals import end_by_parent_alone
signal.signal(signal.SIGTERM, lambda number, frame: None)  # as Lightning, which only takes a note
class Slow(list):
    def __getitem__(self, row):
        time.sleep(0.2)
        return row
loader = DataLoader(Slow(range(12)), num_workers=2, prefetch_factor=1, worker_init_fn=end_by_parent_alone)
signal.signal(signal.SIGINT, lambda number, frame: None)
for batch in loader:
    print(int(batch), flush=True)
iterator = iter(loader)
next(iterator)
for worker in iterator._workers:
    worker.terminate()
    worker.join(20)
    print(worker.exitcode, flush=True)
"""


@contextmanager
def _noted() -> Iterator[list[int]]:
    """SIGTERM is only taken a note of, as Lightning does it."""
    found: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("when", ["now", "due"])
def test_a_busy_process_ends_with_those_it_started_and_says_so(when: str) -> None:
    with started("-c", BUSY, when) as process:
        if when == "now":
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
        # all that held its output are gone when this returns: the other process and the watcher too
        output, errors = process.communicate(timeout=30)
    assert (output, errors) == ("", "the message\n")
    assert process.returncode == -signal.SIGTERM


def test_the_first_process_of_a_container_ends_too() -> None:
    with started("-c", FIRST_OF_A_CONTAINER) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with started("-c", CHILD, "parent", CHILD) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)  # until all that held its output are gone
    called: list[str] = []
    monkeypatch.setattr(cli, "end_with_parent", lambda: called.append(os.environ["LOCAL_RANK"]))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            main(["no-such-command"])
    assert called == ["1"]


def test_who_loads_data_is_spared_the_signal_of_its_group_and_ends_by_that_of_its_parent() -> None:
    with started("-c", LOADS) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, number)
        # of the same reader, which may have taken the next line with the first
        output, errors = process.stdout.read(), process.stderr.read()
    assert (output.split(), errors) == ([*map(str, range(1, 12)), "0", "0"], "")


def test_after_the_block_signals_are_as_before_and_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with _noted() as found:
        with suppress(KeyError), ends_at_once("unsaid"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            raise KeyError
        signal.raise_signal(signal.SIGTERM)
    assert found == [signal.SIGTERM]
    assert "unsaid" not in capfd.readouterr().err


def test_in_a_thread_signals_are_left_alone() -> None:
    found: list[Any] = []

    def work() -> None:
        with ends_at_once("unsaid"):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_all_mining_is_ended_at_once_and_training_as_lightning_does_it(
    fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: list[Any] = []
    written: list[bool] = []

    def watched(*vectors: Any, **about: Any) -> MinedPlan:
        handlers.append(signal.getsignal(signal.SIGTERM))
        written.append((tmp_path / "run" / "metrics.csv").exists())
        return mine(*vectors, **about)

    monkeypatch.setattr(miner, "mine", watched)
    step = "b3_lightning.model.ContrastiveModule.on_train_batch_start"
    trains: list[Any] = []
    monkeypatch.setattr(step, lambda *given: trains.append(signal.getsignal(signal.SIGTERM)), raising=False)
    settings = (f"--model.embedder={models['bert']}", f"--data.teacher={models['bert']}")
    fit("text-text", *settings, "--remine.enabled=true", "--data.val_pairs=null")
    with _noted():
        main(
            ["mine", f"--output={tmp_path / 'plan'}", f"--run.dir={tmp_path / 'mine'}", *settings,
             f"--data.train_pairs={shapes / 'text-text.parquet'}", "--trainer.accelerator=cpu", "--trainer.devices=1",
             "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.enable_progress_bar=false"]
        )  # fmt: skip
    assert handlers == [signal.SIG_DFL] * 3
    assert written[:2] == [False, True]
    assert {type(handler).__name__ for handler in trains} == {"_HandlersCompose"}


def test_ctrl_c_while_mining_is_no_traceback_and_says_how_to_go_on(
    fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def interrupted(*given: Any, **about: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGINT))
        raise KeyboardInterrupt

    handlers: list[Any] = []
    monkeypatch.setattr(miner, "mine", interrupted)
    settings = [
        f"--model.embedder={models['bert']}", f"--data.teacher={models['bert']}", "--trainer.accelerator=cpu",
        "--trainer.devices=1", f"--data.train_pairs={shapes / 'text-text.parquet'}", "--data.mining.n_ranks=10",
    ]  # fmt: skip
    before = signal.signal(signal.SIGINT, lambda number, frame: None)  # as in training, where a note is taken
    try:
        with pytest.raises(SystemExit) as ended:
            main(["mine", f"--output={tmp_path / 'plan'}", f"--run.dir={tmp_path / 'mine'}", *settings])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert handlers == [signal.default_int_handler]
    assert "what was finished is kept, and the same command goes on from there" in caplog.text
    caplog.clear()
    with pytest.raises(SystemExit) as ended:
        fit("text-text", *settings, "--remine.enabled=true")
    assert ended.value.code == 130
    assert "what was finished is kept, and the same command goes on from there" in caplog.text


def test_two_processes_end_and_the_same_command_goes_on(
    models: dict[str, str], shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = shapes / "text-text.parquet"
    arguments = [
        "fit", f"--run.dir={tmp_path / 'run'}", "--run.wandb=disabled", f"--model.embedder={models['bert']}",
        f"--data.teacher={models['bert']}", f"--data.train_pairs={pairs}", "--data.batch_size=16",
        "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(MINES_FOR_EVER)
    left = tmp_path / "run" / "cache" / "vectors-0" / ".part-000000.safetensors.1.tmp"
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    with started(str(script), *arguments, *two, cwd=tmp_path) as process:
        wait_for(tmp_path / "mining", process)
        left.parent.mkdir()
        left.touch()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    said = "ended by a signal while mining; what was finished is kept, and the same command goes on from there\n"
    assert errors.endswith(said)
    main([*arguments, "--trainer.devices=1"])
    assert "vectors: 1 of 1 parts are finished" in caplog.text
    assert (tmp_path / "run" / "export").is_dir()
    assert not left.exists()
