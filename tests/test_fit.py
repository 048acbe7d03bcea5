"""``fit`` end to end on every kind of pair, with tiny models of each family."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run
from peft import PeftModel
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLModel

from b3_lightning.cli import main
from b3_lightning.data.collate import prepare
from b3_lightning.data.pairs import Item
from b3_lightning.mining import MinedPlan
from b3_lightning.model.contrast import contrast_batch
from b3_lightning.model.embedder import LoadSettings, LoraSettings, load_embedder

CONFIGS = Path(__file__).parent.parent / "configs"


def _rows(run: Path) -> list[dict[str, str]]:
    rows = []
    for path in [*sorted(run.glob("metrics-until-*.csv")), run / "metrics.csv"]:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("text-text", "bert"),
        ("image-text", "clip"),
        ("text-image", "clip"),
        ("image-text", "siglip"),
        ("both-image", "qwen2_vl"),
        ("both-image", "qwen2_5_vl"),
        ("both-image", "qwen3_vl"),
        ("both-image", "internvl"),
    ],
)
def test_fit_mines_with_a_teacher_trains_validates_and_exports(
    kind: str, model: str, fit: Run, models: dict[str, str]
) -> None:
    extra = ["--model.load.pooling=lasttoken"] if model.endswith("vl") else []
    path = models[model]
    run = fit(kind, f"--model.embedder={path}", f"--data.teacher={path}", *extra)
    assert (run / "config.yaml").is_file()
    rows = _rows(run)
    assert sum(bool(row.get("val/mrr")) for row in rows) == 2
    assert float(rows[0]["mining/hardness_best"]) > float(rows[0]["mining/hardness_random"])  # the teacher's plan
    mined = MinedPlan.load(run / "plans" / "epoch-0000")
    assert mined.n_rows == 96
    model_out = SentenceTransformer(str(run / "export"), device="cpu")
    vectors = model_out.encode(["a red circle"])
    assert vectors.shape == (1, 32)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)


def test_the_7b_config_trains_a_tiny_qwen2_vl_with_lora(fit: Run, models: dict[str, str]) -> None:
    path = models["qwen2_vl"]
    run = fit(
        "both-image",
        f"--model.embedder={path}",
        f"--data.teacher={path}",
        "--data.batch_size=16",
        "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.max_steps=3",
        "--model.load.max_pixels=12544",
        "--model.chunks.items=3",
        config=CONFIGS / "b3_7b.yaml",
    )
    assert SentenceTransformer(str(run / "export"), device="cpu").encode(["x"]).shape == (1, 32)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert any("lora_A" in name for name in checkpoint["state_dict"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # inside peft
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_is_exported_alone_or_merged(merged: bool, fit: Run, models: dict[str, str]) -> None:
    run = fit(
        "text-text", f"--model.embedder={models['qwen2_vl']}", "--model.load.pooling=lasttoken",
        "--model.lora={r: 2, dropout: 0.0}",
        f"--model.optim={{learning_rate: 0.05, warmup_frac: 0.0, fused: {str(merged).lower()}}}",
        "--data.batches=random", "--trainer.max_epochs=1", f"--run.merge_adapter={merged}",
    )  # fmt: skip
    names = {path.name for path in (run / "export").rglob("*.safetensors")}
    assert names == ({"model.safetensors"} if merged else {"adapter_model.safetensors"})
    plain = load_embedder(models["qwen2_vl"], LoadSettings(pooling="lasttoken"), LoraSettings(r=2, dropout=0.0))
    before = plain.encode(["a red circle"])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["fused"] is (True if merged else None)
    trained = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    missing = plain.load_state_dict(trained, strict=False)
    assert not missing.unexpected_keys
    found = SentenceTransformer(str(run / "export"), device="cpu").encode(["a red circle"])
    assert np.allclose(found, plain.encode(["a red circle"]), atol=1e-5)
    assert not np.allclose(found, before, atol=1e-3)
    if not merged:  # peft reads the adapter too
        base = PeftModel.from_pretrained(Qwen2VLModel.from_pretrained(models["qwen2_vl"]), run / "export")
        values, expected = (
            {name[name.index("language_model") :]: value for name, value in state.items() if "lora_" in name}
            for state in (base.state_dict(), trained)
        )
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], expected[name]) for name in values)


def test_the_loss_is_never_computed_below_float32(
    fit: Run, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def look(query_BD: torch.Tensor, *rest: Any, **about: Any) -> Any:
        seen.add((query_BD.dtype, torch.is_autocast_enabled("cpu")))
        return contrast_batch(query_BD, *rest, **about)

    monkeypatch.setattr("b3_lightning.model.module.contrast_batch", look)
    settings = (f"--model.embedder={models['bert']}", "--data.batches=random", "--trainer.max_epochs=1")
    fit("text-text", *settings, "--trainer.precision=bf16-mixed")
    assert seen == {(torch.float32, False)}


def test_learned_temperatures_of_a_run_and_its_validation_alone(
    fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path
) -> None:
    loss = "{learn_temperature: per_task, temperature: 0.05, matryoshka_dims: [8, 16], symmetric: true, hardness: 1.0}"
    pairs = [{"path": str(shapes / f"{kind}.parquet"), "task": kind} for kind in ("text-text", "both-image")]
    settings = [f"--model.embedder={models['qwen2_vl']}", "--model.load.pooling=lasttoken", f"--model.loss={loss}"]
    run = fit(
        "text-text", *settings, f"--data.train_pairs={json.dumps(pairs)}", "--data.batches=random",
        "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--model.optim.learning_rate=0.01",
        "--hardness.every_n_steps=1",
    )  # fmt: skip
    rows = [row for row in _rows(run) if row.get("train/temperature")]
    assert len({row["train/temperature"] for row in rows}) > 2
    assert all(0.03 < float(row["train/temperature"]) < 0.07 for row in rows)
    assert {"train/text-text/in_batch_accuracy", "train/both-image/masked_frac"} <= set(_rows(run)[0])
    main(
        [
            "validate", *settings, f"--data.val_pairs={shapes / 'text-text.parquet'}", f"--run.dir={tmp_path}/alone",
            f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    with pytest.raises(SystemExit, match="has 32 dimensions"):
        fit("text-text", *settings[:2], "--model.loss={matryoshka_dims: [64]}", "--data.batches=random", name="wide")


def test_the_student_mines_for_itself_and_logs_what_changed(fit: Run) -> None:
    run = fit(
        "image-text",
        "--model.embedder={hidden_sizes: [8, 16], image_size: 32}",
        "--data.teacher=student",
        "--remine.enabled=true",
        "--trainer.max_epochs=4",
    )
    assert sorted(folder.name for folder in (run / "plans").iterdir()) == ["epoch-0001", "epoch-0002", "epoch-0003"]
    mining = [row for row in _rows(run) if row.get("mining/n_edges")]
    assert len(mining) == 3
    assert 0 <= float(mining[1]["mining/together_frac"]) <= 1
    assert float(mining[0]["mining/seconds"]) > 0
    for row in mining:
        hardness = {name: float(row[f"mining/hardness_{name}"]) for name in ("random", "mined", "best")}
        assert max(hardness["random"], hardness["mined"]) < hardness["best"]


def test_random_batches_differ_in_nothing_but_the_batches(fit: Run) -> None:
    small = "--model.embedder={hidden_sizes: [8, 16], image_size: 32}"
    run = fit("image-text", small, "--data.batches=random")
    assert not (run / "plans").exists()
    assert any(row.get("val/hit@1") for row in _rows(run))


def test_same_seed_same_metrics(fit: Run) -> None:
    settings = ("--model.embedder={hidden_sizes: [8, 16], image_size: 32}", "--remine.enabled=true")
    first, second = (fit("image-text", *settings, name=name) for name in ("one", "two"))
    assert _validations(first) == _validations(second)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(fit: Run) -> None:
    settings = (
        "--model.embedder={hidden_sizes: [8, 16], image_size: 32}",
        "--model.optim={schedule: constant, warmup_frac: 0.0}",
        "--remine.enabled=true",
    )
    whole = fit("image-text", *settings, "--trainer.max_epochs=4", name="whole")
    half = fit("image-text", *settings, "--trainer.max_epochs=2", name="half")
    last = half / "checkpoints" / "last.ckpt"
    fit("image-text", *settings, "--trainer.max_epochs=4", f"--ckpt_path={last}", name="half")
    assert _validations(half) == _validations(whole)


def _validations(run: Path) -> list[tuple[str, ...]]:
    return [(row["step"], row["val/loss"], row["val/mrr"]) for row in _rows(run) if row.get("val/mrr")]


def test_mine_writes_a_plan_that_fit_trains_on(fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan"
    settings = [f"--model.embedder={models['bert']}", f"--data.teacher={models['bert']}"]
    command = [
        "mine",
        f"--output={output}",
        f"--data.train_pairs={shapes / 'text-text.parquet'}",
        "--data.batch_size=16",
        "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        *settings,
    ]
    main(command)
    report = (output / "report.md").read_text()
    plan = MinedPlan.load(output)
    texts = pq.read_table(shapes / "text-text.parquet")
    for row in plan.clusters.ids_CK[0].tolist():  # whole, as "large red circle"
        assert f"| {row} | {texts['qry'][row]} | {texts['pos_text'][row]} |" in report
    assert f"| {len(plan.edges)} | " in report.split("inside a cluster |")[1].splitlines()[2]
    main([*command, f"--output={tmp_path / 'own'}", "--data.teacher=student"])
    assert MinedPlan.load(tmp_path / "own").n_rows == 96
    run = fit("text-text", *settings, f"--data.plan={output}")
    assert not (run / "plans").exists()
    with pytest.raises(SystemExit, match="holds another plan"):
        main(command)


def test_text_that_is_a_web_address_stays_text(models: dict[str, str]) -> None:
    embedder = load_embedder(models["qwen2_vl"], LoadSettings(pooling="lasttoken"), None)
    item = Item("https://example.com/red.png", "")
    (features,) = prepare([item, Item("a circle", "")], Path(), embedder.preprocess)
    assert features.tensors["modality"] == "text" or "pixel_values" not in features.tensors


def test_pixel_limits_bound_an_image(models: dict[str, str]) -> None:
    picture = Image.new("RGB", (300, 300))
    patches = {}
    for most in (8, 32):
        load = LoadSettings(pooling="lasttoken", min_pixels=4 * 28 * 28, max_pixels=most * 28 * 28)
        features = load_embedder(models["qwen2_vl"], load, None).preprocess([picture])
        patches[most] = int(features["image_grid_thw"].prod())
    assert patches[8] <= 8 * 4 < patches[32] <= 32 * 4
    with pytest.raises(ValueError, match="give both or neither"):
        LoadSettings(max_pixels=100)
    with pytest.raises(ValueError, match="for Qwen2-VL and its kin"):
        load_embedder(models["clip"], LoadSettings(min_pixels=100, max_pixels=200), None)


def test_predict_writes_vectors_that_serve_as_teacher(
    fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path
) -> None:
    pairs = shapes / "text-text.parquet"
    main(
        [
            "predict",
            f"--run.dir={tmp_path / 'vectors'}",
            f"--data.test_pairs={pairs}",
            f"--model.embedder={models['bert']}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    vectors = tmp_path / "vectors" / "embeddings.safetensors"
    run = fit("text-text", f"--model.embedder={models['bert']}", f"--data.teacher={vectors}")
    assert MinedPlan.load(run / "plans" / "epoch-0000").n_rows == 96
