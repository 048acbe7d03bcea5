"""The shipped configs, unchanged, on a miniature MMEB; only sizes and the machine are overridden."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mini_mmeb import ROWS, TRAIN_ROWS, TRAINED, MiniMmeb, tasks

from b3_lightning.cli import main
from b3_lightning.data.mixture import place
from b3_lightning.data.mmeb import find_task
from b3_lightning.data.pairs import PairSource, load_pairs
from b3_lightning.evaluation.mmeb import read_mmeb
from b3_lightning.evaluation.sets import ReadSettings

CONFIGS = Path(__file__).parent.parent / "configs"
MIXTURE = yaml.safe_load((CONFIGS / "data" / "mmeb_train.yaml").read_text())


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``MMEB-train`` and ``MMEB-eval`` of 11 and 12 datasets."""
    folder = tmp_path_factory.mktemp("mini")
    MiniMmeb(folder, TRAIN_ROWS).write()
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower on many threads, and much slower where others want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _fit(mini: Path, model: str, run: Path, *settings: str) -> None:
    main(
        [
            "fit", *settings, f"--data.pairs_root={mini / 'MMEB-train'}", f"--data.image_root={mini / 'MMEB-train'}",
            f"--data.tasks={json.dumps(TRAINED)}", f"--model.embedder={model}", "--data.batch_size=32",
            "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto",
            "--trainer.precision=32-true", "--model.load.dtype=float32", "--trainer.max_steps=2",
            "--trainer.enable_progress_bar=false", f"--run.dir={run}", "--run.wandb=disabled",
        ]
    )  # fmt: skip


def test_the_miniature_has_what_the_hub_has(mini: Path) -> None:
    assert [len(list(tasks(meta))) for meta in ("classification", "vqa", "retrieval", "grounding")] == [3, 3, 4, 2]
    for name in ROWS:
        table = pq.read_table(mini / "MMEB-eval" / name)
        for row in table.to_pylist():
            assert len(row["tgt_text"]) == len(row["tgt_img_path"]) >= 2
            for image in (row["qry_img_path"], *row["tgt_img_path"]):
                assert not image or (mini / "MMEB-eval" / "images" / image).is_file()
            task = find_task(name)
            assert bool(row["qry_img_path"]) == ("I" in task.query)
            assert all(bool(image) == ("I" in task.target) for image in row["tgt_img_path"])


def test_the_2b_config_with_hard_negatives_trains_and_is_evaluated(
    mini: Path, models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with caplog.at_level("INFO", "b3_lightning"):
        _fit(
            mini, models["qwen2_vl"], run, f"--config={CONFIGS / 'b3_2b.yaml'}",
            f"--config={CONFIGS / 'ablations' / 'hard_negatives.yaml'}", f"--data.teacher={models['qwen2_vl']}",
        )  # fmt: skip
    for task in TRAINED:
        first = {"classification": 0, "vqa": 70, "retrieval": 30, "grounding": 30}[find_task(task).meta]
        assert f"task '{task}': ranks {first} to" in caplog.text
    assert "ranks 70 to 169 are hard" in caplog.text
    assert json.loads((run / "plans" / "epoch-0000" / "plan.json").read_text())["settings"]["n_negatives"] == 5
    output = tmp_path / "evaluation"
    main(
        [
            "evaluate", "--suite=mmeb", f"--model={run / 'export'}", f"--data={mini / 'MMEB-eval'}",
            f"--output={output}", "--wandb=disabled",
        ]
    )  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    assert {entry["name"] for entry in results["sets"]} == set(ROWS)
    assert {meta: results["means"][meta]["n_tasks"] for meta in TRAIN_ROWS} == {
        "classification": 3, "vqa": 3, "retrieval": 4, "grounding": 2,
    }  # fmt: skip
    assert results["means"]["OOD"]["n_tasks"] == 1


@pytest.mark.parametrize("name", ["HatefulMemes", "MSCOCO", "NIGHTS"])
def test_training_and_evaluation_give_a_model_the_same_texts(name: str, mini: Path) -> None:
    """Datasets without words of the row's own but labels: image token, line breaks and prompts must come out alike."""
    entry = next(entry for entry in MIXTURE if entry["path"] == name)
    pairs = load_pairs(place([PairSource(**entry)], str(mini / "MMEB-train"), prompts=True, split="original"))
    trained = {item.text for side in ("query", "target") for item in pairs.items(side)}
    evaluated = {item.text for item in read_mmeb(name, ReadSettings(data=mini / "MMEB-eval")).items}
    if name == "MSCOCO":  # the query names the object
        trained, evaluated = ({text.split('"')[0] for text in texts} for texts in (trained, evaluated))
    assert trained == evaluated


def test_the_7b_config_trains_with_the_overlays_of_the_baseline(
    mini: Path, models: dict[str, str], tmp_path: Path
) -> None:
    overlays = [f"--config={CONFIGS / 'ablations' / f'{name}.yaml'}" for name in ("random", "no_prompts")]
    _fit(mini, models["qwen2_vl"], tmp_path / "run", f"--config={CONFIGS / 'b3_7b.yaml'}", *overlays)
    assert not (tmp_path / "run" / "plans").exists()
    assert "prompts: false" in (tmp_path / "run" / "config.yaml").read_text()


def test_overlays_go_together(
    mini: Path, models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overlays = [f"--config={CONFIGS / 'ablations' / f'{name}.yaml'}" for name in ("p0", "k8", "teacher_clip")]
    with caplog.at_level("INFO", "b3_lightning"):
        _fit(
            mini, models["qwen2_vl"], tmp_path / "run", f"--config={CONFIGS / 'b3_2b.yaml'}", *overlays,
            f"--data.teacher={models['clip']}", "--model.teacher_load.max_seq_length=64",
        )  # fmt: skip
    for name in tasks("vqa"):
        assert f"task '{name}': ranks 0 to 99 are hard" in caplog.text
    plan = json.loads((tmp_path / "run" / "plans" / "epoch-0000" / "plan.json").read_text())
    assert plan["settings"]["cluster_size"] == 8
