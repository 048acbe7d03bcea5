"""The likeliest mistakes, each told in a line that says what was given, what is right and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from b3_lightning.callbacks import Export, Remine
from b3_lightning.callbacks.requeue import where_to_begin
from b3_lightning.checkpoints import existing_checkpoint
from b3_lightning.cli import main
from b3_lightning.data import PairsDataModule
from b3_lightning.mining import MiningSettings
from b3_lightning.mistakes import tell_idle, tell_weights
from b3_lightning.model.embedder import SmallEmbedder
from b3_lightning.options import as_known

Command = Callable[..., str]


@pytest.fixture
def told(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run a command on a good config of 40 pairs, with one mistake; returns what it says on its way out."""
    rows = "".join(f"question {row},answer {row}\n" for row in range(40))
    (tmp_path / "pairs.csv").write_text("qry,pos_text\n" + rows)
    (tmp_path / "other.csv").write_text("asked,reply\n" + rows)
    (tmp_path / "null.csv").write_text("qry,pos_text\n" + rows + "question,\n,answer\n")
    (tmp_path / "picture.csv").write_text("qry_image_path,pos_text\n" + "no.png,a\n" * 40)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "half.csv").write_text("asked,qry_image_path,pos_text\n" + "what,,that\n" * 40)
    (tmp_path / "bad.ckpt").write_text("no checkpoint")
    vectors = np.random.default_rng(0).normal(size=(2, 40, 8))
    np.save(tmp_path / "short.npy", vectors[:, :37])
    np.save(tmp_path / "flat.npy", vectors[0])
    vectors[0, 5] = np.nan
    np.save(tmp_path / "nan.npy", vectors)
    config = f"""
run: {{dir: run, wandb: disabled}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 1, enable_progress_bar: false}}
model: {{embedder: "{models["bert"]}"}}
data:
  train_pairs: pairs.csv
  teacher: "{models["bert"]}"
  batch_size: 16
  mining: {{first_rank: 1, n_ranks: 10, cluster_size: 4}}
"""
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "foreign.yaml").write_text(config.replace("batch_size", "hard_negatives: 5\n  batch_size"))
    (tmp_path / "open.yaml").write_text("data: [1,\n")
    (tmp_path / "slip.yaml").write_text(config.replace("first_rank", "frist_rank"))
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def run(command: str, *settings: str, config: str = "config.yaml") -> str:
        configured = [f"--config={config}"] if command in ("fit", "mine", "plan", "validate") else []
        with pytest.raises(SystemExit) as stop:
            main([command, *configured, *settings])
        said = f"{stop.value.code}\n{capsys.readouterr().err}"
        assert stop.value.code, "a mistake must not end well"
        assert "Traceback" not in said
        line = next((line for line in said.splitlines() if "error: " in line), "")
        assert 20 < len(line) < 420, said
        return said

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--data.train_pairs=other.csv"],
            "neither a column 'qry' .* it has .*'asked'.*{path: other.csv, columns: {qry: YOUR_COLUMN}}",
        ),
        (["--data.train_pairs=absent.csv"], "no pairs file absent.csv .looked from"),
        (["--data.train_pairs=empty.csv"], "empty.csv is empty"),
        (
            ["--data.train_pairs={path: other.csv, columns: {asked: qry, reply: pos_text}}"],
            "columns maps .*; write it the other way round, ours first: {'qry': 'asked', 'pos_text': 'reply'}",
        ),
        (
            ["--data.train_pairs={path: other.csv, colums: {qry: question}}"],
            "no setting takes 'colums'; did you mean columns.\npython -m b3_lightning",
        ),
        (["--model.lora={rnk: 8}"], "no setting takes 'rnk'"),
        (["--model.chunks={item: 8}"], "no setting takes 'item'; did you mean items"),
        (
            ["--data.train_pairs=null.csv"],
            "the query is null .* in row.s. 41, and the target is null or empty in row.s. 40, counted from 0; mend",
        ),
        (
            ["--data.train_pairs=picture.csv"],
            "1 of 1 images under .* .image_root. cannot be used:\n  no.png: missing .rows 0, 1",
        ),
        (
            ["--data.train_pairs=picture.csv", "--data.image_root=nowhere"],
            "under .*/nowhere .image_root, which is no folder. cannot be used",
        ),
        (["--trainer.accelerator=gpu"], "sees no GPU: set --trainer.accelerator=cpu or auto"),
        (["--run.wandb=online"], "no key: `wandb login` or set WANDB_API_KEY; --run.wandb=offline needs none"),
        (["--data.batch-size=18"], "batch_size=18 must be a multiple of cluster_size=4; nearest: 16 or 20"),
        (["--data.batch_size=64"], "40 rows, fewer than batch_size=64.*lower the batch size"),
        (["--data.mining.cluster_size=64", "--data.batch_size=64"], "40 rows are fewer than cluster_size=64"),
        (
            ["--data.mining.first_rank=35"],
            "40 rows of task .pairs. are too few .* first_rank=35.*lower first_rank",
        ),
        (["--data.batch_size=12", "--trainer.devices=5"], "batch_size=12 must be a multiple of the 5 processes"),
        (["--data.teacher=null"], "data.teacher=null: name a model, a file of vectors, or 'student'"),
        (["--data.teacher=short.npy"], "short.npy holds vectors of 37 rows, the pairs have 40"),
        (["--data.teacher=flat.npy"], "has shape .40, 8.; .2, rows, dimensions. is needed"),
        (["--data.teacher=nan.npy"], "query vectors hold NaN, infinity or only zeros in row.s. 5; embed these again"),
        (["--data.teacher=absent.npy"], "no file of vectors absent.npy .looked from"),
        (["--data.plan=absent"], "absent holds no mined plan .no plan.json.; make one with the 'mine' command"),
        (["--model.embedder=nobody/absent"], "no model 'nobody/absent': no folder here .* Check name and network"),
        (["--ckpt_path=absent.ckpt"], "no checkpoint ckpt_path=absent.ckpt .looked from"),
        (["--ckpt_path=bad.ckpt"], "bad.ckpt is truncated or no checkpoint .*; resume from another one"),
        (["--data.mining.cluster_size=abc"], "data.mining.cluster_size=abc: a whole number is needed\n"),
        (["--trainer.max_epochs=0.5"], "trainer.max_epochs=0.5: a whole number or null is needed\n"),
        (["--trainer.limit_train_batches=abc"], "trainer.limit_train_batches=abc: a number or null is needed\n"),
        (["--data.eval_batch_size=2.5"], "data.eval_batch_size=2.5: a whole number is needed\n"),
        (["--trainer.precision=fp16"], "trainer.precision=fp16 is none of 64, 32, 16, .*bf16-mixed.*, bf16\n"),
        (["--data.mining.min_recall=0.9"], "min_recall=0.9 is without effect .* or leave min_recall at 0.95"),
        (["--model.embedder=null"], "fit needs model.embedder: --model.embedder=PATH_OR_NAME"),
        (["--data.bach_size=8"], "no setting data.bach_size; did you mean data.batch_size"),
        (
            ["--model.optim.fused=true", "--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=1"],
            "fused=true with --trainer.precision=bf16-mixed and gradients clipped at 1: .*Leave out model.optim.fused",
        ),
        (
            ["--trainer.max_time=00:00:01:00", "--trainer.max_epochs=-1"],
            "schedule=linear, model.optim.warmup_frac=0.1: .*Set one of them .max_time may end the run before., or",
        ),
        (["--model.load.dtype=bf16"], " dtype=bf16 must be bfloat16, float16, float32 or auto"),
        (
            ["--model.lora.target_modules=[q_prj]"],
            r"target_modules=\['q_prj'\]: .* none of these layers; it has .*query",
        ),
        (["--model.optim.learning_rate=-1"], "model.optim.learning_rate=-1.0 must be at least 0"),
        (["--model.optim.warmup_frac=500"], "model.optim.warmup_frac=500.0 is a share of all steps: between 0 and 1"),
        (["--model.embedder={hidden_sizes: [8]}", "--model.lora.r=8"], "model.lora adapts a model that exists"),
        (["--run.dir=config.yaml/run"], "config.yaml is a file, so nothing can be written into config.yaml/run; name"),
        (
            ["--data.train_pairs=half.csv"],
            "the query is null or empty in .* .it has no column 'qry', only .*'asked'",
        ),
        (["--model.chunks.items=0"], "^error: chunks: items=0 and tokens=None must be above 0"),
        (["--model.embedder="], "model.embedder is not set"),
        (["--model.embedder={hidden_sizes: []}"], "hidden_sizes=.* must hold at least one"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0 must be at least 1"),
        (["--data.mining.seed=3000000000"], "seed=3000000000 must be below 2.31"),
        (
            ["--data.mining.n_negatives=1", "--data.mining.random_negatives=0.5"],
            "random_negatives=0.5 of data.mining.n_negatives=1 is less than one: set it above 0.5, or to 0",
        ),
        (
            ["--data.train_pairs={path: pairs.csv, weight: 0.2}", "--data.batches=random"],
            "an epoch offers fewer rows of any task than data.batch_size=16, by the weights of data.train_pairs",
        ),
        (
            ["--trainer.val_check_interval=00:00:10:00"],
            "trainer.val_check_interval is a time, and .* give it a number of batches, or a part of an epoch",
        ),
        (
            ["--trainer.val_check_interval=500"],
            "trainer.val_check_interval=500 is more than the 2 batches of an epoch: set it to at most 2, or .*=null",
        ),
        (["--trainer.strategy=foo"], "the trainer cannot be made as it is set: .*invalid strategy"),
        (["--trainer.barebones=true"], "the trainer cannot be made as it is set: .*barebones=True"),
        (
            ["--trainer.precision=16-true"],
            "16-true: AdamW's epsilon is 0 .*Set --trainer.precision=bf16-true",
        ),
        (
            ["--trainer.enable_checkpointing=false", "--run.checkpoint_every_n_steps=2"],
            "checkpoint_every_n_steps is without effect where trainer.enable_checkpointing=false: leave one of them",
        ),
        (["--trainer.max_epochs=0"], "trainer.max_epochs=0: that leaves nothing to train on; raise the limit"),
        (["--trainer.overfit_batches=1"], "trainer.overfit_batches=1: every epoch has batches of its own"),
        (["--model.load.max_seq_length=0"], "max_seq_length=0 must be at least 1"),
        (
            ["--trainer.limit_train_batches=0.1"],
            "trainer.limit_train_batches=0.1 of 2 batches: that leaves nothing to train on; raise the limit",
        ),
        (
            ["--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/acc}}"],
            "EarlyStopping monitors val/acc: without data.val_pairs there is none",
        ),
        (
            [
                "--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/acc}}",
                "--data.val_pairs=pairs.csv",
            ],
            "EarlyStopping monitors val/acc: there are val/hit@1, .*val/mrr",
        ),
        (["--data.val_pairs=[]"], "no pairs file was given: name one, or leave the setting out"),
        (["--data.mining.per-task.OK-VQA.first_rank=0"], "per_task names unknown tasks .'OK-VQA'."),
    ],
)
def test_a_wrong_setting(settings: list[str], message: str, told: Command) -> None:
    assert _holds(told("fit", *settings), message)


