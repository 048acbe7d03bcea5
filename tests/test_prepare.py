"""``prepare`` on a miniature MMEB: whole, and with each kind of thing missing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mini_mmeb import ROWS, TRAIN_ROWS, MiniMmeb

from b3_lightning.cli import main
from b3_lightning.data import downloaded
from b3_lightning.data.downloaded import Finding, Place, check_dataset, commands
from b3_lightning.data.mmeb import find_task
from b3_lightning.verbs import prepare

SMALL = {name: replace(find_task(name), n_train_rows=TRAIN_ROWS[find_task(name).meta]) for name in ROWS}
"""The table's tasks with the miniature's rows."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature MMEB."""
    folder = tmp_path_factory.mktemp("whole")
    MiniMmeb(folder, TRAIN_ROWS, side=16).write()
    return folder


@pytest.fixture
def mini(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be damaged, and the table to go with it."""
    shutil.copytree(whole, tmp_path / "mini")
    monkeypatch.setattr(downloaded, "N_EVAL_QUERIES", 12)
    monkeypatch.setattr(prepare, "TASKS", tuple(SMALL.values()))
    monkeypatch.setattr(prepare, "TRAIN_TASKS", tuple(task for task in SMALL.values() if task.in_domain))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "mini"


def _prepare(mini: Path, *more: str) -> None:
    main(["prepare", "--train", str(mini / "MMEB-train"), "--eval", str(mini / "MMEB-eval"), "--sample", "0", *more])


def _train(mini: Path, name: str) -> Finding:
    folder = mini / "MMEB-train"
    return check_dataset(SMALL[name], Place("train", folder, folder, "original"))


def test_a_whole_download_passes(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _prepare(mini)
    said = capsys.readouterr().out
    assert "11 of 11 datasets whole" in said
    assert "12 of 12 datasets whole" in said
    assert "everything that was looked for is there" in said


def test_what_is_missing_is_named_with_the_commands_that_get_it(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluation = mini / "MMEB-train", mini / "MMEB-eval"
    shutil.rmtree(train / "DocVQA")
    image = next((train / "images" / "NIGHTS" / "Train").iterdir())
    image.unlink()
    shutil.rmtree(evaluation / "images" / "WebQA")
    with pytest.raises(SystemExit) as stop:
        _prepare(mini)
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "9 of 11 datasets whole" in said
    assert "11 of 12 datasets whole" in said
    assert "no original-*.parquet" in said
    assert f"such as images/NIGHTS/Train/{image.name}" in said
    local = f"--repo-type dataset --local-dir {train}"
    assert f'hf download TIGER-Lab/MMEB-train {local} --include "DocVQA/original-*"' in said
    assert f"hf download TIGER-Lab/MMEB-train images_zip/DocVQA.zip images_zip/NIGHTS.zip {local}" in said
    assert f"unzip -qn {train}/images_zip/$name.zip -d {train}/images" in said
    assert f"unzip -qn {evaluation}/images.zip -d {evaluation}/images" in said


def test_an_empty_folder_gives_one_command_for_all_files(tmp_path: Path) -> None:
    place = Place("train", tmp_path, tmp_path, "original")
    steps = commands([check_dataset(task, place) for task in SMALL.values()], place)
    assert '--include "*/original-*"' in steps[0]
    assert len(steps) == 3


def test_each_kind_of_damage_is_told(mini: Path) -> None:
    assert _train(mini, "WebQA").is_whole
    (mini / "MMEB-train" / "WebQA" / "original-00001-of-00002.parquet").unlink()
    assert "holds 1 of the 2 files of split 'original'" in _train(mini, "WebQA").wrong
    path = mini / "MMEB-train" / "ChartQA" / "original-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 100), path)
    assert _train(mini, "ChartQA").wrong == "100 of 176 rows"
    pq.write_table(table.drop_columns(["pos_image_path"]), path)
    assert _train(mini, "ChartQA").wrong == "no column pos_image_path"
    path.write_bytes(path.read_bytes()[:100])
    assert "magic bytes" in _train(mini, "ChartQA").wrong
    path.unlink()
    assert "no split 'original'; it has ['diverse_instruction']" in _train(mini, "ChartQA").wrong


def test_more_rows_than_the_table_has_are_no_fault(mini: Path) -> None:
    folder = mini / "MMEB-train"
    fewer = replace(SMALL["OK-VQA"], n_train_rows=100)
    finding = check_dataset(fewer, Place("train", folder, folder, "original", sample=5))
    assert finding.is_whole
    assert finding.odd == "176 rows, the paper's table has 100"
    assert (finding.n_checked, finding.n_images) == (5, 176)


def test_something_to_check_is_needed() -> None:
    with pytest.raises(SystemExit, match="give --train DIR, --eval DIR or both"):
        main(["prepare"])
    with pytest.raises(SystemExit, match="'NoSuch' is no dataset of MMEB"):
        main(["prepare", "--train", "x", "--tasks", "NoSuch"])
