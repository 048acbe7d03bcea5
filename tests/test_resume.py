"""Killed runs that go on to the same losses, checkpoints that are refused, and what a checkpoint holds."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, losses, validations

from b3_lightning.checkpoints import BestCheckpoint, CheckedCheckpointIO
from b3_lightning.cli import main
from b3_lightning.data.sampler import EpochBatches
from b3_lightning.model import ContrastiveModule

KILLED = """
import os, signal, sys
from b3_lightning.cli import main
from b3_lightning.model import ContrastiveModule
step = ContrastiveModule.training_step
def until(self, batch, batch_idx):
    if self.trainer.global_step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
ContrastiveModule.training_step = until
for killed_at in map(int, sys.argv[1].split(",")):  # a process each, which need not import everything again
    child = os.fork()
    if child == 0:
        main([*sys.argv[2:], f"--run.dir=killed-{killed_at}"])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""
GOES_ON_AT = {9: 8, 13: 12, 12: 12}
"""Step of the kill -> that of the last checkpoint, in epochs of 6 steps with a checkpoint every 2."""


def _settings(path: str) -> list[str]:
    """A text model with dropout, mined anew before every epoch from the second on: 3 epochs of 6 batches."""
    return [
        f"--model.embedder={path}",
        "--data.teacher=student",
        "--remine.enabled=true",
        "--trainer.max_epochs=3",
        "--trainer.log_every_n_steps=1",
        "--run.checkpoint_every_n_steps=2",
        "--hardness.every_n_steps=1",
    ]


def _command(folder: Path, shapes: Path, model: str) -> list[str]:
    pairs = shapes / "text-text.parquet"
    return [
        "fit", f"--run.dir={folder}", "--run.wandb=disabled", f"--data.train_pairs={pairs}",
        f"--data.val_pairs={pairs}", f"--data.image_root={shapes}", "--data.batch_size=16",
        "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0",
        *_settings(model),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes: Path, models: dict[str, str]) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(_command(folder, shapes, models["bert"]))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, shapes: Path, models: dict[str, str]) -> Path:
    """The same run killed at each of these steps."""
    folder = tmp_path_factory.mktemp("killed")
    steps = ",".join(map(str, GOES_ON_AT))
    script = [sys.executable, "-c", KILLED, steps, *_command(folder, shapes, models["bert"])]
    done = subprocess.run(script, cwd=folder, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("killed_at", "goes_on_at"), GOES_ON_AT.items())
def test_a_run_killed_in_an_epoch_goes_on_to_the_same_losses(
    killed_at: int, goes_on_at: int, whole: Path, killed: Path, models: dict[str, str], shapes: Path
) -> None:
    folder = killed / f"killed-{killed_at}"
    last = folder / "checkpoints" / "last.ckpt"
    main([*_command(folder, shapes, models["bert"]), f"--ckpt_path={last}"])
    found, expected = losses(folder), losses(whole)
    assert sorted(found) == list(range(goes_on_at, 18))
    assert found == {step: loss for step, loss in expected.items() if step >= goes_on_at}


def _constant(folder: Path, shapes: Path, model: str, *settings: str) -> list[str]:
    """On random batches at one rate, whatever the number of steps."""
    about = ["--data.batches=random", "--remine.enabled=false", "--model.optim={schedule: constant, warmup_frac: 0.0}"]
    return [*_command(folder, shapes, model), *about, *settings]


def test_what_max_steps_leaves_of_an_epoch_is_trained_on_later(
    shapes: Path, models: dict[str, str], tmp_path: Path
) -> None:
    main(_constant(tmp_path / "whole", shapes, models["bert"], "--trainer.max_epochs=2"))
    part = _constant(tmp_path / "part", shapes, models["bert"], "--trainer.max_epochs=2")
    main([*part, "--trainer.max_steps=3"])
    main([*part, f"--ckpt_path={tmp_path / 'part' / 'checkpoints' / 'last.ckpt'}"])
    found, expected = losses(tmp_path / "part"), losses(tmp_path / "whole")
    assert sorted(found) == list(range(3, 12))
    assert found == {step: loss for step, loss in expected.items() if step >= 3}


