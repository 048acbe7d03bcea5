"""What is trained is float32, whatever the base weights are; exports and checkpoints keep what they need."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from b3_lightning.callbacks.export import _name_base_wholly
from b3_lightning.model.embedder import LoadSettings, LoraSettings, check_trained, load_embedder

BFLOAT16 = LoadSettings(pooling="lasttoken", dtype="bfloat16")
TEXTS = ["a red circle", "a large blue square"]


def test_a_step_moves_every_weight_of_an_adapter_on_a_bfloat16_base(models: dict[str, str]) -> None:
    model = load_embedder(models["qwen2_vl"], BFLOAT16, LoraSettings(r=2, dropout=0.0)).train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    torch.manual_seed(0)
    for name, weight in trained.items():
        if "lora_B" in name:  # 0 at first, so that none but they have a gradient
            torch.nn.init.normal_(weight, std=0.02)
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0.0)
    (model(dict(model.preprocess(TEXTS)))["sentence_embedding"].float() @ torch.randn(32, 3)).sum().backward()
    optimizer.step()
    for name, weight in trained.items():
        assert (weight != before[name]).all(), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # inside peft
@pytest.mark.parametrize("merged", [False, True])
def test_a_bfloat16_base_with_an_adapter_trains_goes_on_and_is_exported(
    merged: bool, fit: Run, models: dict[str, str]
) -> None:
    settings = (
        f"--model.embedder={os.path.relpath(models['qwen2_vl'])}",
        "--model.load={pooling: lasttoken, dtype: bfloat16}", "--model.load.gradient_checkpointing=true",
        "--model.lora={r: 2, dropout: 0.0}", "--model.chunks.items=24", "--data.batch_size=48",
        "--model.optim={learning_rate: 0.05, warmup_frac: 0.0, schedule: constant}", "--data.batches=random",
        f"--trainer.precision={'32-true' if merged else 'bf16-mixed'}", f"--run.merge_adapter={merged}",
    )  # fmt: skip
    run = fit("text-text", *settings, "--trainer.max_epochs=1")
    last = run / "checkpoints" / "last.ckpt"
    first = torch.load(last, weights_only=True)["state_dict"]
    fit("text-text", *settings, f"--ckpt_path={last}")
    second = torch.load(last, weights_only=True)["state_dict"]
    assert {value.dtype for value in second.values()} == {torch.float32}
    assert all((second[name] != value).any() for name, value in first.items())
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    exported = torch.load(best, weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in exported.items()}
    (file,) = (run / "export").rglob("*.safetensors")
    weights = load_file(file)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16 if merged else torch.float32}
    assert file.name == ("model.safetensors" if merged else "adapter_model.safetensors")
    own = load_embedder(models["qwen2_vl"], BFLOAT16, LoraSettings(r=2, dropout=0.0))
    assert not own.load_state_dict(state, strict=False).unexpected_keys
    again = load_embedder(str(run / "export"), LoadSettings(dtype="bfloat16"), None)
    expected, found = (model.encode(TEXTS, normalize_embeddings=True) for model in (own, again))
    assert np.allclose(found, expected, atol=0.03 if merged else 1e-6)
    if not merged:
        config = json.loads((file.parent / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(Path(models["qwen2_vl"]).resolve())  # given as a relative path
        # nothing was rounded on the way back
        kept = {name: value for name, value in again.state_dict().items() if "lora_" in name}
        assert all(torch.equal(value, state[name]) for name, value in kept.items())
    assert SentenceTransformer(str(run / "export"), device="cpu").encode(TEXTS).shape == (2, 32)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_below_float32_are_not_trained(precision: str, fit: Run, models: dict[str, str]) -> None:
    settings = (f"--model.embedder={models['bert']}", "--model.load.dtype=bfloat16", "--data.batches=random")
    with pytest.raises(SystemExit, match=r"trained weights are bfloat16, such as .*--model.load.dtype=null"):
        fit("text-text", *settings, f"--trainer.precision={precision}")


def test_weights_below_float32_are_trained_where_that_is_asked_for(fit: Run, models: dict[str, str]) -> None:
    settings = (f"--model.embedder={models['bert']}", "--model.load.dtype=bfloat16", "--data.batches=random")
    run: Path = fit("text-text", *settings, "--trainer.precision=bf16-true", "--trainer.max_epochs=1")
    assert (run / "export" / "model.safetensors").is_file()


def test_an_adapter_that_came_with_the_model_is_not_trained_on_silently(models: dict[str, str], tmp_path: Path) -> None:
    """transformers freezes it: a run would train nothing, or its temperature alone."""
    adapted = load_embedder(models["qwen2_vl"], BFLOAT16, LoraSettings(r=2))
    adapted.save_pretrained(str(tmp_path / "export"), create_model_card=False)
    model = load_embedder(str(tmp_path / "export"), LoadSettings(), None)
    with pytest.raises(ValueError, match=r"all weights of model\.embedder are frozen.*--run\.merge_adapter=true"):
        check_trained(model, "32-true")
    with pytest.raises(ValueError, match=r"model\.lora adds an adapter, and model\.embedder has one.*model\.lora=null"):
        load_embedder(str(tmp_path / "export"), LoadSettings(), LoraSettings(r=2))


def test_an_exported_adapter_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for given, kept in (("models/base", str(tmp_path / "models" / "base")), ("owner/name", "owner/name"), (None, None)):
        path = tmp_path / "export" / "adapter" / "adapter_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"base_model_name_or_path": given, "r": 2}))
        _name_base_wholly(tmp_path / "export")
        assert json.loads(path.read_text()) == {"base_model_name_or_path": kept, "r": 2}
