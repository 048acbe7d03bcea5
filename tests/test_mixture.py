"""MMEB's mixture: its files and texts, which tasks are taken, how each is mined, how models read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Run
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from b3_lightning.data.collate import model_input
from b3_lightning.data.datamodule import PairsDataModule
from b3_lightning.data.mmeb import TRAIN_TASKS, find_task
from b3_lightning.data.pairs import Item, PairSource, load_pairs
from b3_lightning.mining import MiningSettings
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.model.fused import FusedEmbedder

CONFIGS = Path(__file__).parent.parent / "configs"
MIXTURE: list[dict[str, Any]] = yaml.safe_load((CONFIGS / "data" / "mmeb_train.yaml").read_text())
TEMPLATE: str = yaml.safe_load((CONFIGS / "b3_2b.yaml").read_text())["model"]["load"]["chat_template"]


def _write(folder: Path, name: str, **columns: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder


# ---- files and texts


def test_the_image_token_goes_from_all_texts_of_a_file_that_has_it(tmp_path: Path) -> None:
    folder = _write(
        tmp_path / "WebQA",
        "original-00000-of-00001.parquet",
        qry=["<|image_1|>\nWhat is it?\n", "no token\n", "<|image_1|>\n"],
        qry_image_path=["", None, "a.png"],
        pos_text=["<|image_1|>\nA picture: red\n", "<|image_1|>\n", "blue"],
        pos_image_path=["b.png", "c.png", ""],
        neg_text=[["<|image_1|>\ngreen\n", ""], [], ["", "x"]],
        neg_image_path=[["d.png", ""], [], ["e.png", ""]],
    )
    pairs = load_pairs(PairSource(str(folder), split="original", target_prompt="Say: "))
    assert pairs.items("query") == [Item("What is it?", ""), Item("no token", ""), Item("", "a.png")]
    assert pairs.items("target")[0] == Item("Say: A picture: red", "b.png")
    assert pairs.negatives == [
        [Item("Say: green", "d.png")],
        [],
        [Item("Say: ", "e.png"), Item("Say: x", "")],
    ]


def test_texts_of_other_files_stay_as_they_are(tmp_path: Path) -> None:
    folder = _write(tmp_path / "x", "train-00000-of-00001.parquet", qry=["a\n"], pos_text=[" b"])
    assert load_pairs(str(folder)).items("query") == [Item("a\n", "")]


def test_a_text_that_is_nothing_but_the_token_needs_an_image(tmp_path: Path) -> None:
    folder = _write(tmp_path / "x", "train-00000-of-00001.parquet", qry=["q", "<|image_1|>\n"], pos_text=["a", "b"])
    with pytest.raises(ValueError, match=r"the query is null or empty in row\(s\) 1"):
        load_pairs(str(folder))


def test_a_folder_is_read_split_by_split_and_file_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "CIRR"
    for split, texts in (("original", ["a", "b"]), ("diverse_instruction", ["c", "d"])):
        for part, text in enumerate(texts):
            _write(folder, f"{split}-{part:05d}-of-00002.parquet", qry=[text], pos_text=[text])
    assert [item.text for item in load_pairs(PairSource(str(folder), split="original")).items("query")] == ["a", "b"]
    diverse = load_pairs(PairSource(str(folder), split="diverse_instruction"))
    assert [item.text for item in diverse.items("query")] == ["c", "d"]
    assert diverse.tasks == ["CIRR"] * 2
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['diverse_instruction', 'original'\]"):
        load_pairs(str(folder))
    (folder / "original-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="holds 1 of the 2 files of split 'original'"):
        load_pairs(PairSource(str(folder), split="original"))


def test_validation_and_test_read_splits_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "qa"
    for split in ("train", "validation", "test", "dev"):
        _write(folder, f"{split}-00000-of-00001.parquet", qry=[f"a query to {split}"], pos_text=["b"])

    def read(**given: Any) -> list[str]:
        data = PairsDataModule(**given)
        return [
            item.text for sources in data.sources.values() if sources for item in load_pairs(sources).items("query")
        ]

    everywhere = dict.fromkeys(("train_pairs", "val_pairs", "test_pairs"), str(folder))
    assert read(**everywhere) == ["a query to train", "a query to validation", "a query to test"]
    assert read(val_pairs=PairSource(str(folder), split="dev")) == ["a query to dev"]
    (folder / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"no split 'validation'; it has .*'dev'.*: write \{path: .*qa, split: NAME\}"):
        read(val_pairs=str(folder))


@pytest.mark.parametrize("error", [ValueError("Unknown split."), ConnectionError("Couldn't reach it.")])
def test_what_the_hub_lacks_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    told = f"owner/name is no file or folder .*, and as a dataset of the hub, split 'validation': {error}"
    with pytest.raises(ValueError, match=told):
        load_pairs(PairSource("owner/name", split="validation"))


# ---- which tasks, how mined


def test_the_mixture_is_the_table_with_the_papers_policy() -> None:
    assert {entry["path"] for entry in MIXTURE} == {task.train_name for task in TRAIN_TASKS}
    assert len(MIXTURE) == 20
    data = PairsDataModule([PairSource(**entry) for entry in MIXTURE], mining=MiningSettings())
    for entry in MIXTURE:
        task, mined = find_task(entry["path"]), data.mining.of_task(entry["path"])
        assert entry["split"] == "original"
        assert entry.get("target_prompt", "") == task.target_prompt
        if task.meta == "classification":
            # 300 is 30% of ImageNet's labels: n_ranks must not cut it
            assert (mined.ranked, mined.label_share, mined.n_ranks) == ("labels", 0.3, 300)
        else:
            first_rank = 70 if task.meta == "vqa" else 30
            assert (mined.first_rank, mined.n_ranks) == (first_rank, 100)


def _sources() -> list[str | PairSource]:
    return [PairSource("a.csv", mining={"first_rank": 7, "n_ranks": 5}), PairSource("b.csv", target_prompt="B: ")]


def test_tasks_are_chosen_and_their_settings_with_them() -> None:
    mining = MiningSettings(per_task={"a": {"first_rank": 9}, "b": {"n_ranks": 3}})
    whole = PairsDataModule(_sources(), mining=mining)
    assert whole.mining.per_task == {"a": {"first_rank": 9, "n_ranks": 5}, "b": {"n_ranks": 3}}
    only_b = PairsDataModule(_sources(), tasks=["b"], mining=mining)
    assert only_b.mining.per_task == {"b": {"n_ranks": 3}}
    assert [source.name for source in only_b.sources["train"] or []] == ["b"]
    with pytest.raises(ValueError, match=r"data.tasks=\['c'\]: .* they are \['a', 'b'\]"):
        PairsDataModule(_sources(), tasks=["c"])
    with pytest.raises(ValueError, match="cluster_size"):
        PairsDataModule([PairSource("a.csv", mining={"cluster_size": 8})])
    with pytest.raises(ValueError, match="task 'a' is given the mining settings"):
        PairsDataModule([*_sources(), PairSource("a.csv")])


def test_prompts_can_be_left_out_and_paths_lie_under_a_root(tmp_path: Path) -> None:
    _write(tmp_path / "b", "train-00000-of-00001.parquet", qry=["q"], pos_text=["t"])
    source = PairSource("b", query_prompt="A: ", target_prompt="B: ")
    for prompts, text in ((True, "B: t"), (False, "t")):
        data = PairsDataModule(source, pairs_root=str(tmp_path), prompts=prompts, batches="random", batch_size=1)
        data.load("train")
        assert data.pairs("train").items("target") == [Item(text, "")]
        assert data.pairs("train").tasks == ["b"]
    data = PairsDataModule("absent/b", pairs_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no pairs file .*absent/b .*data\.pairs_root"):
        data.load("train")


# ---- how models read it


def test_the_papers_template_leaves_the_image_token_and_the_text(models: dict[str, str], tmp_path: Path) -> None:
    load = LoadSettings(pooling="lasttoken", min_pixels=784, max_pixels=784, chat_template=TEMPLATE)
    embedder = load_embedder(models["qwen2_vl"], load, None)
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    for item, expected in (
        (Item("what is it", "a.png"), "<|image_pad|>\nwhat is it"),
        (Item("", "a.png"), "<|image_pad|>\n"),
        (Item("what is it", ""), "what is it"),
    ):
        tokens = embedder.preprocess([model_input(item, tmp_path)])["input_ids"][0]
        tokenizer: Any = embedder.tokenizer
        assert tokens.tolist() == tokenizer(expected)["input_ids"]
    embedder.save_pretrained(str(tmp_path / "export"), create_model_card=False)
    again = load_embedder(str(tmp_path / "export"), LoadSettings(), None)
    assert np.allclose(again.encode(["x"]), embedder.encode(["x"]), atol=1e-6)
    with pytest.raises(ValueError, match="has no chat template to replace"):
        load_embedder(models["clip"], LoadSettings(chat_template=TEMPLATE), None)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # inside peft
def test_adapters_of_any_naming_are_read_whole(models: dict[str, str], tmp_path: Path) -> None:
    base = Qwen2VLForConditionalGeneration.from_pretrained(models["qwen2_vl"])
    layers = ["q_proj", "down_proj"]
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules=layers, use_dora=True))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            weight.data.uniform_(0.5, 1.5)
    adapted.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(models["qwen2_vl"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    # transformers 4 called the language model "model", and so do the adapters on the hub
    older = {name.replace("model.language_model.layers", "model.layers"): value for name, value in saved.items()}
    for weights in (saved, older):
        save_file(weights, file, metadata={"format": "pt"})
        embedder = load_embedder(str(tmp_path), LoadSettings(pooling="lasttoken"), None)
        found = {n: w for n, w in embedder.named_parameters() if "lora_magnitude" in n or "lora_B" in n}
        assert len(found) == 8
        for name, weight in found.items():
            tail = name[name.index("layers.") :].replace(".default", "")
            (same,) = (value for key, value in saved.items() if tail.startswith(key[key.index("layers.") :]))
            assert torch.equal(weight.flatten(), same.flatten()), name
    del older[next(name for name in older if "lora_B" in name)]
    save_file(older, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 of 12 weights of the adapter do not fit"):
        load_embedder(str(tmp_path), LoadSettings(pooling="lasttoken"), None)


def test_a_fused_teacher_adds_up_image_and_text(models: dict[str, str], tmp_path: Path) -> None:
    clip = load_embedder(models["clip"], LoadSettings(), None)
    fused = FusedEmbedder(clip).eval()
    image = Image.new("RGB", (32, 32), "red")
    with torch.no_grad():
        found = fused(fused.preprocess([{"image": image, "text": "a circle"}]))["sentence_embedding"][0].numpy()
        alone = fused(fused.preprocess(["a circle"]))["sentence_embedding"][0].numpy()
    parts = clip.encode([image])[0], clip.encode(["a circle"])[0]
    total = parts[0] + parts[1]
    assert np.allclose(found, total / np.linalg.norm(total), atol=1e-5)
    assert np.allclose(alone, parts[1], atol=1e-5)
    assert fused.supports(("image", "text"))
    assert not fused.supports("audio")


def test_a_clip_teacher_mines_for_a_vision_language_model(fit: Run, models: dict[str, str]) -> None:
    settings = (
        f"--model.embedder={models['qwen2_vl']}", "--model.load={pooling: lasttoken, min_pixels: 784, max_pixels: 784}",
        f"--data.teacher={models['clip']}", "--model.teacher_load.dtype=float32", "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
    )  # fmt: skip
    with pytest.raises(SystemExit, match=r"does not take image and text in one item.*model.fuse_teacher"):
        fit("both-image", *settings, name="refused")
    run = fit("both-image", *settings, "--model.fuse_teacher=true")
    assert (run / "plans" / "epoch-0000" / "plan.json").is_file()
