"""Pairs files in, a checked ``PairTable`` out: text, images or both on either side, one task or many.

Columns (MMEB-train's names): ``qry``, ``qry_image_path``, ``pos_text``, ``pos_image_path``; each side needs text, an
image or both in every row. Optional are ``group``: rows that share one are never each other's negatives; and
``neg_text``, ``neg_image_path``: hard negatives of a row, one or a list, the empty string for none. Other names are
mapped by ``PairSource.columns``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from b3_lightning.types import name_rows

TEXT_AND_IMAGE = {"query": ("qry", "qry_image_path"), "target": ("pos_text", "pos_image_path")}
COLUMNS = (*(column for pair in TEXT_AND_IMAGE.values() for column in pair), "group")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


@dataclass(frozen=True)
class PairSource:
    """One pairs file and how to read it.

    Args:
        path: a .parquet, .jsonl, .csv file, a folder written by ``datasets.save_to_disk``, or a dataset's hub name.
        task: rows of one task share batches; the file's name where absent.
        weight: how many times an epoch passes over the task.
        split: of a dataset folder or hub name.
        columns: ours -> the file's, such as ``{qry: question, pos_text: answer}``.
        query_prompt: put before the query's text.
        target_prompt: put before the target's text.
    """

    path: str
    task: str | None = None
    weight: float = 1.0
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    query_prompt: str = ""
    target_prompt: str = ""


class Item(NamedTuple):
    """One side of a pair; the empty string stands for what is absent. ``image`` is relative to the image root."""

    text: str
    image: str


Modality = str | tuple[str, str]
"""``text``, ``image``, or ``(image, text)``: sentence-transformers' names."""


def modality_of(item: Item) -> Modality:
    """What an item holds."""
    if item.text and item.image:
        return ("image", "text")
    return "image" if item.image else "text"


class PairTable:
    """All pairs of a run, row ids being positions in the order of the sources; ``negatives`` are those of the files."""

    def __init__(
        self,
        columns: dict[str, list[str]],
        tasks: list[str],
        task_weights: dict[str, float],
        negatives: list[list[Item]],
    ) -> None:
        self.columns, self.tasks, self.task_weights, self.negatives = columns, tasks, task_weights, negatives
        self._items: dict[str, list[Item]] = {}

    def __len__(self) -> int:
        return len(self.tasks)

    def items(self, side: str) -> list[Item]:
        """Every row's ``query`` or ``target``."""
        if side not in self._items:
            text, image = TEXT_AND_IMAGE[side]
            self._items[side] = [Item(*both) for both in zip(self.columns[text], self.columns[image], strict=True)]
        return self._items[side]

    @property
    def groups(self) -> list[str | None] | None:
        """Every row's group, None for a row without; None where no row has one."""
        groups = [group or None for group in self.columns["group"]]
        return groups if any(groups) else None

    def image_paths(self) -> dict[str, list[int]]:
        """Every distinct image and the rows that use it."""
        rows: dict[str, list[int]] = {}
        for _, column in TEXT_AND_IMAGE.values():
            for row, path in enumerate(self.columns[column]):
                if path:
                    rows.setdefault(path, []).append(row)
        for row, items in enumerate(self.negatives):
            for item in items:
                if item.image:
                    rows.setdefault(item.image, []).append(row)
        return rows


def load_pairs(sources: str | PairSource | Sequence[str | PairSource]) -> PairTable:
    """Read and check pairs.

    Raises:
        FileNotFoundError: where a path is neither a file, a dataset folder nor a hub name.
        ValueError: on an unknown format, a missing column, no rows, or rows with an empty side.
    """
    listed = [sources] if isinstance(sources, str | PairSource) else list(sources)
    if not listed:
        raise ValueError("no pairs file was given; set data.train_pairs=FILE")
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    tasks: list[str] = []
    negatives: list[list[Item]] = []
    weights: dict[str, float] = {}
    for entry in listed:
        source = PairSource(entry) if isinstance(entry, str) else entry
        task = source.task or Path(source.path).stem
        if weights.setdefault(task, source.weight) != source.weight:
            raise ValueError(f"task {task!r} is given the weights {weights[task]} and {source.weight}; give it one")
        table = read_table(source)
        read = _read_columns(table, source)
        negatives += read_negatives(table, source)
        for name in COLUMNS:
            columns[name] += read[name]
        tasks += [task] * len(read["qry"])
    return PairTable(columns, tasks, weights, negatives)


