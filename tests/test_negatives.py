"""Hard negatives on their way into a batch: of the plan, of the pairs file, lacking ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run

from b3_lightning.data.collate import PairCollator
from b3_lightning.data.pairs import Item, PairSource, load_pairs
from b3_lightning.data.splits import Split
from b3_lightning.mining import MiningSettings, mine
from b3_lightning.types import OF_FILE

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(**more: list[Any]) -> str:
        columns: dict[str, list[Any]] = {"qry": ["q0", "q1", "q2"], "pos_text": ["a", "b", "c"], **more}
        pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
        return str(tmp_path / "pairs.parquet")

    return run


def preprocess(inputs: Any) -> dict[str, Any]:
    return {"texts": list(inputs)}


def _texts(batch: dict[str, Any]) -> dict[int, str]:
    pairs = [zip(part.position_P.tolist(), part.tensors["texts"], strict=True) for part in batch["negative"]]
    return {place: text for part in pairs for place, text in part}


def test_one_or_a_list_and_the_prompt_of_targets(write: Write) -> None:
    path = write(neg_text=["x", "", "z"])
    assert load_pairs(PairSource(path, target_prompt="T: ")).negatives == [[Item("T: x", "")], [], [Item("T: z", "")]]
    path = write(neg_text=[["x", "y"], None, ["z"]], neg_image_path=[["1.png", ""], [], None])
    found = load_pairs(path).negatives
    assert found == [[Item("x", "1.png"), Item("y", "")], [], [Item("z", "")]]
    assert load_pairs(path).image_paths() == {"1.png": [0]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"neg_text": [[1], [2], [3]]}, r"must hold texts or lists of texts; not so in row\(s\) 0, 1, 2"),
        ({"neg_text": [["x"], ["y"], []], "neg_image_path": [["1"], ["2", "3"], []]}, r"not so in row\(s\) 1"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(columns: dict[str, list[Any]], message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(write(**columns))


def test_places_of_a_file_and_of_a_plan(write: Write) -> None:
    split = Split.read(write(neg_text=[["b", "new"], [], ["x", "y", "z"]]), Path(), "decode")
    vectors = torch.eye(3, 4)
    mined = mine(vectors, vectors, settings=MiningSettings(first_rank=0, n_ranks=2, cluster_size=2, n_negatives=1))
    mined = replace(mined, negative_NH=torch.tensor([[2], [-1], [0]]))
    batch = PairCollator(split, Path(), preprocess, mined=mined, n_file_negatives=2)([0, 2, 1])
    # two places of the file for each row, in the rows' order, then one of the plan
    assert batch["negative_row_N"].tolist() == [*[OF_FILE] * 4, -1, -1, 2, 0, -1]
    assert _texts(batch) == {0: "b", 1: "new", 2: "x", 3: "y", 6: "c", 7: "a"}
    key = split.keys["target"]
    assert batch["negative_target_key_N"].tolist()[0] == key[1]  # the file's negative is another row's target
    assert batch["negative_target_key_N"].tolist()[6:8] == [key[2], key[0]]
    assert batch["negative_query_key_N"].tolist()[:4] == [-1] * 4
    assert "negative" not in PairCollator(split, Path(), preprocess)([0, 1])


def test_only_the_negatives_that_are_trained_on_are_kept(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("b3_lightning.data.pairs._ROWS_AT_ONCE", 2)
    path = write(neg_text=[["", "x", "y"], [], ["z"]], neg_image_path=[["absent.png", "", ""], None, [None]])
    pairs = load_pairs(path)
    assert pairs.negatives == [[Item("", "absent.png"), Item("x", ""), Item("y", "")], [], [Item("z", "")]]
    few = load_pairs(path, n_negatives=1)
    assert few.negatives == [[Item("", "absent.png")], [], [Item("z", "")]]
    assert few.n_negatives == pairs.n_negatives == [3, 0, 1]
    with pytest.raises(ValueError, match=r"1 of 1 images .*\n  absent.png: missing"):
        Split.read(path, Path(), "decode")
    none = Split.read(path, Path(), "decode", n_negatives=0)  # nor are their images looked for
    assert none.pairs.negatives == [[], [], []]
    path = write(neg_text=[["x", "y"], [], ["z"]])
    splits = [Split.read(path, Path(), "decode", n_negatives=n) for n in (0, 1, 2)]
    assert len({split.fingerprint for split in splits}) == 1  # a plan serves any number of them
    assert len({split.negatives_fingerprint for split in splits}) == 3


def test_masked_rows_travel_with_the_batch(write: Write) -> None:
    split = Split.read(write(), Path(), "decode")
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]]), dim=1)
    mined = mine(vectors, vectors, settings=MiningSettings(first_rank=1, n_ranks=1, cluster_size=2))
    batch = PairCollator(split, Path(), preprocess, mined=mined)([0, 2])
    key = int(split.keys["target"][1])
    assert batch["masked_BM"].tolist() == [[key], [key]]  # rank 0 of both is row 1


def test_training_on_the_negatives_of_a_file(
    fit: Run, models: dict[str, str], shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pq.read_table(shapes / "text-text.parquet")
    negatives = [["a wrong answer", f"another {row}"][: row % 3] for row in range(len(table))]
    pq.write_table(table.append_column("neg_text", pa.array(negatives)), tmp_path / "pairs.parquet")
    settings = (f"--model.embedder={models['bert']}", f"--data.teacher={models['bert']}", "--trainer.max_epochs=1")
    with caplog.at_level(logging.INFO, logger="b3_lightning"):
        fit(
            "text-text", *settings, f"--data.train_pairs={tmp_path / 'pairs.parquet'}", "--data.n_file_negatives=1",
            "--data.mining={first_rank: 1, n_ranks: 10, cluster_size: 4, n_negatives: 2}", "--model.chunks.items=8",
        )  # fmt: skip
    assert "32 hard negatives of the pairs files are not trained on: data.n_file_negatives=1 a row" in caplog.text
    assert "data.n_file_negatives=1: the pairs files lack 32 of them" in caplog.text
    with pytest.raises(SystemExit, match="the pairs hold none"):
        fit("text-text", *settings, "--data.n_file_negatives=1", name="none")
