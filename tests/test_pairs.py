"""Pairs files in every format, and what is said about bad ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from b3_lightning.data.images import check_images, load_image
from b3_lightning.data.pairs import Item, PairSource, load_pairs

ROWS = [('what, is "red"?\nreally', "a colour"), ("naïve", "simple"), ("null", "nothing")]


def _write(folder: Path, kind: str, names: tuple[str, str] = ("qry", "pos_text")) -> str:
    table = pa.table({name: [row[i] for row in ROWS] for i, name in enumerate(names)})
    path = folder / f"pairs.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "folder"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    pairs = load_pairs(_write(tmp_path, kind))
    assert pairs.items("query") == [Item(query, "") for query, _ in ROWS]
    assert pairs.items("target") == [Item(target, "") for _, target in ROWS]
    assert pairs.tasks == ["pairs"] * 3


def test_columns_are_mapped_and_prompts_are_put_before_the_text(tmp_path: Path) -> None:
    path = _write(tmp_path, "parquet", ("question", "answer"))
    source = PairSource(path, columns={"qry": "question", "pos_text": "answer"}, target_prompt="Answer: ")
    assert load_pairs(source).items("target")[1] == Item("Answer: simple", "")


def test_categories_of_pandas_are_the_texts_that_they_stand_for(tmp_path: Path) -> None:
    columns = {"qry": ["a", "b", "c"], "pos_text": ["x", "y", "x"], "group": ["g", None, "g"]}
    table = pa.table({name: pa.array(values).dictionary_encode() for name, values in columns.items()})
    pq.write_table(table, tmp_path / "pairs.parquet")
    pairs = load_pairs(str(tmp_path / "pairs.parquet"))
    assert [item.text for item in pairs.items("target")] == ["x", "y", "x"]
    assert pairs.groups == ["g", None, "g"]


def test_several_files_are_several_tasks_with_weights(tmp_path: Path) -> None:
    path = _write(tmp_path, "csv")
    pairs = load_pairs([PairSource(path, task="a", weight=2.0), PairSource(path, task="b")])
    assert pairs.tasks == ["a"] * 3 + ["b"] * 3
    assert pairs.task_weights == {"a": 2.0, "b": 1.0}
    with pytest.raises(ValueError, match=r"task 'a' is given the weights 2\.0 and 1\.0"):
        load_pairs([PairSource(path, task="a", weight=2.0), PairSource(path, task="a")])


def _table(folder: Path, **columns: Sequence[str | None] | list[int]) -> str:
    path = folder / "bad.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_common_names_of_columns_are_known_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"anchor": ["a"], "positive": ["b"], "negative_1": ["c"], "negative_2": [""], "negative_10": ["d"]}
    with caplog.at_level("INFO", "b3_lightning"):
        pairs = load_pairs(PairSource(_table(tmp_path, **names), target_prompt="is "))
    assert (pairs.items("query"), pairs.items("target")) == ([Item("a", "")], [Item("is b", "")])
    assert pairs.negatives == [[Item("is c", ""), Item("is d", "")]]
    assert "qry is read from 'anchor', pos_text is read from 'positive'" in caplog.text
    assert "hard negatives are read from 'negative_1', 'negative_2', 'negative_10' too" in caplog.text
    # our own name goes first, what is mapped before that, and a column is read once
    both = {"qry": ["own"], "anchor": ["theirs"], "pos_text": ["p"], "negative": ["n"]}
    assert load_pairs(_table(tmp_path, **both)).items("query") == [Item("own", "")]
    mapped = load_pairs(PairSource(_table(tmp_path, **both), columns={"qry": "anchor", "pos_text": "negative"}))
    assert (mapped.items("query"), mapped.items("target")) == ([Item("theirs", "")], [Item("n", "")])
    assert mapped.negatives == [[]]


def test_pairs_with_scores_are_not_taken_for_positives(tmp_path: Path) -> None:
    scored = _table(tmp_path, sentence1=["a"], sentence2=["b"], score=[1])
    with pytest.raises(ValueError, match=r"sentence2 with a score: such pairs are not all positives.*qry is sentence1"):
        load_pairs(scored)
    named = PairSource(scored, columns={"qry": "sentence1", "pos_text": "sentence2"})
    assert load_pairs(named).items("target") == [Item("b", "")]


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = _write(tmp_path, "parquet")
    with pytest.raises(FileNotFoundError, match=r"no pairs file absent.parquet"):
        load_pairs("absent.parquet")
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(ValueError, match=r"ends in '.txt'; readable are .parquet"):
        load_pairs(str(tmp_path / "pairs.txt"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_pairs(str(tmp_path / "empty.csv"))
    with pytest.raises(ValueError, match="holds no rows"):
        load_pairs(_table(tmp_path, qry=[], pos_text=[]))
    with pytest.raises(ValueError, match="neither a column 'pos_text' nor 'pos_image_path' for the target"):
        load_pairs(_table(tmp_path, qry=["a"], reply=["b"]))
    with pytest.raises(ValueError, match=r"has no column \['reply'\]; it has"):
        load_pairs(PairSource(good, columns={"pos_text": "reply"}))
    with pytest.raises(ValueError, match=r"columns maps \['positive'\]"):
        load_pairs(PairSource(good, columns={"positive": "pos_text"}))
    with pytest.raises(ValueError, match="column 'qry' holds int64"):
        load_pairs(_table(tmp_path, qry=[1], pos_text=["b"]))


def test_empty_sides_are_counted_and_the_first_rows_named(tmp_path: Path) -> None:
    path = _table(tmp_path, qry=["a"] * 9, pos_text=["b", None, "", " ", None, "", "", "", "b"])
    with pytest.raises(ValueError, match=r"the target is null or empty in rows 1, 2, 3, 4, 5, ... \(7 in all\)"):
        load_pairs(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_of_any_mode_become_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    image = Image.new("I;16", (8, 8), 65535) if mode == "I;16" else Image.new("RGB", (8, 8), "white").convert(mode)
    saved = image.convert("RGB") if suffix == "jpg" and mode not in ("RGB", "L", "CMYK") else image
    if suffix != "png" and mode in ("CMYK", "I;16", "1"):
        saved = Image.new("RGB", (8, 8), "white")
    if suffix == "png" and mode == "CMYK":
        saved = Image.new("RGB", (8, 8), "white")
    saved.save(tmp_path / f"x.{suffix}")
    loaded = load_image(f"x.{suffix}", tmp_path)
    assert loaded.mode == "RGB"
    assert np.asarray(loaded).min() > 250


def test_files_that_are_one_task_by_their_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    paths = []
    for folder in ("faq", "shop"):
        (tmp_path / folder).mkdir()
        paths.append(str(_table(tmp_path / folder, qry=["a"], pos_text=["b"])))
    assert len(set(load_pairs(paths).tasks)) == 1
    assert "are one task, " in caplog.text
    assert "faq" in caplog.text
    caplog.clear()
    load_pairs([PairSource(paths[0], task="faq"), PairSource(paths[1], task="shop")])
    assert "are one task" not in caplog.text


@pytest.mark.parametrize("at_least", [None, 4])
def test_photos_are_turned_as_their_exif_says(at_least: int | None, tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 20), "white")
    photo.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    photo.save(tmp_path / "x.jpg", exif=exif)
    loaded = np.asarray(load_image("x.jpg", tmp_path, at_least=at_least))
    height = len(loaded) // 2
    assert loaded.shape[0] == 2 * loaded.shape[1]
    assert loaded[: height - 1].max() < 50
    assert loaded[height + 1 :].min() > 200


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert load_image("x.png", tmp_path).getpixel((0, 0)) == (255, 255, 255)


def test_all_bad_images_are_found_before_training(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (64, 64)).save(root / "good.png")
    whole = (root / "good.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("no picture")
    (tmp_path / "outside.png").write_bytes(whole)
    paths = {"good.png": [0], "cut.png": [1], "text.png": [2], "absent.png": [3, 4], "../outside.png": [5]}
    with pytest.raises(ValueError, match="4 of 5 images") as error:
        check_images(paths, root, how="decode")
    message = str(error.value)
    assert "cut.png" in message
    assert "text.png" in message
    assert "absent.png: missing (row(s) 3, 4)" in message
    assert "leaves image_root" in message


def test_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    for name, color in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (4, 4), color).save(tmp_path / name)
    digests = check_images({"a.png": [0], "b.png": [1], "c.png": [2]}, tmp_path, how="header")
    assert digests["a.png"] == digests["b.png"] != digests["c.png"]


@pytest.mark.parametrize("values", [[7, 7, None], [7.0, 7.0, None], ["x", "x", None]])
def test_groups_are_texts_or_whole_numbers_and_rows_may_lack_one(tmp_path: Path, values: list[object]) -> None:
    table = pa.table({"qry": ["a", "b", "c"], "pos_text": ["d", "e", "f"], "family": values})
    pq.write_table(table, tmp_path / "pairs.parquet")
    groups = load_pairs(PairSource(str(tmp_path / "pairs.parquet"), columns={"group": "family"})).groups
    assert groups == (["x", "x", None] if "x" in values else ["7", "7", None])
    assert load_pairs(str(tmp_path / "pairs.parquet")).groups is None
