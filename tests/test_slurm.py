"""SLURM without SLURM: its variables set by hand, and a script in place of ``scontrol``."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, losses
from lightning.fabric.utilities.rank_zero import rank_zero_only

from b3_lightning.callbacks.requeue import queue_again, where_to_begin
from b3_lightning.cli import show_log
from b3_lightning.model import ContrastiveModule

JOB = {
    "SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "b3", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A SLURM job; the file that what ``scontrol`` was asked for is written to."""
    tools, told = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    (tools / "scontrol").chmod(0o755)
    for name, value in {**JOB, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    yield told
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _ends_after(step: int, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SLURM say within a step that the time ends, and end the job when that asks for another start."""
    trains = ContrastiveModule.training_step

    def training_step(module: ContrastiveModule, *given: Any) -> Any:
        if module.trainer.global_step == step:
            signal.raise_signal(signal.SIGUSR1)
            deadline = time.monotonic() + 60
            while not asked.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
        return trains(module, *given)

    monkeypatch.setattr(ContrastiveModule, "training_step", training_step)


def test_a_job_that_is_queued_again_goes_on_to_the_same_losses(
    fit: Run,
    models: dict[str, str],
    asked: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = (f"--model.embedder={models['bert']}", "--data.batches=random", "--trainer.log_every_n_steps=1",
                "--data.val_pairs=null")  # fmt: skip
    whole = losses(fit("text-text", *settings, name="whole"))
    with monkeypatch.context() as patch:
        _ends_after(8, asked, patch)
        with pytest.raises(SystemExit) as ended:
            fit("text-text", *settings)
    assert ended.value.code == 128 + signal.SIGTERM
    assert re.search(r"ended by a signal: --ckpt_path=\S+/checkpoints/last.ckpt goes on from there", caplog.text)
    assert asked.read_text() == "requeue 71\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit, match="holds another run"):
        fit("text-text", *settings, "--model.optim.learning_rate=0.5")
    run = fit("text-text", *settings)
    assert losses(run) == {step: loss for step, loss in whole.items() if step >= 9}
    assert sorted(whole) == list(range(12))
    assert not list(run.glob("hpc_ckpt*"))


def test_only_a_job_s_own_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "seed_everything: 0\n"
    assert where_to_begin(tmp_path, settings, None) is None
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(ValueError, match="remove it: it has no last checkpoint"):
        where_to_begin(tmp_path, settings, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert where_to_begin(tmp_path, settings, None) is None
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    (last.parent / "mine.ckpt").touch()
    with pytest.raises(ValueError, match="holds another run"):
        where_to_begin(tmp_path, settings, None)
    last.touch()
    assert where_to_begin(tmp_path, settings, None) == str(last)
    assert where_to_begin(tmp_path, settings, str(last.parent / "mine.ckpt")) == str(last.parent / "mine.ckpt")
    with pytest.raises(ValueError, match=r"go on with it: --ckpt_path=.*last\.ckpt"):
        where_to_begin(tmp_path, "seed_everything: 1\n", None)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint ckpt_path=absent\.ckpt"):
        where_to_begin(tmp_path, settings, "absent.ckpt")


def test_where_slurm_refuses_the_log_says_why(
    asked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    queue_again()
    assert asked.read_text() == "requeue 70_3\n"
    (asked.parent / "tools" / "scontrol").write_text("#!/bin/sh\necho Access denied >&2\nexit 1\n")
    queue_again()
    assert "SLURM does not queue job 70_3 again: Access denied" in caplog.text
    monkeypatch.setenv("PATH", str(asked.parent))
    queue_again()
    assert "No such file or directory: 'scontrol'" in caplog.text


def test_only_the_first_process_tells_what_it_does_and_all_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_log()
    log = logging.getLogger("b3_lightning.data")
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        log.info("mining in process %d", rank)
        log.warning("a mistake in process %d", rank)
    said = capsys.readouterr().err.splitlines()
    assert said == ["mining in process 0", "a mistake in process 0", "a mistake in process 1"]
