"""Images that a process does not open again, since the one that started it did."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from PIL import Image

from b3_lightning.data.handed import Handed
from b3_lightning.data.images import check_images

PATHS = {"a.png": [0], "b.png": [1, 2]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for path, color in zip(PATHS, ("red", "blue"), strict=True):
        Image.new("RGB", (4, 4), color).save(folder / path)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are opened."""
    names: list[str] = []
    real = Image.open

    def note(path: Path) -> Image.Image:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(Image, "open", note)
    return names


def test_only_what_changed_is_opened_again(root: Path, opened: list[str], tmp_path: Path) -> None:
    file = tmp_path / "cache" / "images-train.json"
    digests = Handed(file, was_started=False).check_images(PATHS, root, how="decode")
    assert digests == check_images(PATHS, root, how="decode")
    started = Handed(file, was_started=True)
    opened.clear()
    assert started.check_images(PATHS, root, how="decode") == digests
    assert opened == []
    os.utime(root / "a.png", ns=(0, 0))
    assert started.check_images(PATHS, root, how="decode") == digests
    assert opened == ["a.png"]
    opened.clear()
    started.check_images(PATHS, root, how="header")  # was checked in another way
    assert sorted(opened) == ["a.png", "b.png"]
    (root / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .*\n  b.png: missing \(row\(s\) 1, 2\)"):
        started.check_images(PATHS, root, how="decode")


def test_what_is_damaged_or_absent_is_of_no_use(
    root: Path, opened: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "images-train.json"
    digests = Handed(file, was_started=False).check_images(PATHS, root, how="decode")
    file.write_bytes(file.read_bytes().replace(digests["a.png"][:8].encode(), b"00000000"))
    opened.clear()
    assert Handed(file, was_started=True).check_images(PATHS, root, how="decode") == digests
    assert sorted(opened) == ["a.png", "b.png"]
    assert "images-train.json is damaged, so this process checks all images itself" in caplog.text
    file.unlink()
    assert Handed(file, was_started=True).check_images(PATHS, root, how="decode") == digests


def test_who_hands_to_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # set by a trainer, and put back after the test

    def handed(devices: int) -> Handed | None:
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        return Handed.of(trainer, tmp_path)

    assert handed(1) is None
    assert handed(2) == Handed(tmp_path, was_started=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert handed(2) == Handed(tmp_path, was_started=True)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # torchrun
    assert handed(2) is None
