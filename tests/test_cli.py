"""The real command line in a process of its own, its outputs, and its answers to mistakes."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import Run
from PIL import Image
from safetensors.torch import load_file

from b3_lightning.cli import main
from b3_lightning.lightning_cli import _cli_of
from b3_lightning.mining import MinedPlan
from b3_lightning.mining.lock import FolderLock
from b3_lightning.reports import record

ROOT = Path(__file__).parent.parent
SMALL = "--model.embedder={hidden_sizes: [8, 16], image_size: 32}"


def command(*args: str, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "default", "COLUMNS": "120"}
    environment.pop("WANDB_SERVICE", None)  # of a W&B run in this process: its service would write the other's file
    return subprocess.run(
        [sys.executable, "-m", "b3_lightning", *args],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_the_quickstart_from_data_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["glyphs", "--output", str(tmp_path / "data" / "glyphs")])
    done = command(
        "fit",
        f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
        "--trainer.max_epochs=3",
        "--trainer.limit_train_batches=5",
        "--remine.start_epoch=1",
        "--run.tags=[test]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "quickstart"
    for said in ("val/hit@1", "runs/quickstart/export", "wandb sync", "compare"):
        assert said in done.stdout
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["mining"]["cluster_size"] == 8
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1
    with (run / "metrics.csv").open() as file:
        assert {"train/loss", "val/mrr", "val/ndcg@10", "mining/together_frac"} <= set(next(csv.reader(file)))
    assert "b3_lightning" in (run / "export" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)  # the run's paths are relative to where it began
    _same_vectors_without_this_package(tmp_path, run)
    main(["compare", str(run), str(run)])
    assert "val/hit@10" in capsys.readouterr().out


def _same_vectors_without_this_package(folder: Path, run: Path) -> None:
    """The export, in a process that cannot import b3_lightning, gives what ``predict`` gives from the checkpoint."""
    checkpoint = next((run / "checkpoints").glob("best*.ckpt"))
    given = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--run.dir=vectors"]
    main(["predict", *given, "--data.test_pairs=data/glyphs/test.parquet"])
    code = f"""
