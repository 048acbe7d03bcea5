"""The suites' files and their quirks, and ``evaluate`` on them with tiny models."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import free_port
from PIL import Image
from rich.console import Console
from sentence_transformers import SentenceTransformer

from b3_lightning.cli import main
from b3_lightning.data import collate
from b3_lightning.data.images import load_image
from b3_lightning.data.mmeb import TASKS, TRAIN_TASKS, find_task, without_image_token
from b3_lightning.data.pairs import Item
from b3_lightning.evaluation.encode import EvalModel
from b3_lightning.evaluation.mmeb import read_mmeb
from b3_lightning.evaluation.results import Results
from b3_lightning.evaluation.retrieval import read_retrieval
from b3_lightning.evaluation.scoring import OwnCandidates, ScoredPairs, SharedCandidates
from b3_lightning.evaluation.sets import ReadSettings
from b3_lightning.evaluation.sts import read_sts
from b3_lightning.evaluation.suites import SUITES
from b3_lightning.evaluation.visdoc import read_visdoc
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.reports.evaluation import Sheet, show

I = "<|image_1|>\n"  # noqa: E741
SMALL_IMAGES = ["--pooling", "lasttoken", "--min-pixels", "784", "--max-pixels", "784"]
COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def write_mmeb(folder: Path, name: str, rows: Sequence[tuple[str, str, list[str], list[str]]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / name / "test-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sets of MMEB with the quirks of the real files; captions and sentences in their layouts."""
    folder = tmp_path_factory.mktemp("evaluation")
    generator = np.random.default_rng(0)
    (folder / "images" / "a").mkdir(parents=True)
    for index in range(8):
        pixels = generator.integers(0, 255, size=(28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "a" / f"{index}.png")
    Image.open(folder / "images" / "a" / "0.png").save(folder / "images" / "a" / "0-again.png")
    pictures = [f"a/{index}.png" for index in range(8)]
    labels = ["cat", "dog", "cat"]
    voc = [(f"{I}Identify the object", pictures[row], labels[row % 2 :], [""] * (3 - row % 2)) for row in range(6)]
    write_mmeb(folder, "VOC2007", voc)
    oven = []
    for row in range(6):
        texts = [f"{I}Wikipedia: text {n}" for n in (row, 6, 7)]
        oven.append(
            (f"{I}Provide evidence: question {row}\n", pictures[row], texts, [pictures[n] for n in (row, 6, 7)])
        )
    write_mmeb(folder, "OVEN", oven)
    edis = []
    for row in range(6):
        text = f"{I}Represent: {row}"
        images = ["a/0.png", "", "a/0-again.png", pictures[row + 1]]
        edis.append((f"{I}Find a news image: {row}", "", [text, "", text, text], images))
    write_mmeb(folder, "EDIS", edis)
    write_mmeb(folder, "NIGHTS", [(I, pictures[0], [I], [pictures[1]])])
    captions = {"image": pictures[:3], "captions": [["one", "uno"], ["two"], ["three", "one"]]}
    pq.write_table(pa.table(captions), folder / "Flickr30K.parquet")
    with (folder / "STSb.csv").open("w", newline="") as file:
        rows = [(f"sentence {row}", f"phrase {row * row % 7}", row % 4 + 0.5) for row in range(20)]
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
    return folder


def test_the_table_of_tasks() -> None:
    assert (len(TASKS), len(TRAIN_TASKS), sum(task.n_train_rows for task in TASKS)) == (36, 20, 1_068_472)
    counts = [sum(task.meta == meta for task in TASKS) for meta in ("retrieval", "classification", "vqa", "grounding")]
    assert counts == [12, 10, 10, 4]
    assert find_task("ImageNet_1K") is find_task("ImageNet-1K")
    prompts = {task.name: task.target_prompt for task in TASKS if task.target_prompt}
    assert len(prompts) == 22
    assert prompts["VisualNews_i2t"] == "Represent the image caption: "
    assert all(
        ("I" in task.query) == (f"{I}" in task.query_text) for task in TASKS if task.name not in ("WebQA", "EDIS")
    )
    assert all(("I" in task.target) == (f"{I}" in task.target_text) for task in TASKS)
    with pytest.raises(ValueError, match="'Imagenet' is no dataset of MMEB; they are ImageNet-1K, N24News"):
        find_task("Imagenet")


def test_the_placeholder_is_taken_out_wherever_it_stands() -> None:
    assert without_image_token(f"{I}Represent the given image.\n") == "Represent the given image."
    assert without_image_token("look at <|image_1|> here") == "look at  here"
    assert without_image_token(I) == without_image_token("") == ""


def test_an_image_comes_before_its_text(data: Path, models: dict[str, str]) -> None:
    """As VLM2Vec and B3 have it: the words of a causal model see only what stands before them."""
    model = load_embedder(models["qwen2_vl"], LoadSettings(pooling="lasttoken", min_pixels=784, max_pixels=784), None)
    given = collate.model_input(Item("what colour is the shape", "a/0.png"), data / "images")
    tokens = model[0].tokenizer.decode(model.preprocess([given])["input_ids"][0])
    assert 0 < tokens.index("<|vision_end|>") < tokens.index("shape")


def test_mmeb_files_are_read_with_their_quirks(data: Path) -> None:
    """Prompts before targets, lists of unequal lengths, an empty candidate, an equal picture in another file."""
    voc = read_mmeb("VOC2007", ReadSettings(data))
    assert {item.text for item in voc.items if not item.image} == {
        "Represent the class label: cat",
        "Represent the class label: dog",
    }
    scoring = voc.tasks["VOC2007"]
    assert isinstance(scoring, OwnCandidates)
    assert [len(own) for own in scoring.candidates_QC] == [3, 2] * 3
    assert voc.notes == {"n_candidates": 3, "n_empty_candidates": 0, "n_equal_to_gold": 3}
    assert {item.text for item in read_mmeb("VOC2007", ReadSettings(data, prompts=False)).items} >= {"cat", "dog"}
    edis = read_mmeb("EDIS", ReadSettings(data))
    assert edis.notes == {"n_candidates": 4, "n_empty_candidates": 6, "n_equal_to_gold": 6}
    assert Item("Find a news image: 0", "") in edis.items
    assert len(edis.items) == len(set(edis.contents)) == 6 + 12
    nights = read_mmeb("NIGHTS", ReadSettings(data))
    assert set(nights.items) == {Item("", "a/0.png"), Item("", "a/1.png")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", "", ["x"], [""]), r"the query is empty in row\(s\) 1"),
        (("q", "", [], []), r"there are no targets in row\(s\) 1"),
        (("q", "", ["x", "y"], [""]), r"lists of one length in row\(s\) 1"),
        (("q", "", ["", "y"], ["", ""]), r"the right one, is empty in row\(s\) 1"),
        (("q", "", ["x"], ["absent.png"]), r"(?s)absent.png: missing.*give their folder: --image_root"),
        (("q", "", ["x"], ["../secret.png"]), "leaves image_root"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    row: tuple[str, str, list[str], list[str]], message: str, tmp_path: Path
) -> None:
    write_mmeb(tmp_path, "GQA", [("q", "", ["x"], [""]), row])
    with pytest.raises(ValueError, match=message):
        read_mmeb("GQA", ReadSettings(tmp_path))


def test_captions_and_images_are_ranked_both_ways(data: Path) -> None:
    """A caption of two images is right for both; with instructions an image is encoded as a query and as a target."""
    bare = read_retrieval("Flickr30K", ReadSettings(data, prompts=False))
    texts, pictures = ["one", "uno", "two", "three"], ["a/0.png", "a/1.png", "a/2.png"]
    assert {item.text or item.image for item in bare.items} == {*texts, *pictures}
    position = {item.text or item.image: index for index, item in enumerate(bare.items)}
    t2i, i2t = bare.tasks["Flickr30K t2i"], bare.tasks["Flickr30K i2t"]
    assert isinstance(t2i, SharedCandidates)
    assert isinstance(i2t, SharedCandidates)
    assert t2i.query_Q == [position[text] for text in ("one", "uno", "two", "three", "one")]
    assert set(t2i.relevance_Q[0]) == {position["a/0.png"], position["a/2.png"]}
    assert i2t.candidates_C == [position[text] for text in texts]
    assert set(i2t.relevance_Q[2]) == {position["three"], position["one"]}
    asked = read_retrieval("Flickr30K", ReadSettings(data, query_prompt="Q ", target_prompt="T "))
    assert Item("Q Find me an everyday image that matches the given caption: uno", "") in asked.items
    assert Item("T Represent the given image.", "a/1.png") in asked.items
    assert Item("Q Find an image caption describing the given everyday image.", "a/1.png") in asked.items
    assert Item("T Represent the image caption: uno", "") in asked.items
    own = read_retrieval("Flickr30K", ReadSettings(data, prompts=False, query_prompt="Q", target_prompt="T"))
    assert {Item("Q", "a/1.png"), Item("T", "a/1.png"), Item("Quno", ""), Item("Tuno", "")} <= set(own.items)


def test_pages_are_read_from_the_hubs_layout(data: Path, tmp_path: Path) -> None:
    """Pictures in the file are written once; relevance is graded."""
    pictures = _write_pages(data, tmp_path)
    assert SUITES["visdoc"].choose(ReadSettings(tmp_path), None) == ["ViDoRe_x"]
    for _ in range(2):
        read = read_visdoc("ViDoRe_x", ReadSettings(tmp_path))
    scoring = read.tasks["ViDoRe_x"]
    assert isinstance(scoring, SharedCandidates)
    assert read.items[scoring.query_Q[0]].text == "Find a document image that matches the given query: which year"
    right = {(tmp_path / read.items[item].image).read_bytes(): grade for item, grade in scoring.relevance_Q[0].items()}
    assert right == {pictures[1]: 2.0, pictures[2]: 1.0}
    columns = scoring.columns(torch.eye(5)[torch.tensor([*scoring.query_Q, *scoring.candidates_C]).argsort()])
    assert scoring.metric == "ndcg_linear@5"
    assert columns["ndcg_linear@5"].shape == (2,)
    own = read_visdoc("ViDoRe_x", ReadSettings(tmp_path, prompts=False, query_prompt="Q ", target_prompt="T"))
    assert {item.text for item in own.items} == {"Q which year", "Q how much", "T"}


def _write_pages(data: Path, root: Path, **other: dict[str, list[Any]]) -> list[bytes]:
    """A set of documents with columns in place of its own, and its pictures."""
    pictures = [(data / "images" / "a" / f"{index}.png").read_bytes() for index in range(3)]
    files: dict[str, dict[str, Any]] = {
        "corpus": {"corpus-id": [7, 8, 9], "image": [{"bytes": content, "path": "p.png"} for content in pictures]},
        "queries": {"query-id": ["a", "b"], "query": ["which year", "how much"]},
        "qrels": {"query-id": ["a", "a", "b"], "corpus-id": [8, 9, 7], "score": [2, 1, 1]},
    }
    for name, columns in files.items():
        folder = root / "ViDoRe_x" / name
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns | other.get(name, {})), folder / "test-00000-of-00001.parquet")
    return pictures


