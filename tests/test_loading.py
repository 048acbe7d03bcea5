"""How models are loaded: code of others only where it is trusted, one revision, teachers by what they inherit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from b3_lightning.model import ContrastiveModule, embedder
from b3_lightning.model.embedder import LoadSettings, load_embedder

CODE = """
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(models: dict[str, str], tmp_path: Path) -> str:
    """A model whose folder brings its architecture."""
    folder = tmp_path / "own_model"
    shutil.copytree(models["bert"], folder)
    (folder / "own.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": classes}))
    return str(folder)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_code_of_a_repository_runs_only_where_it_is_trusted(
    pooling: Any, own_code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match=r"does not load with trust_remote_code=False .* of model.load: "):
        load_embedder(own_code, LoadSettings(pooling), None)
    model = load_embedder(own_code, LoadSettings(pooling, trust_remote_code=True), None)
    assert type(model[0].auto_model).__name__ == "OwnModel"
    assert model.encode(["x"]).shape == (1, 32)


def test_revision_and_attention_are_passed_on(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Spy(SentenceTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given.append(kwargs)
            super().__init__(*args, **kwargs)

    class SpyTransformer(Transformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given.extend(dict(kwargs[name]) for name in ("model_kwargs", "processor_kwargs", "config_kwargs"))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(embedder, "SentenceTransformer", Spy)
    load_embedder(models["bert"], LoadSettings(revision="v2"), None)
    monkeypatch.setattr(embedder, "Transformer", SpyTransformer)
    model = load_embedder(models["bert"], LoadSettings("mean", revision="v2", attn_implementation="eager"), None)
    assert [kwargs.get("revision") for kwargs in given] == ["v2"] * 4 + [None]
    assert model[0].auto_model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"attn_implementation=no_such of model\.load: "):
        load_embedder(models["bert"], LoadSettings(attn_implementation="no_such"), None)
    with pytest.raises(OSError, match="no model 'nobody/absent' at revision 'v2': no folder here"):
        load_embedder("nobody/absent", LoadSettings(revision="v2"), None)


def test_what_a_teacher_inherits() -> None:
    load = LoadSettings("mean", trust_remote_code=True, revision="v2", attn_implementation="eager")
    assert load.for_teacher(same_model=True, precision="32-true") == load
    other = load.for_teacher(same_model=False, precision="32-true")
    assert other == LoadSettings("mean", attn_implementation="eager")
    for precision, named, dtype in (
        ("bf16-mixed", None, "bfloat16"),
        ("bf16-true", None, "bfloat16"),
        ("bf16-mixed", "float32", "float32"),
        ("16-mixed", None, None),
    ):
        assert LoadSettings(dtype=named).for_teacher(same_model=True, precision=precision).dtype == dtype


def test_a_teacher_is_bfloat16_where_the_student_is_trained_in_float32(models: dict[str, str]) -> None:
    module: Any = ContrastiveModule(models["bert"])
    module.trainer = SimpleNamespace(precision="bf16-mixed")
    assert {weight.dtype for weight in module.load_teacher(models["bert"], {"text"}).parameters()} == {torch.bfloat16}
    own: Any = ContrastiveModule(models["bert"], teacher_load=LoadSettings())
    own.trainer = module.trainer
    assert {weight.dtype for weight in own.load_teacher(models["bert"], {"text"}).parameters()} == {torch.float32}