def _read_columns(table: pa.Table, source: PairSource) -> dict[str, list[str]]:
    if table.num_rows == 0:
        raise ValueError(f"{source.path} holds no rows")
    unknown = sorted(set(source.columns) - {*COLUMNS, *NEGATIVE_COLUMNS})
    if unknown:
        raise ValueError(f"columns maps {unknown}; what can be mapped is {[*COLUMNS, *NEGATIVE_COLUMNS]}")
    absent = {name: theirs for name, theirs in source.columns.items() if theirs not in table.column_names}
    if absent:
        raise ValueError(f"{source.path} has no column {sorted(absent.values())}; it has {table.column_names}")
    read = {}
    for name in COLUMNS:
        theirs = source.columns.get(name, name)
        present = theirs in table.column_names
        numbers = name == "group"
        read[name] = read_strings(table, theirs, source.path, numbers) if present else [""] * table.num_rows
    for side, pair in TEXT_AND_IMAGE.items():
        _check_side(side, pair, read, table.column_names, source)
    for column, prompt in (("qry", source.query_prompt), ("pos_text", source.target_prompt)):
        if prompt:
            read[column] = [prompt + text for text in read[column]]
    return read


def read_negatives(table: pa.Table, source: PairSource) -> list[list[Item]]:
    """Every row's hard negatives; the target's prompt goes before their texts too."""
    found = {}
    for name in NEGATIVE_COLUMNS:
        theirs = source.columns.get(name, name)
        values = table[theirs].to_pylist() if theirs in table.column_names else [None] * table.num_rows
        found[name] = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
        wrong = [row for row, listed in enumerate(found[name]) if any(not isinstance(one or "", str) for one in listed)]
        if wrong:
            raise ValueError(
                f"{source.path}: {theirs!r} must hold texts or lists of texts; not so in {name_rows(wrong)}"
            )
    texts, images = found.values()
    uneven = [
        row for row, both in enumerate(zip(texts, images, strict=True)) if all(both) and len(both[0]) != len(both[1])
    ]
    if uneven:
        raise ValueError(
            f"{source.path}: as many texts as images of negatives are needed; not so in {name_rows(uneven)}"
        )
    rows = []
    for row_texts, row_images in zip(texts, images, strict=True):
        pairs = itertools.zip_longest(row_texts, row_images)
        there = [(text or "", image or "") for text, image in pairs if (text or "").strip() or image]
        rows.append([Item(source.target_prompt + text, image) for text, image in there])
    return rows


def read_strings(table: pa.Table, column: str, path: str, numbers: bool) -> list[str]:
    """The column's texts, null as the empty one; whole numbers as texts where ``numbers`` may stand too."""
    values = table[column]
    if numbers and pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    if pa.types.is_null(values.type):
        return [""] * table.num_rows
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ValueError(f"{path}: column {column!r} holds {values.type}; text is needed (of images: their paths)")
    return pc.fill_null(values, "").to_pylist()  # type: ignore[no-any-return]


def _check_side(
    side: str, pair: tuple[str, str], read: dict[str, list[str]], found: list[str], source: PairSource
) -> None:
    text, image = pair
    if not any(source.columns.get(name, name) in found for name in pair):
        raise ValueError(
            f"{source.path} has neither a column {text!r} nor {image!r} for the {side}; it has {found}. "
            f"Map yours: {{path: {source.path}, columns: {{{text}: YOUR_COLUMN}}}} instead of the path alone"
        )
    empty = [row for row in range(len(read[text])) if not read[text][row].strip() and not read[image][row].strip()]
    if empty:
        raise ValueError(f"{source.path}: the {side} is null or empty in {name_rows(empty)}; mend or remove them")


def read_table(source: PairSource) -> pa.Table:
    """All columns of a file, dataset folder or hub name, as they stand there."""
    path = Path(source.path)
    if path.is_file():
        readers: dict[str, Any] = {
            ".parquet": pq.read_table,
            ".jsonl": pyarrow.json.read_json,
            ".csv": _read_csv,
        }
        if path.suffix not in readers:
            raise ValueError(f"{path} ends in {path.suffix!r}; readable are {', '.join(readers)} and dataset folders")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        return readers[path.suffix](path)
    if path.is_dir():
        return _read_dataset_folder(path, source.split)
    if path.suffix or source.path.count("/") != 1 or source.path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no pairs file {source.path} (looked from {Path.cwd()})")
    import datasets

    return datasets.load_dataset(source.path, split=source.split).with_format("arrow")[:]


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8") as file:
        names = next(iter(file)).strip()
    columns = {name.strip('"'): pa.string() for name in names.split(",")}
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=columns),
    )


def _read_dataset_folder(path: Path, split: str) -> pa.Table:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}; it has {list(loaded)}")
        loaded = loaded[split]
    return loaded.with_format("arrow")[:]