def test_steps_that_validate_are_saved_once_they_have(
    shapes: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    write = CheckedCheckpointIO.save_checkpoint

    def save(self: CheckedCheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write(self, checkpoint, path, storage_options)
        if Path(path).name == "last.ckpt":
            saved.append(checkpoint["global_step"])
            shutil.copy(path, tmp_path / f"{checkpoint['global_step']}.ckpt")

    every = [
        "--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=null", "--run.checkpoint_every_n_steps=4"
    ]  # fmt: skip
    command = _constant(tmp_path / "run", shapes, models["bert"], *every)
    with monkeypatch.context() as patch:
        patch.setattr(CheckedCheckpointIO, "save_checkpoint", save)
        main(command)
    assert sorted(set(saved)) == [4, 6, 8, 12, 16, 18]
    expected = validations(tmp_path / "run")
    assert sorted(expected) == [3, 7, 11, 15]
    (tmp_path / "8.ckpt").rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    main([*command, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"])
    assert sorted(losses(tmp_path / "run")) == list(range(8, 18))
    assert validations(tmp_path / "run") == {step: value for step, value in expected.items() if step > 7}


def test_steps_are_counted_on_after_an_error_in_one_that_validates(
    shapes: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = _constant(tmp_path / "run", shapes, models["bert"], "--trainer.val_check_interval=2")
    step = ContrastiveModule.training_step

    def until(self: ContrastiveModule, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.trainer.global_step == 9:  # the 4th of an epoch, after which validation is due
            raise RuntimeError("on purpose")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveModule, "training_step", until)
        with pytest.raises(RuntimeError, match="on purpose"):
            main(command)
    main([*command, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"])
    assert sorted(losses(tmp_path / "run")) == list(range(9, 18))
    assert sorted(validations(tmp_path / "run")) == [9, 11, 13, 15, 17]


def test_a_run_that_was_moved_keeps_its_best_and_goes_on_as_the_settings_say(
    whole: Path, shapes: Path, models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(whole, run)
    last = run / "checkpoints" / "last.ckpt"
    best = {path.name for path in last.parent.glob("best*")}
    optim = "--model.optim={learning_rate: 1e-20, weight_decay: 0.5, warmup_frac: 0.0, schedule: constant}"
    main([*_command(run, shapes, models["bert"]), f"--ckpt_path={last}", "--trainer.max_epochs=4", optim])
    assert "model.optim.learning_rate is 1e-20 from here on; it was 0.0001" in caplog.text
    assert "model.optim.weight_decay is 0.5 from here on; it was 0.01" in caplog.text
    with (run / "metrics.csv").open(newline="") as file:
        rates = {row["train/learning_rate"] for row in csv.DictReader(file) if row["train/learning_rate"]}
    assert [float(rate) for rate in rates] == pytest.approx([1e-20])
    after = CheckedCheckpointIO().load_checkpoint(last)
    assert [group["weight_decay"] for group in after["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]
    assert "ckpt_path" not in (run / "config.yaml").read_text()  # of this start alone
    before = CheckedCheckpointIO().load_checkpoint(whole / "checkpoints" / "last.ckpt")
    kept, known = (
        next(state for name, state in found["callbacks"].items() if name.startswith("BestCheckpoint"))
        for found in (after, before)
    )
    assert kept["best_model_score"] == known["best_model_score"]  # nothing was learned since
    assert Path(kept["best_model_path"]) == last.parent / Path(known["best_model_path"]).name
    assert {path.name for path in last.parent.glob("best*")} == best


def test_where_the_best_checkpoint_is_lost_it_is_sought_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, after = (BestCheckpoint(dirpath=tmp_path / name, monitor="val/mrr", mode="max") for name in "ab")
    before.best_model_path, before.best_model_score = str(tmp_path / "a" / "best.ckpt"), torch.tensor(0.5)
    after.load_state_dict(before.state_dict())
    assert "best.ckpt, the best until now, is neither there nor in" in caplog.text
    assert after.best_model_path == ""
    assert after.best_model_score is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "best.ckpt").touch()
    after.load_state_dict(before.state_dict())  # a run in another folder, begun from this one's checkpoint
    assert after.best_model_path == before.best_model_path
    assert after.best_model_score == 0.5


def test_a_checkpoint_of_other_batches_is_refused(
    whole: Path, fit: Run, models: dict[str, str], tmp_path: Path
) -> None:
    last = tmp_path / "last.ckpt"
    shutil.copy(whole / "checkpoints" / "last.ckpt", last)
    with pytest.raises(SystemExit, match=r"batch_size \(16 then, 8 now\)"):
        fit("text-text", *_settings(models["bert"]), f"--ckpt_path={last}", "--data.batch_size=8", name="other")
    with pytest.raises(SystemExit, match="differs in pairs"):
        fit("text-image", *_settings(models["clip"]), f"--ckpt_path={last}", name="other")


def test_a_start_that_trains_nothing_leaves_the_run_as_it_was(
    whole: Path, shapes: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    record = [run / "config.yaml", run / "metrics.csv"]
    before = [path.read_text() for path in record]
    unfinished = [run / ".metrics.csv.1.tmp", run / "checkpoints" / ".last.ckpt.1.tmp"]  # of a process that was killed
    for path in unfinished:
        path.touch()
    for settings in (["--data.batch_size=8"], ["--trainer.max_epochs=9", "--data.plan=absent"], []):
        again = [*_command(run, shapes, models["bert"]), "--ckpt_path=last", *settings]
        if settings:
            with pytest.raises(SystemExit, match=r"batch_size|absent"):
                main(again)
        else:
            main(again)
            assert "nothing was left to train (trainer.max_epochs=" in capsys.readouterr().out
        assert [path.read_text() for path in record] == before
        assert not list(run.glob("metrics-until-*.csv"))
    assert not any(path.exists() for path in unfinished)


def test_a_plan_that_was_changed_is_refused(fit: Run, models: dict[str, str]) -> None:
    settings = _settings(models["bert"])
    run = fit("text-text", *settings, "--trainer.max_epochs=2", name="changed")
    plan = run / "plans" / "epoch-0001" / "plan.json"
    plan.write_text(plan.read_text() + " ")
    last = run / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit, match="is not the plan that the checkpoint was trained on"):
        fit("text-text", *settings, f"--ckpt_path={last}", "--trainer.max_epochs=4", name="changed")


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    files = CheckedCheckpointIO()
    path = tmp_path / "a.ckpt"
    content = {"state_dict": {"weight": torch.arange(1000.0)}, "epoch": 3}
    files.save_checkpoint(content, path)
    assert torch.equal(files.load_checkpoint(path)["state_dict"]["weight"], torch.arange(1000.0))
    whole = path.read_bytes()
    place = whole.index(torch.tensor([500.0, 501.0]).numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        files.load_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        files.load_checkpoint(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="it has no state_dict"):
        files.load_checkpoint(path)
    torch.save({"state_dict": {}, "path": Path()}, path)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        files.load_checkpoint(path)
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        files.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        files.load_checkpoint(tmp_path / "b.ckpt")


def test_a_failed_write_keeps_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = CheckedCheckpointIO(), tmp_path / "last.ckpt"
    files.save_checkpoint({"state_dict": {}, "epoch": 1}, path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        files.save_checkpoint({"state_dict": {}, "epoch": 2}, path)
    assert files.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_with_lora_a_checkpoint_holds_what_is_trained_and_goes_on(fit: Run, models: dict[str, str]) -> None:
    settings = [
        f"--model.embedder={models['qwen2_vl']}",
        "--model.load.pooling=lasttoken",
        "--model.lora={r: 2, dropout: 0.1}",
        "--data.batches=random",
        "--trainer.log_every_n_steps=1",
        "--trainer.limit_train_batches=2",
        "--model.optim={schedule: constant}",
    ]
    whole = fit("text-text", *settings, "--trainer.max_epochs=2", name="whole")
    half = fit("text-text", *settings, "--trainer.max_epochs=1", name="half")
    last = half / "checkpoints" / "last.ckpt"
    names = CheckedCheckpointIO().load_checkpoint(last)["state_dict"]
    assert names
    assert all("lora_" in name for name in names)
    fit("text-text", *settings, "--trainer.max_epochs=2", f"--ckpt_path={last}", name="half")
    assert losses(half) == {step: loss for step, loss in losses(whole).items() if step >= 2}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_goes_on_with_the_same_global_batches(world_size: int) -> None:
    ids = torch.arange(48).view(6, 8)
    shares = [EpochBatches(ids, rank=rank, world_size=world_size) for rank in range(world_size)]
    for share in shares:
        share.first_batch = 4
        assert len(share) == 6
    assert torch.cat([torch.tensor(list(share)) for share in shares], dim=1).tolist() == ids[4:].tolist()