import sys
sys.modules["b3_lightning"] = None
import numpy, pyarrow.parquet
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(run / "export")!r}, device="cpu")
rows = pyarrow.parquet.read_table("data/glyphs/test.parquet").to_pylist()[:20]
images = [Image.open("data/glyphs/" + row["qry_image_path"]).convert("RGB") for row in rows]
numpy.save("query.npy", model.encode(images))
numpy.save("target.npy", model.encode([row["pos_text"] for row in rows]))
"""
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    vectors = load_file(folder / "vectors" / "embeddings.safetensors")
    for side in ("query", "target"):
        assert np.allclose(np.load(folder / f"{side}.npy"), vectors[side][:20], atol=1e-5), side


def test_only_the_parser_of_the_command_that_is_asked_for_is_made() -> None:
    assert list(_cli_of(["mine", "fit"]).subcommands()) == ["mine"]
    for words in ([], ["--help"], ["trian"]):
        assert {"fit", "mine", "plan", "predict"} <= set(_cli_of(words).subcommands())


def test_ctrl_c_leaves_a_checkpoint(tmp_path: Path, shapes: Path) -> None:
    pairs = shapes / "image-text.parquet"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "b3_lightning", "fit", SMALL, "--run.wandb=disabled", "--remine.enabled=true",
            f"--data.train_pairs={pairs}", f"--data.image_root={shapes}", "--data.batch_size=16",
            "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.accelerator=cpu",
            "--trainer.max_epochs=100000", "--run.dir=run", "--trainer.enable_progress_bar=false",
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # where the tests run in the background the shell has the interrupt ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "plans" / "epoch-0002" / "plan.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    assert "was raised with message" not in output
    assert "ended by a signal: --ckpt_path=run/checkpoints/last.ckpt goes on from there" in output
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert checkpoints, output
    assert all("state_dict" in torch.load(path, weights_only=True) for path in checkpoints)


def test_a_run_says_what_is_trained_and_that_nothing_was_validated(
    fit: Run, models: dict[str, str], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--trainer.max_steps=1", "--data.batches=random", "--remine.enabled=false")
    caplog.set_level("INFO", "b3_lightning")
    fit("text-text", *settings, f"--model.embedder={models['bert']}", "--model.lora={r: 2, target_modules: [query]}")
    told = re.search(r"model: ([\d,]+) weights, ([\d,]+) of them trained", caplog.text)
    assert told is not None
    n_weights, n_trained = told.groups()
    assert 0 < int(n_trained.replace(",", "")) < int(n_weights.replace(",", "")) / 4
    assert "ended before its first validation" in capsys.readouterr().out
    for limit in ("--trainer.limit_val_batches=0", "--data.val_pairs=null"):
        fit("text-text", *settings, f"--model.embedder={models['bert']}", limit, name=limit[-6:])
        assert "first validation" not in capsys.readouterr().out
        assert re.search(r"model: [\d,]+ weights, all trained", caplog.text)


def test_a_run_without_checkpoints_exports_its_last_weights(fit: Run, models: dict[str, str]) -> None:
    settings = ("--trainer.max_steps=1", "--data.batches=random", f"--model.embedder={models['bert']}")
    run = fit("text-text", *settings, "--trainer.enable_checkpointing=false")
    assert not list(run.rglob("*.ckpt"))
    assert (run / "export" / "modules.json").is_file()


def test_a_run_that_only_tries_names_nothing_that_is_not_there(
    fit: Run, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit("text-text", f"--model.embedder={models['bert']}", "--data.batches=random", "--trainer.fast_dev_run=true")
    assert f"run      {run}  (config.yaml)\n" in capsys.readouterr().out


def test_two_processes_train_on_one_plan(tmp_path: Path, shapes: Path) -> None:
    pairs = shapes / "image-text.parquet"
    done = command(
        "fit", SMALL, "--run.wandb=disabled", "--run.dir=run", "--remine.enabled=true", "--data.batch_size=16",
        f"--data.train_pairs={pairs}", f"--data.val_pairs={pairs}", f"--data.image_root={shapes}",
        "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.max_epochs=3",
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp",
        "--trainer.enable_progress_bar=false",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "plans").iterdir()) == ["epoch-0001", "epoch-0002"]
    assert "18 steps" in done.stdout
    assert "recommended" not in done.stderr
    assert "deprecated" not in done.stderr


def test_an_error_in_one_of_two_processes_ends_both_and_is_told(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 32, 3), dtype=np.uint8)
    lines = ["qry,pos_image_path"]
    for row, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{row}.png")
        lines.append(f"picture number {row},{row}.png")
    half = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(half[: len(half) // 2])
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    done = command(
        "fit", "--run.wandb=disabled", "--run.dir=run", "--data.train_pairs=pairs.csv", "--data.image_root=.",
        "--data.image_check=header", "--data.batches=random", "--data.batch_size=8", "--trainer.max_epochs=1",
        SMALL, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.enable_progress_bar=false",
        cwd=tmp_path, timeout=150,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "the image 7.png under" in done.stderr
    assert done.stderr.endswith("error: the process of rank 1, of 2, failed, and said why\n")


def test_mining_by_two_processes_gives_the_plan_of_one_and_is_reused(
    tmp_path: Path,
    shapes: Path,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plans: list[Path] = []
    for n_processes in (1, 2, 1):
        plans.append(tmp_path / f"plan-{len(plans)}")
        arguments = [
            "mine", f"--output={plans[-1]}", f"--run.dir={tmp_path}/run-{n_processes}",
            f"--model.embedder={models['bert']}",
            f"--data.teacher={models['bert']}", f"--data.train_pairs={shapes / 'text-text.parquet'}",
            "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}", "--trainer.accelerator=cpu",
            f"--trainer.devices={n_processes}", "--trainer.enable_progress_bar=false", "--data.batch_size=16",
        ]  # fmt: skip
        if n_processes == 1:
            caplog.clear()
            main(arguments)
            said = capsys.readouterr().out
        else:
            done = command(*arguments, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        assert said.count("plan and report") == 1
    first, second, _ = (MinedPlan.load(plan) for plan in plans)
    assert torch.equal(first.clusters.ids_CK, second.clusters.ids_CK)
    assert torch.equal(first.neighbors.ids_NW, second.neighbors.ids_NW)
    assert f"vectors: 1 of 1 parts are finished in {tmp_path}/run-1/cache" in caplog.text
    assert "neighbours: 1 of 1 parts are finished" in caplog.text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", "mine", "glyphs", "compare"):
        assert f"\n  {name}" in shown or f"\n    {name}" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.batch_size=18"], "batch_size=18 must be a multiple of cluster_size=4; nearest: 16"),
        (
            ["--data.mining.first_rank=95"],
            "the 96 rows of task 'image-text' are too few for the ranks up to first_rank=95",
        ),
        (["--data.batch_size=128"], "96 rows, fewer than batch_size=128"),
        (["--data.train_pairs=absent.parquet"], "no pairs file absent.parquet"),
        (["--data.image_root=."], "96 of 96 images under"),
        (["--data.teacher=absent.npy"], "no file of vectors absent.npy"),
        (["--data.plan=absent"], "absent holds no mined plan"),
    ],
)
def test_mistakes_end_with_their_message_alone(
    settings: list[str], message: str, fit: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        fit("image-text", SMALL, "--remine.enabled=true", *settings)
    assert message in f"{stop.value.code}{capsys.readouterr().err}"


def test_unknown_settings_are_refused(fit: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit("image-text", SMALL, "--data.mining.frist_rank=3")
    assert "frist_rank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit("image-text", SMALL, "--data.mining.n_rank=3")  # the beginning of another's name
    assert "no setting data.mining.n_rank; did you mean data.mining.n_ranks" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(fit: Run) -> None:
    fit("image-text", SMALL, "--data.batches=random", "--trainer.max_epochs=1")
    with pytest.raises(SystemExit, match="holds another run"):
        fit("image-text", SMALL, "--data.batches=random", "--trainer.max_epochs=1")


def test_a_folder_in_which_another_process_trains_is_refused(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_PATIENCE_S", 0.0)
    given = ("image-text", SMALL, "--data.batches=random", "--trainer.max_epochs=1")
    lock = FolderLock(tmp_path / "run")
    assert lock.take(seconds=0)
    with pytest.raises(SystemExit, match=rf"run\.dir=.*run is in use by process {os.getpid()} on .*: wait until"):
        fit(*given)
    lock.release()
    with pytest.raises(SystemExit, match=r"no_such\.parquet"):
        fit(*given, "--data.train_pairs=no_such.parquet")
    assert not (tmp_path / "run").exists()
    fit(*given)
    assert lock.take(seconds=0)  # it was given back
    lock.release()


def test_vectors_of_other_pairs_are_refused(fit: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.ones((2, 50, 4), dtype=np.float32))
    with pytest.raises(SystemExit, match="vectors of 50 rows, the pairs have 96"):
        fit("image-text", SMALL, f"--data.teacher={tmp_path / 'vectors.npy'}")
    np.save(tmp_path / "flat.npy", np.ones((96, 4), dtype=np.float32))
    with pytest.raises(SystemExit, match=r"has shape \(96, 4\); \(2, rows, dimensions\)"):
        fit("image-text", SMALL, f"--data.teacher={tmp_path / 'flat.npy'}")


def test_re_mining_needs_reloaded_batches_and_a_student_needs_re_mining(fit: Run) -> None:
    with pytest.raises(SystemExit, match="reload_dataloaders_every_n_epochs=0 would train later epochs"):
        fit("image-text", SMALL, "--remine.enabled=true", "--trainer.reload_dataloaders_every_n_epochs=0")
    with pytest.raises(SystemExit, match=r"needs remine\.enabled=true"):
        fit("image-text", SMALL)


@pytest.mark.parametrize(
    ("kind", "embedder", "unfit"),
    [
        ("both-image", SMALL, r"SmallEmbedder does not take image and text in one item"),
        ("image-text", "bert", "not take image,"),
    ],
)
def test_pairs_that_the_model_cannot_take_are_refused(
    kind: str, embedder: str, unfit: str, fit: Run, models: dict[str, str]
) -> None:
    given = f"--model.embedder={models[embedder]}" if embedder in models else embedder
    with pytest.raises(SystemExit, match=unfit):
        fit(kind, given, "--data.batches=random")


def test_a_bug_keeps_its_traceback(fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("b3_lightning.data.datamodule.PairDataset", lambda n_rows: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        fit("image-text", SMALL, "--data.batches=random")


def test_validate_from_a_checkpoint_repeats_what_fit_logged(fit: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = fit("image-text", SMALL, "--data.batches=random")
    with (run / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["val/mrr"]][-1]
    # neither training pairs nor a teacher are read: the vocabulary is in the checkpoint
    nothing = ["--data.train_pairs=null", "--data.batches=b3", "--data.teacher=absent", "--data.plan=absent"]
    command = ["validate", f"--config={run / 'config.yaml'}", *nothing]
    main([*command, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    assert f"weights: those of the checkpoint {run}/checkpoints/last.ckpt" in caplog.text
    with (run / "validate" / "metrics.csv").open() as file:
        again = next(csv.DictReader(file))
    assert float(again["val/mrr"]) == pytest.approx(float(last["val/mrr"]), abs=1e-6)
    with pytest.raises(SystemExit, match="a small embedder learns its vocabulary from the training pairs"):
        main(command)