def _holds(said: str, message: str) -> bool:
    return re.search(message, said) is not None or pytest.fail(f"{message!r} is not in:\n{said}")


def test_configs_that_are_absent_foreign_or_misspelt(told: Command) -> None:
    assert _holds(told("fit", config="absent.yaml"), "File does not exist: .*absent.yaml")
    assert _holds(
        told("fit", config="foreign.yaml"), "no setting data.hard_negatives; did you mean data.n_file_negatives"
    )
    assert _holds(told("fit", config="open.yaml"), "\n  in open.yaml, line 2, column 1")
    said = told("fit", "--data.mining={first_rank: [")
    assert _holds(said, "Unable to load config '{first_rank: \\['")
    assert "config.yaml" not in said  # which is sound
    assert _holds(told("fit", config="slip.yaml"), "frist_rank; did you mean data.mining.first_rank")


def test_unknown_commands_and_missing_arguments(told: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert _holds(told("trian"), "no command 'trian'.*fit, ")
    assert _holds(told("comapre"), "no command 'comapre'; did you mean compare?")
    assert _holds(told("mine"), "mine needs --output\npython -m b3_lightning mine --help lists all")
    alone = ("--model.embedder=null", "--data.teacher=student", "--output=plan")
    assert _holds(told("mine", *alone), "mine needs model.embedder: .* where data.teacher is not the student")
    assert _holds(told("validate"), "data.val_pairs is not set; give a pairs file")
    with pytest.raises(SystemExit, match=r"name a command: the commands are fit, .*audit"):
        main([])


def test_options_of_every_command_take_dashes_and_underscores_and_misspelt_ones_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = ["--ckpt_path", "--no-cache_of", "--data.per_task"]
    given = ["--ckpt-path=a-b", "x-y", "--no-cache-of", "--data.per-task.A-B=1", "--", "--ckpt-path"]
    expected = ["--ckpt_path=a-b", "x-y", "--no-cache_of", "--data.per_task.A-B=1", "--", "--ckpt-path"]
    assert as_known(given, known) == expected
    for words, said in (
        (["batches", "plan", "--bach-size=8"], "there is no option --bach-size; did you mean --batch_size?"),
        (["audit", "x.csv", "--in-order", "--epochs=2"], "there is no option --epochs\n"),
        (["prepare", "--eval-images=x", "--sample=none"], "argument --sample: invalid int value"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        errors = capsys.readouterr().err
        assert _holds(errors, f"^error: .*{said}")
        assert f"python -m b3_lightning {words[0]} --help lists all" in errors


def test_a_plan_of_other_pairs_and_a_folder_in_use(told: Command, tmp_path: Path) -> None:
    main(["mine", "--config=config.yaml", "--output=plan"])
    (tmp_path / "more.csv").write_text((tmp_path / "pairs.csv").read_text() + "x,y\n")
    said = told("fit", "--data.train_pairs=more.csv", "--data.plan=plan")
    assert _holds(said, "the plan was mined from 40 rows, the training pairs have 41; mine again")
    text = (tmp_path / "pairs.csv").read_text().splitlines()
    (tmp_path / "swapped.csv").write_text("\n".join([text[0], text[2], text[1], *text[3:]]) + "\n")
    said = told("fit", "--data.train_pairs=swapped.csv", "--data.plan=plan")
    assert _holds(said, "the plan was mined from other pairs, of which there are 40 too")
    assert _holds(told("mine", "--output=plan"), "output=plan holds another plan; name a new folder")
    for command in ("mine", "plan"):
        said = told(command, "--output=plan/plan.json")
        assert _holds(said, "plan/plan.json is a file, so nothing can be written into plan/plan.json; name another")


def test_going_on_with_another_plan(told: Command, caplog: pytest.LogCaptureFixture) -> None:
    for name, first_rank in (("plan", 1), ("other", 2)):
        main(["mine", "--config=config.yaml", f"--output={name}", f"--data.mining.first_rank={first_rank}"])
    main(["fit", "--config=config.yaml", "--data.plan=plan"])
    again = ["--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=2"]
    said = told("fit", *again, "--data.plan=other")
    assert _holds(
        said, r"other is not the plan that the checkpoint was trained on; name that one \(.*/plan\), or begin"
    )
    Path("plan").rename("moved")
    assert _holds(told("fit", *again), "goes on with a plan that is not in .*/plan: name it as --data.plan")
    main(["fit", "--config=config.yaml", *again, "--data.plan=moved", "--data.mining.first_rank=3"])
    assert "first_rank=1, not 3: data.mining is without effect there" in caplog.text
    assert "counts from the next time" not in caplog.text, "it is said once"


def test_going_on_in_the_wrong_folder_or_with_other_batches(
    told: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", "--config=config.yaml", "--data.val_pairs=pairs.csv"])
    assert _holds(told("fit"), "run.dir=run holds another run; set --run.dir .*--ckpt_path=run/checkpoints/last.ckpt")
    again = ["--data.val_pairs=pairs.csv", "--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=2"]
    said = told("fit", *again, "--run.dir=elsewhere")
    assert _holds(said, "goes on with the plans of its run, and run.dir=elsewhere is another: set --run.dir=.*/run,")
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(tmp_path / "moved.ckpt")
    said = told("fit", *again, "--run.dir=elsewhere", "--ckpt_path=moved.ckpt")
    assert _holds(said, "goes on with a plan that is not in elsewhere.*: set --run.dir to the run that it is of")
    assert not list((tmp_path / "elsewhere").rglob("*.ckpt")), "nothing was trained that could be gone on with"
    (tmp_path / "moved.ckpt").rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert _holds(told("fit", *again, "--data.batch_size=8"), "differs in batch_size .16 then, 8 now.")
    said = told("validate", *again, "--model.embedder={hidden_sizes: [8]}")
    assert _holds(said, r"weights of another model; \d+ differ, such as model\..*Give model.embedder, model.lora")
    main(["fit", "--config=config.yaml", *again, "--data.mining.first_rank=3"])
    assert "data.mining.first_rank (1 then, 3 now): counts from the next time on that this run mines" in caplog.text


def test_a_checkpoint_is_refused_only_where_its_plans_lie_in_another_run(tmp_path: Path) -> None:
    """Not one that was kept elsewhere, nor where the run's folders are links, nor where the plans were copied."""
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    for name in ("checkpoints", "plans"):
        (scratch / name).mkdir(parents=True)
    (scratch / "config.yaml").touch()
    last = scratch / "checkpoints" / "last.ckpt"
    last.touch()
    run.mkdir()
    with pytest.raises(ValueError, match=r"goes on with the plans of its run, .* set --run.dir=.*/scratch,"):
        where_to_begin(run, "", str(last))
    (run / "checkpoints").symlink_to(scratch / "checkpoints")
    assert where_to_begin(run, "", str(run / "checkpoints" / "last.ckpt")) is not None
    (run / "checkpoints").unlink()
    (run / "plans").mkdir()
    assert where_to_begin(run, "", str(last)) == str(last)
    kept = tmp_path / "scratch" / "kept.ckpt"
    last.rename(kept)
    assert where_to_begin(tmp_path / "new", "", str(kept)) == str(kept)


def test_evaluation_says_whose_weights_it_uses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    last, export, base = tmp_path / "checkpoints/last.ckpt", tmp_path / "export", tmp_path / "base"
    for folder, card in (
        (export, Export()._card({"validation": {}, "global_step": 3}, None, "")),
        (base, "# A model"),
    ):
        folder.mkdir()
        (folder / "README.md").write_text(card)
    caplog.set_level("INFO", "b3_lightning")
    tell_weights(None, SmallEmbedder(), tmp_path)
    assert _holds(caplog.text, "WARNING.*weights: random, of a small embedder.*--ckpt_path=RUN/checkpoints/FILE.ckpt")
    last.parent.mkdir()
    last.write_text("")
    for given, embedder, said in (
        (str(last), base, f"INFO .*weights: those of the checkpoint {last}"),
        (None, export, f"INFO .*weights: those of the export {export}"),
        (None, base, f"WARNING .*weights: model.embedder={base} as loaded, which no run.* --ckpt_path={last}"),
    ):
        caplog.clear()
        tell_weights(given, str(embedder), tmp_path)
        assert _holds(caplog.text, said)


def test_a_checkpoint_is_named_by_its_file_or_as_the_last_or_best_of_the_run(tmp_path: Path) -> None:
    last, best = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("last", "best-epoch0001-step000002"))
    last.parent.mkdir()
    for file in (last, best):
        file.touch()
    for given, found in ((str(last), last), ("last", last), ("best", best)):
        assert existing_checkpoint(given, tmp_path) == str(found)
    with pytest.raises(FileNotFoundError, match=rf"ckpt_path={tmp_path} .it is a folder; in it: {best}, {last}"):
        existing_checkpoint(str(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint ckpt_path=last .looked from"):
        existing_checkpoint("last", tmp_path / "other")


def test_a_baseline_tells_what_it_leaves_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    shared = partial(PairsDataModule, mining=MiningSettings(first_rank=1), mined_frac={0: 0.5})
    tell_idle(shared(), Remine(enabled=True))
    tell_idle(PairsDataModule(batches="random"), Remine())
    assert caplog.text == ""
    tell_idle(shared(batches="random"), Remine(enabled=True))
    assert _holds(caplog.text, "WARNING .*mines nothing; without effect: data.mining, data.mined_frac, remine\n")


@pytest.mark.usefixtures("told")
def test_a_plan_mined_with_other_settings_tells_which(caplog: pytest.LogCaptureFixture) -> None:
    main(["mine", "--config=config.yaml", "--output=plan"])
    same, other = (
        MiningSettings(first_rank=1, n_ranks=10, cluster_size=4),
        MiningSettings(first_rank=1, cluster_size=16),
    )
    caplog.clear()
    for mining in (MiningSettings(), same):
        tell_idle(PairsDataModule(plan="plan", mining=mining), Remine())
    tell_idle(PairsDataModule(plan="plan", mining=other), Remine(enabled=True))
    assert caplog.text == ""
    tell_idle(PairsDataModule(plan="plan", mining=other), Remine())
    assert _holds(caplog.text, "data.plan=plan was mined with cluster_size=4, not 16: data.mining is without effect")


def test_vectors_in_another_order_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"{row},question {row},answer {row}\n" for row in range(400)]
    (tmp_path / "pairs.csv").write_text("id,qry,pos_text\n" + "".join(rows))
    query, noise = np.random.default_rng(0).normal(size=(2, 400, 16))
    target = query + 0.3 * noise
    for name, order in (("right", np.arange(400)), ("turned", np.arange(400)[::-1])):
        caplog.clear()
        np.save(tmp_path / f"{name}.npy", np.stack([query, target[order]]))
        main(["mine", f"--data.train_pairs={tmp_path / 'pairs.csv'}", f"--data.teacher={tmp_path / name}.npy",
              f"--run.dir={tmp_path / 'run'}", f"--output={tmp_path / name}", "--data.batch_size=16",
              "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}"])  # fmt: skip
        told = re.search(
            r"task 'pairs': the teacher puts the own target first for \d.\d% of the 400 queries", caplog.text
        )
        assert (told is not None) == (name == "turned")


@pytest.mark.usefixtures("told")
def test_batches_that_are_hardly_harder_than_random_ones_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name, spread in (("topics", 0.3), ("noise", 100.0)):
        np.save(f"{name}.npy", rng.normal(size=(5, 8))[np.arange(40) % 5] + spread * rng.normal(size=(2, 40, 8)))
    mine = ["mine", "--config=config.yaml", "--data.mining={first_rank: 0, n_ranks: 6, cluster_size: 8}"]
    main([*mine, "--data.teacher=noise.npy", "--data.mining.min_score=1.5", "--output=filtered"])
    assert _holds(
        caplog.text,
        r"WARNING .*The batches are .*; 100% of the rows have nothing hard in their cluster\. data\.mining\.min_score "
        r"and the ranks leave 0\.0 hard negatives a row of 6: loosen the filter, .*start_epoch",
    )
    for teacher, kind in (("topics", "louvain"), ("noise", "none")):
        caplog.clear()
        main([*mine, f"--data.teacher={teacher}.npy", f"--data.mining.communities={kind}", f"--output={kind}"])
        assert "mined in" in caplog.text
        assert "of the way" not in caplog.text
    monkeypatch.setattr("b3_lightning.data.miner.LITTLE_OF_THE_WAY", 2.0)
    main([*mine, "--data.teacher=topics.npy", "--output=again"])
    assert _holds(
        caplog.text,
        r"WARNING .*The batches are \d+% of the way from random ones .* Raise data\.mining\.n_ranks or .*start_epoch",
    )


@pytest.mark.parametrize("validated", [False, True])
def test_a_run_that_diverges_ends_and_leaves_no_weights(validated: bool, told: Command, tmp_path: Path) -> None:
    settings = ["--model.optim.learning_rate=1e30", "--trainer.gradient_clip_val=0", "--data.batches=random"]
    said = told("fit", *settings, *(["--data.val_pairs=pairs.csv"] if validated else []))
    assert re.search(r"training has diverged: \d+ trained weights are not finite after step 2; lower", said)
    assert "weights of before" not in said
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert not (tmp_path / "run" / "export").exists()


def test_running_out_of_memory_is_answered_with_what_helps(told: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("b3_lightning.lightning_cli.B3CLI.before_fit", full)
    assert _holds(told("fit"), r"ran out of memory.*--model.chunks.items=16.*Tried to allocate 2.00 GiB")


def test_a_bug_keeps_its_traceback(told: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        [].index(3)  # type: ignore[arg-type]

    monkeypatch.setattr("b3_lightning.lightning_cli.B3CLI.before_fit", broken)
    with pytest.raises(ValueError, match="not in list"):
        main(["fit", "--config=config.yaml"])
