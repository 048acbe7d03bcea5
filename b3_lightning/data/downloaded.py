"""What of MMEB lies on this machine: files, columns, rows and images of every dataset, and what gets the rest."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from b3_lightning.data.images import resolve
from b3_lightning.data.mmeb import N_EVAL_QUERIES, MmebTask
from b3_lightning.data.tables import find_shards, is_list, shards_of

REPOS = {"train": "TIGER-Lab/MMEB-train", "eval": "TIGER-Lab/MMEB-eval"}
COLUMNS = {
    "train": ("qry", "qry_image_path", "pos_text", "pos_image_path"),
    "eval": ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"),
}
IMAGE_COLUMNS = {"train": ("qry_image_path", "pos_image_path"), "eval": ("qry_img_path", "tgt_img_path")}
Part = Literal["train", "eval"]


@dataclass(frozen=True)
class Place:
    """Where one part lies.

    Args:
        part: ``train`` or ``eval``.
        folder: of a folder for every dataset.
        images: folder that image paths are relative to; MMEB-train's begin with ``images/``, MMEB-eval's do not.
        split: whose files are looked for.
        sample: so many images of a dataset are looked for, drawn at random; all where None.
    """

    part: Part
    folder: Path
    images: Path
    split: str
    sample: int | None = None

    def name_of(self, task: MmebTask) -> str:
        """As this part spells it."""
        return task.train_name if self.part == "train" else task.name


@dataclass(frozen=True)
class Finding:
    """One dataset of one part.

    Args:
        wrong: what makes it unusable, in words.
        odd: what differs from the table and does not hinder.
        n_rows: found; 0 where there are no files.
        n_images: distinct images named by its rows.
        n_checked: of these, looked for.
        absent: those of them that are not there.
    """

    name: str
    part: Part
    wrong: str = ""
    odd: str = ""
    n_rows: int = 0
    n_images: int = 0
    n_checked: int = 0
    absent: Sequence[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Can it be used?"""
        return not self.wrong and not self.absent


def check_dataset(task: MmebTask, place: Place) -> Finding:
    """Look at the files of a dataset, then for its images."""
    name, expected = place.name_of(task), task.n_train_rows if place.part == "train" else N_EVAL_QUERIES
    try:
        if not find_shards(place.folder / name):
            return Finding(name, place.part, wrong=f"no {place.split}-*.parquet")
        files = [pq.ParquetFile(path) for path in shards_of(place.folder / name, place.split)]
    except (ValueError, OSError) as error:  # no such split, a file of it missing or cut off (pyarrow: ValueError)
        return Finding(name, place.part, wrong=str(error))
    n_rows = sum(file.metadata.num_rows for file in files)
    lacking = [column for column in COLUMNS[place.part] if any(column not in file.schema_arrow.names for file in files)]
    if lacking:
        return Finding(name, place.part, f"no column {', '.join(lacking)}", n_rows=n_rows)
    paths = _image_paths(files, IMAGE_COLUMNS[place.part])
    chosen = paths if place.sample is None else random.Random(0).sample(paths, min(place.sample, len(paths)))
    return Finding(
        name,
        place.part,
        wrong=f"{n_rows:,} of {expected:,} rows" if n_rows < expected else "",
        odd=f"{n_rows:,} rows, the paper's table has {expected:,}" if n_rows > expected else "",
        n_rows=n_rows,
        n_images=len(paths),
        n_checked=len(chosen),
        absent=_absent(chosen, place.images),
    )


def _image_paths(files: Iterable[pq.ParquetFile], columns: Sequence[str]) -> list[str]:
    """Every distinct path in columns of texts or of lists of texts, sorted."""
    found: set[str] = set()
    for file in files:
        for values in file.read(columns=list(columns)).columns:
            if is_list(values.type):
                values = pc.list_flatten(values)
            found |= {path for path in pc.unique(values).to_pylist() if path}
    return sorted(found)


def _absent(paths: Sequence[str], root: Path) -> list[str]:
    def is_there(path: str) -> bool:
        try:
            return resolve(path, root).is_file()
        except ValueError:  # it leaves the folder, and would be refused
            return False

    with ThreadPoolExecutor() as pool:
        return [path for path, there in zip(paths, pool.map(is_there, paths), strict=True) if not there]


def commands(findings: Sequence[Finding], place: Place) -> list[str]:
    """Shell commands that get what is missing of one part, by ``hf`` and ``unzip``."""
    repo, local = REPOS[place.part], f"--repo-type dataset --local-dir {_quoted(place.folder)}"
    files = [finding.name for finding in findings if finding.wrong]
    images = [finding.name for finding in findings if finding.absent or (finding.wrong and not finding.n_images)]
    found = []
    if files:
        names = ["*"] if len(files) == len(findings) else files
        wanted = " ".join(f'--include "{name}/{place.split}-*"' for name in names)
        found.append(f"hf download {repo} {local} {wanted}")
    if images and place.part == "eval":
        found.append(f"hf download {repo} images.zip {local}")
        found.append(f"unzip -qn {_quoted(place.folder / 'images.zip')} -d {_quoted(place.images)}")
    elif images:
        found.append(f"hf download {repo} {' '.join(f'images_zip/{name}.zip' for name in images)} {local}")
        archive = f"{_quoted(place.folder)}/images_zip/$name.zip"
        target = _quoted(place.images / "images")
        found.append(f"for name in {' '.join(images)}; do unzip -qn {archive} -d {target}; done")
    return found


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