@pytest.mark.parametrize(
    ("part", "columns", "message"),
    [
        ("qrels", {"corpus-id": [8, 9, 6]}, r"qrels\S+: row 2 names page 6, which corpus has not"),
        ("qrels", {"query-id": ["a", "c", "b"]}, r"qrels\S+: row 1 names query 'c', which queries has not"),
        ("qrels", {"score": [1.0, None, 1.0]}, "the score None of row 1 is no number"),
        ("qrels", {"score": [1.0, 1.0, math.inf]}, "the score inf of row 2 is no number"),
        ("qrels", {"corpus-id": [8, 8, 7]}, "rows 0 and 1 are both of query 'a' and page 8"),
        ("qrels", {"score": [0, 0, 1]}, r"no page is right for the query in row\(s\) 0"),
        ("queries", {"query-id": ["a", "a"]}, r"every query-id must be there once; not so in row\(s\) 0, 1"),
        ("queries", {"query": ["which year", " "]}, r"a query needs text; not so in row\(s\) 1"),
        ("queries", {"query": [1, 2]}, r"a query needs text; not so in row\(s\) 0, 1"),
        ("corpus", {"corpus-id": [7, 8, 8]}, r"every corpus-id must be there once; not so in row\(s\) 1, 2"),
        ("corpus", {"image": ["", "x", "y"]}, "the image of row 0 is neither a path nor a picture"),
        ("corpus", {"image": [{"bytes": b"", "path": "absent.png"}] * 3}, "absent.png: missing"),
    ],
)
def test_documents_that_would_be_scored_wrongly_are_refused(
    part: str, columns: dict[str, list[Any]], message: str, data: Path, tmp_path: Path
) -> None:
    _write_pages(data, tmp_path, **{part: columns})
    with pytest.raises(ValueError, match=message):
        read_visdoc("ViDoRe_x", ReadSettings(tmp_path))


