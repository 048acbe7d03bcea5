"""Prompts: what an export keeps of them, and that nothing here puts them before texts twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from b3_lightning.callbacks.export import keep_prompts, told_prompts
from b3_lightning.cli import main
from b3_lightning.data.datamodule import PairsDataModule
from b3_lightning.data.miner import PairMiner
from b3_lightning.data.mixture import prompts_of
from b3_lightning.data.pairs import PairSource, TeacherPrompts
from b3_lightning.evaluation.encode import EvalModel, device_of
from b3_lightning.mining import MiningSettings, Stages
from b3_lightning.model import ContrastiveModule
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.progress import StageProgress
from b3_lightning.trainer import B3Trainer

MINING = MiningSettings(first_rank=1, n_ranks=10, cluster_size=4)


def test_an_export_puts_its_prompts_where_training_did_and_never_twice(
    fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shapes / "text-text.parquet"
    source = json.dumps({"path": str(path), "task": "shapes", "query_prompt": "query: ", "target_prompt": "large: "})
    run = fit(
        "text-text", f"--model.embedder={models['bert']}", f"--data.train_pairs=[{source}]", "--data.batches=random",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0",
    )  # fmt: skip
    export = str(run / "export")
    settings = json.loads((run / "export" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "query: ", "document": "large: "}
    assert '- query: `encode_query` puts `"query: "` before' in (run / "export" / "README.md").read_text()
    main(
        [
            "predict", f"--run.dir={tmp_path / 'vectors'}", f"--data.test_pairs=[{source}]",
            f"--model.embedder={export}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    vectors = load_file(tmp_path / "vectors" / "embeddings.safetensors")
    rows = pq.read_table(path).slice(0, 5)
    model = SentenceTransformer(export, device="cpu")
    query, target = rows["qry"].to_pylist(), rows["pos_text"].to_pylist()
    assert np.allclose(model.encode_query(query), vectors["query"][:5], atol=1e-5)
    assert np.allclose(model.encode_document(target), vectors["target"][:5], atol=1e-5)
    assert np.allclose(model.encode([f"query: {text}" for text in query]), vectors["query"][:5], atol=1e-5)
    assert not np.allclose(model.encode(query), vectors["query"][:5], atol=1e-3)
    EvalModel.load(export, LoadSettings(), device_of("cpu")).tell_unused_prompts()
    assert "holds the prompts {'query': 'query: ', 'document': 'large: '}" in caplog.text


def test_prompts_that_no_text_was_trained_with_are_emptied(models: dict[str, str]) -> None:
    model = load_embedder(models["bert"], LoadSettings(), None)
    model.prompts, model.default_prompt_name = {"query": "old: ", "document": "old: "}, "query"
    prompts = prompts_of([PairSource("a", target_prompt="A: "), PairSource("b"), PairSource("a", target_prompt="A: ")])
    assert prompts == {"query": {"": ["a", "b"]}, "target": {"A: ": ["a"], "": ["b"]}}
    kept = keep_prompts(model, prompts)
    assert model.prompts == {"query": "", "document": ""}
    assert model.default_prompt_name is None
    told = told_prompts(prompts, kept)
    assert (
        told == '## Prompts\n\n- target: put the prompt of its task before the text yourself: `"A: "` (a); `""` (b)\n\n'
    )
    assert told_prompts({"query": {"": ["a"]}, "target": {"": ["a"]}}, {"query": "", "target": ""}) == ""


def test_a_prompt_that_would_become_a_system_message_is_not_kept(models: dict[str, str]) -> None:
    model = load_embedder(models["qwen2_vl"], LoadSettings(pooling="lasttoken"), None)
    prompts = prompts_of([PairSource("a", query_prompt="Q: ")])
    kept = keep_prompts(model, prompts)
    assert kept == {"query": "", "target": ""}
    assert model.prompts["query"] == ""
    assert "- query: put the prompt" in told_prompts(prompts, kept)


def _teacher_vectors(run: Path, sources: list[str | PairSource], model: str, **given: object) -> list[torch.Tensor]:
    """(query, target) of a teacher as ``mine`` encodes it."""
    data = PairsDataModule(sources, teacher=model, batch_size=16, mining=MINING, cache=str(run), **given)  # type: ignore[arg-type]
    trainer = B3Trainer(accelerator="cpu", default_root_dir=run, logger=False, enable_checkpointing=False)
    data.load("train")
    trainer._prepare(ContrastiveModule(model), data)
    miner: PairMiner = data._miner()
    with StageProgress(enabled=False) as progress:
        vectors = miner._teacher_vectors(Stages(run, miner.processes), progress)
    return [vectors.query_ND, vectors.target_ND]


def test_a_teacher_reads_its_own_prompts_and_its_kept_vectors_follow_them(
    models: dict[str, str], shapes: Path, tmp_path: Path
) -> None:
    path = str(shapes / "text-text.parquet")
    sources: list[str | PairSource] = [PairSource(path, query_prompt="student: ", target_prompt="student too: ")]
    bare: list[str | PairSource] = [PairSource(path)]
    e5: list[str | PairSource] = [PairSource(path, query_prompt="query: ", target_prompt="passage: ")]
    wanted = _teacher_vectors(tmp_path, e5, models["bert"])
    given = TeacherPrompts("query: ", "passage: ")
    for own in (sources, bare):
        found = _teacher_vectors(tmp_path, own, models["bert"], teacher_prompts=given)
        assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))
    as_student = _teacher_vectors(tmp_path, sources, models["bert"])
    assert not torch.allclose(as_student[0], wanted[0], atol=1e-3)
    one = _teacher_vectors(tmp_path, sources, models["bert"], teacher_prompts=TeacherPrompts(query="query: "))
    assert torch.equal(one[0], wanted[0])
    assert torch.equal(one[1], as_student[1])


@pytest.mark.parametrize("teacher", ["student", "vectors.npy"])
def test_prompts_for_a_teacher_without_texts_are_refused(teacher: str) -> None:
    with pytest.raises(ValueError, match=f"teacher_prompts are without effect where data.teacher={teacher}"):
        PairsDataModule("a.csv", teacher=teacher, teacher_prompts=TeacherPrompts(query="x"))
