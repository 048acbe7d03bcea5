"""What a suite reads: items, each once, and the tasks that are scored with their vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from b3_lightning.data import tables
from b3_lightning.data.images import ImageCheck, check_images
from b3_lightning.data.pairs import Item, Modality, modality_of
from b3_lightning.evaluation.scoring import Scoring


@dataclass(frozen=True)
class ReadSettings:
    """Where a suite's files lie and how they are read.

    Args:
        data: folder of the suite.
        image_root: folder that image paths are relative to; ``data/images``, or ``data`` where there is none.
        prompts: put before the texts what the suite's recipe asks for: B3's target prompts (mmeb), MMEB's instructions
            beside captions and images (retrieval).
        query_prompt: put before every query's text, after the suite's own.
        target_prompt: the same for targets.
        image_check: decode every image before encoding, or read only each header.
    """

    data: Path
    image_root: Path | None = None
    prompts: bool = True
    query_prompt: str = ""
    target_prompt: str = ""
    image_check: ImageCheck = "header"

    @property
    def root(self) -> Path:
        """The folder of images in use."""
        if self.image_root is not None:
            return self.image_root
        return self.data / "images" if (self.data / "images").is_dir() else self.data


@dataclass(frozen=True)
class EvalSet:
    """One set: what is encoded once, and what is scored with it.

    Args:
        items: each once, in the order in which they are encoded: long texts first.
        contents: text and image digest of every item, which are what its vector depends on beside the model.
        tasks: name -> scoring, whose positions are those of ``items``.
        rows: fingerprint of queries and what is right for them, prompts apart: two results can be compared query by
            query where it is the same.
        notes: counts worth telling, such as candidates left out.
    """

    name: str
    items: list[Item]
    contents: list[tuple[str, str]]
    image_root: Path
    tasks: dict[str, Scoring]
    rows: str
    notes: dict[str, int] = field(default_factory=dict)

    def modalities(self) -> set[Modality]:
        """What the items hold: text, images, both in one."""
        return {modality_of(item) for item in self.items}


class ItemTable:
    """Items of a set, each content once: the same text with the same picture, whatever file the picture lies in."""

    def __init__(self, items: Iterable[Item], settings: ReadSettings, where: str) -> None:
        listed = list(dict.fromkeys(items))
        # items come from several files, so their places here are no rows to be told
        paths: dict[str, list[int]] = {item.image: [] for item in listed if item.image}
        try:
            digests = check_images(paths, settings.root, how=settings.image_check)
        except ValueError as error:
            raise ValueError(f"{where}: {error}\ngive their folder: --image_root DIR") from error
        content = {item: (item.text, digests[item.image] if item.image else "") for item in listed}
        first = {of: item for item, of in reversed(content.items())}
        self.items = sorted(first.values(), key=lambda item: (-len(item.text), item))
        self.contents = [content[item] for item in self.items]
        place = {of: position for position, of in enumerate(self.contents)}
        self._position = {item: place[of] for item, of in content.items()}

    def positions(self, items: Iterable[Item]) -> list[int]:
        """Where these items stand among ``items``."""
        return [self._position[item] for item in items]


def find_files(data: Path, name: str) -> list[Path]:
    """The files of a set: ``test.parquet`` or ``test-*.parquet`` in ``NAME`` or ``NAME/data``, or ``NAME.parquet``.

    Or .jsonl, .csv. Other splits, such as ``testmini-*``, are not the set's.

    Raises:
        ValueError: where it is there in files of several kinds, which may hold the same rows, or some of its files
            are missing.
    """
    tests = ("test", "test-*")
    for folder, stems in ((data / name, tests), (data / name / "data", tests), (data, (name,))):
        found = sorted(path for stem in stems for suffix in tables.SUFFIXES for path in folder.glob(f"{stem}{suffix}"))
        if len({path.suffix for path in found}) > 1:
            listed = ", ".join(str(path.relative_to(data)) for path in found)
            raise ValueError(
                f"{data} has the set {name!r} in several kinds of file ({listed}); leave one of them there"
            )
        tables.check_shards(found)
        if found:
            return found
    return []


def discover(data: Path, known: Sequence[str] = (), probe: str = "{}") -> list[str]:
    """Names of the sets in a folder, in the order of ``known``; any names where that is empty.

    A set is there where the files of ``probe``, filled with its name, are.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"--data {data} is no folder (looked from {Path.cwd()})")
    names = known or sorted({path.stem if path.is_file() else path.name for path in data.iterdir()})
    return [name for name in names if find_files(data, probe.format(name))]


def read_files(data: Path, name: str, columns: Sequence[str], probe: str = "{}") -> tuple[dict[str, list[Any]], str]:
    """The columns of a set, and where they were read.

    Args:
        probe: of the sets that the folder is said to have, where it lacks this one.

    Raises:
        FileNotFoundError: where the set is not there.
        ValueError: where a file cannot be read or lacks a column, or there are no rows.
    """
    paths = find_files(data, name)
    if not paths:
        raise FileNotFoundError(
            f"no set {name!r} in {data}: neither {name}/test-*.parquet nor {name}.parquet (nor .jsonl, .csv); "
            f"the folder has {', '.join(discover(data, probe=probe)) or 'none'}"
        )
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    table = tables.read_files(paths, columns, typed=True)
    if table.num_rows == 0:
        raise ValueError(f"{where} holds no rows")
    return {column: table[column].to_pylist() for column in columns}, where