def test_a_set_of_documents_that_lacks_a_part_is_told_beside_those_that_have_it(data: Path, tmp_path: Path) -> None:
    _write_pages(data, tmp_path)
    (tmp_path / "ViDoRe_y" / "queries").mkdir(parents=True)
    shutil.copy(*(tmp_path / f"ViDoRe_{name}/queries/test-00000-of-00001.parquet" for name in "xy"))
    with pytest.raises(FileNotFoundError, match=r"no set 'ViDoRe_y/corpus' in .*; the folder has ViDoRe_x"):
        read_visdoc("ViDoRe_y", ReadSettings(tmp_path))


@pytest.mark.parametrize("columns", [{"image": [1, 2]}, {"captions": [[3], [4]]}, {"captions": [5, 6]}])
def test_captions_and_images_that_are_no_text_are_refused(columns: dict[str, list[Any]], tmp_path: Path) -> None:
    table = {"image": ["0.png", "1.png"], "captions": [["a"], ["b"]]} | columns
    pq.write_table(pa.table(table), tmp_path / "Flickr30K.parquet")
    with pytest.raises(ValueError, match=r"captions with text are needed; not so in row\(s\) 0, 1"):
        read_retrieval("Flickr30K", ReadSettings(tmp_path))


def test_sentences_need_scores_that_differ(data: Path, tmp_path: Path) -> None:
    assert len(read_sts("STSb", ReadSettings(data)).items) == 24
    for name, scores, message in (
        ("STS12", [1.0, 1.0], "every score is 1.0"),
        ("STS13", [1.0, None], r"row\(s\) 1"),
        ("STS14", [1.0, math.inf], r"row\(s\) 1"),
    ):
        pq.write_table(
            pa.table({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": scores}), tmp_path / f"{name}.parquet"
        )
        with pytest.raises(ValueError, match=message):
            read_sts(name, ReadSettings(tmp_path))


def test_sentences_have_one_prompt_and_equal_ones_tie(data: Path) -> None:
    with pytest.raises(ValueError, match="one prompt for all sentences: --query_prompt"):
        read_sts("STSb", ReadSettings(data, target_prompt="t: "))
    vectors = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    own = ScoredPairs(range(40), range(40), [float(row) for row in range(40)])
    assert set(own.columns(vectors)["cosine"].tolist()) == {1.0}


def test_what_is_no_set_of_the_suite_is_named(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "b3_lightning")
    shutil.copy(data / "STSb.csv", tmp_path / "STSb.csv")
    shutil.copy(data / "STSb.csv", tmp_path / "sts_12.csv")
    (tmp_path / "images").mkdir()
    assert SUITES["sts"].choose(ReadSettings(tmp_path), None) == ["STSb"]
    assert "no sets of sts, not scored: sts_12 (its sets: STS12, " in caplog.text
    caplog.clear()
    assert SUITES["sts"].choose(ReadSettings(tmp_path), ["STSb"]) == ["STSb"]
    assert not caplog.text


@pytest.fixture(scope="module")
def evaluated(data: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    mmeb(data, models, folder, "--wandb", "offline")
    return folder


def mmeb(data: Path, models: dict[str, str], folder: Path, *more: str) -> None:
    names = ["VOC2007", "OVEN", "EDIS"]
    given = ["--suite", "mmeb", "--model", models["qwen2_vl"], "--data", str(data), "--output", str(folder)]
    main(["evaluate", *given, "--tasks", *names, "--device", "cpu", "--batch-size", "4", *SMALL_IMAGES, *more])


def test_evaluate_finds_what_sentence_transformers_and_a_plain_scorer_do(
    evaluated: Path, data: Path, models: dict[str, str]
) -> None:
    load = LoadSettings(pooling="lasttoken", min_pixels=784, max_pixels=784)
    model: SentenceTransformer = load_embedder(models["qwen2_vl"], load, None)

    @cache
    def vector(text: str, image: str) -> Any:
        text = text.replace("<|image_1|>", "").strip()
        picture = Image.open(data / "images" / image).convert("RGB") if image else None
        both = {"image": picture, "text": text}
        return model.encode([both if picture and text else picture or text], normalize_embeddings=True)[0]

    tasks = Results.load(evaluated).tasks()
    for name, prompt in (("VOC2007", "Represent the class label: "), ("OVEN", "")):
        hits = []
        for row in pq.read_table(data / name).to_pylist():
            query = vector(row["qry_text"], row["qry_img_path"])
            pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
            scores = [float(query @ vector(prompt + text.replace(I, ""), image)) for text, image in pairs]
            hits.append(int(np.argmax(np.round(scores, 5)) == 0))
        assert tasks[name].columns["hit@1"] == hits
        assert tasks[name].value == pytest.approx(np.mean(hits))


def test_a_run_leaves_tables_that_say_which_rows_are_published(evaluated: Path) -> None:
    page = (evaluated / "results.md").read_text()
    assert "| B3++ Qwen2-VL-2B | published: B3 | 70.85 | 67.0 | 61.19 | 79.88 | 72.11 | 63.09 | 68.1 |" in page
    assert "* some tasks only, not comparable with the published: Ret 2 of 12, Cla 1 of 10" in page
    assert "| OVEN | retrieval | OOD | 6 |" in page
    given = json.loads((evaluated / "results.json").read_text())
    assert given["settings"]["n_items"] == 8 + 14 + 18
    assert set(given["means"]) == {"retrieval", "classification", "IND", "OOD", "all"}
    assert list(evaluated.glob("wandb/offline-run-*/*.wandb"))
    assert not (evaluated / "unfinished").exists()


def test_finished_sets_are_reused_and_others_evaluated_again(
    evaluated: Path, data: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Only what changed is encoded: without target prompts classification is another, the others are not."""
    loaded: list[str] = []

    def load(path: str, image_root: Path) -> Image.Image:
        loaded.append(path)
        return load_image(path, image_root)

    monkeypatch.setattr(collate, "load_image", load)
    before = (evaluated / "results.json").read_text()
    (evaluated / "sets" / "OVEN.json").write_text("{")
    mmeb(data, models, evaluated, "--wandb", "disabled", "--no-target-prompts", "--against", str(evaluated))
    assert sorted(loaded) == sorted([f"a/{row}.png" for row in range(6)] * 3 + ["a/6.png", "a/7.png"])
    assert "OVEN.json is of another model, data or setting, or not whole" in caplog.text
    assert "EDIS: finished before" in caplog.text
    shown = capsys.readouterr().out
    assert "differences of the means, in points" in shown
    assert "paired bootstrap" in shown
    after = json.loads((evaluated / "results.json").read_text())
    assert [one == other for one, other in zip(json.loads(before)["sets"], after["sets"], strict=True)] == [
        False,
        True,
        True,
    ]


def test_prompts_that_change_places_make_other_figures(
    data: Path, models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["--suite", "retrieval", "--model", models["clip"], "--data", str(data), "--output", str(tmp_path / "out")]
    for query, target in (("A ", "B "), ("A ", "B "), ("B ", "A ")):
        caplog.clear()
        main(["evaluate", *given, "--tasks", "Flickr30K", "--device", "cpu", "--wandb", "disabled",
              "--fuse", "--no-target-prompts", f"--query-prompt={query}", f"--target-prompt={target}"])  # fmt: skip
    assert "Flickr30K.json is of another model, data or setting" in caplog.text


def test_a_killed_run_goes_on_within_a_set(
    data: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are of four batches; those that were finished are not encoded again."""
    asked: list[int] = []
    prepare = collate.prepare

    def counted(items: Sequence[Item], *rest: Any) -> Any:
        asked.append(len(items))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return prepare(items, *rest)

    monkeypatch.setattr(collate, "prepare", counted)
    given = ["evaluate", "--suite", "sts", "--model", models["bert"], "--data", str(data), "--output", str(tmp_path)]
    given += ["--device", "cpu", "--wandb", "disabled", "--batch-size", "2"]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 130
    main(given)
    assert sum(asked) == 24 + 2 + 2


def test_two_processes_find_what_one_does(
    data: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them; this test is the first, and both finish."""
    given = ["evaluate", "--suite", "sts", "--model", models["bert"], "--data", str(data), "--device", "cpu"]
    given += ["--wandb", "disabled", "--batch-size", "2", "--output"]
    main([*given, str(tmp_path / "one")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **shared, "RANK": "1", "LOCAL_RANK": "1"}
    second = [sys.executable, "-m", "b3_lightning", *given, str(tmp_path / "two")]
    process = subprocess.Popen(second, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name, value in {**shared, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    main([*given, str(tmp_path / "two")])
    said, log = process.communicate(timeout=200)
    assert (process.returncode, said) == (0, ""), log
    one, two = (Results.load(tmp_path / name) for name in ("one", "two"))
    assert one.sets == two.sets


def test_clip_takes_image_and_text_only_fused(data: Path, models: dict[str, str], tmp_path: Path) -> None:
    """``--fuse``: the sum of the unit vectors of both."""
    plain = EvalModel.load(models["clip"], LoadSettings(), torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"OVEN: .* does not take image and text in one item.*add the vectors of both: --fuse"
    ):
        plain.takes(read_mmeb("OVEN", ReadSettings(data)))
    given = ["evaluate", "--suite", "mmeb", "--model", models["clip"], "--data", str(data), "--output", str(tmp_path)]
    main([*given, "--tasks", "OVEN", "--device", "cpu", "--wandb", "disabled", "--fuse"])

    def vector(text: str, image: str) -> Any:
        parts = [text.replace("<|image_1|>", "").strip(), Image.open(data / "images" / image).convert("RGB")]
        return sum(plain.embedder.encode([part], normalize_embeddings=True)[0] for part in parts)

    hits = []
    for row in pq.read_table(data / "OVEN").to_pylist():
        query = vector(row["qry_text"], row["qry_img_path"])
        targets = [vector(*both) for both in zip(row["tgt_text"], row["tgt_img_path"], strict=True)]
        hits.append(int(np.argmax([query @ target / np.linalg.norm(target) for target in targets]) == 0))
    assert Results.load(tmp_path).tasks()["OVEN"].columns["hit@1"] == hits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent"], "--data absent is no folder"),
        (["--tasks", "VOC"], "--tasks VOC: no set of mmeb; they are ImageNet-1K"),
        (
            ["--tasks", "GQA"],
            r"has no GQA: looked for GQA/test-\*.parquet or GQA.parquet .*; it has VOC2007",
        ),
        (["--against", "absent.json"], "no results absent.json"),
        (["--batch-size", "0"], "--batch_size 0 must be above 0"),
        (["--model", "./absent"], "--model ./absent is no folder"),
        (["--model", "run"], "run holds no model: that of its run is run/export"),
        (["--model", "run/checkpoints"], "run/checkpoints holds no model: that of its run is run/export"),
        (["--model", "unfinished"], "unfinished holds no model: it is of a run, whose export .*fit --ckpt_path=last"),
        (["--model", "."], r"\. holds no model: none of modules\.json, config\.json, adapter_config\.json is there"),
        (["--dtype", "foo"], "dtype=foo must be bfloat16, float16, float32 or auto"),
        (["--device", "nope"], "--device nope cannot be used"),
        (["--output", "file"], "file is a file"),
        (["--num_workers=-1"], "--num_workers -1 not negative"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    arguments: list[str], message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/export", "run/checkpoints", "unfinished/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "export" / "modules.json").touch()
    (tmp_path / "unfinished" / "config.yaml").touch()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=message):
        main(["evaluate", "--suite", "mmeb", "--model", "./none", "--data", str(data), *arguments])


@pytest.mark.parametrize("width", [50, 60, 200])
def test_words_are_whole_on_a_narrow_terminal_and_what_does_not_fit_is_counted(
    width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ["task", "meta-task", "split", "n", "hit@1", *(f"published\nmodel-{index}" for index in range(8))]
    sheet = Sheet(
        "every task", header, [["ImageNet-1K", "classification", "in", "1000", "50.0", *["55.5"] * 8]], 3, "note"
    )
    show([sheet], Console(width=width))
    said = capsys.readouterr().out
    assert "ImageNet-1K" in said
    assert "50.0" in said
    assert ("columns that do not fit here: " in " ".join(said.split())) == (width < 200)
    assert said.count("model-") + sum(map(int, re.findall(r"fit here:\s+(\d+)", said))) == 8
    assert max(map(len, said.splitlines())) <= width
