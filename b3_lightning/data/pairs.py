"""Pairs files in, a checked ``PairTable`` out: text, images or both on either side, one task or many.

Columns (MMEB-train's names): ``qry``, ``qry_image_path``, ``pos_text``, ``pos_image_path``; each side needs text, an
image or both in every row. Optional are ``group``: rows that share one are never each other's negatives; and
``neg_text``, ``neg_image_path``: hard negatives of a row, one or a list, the empty string for none. Other names are
mapped by ``PairSource.columns``; common ones (``anchor``, ``positive``, ``negative``, ...) are known.

MMEB's texts carry ``<|image_1|>`` where the image belongs, and some carry it without an image. A file with it anywhere
has it taken out of all its texts, with the line break after it and what is blank at the ends: the model's own processor
puts the token that the model knows where there is an image.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from b3_lightning.data.columns import columns_of, numbered_negatives
from b3_lightning.data.mmeb import IMAGE_TOKEN, without_image_token
from b3_lightning.data.tables import is_list, read_table, whole_numbers
from b3_lightning.types import name_rows

log = logging.getLogger(__name__)

TEXT_AND_IMAGE = {"query": ("qry", "qry_image_path"), "target": ("pos_text", "pos_image_path")}
COLUMNS = (*(column for pair in TEXT_AND_IMAGE.values() for column in pair), "group")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
_ROWS_AT_ONCE = 2**14


@dataclass(frozen=True)
class PairSource:
    """One pairs file and how to read it.

    Args:
        path: a .parquet, .jsonl, .csv file, a folder of parquet files ``SPLIT-*.parquet`` as the hub lays them out, a
            folder written by ``datasets.save_to_disk``, or a dataset's hub name.
        task: rows of one task share batches; the file's name where absent.
        weight: how many times an epoch passes over the task.
        split: of a folder or hub name; MMEB-train has ``original`` and ``diverse_instruction``. ``train`` where
            absent, or ``validation`` or ``test`` where the pairs are for that.
        columns: ours -> the file's, such as ``{qry: question, pos_text: answer}``.
        query_prompt: put before the query's text.
        target_prompt: put before the target's text and the texts of its hard negatives.
        mining: the task's own settings, such as ``{first_rank: 70}``; ``data.mining.per_task`` goes before them.
    """

    path: str
    task: str | None = None
    weight: float = 1.0
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    query_prompt: str = ""
    target_prompt: str = ""
    mining: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its task's."""
        return self.task or Path(self.path).stem


@dataclass(frozen=True)
class TeacherPrompts:
    """What a teacher reads before the texts, instead of the sources' prompts.

    Args:
        query: before every query's text, such as ``query: ``; the prompts of the sources where absent.
        target: the same for targets, such as ``passage: ``.
    """

    query: str | None = None
    target: str | None = None


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
    """All pairs of a run, row ids being positions in the order of the sources.

    Args:
        columns: texts begin with their prompts.
        negatives: those of the files, or the first few of a row's.
        n_negatives: how many each row has in the files.
        prompts: every row's, by side.
    """

    def __init__(
        self,
        columns: dict[str, list[str]],
        tasks: list[str],
        task_weights: dict[str, float],
        negatives: list[list[Item]],
        n_negatives: list[int],
        prompts: dict[str, list[str]],
    ) -> None:
        self.columns, self.tasks, self.task_weights = columns, tasks, task_weights
        self.negatives, self.n_negatives, self.prompts = negatives, n_negatives, prompts
        self._items: dict[str, list[Item]] = {}

    def __len__(self) -> int:
        return len(self.tasks)

    def items(self, side: str) -> list[Item]:
        """Every row's ``query`` or ``target``."""
        if side not in self._items:
            text, image = TEXT_AND_IMAGE[side]
            self._items[side] = [Item(*both) for both in zip(self.columns[text], self.columns[image], strict=True)]
        return self._items[side]

    def with_prompts(self, given: TeacherPrompts) -> PairTable:
        """The same rows with other prompts before the texts of queries and targets."""
        columns, prompts = dict(self.columns), dict(self.prompts)
        for side, prompt in (("query", given.query), ("target", given.target)):
            if prompt is not None:
                column, _ = TEXT_AND_IMAGE[side]
                rows = zip(self.columns[column], self.prompts[side], strict=True)
                columns[column] = [prompt + text.removeprefix(own) for text, own in rows]
                prompts[side] = [prompt] * len(self)
        return PairTable(columns, self.tasks, self.task_weights, self.negatives, self.n_negatives, prompts)

    @property
    def groups(self) -> list[str | None] | None:
        """Every row's group, None for a row without; None where no row has one."""
        groups = [group or None for group in self.columns["group"]]
        return groups if any(groups) else None

    def texts(self) -> Iterator[str]:
        """Every text of both sides, for learning a vocabulary."""
        for text, _ in TEXT_AND_IMAGE.values():
            yield from (value for value in self.columns[text] if value)

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


def task_codes(pairs: PairTable) -> Tensor:
    """(N,) int64: every row's task, numbered in the order of ``task_weights``."""
    code = {name: task for task, name in enumerate(pairs.task_weights)}
    return torch.tensor([code[task] for task in pairs.tasks])


def load_pairs(sources: str | PairSource | Sequence[str | PairSource], n_negatives: int | None = None) -> PairTable:
    """Read and check pairs.

    Args:
        n_negatives: at most so many hard negatives of a row are kept; all where absent.

    Raises:
        FileNotFoundError: where a path is neither a file, a dataset folder nor a hub name.
        ValueError: on an unknown format, a missing column, no rows, or rows with an empty side.
    """
    entries = [sources] if isinstance(sources, str | PairSource) else sources
    given = [PairSource(entry) if isinstance(entry, str) else entry for entry in entries]
    if not given:
        raise ValueError("no pairs file was given: name one, or leave the setting out")
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    tasks: list[str] = []
    negatives: list[list[Item]] = []
    counts: list[int] = []
    prompts: dict[str, list[str]] = {side: [] for side in TEXT_AND_IMAGE}
    weights: dict[str, float] = {}
    for source in given:
        task = source.name
        if weights.setdefault(task, source.weight) != source.weight:
            raise ValueError(f"task {task!r} is given the weights {weights[task]} and {source.weight}; give it one")
        table, source = _read(source)
        read = _read_columns(table, source)
        for listed in read_negatives(table, source):
            negatives.append(listed[:n_negatives])
            counts.append(len(listed))
        for name in COLUMNS:
            columns[name] += read[name]
        tasks += [task] * len(read["qry"])
        prompts["query"] += [source.query_prompt] * len(read["qry"])
        prompts["target"] += [source.target_prompt] * len(read["qry"])
    _tell_joined(given)
    return PairTable(columns, tasks, weights, negatives, counts, prompts)


def _tell_joined(given: Sequence[PairSource]) -> None:
    """Tell of files in several folders that are one task by their name alone."""
    paths: dict[str, list[str]] = {}
    for source in given:
        if source.task is None:
            paths.setdefault(source.name, []).append(source.path)
    for name, same in paths.items():
        if len(same) > 1:
            log.info("%s are one task, %r, by their names; {path: ..., task: ...} gives each its own", same, name)


def _read(source: PairSource) -> tuple[pa.Table, PairSource]:
    """The file, and the source with the names of all of its columns that are read."""
    table = read_table(source.path, source.split or "train")
    columns = columns_of(source.path, table.column_names, source.columns, [*COLUMNS, *NEGATIVE_COLUMNS])
    guessed = {ours: name for ours, name in columns.items() if name != ours and ours not in source.columns}
    if guessed:
        log.info("%s: %s", source.path, ", ".join(f"{ours} is read from {name!r}" for ours, name in guessed.items()))
    numbered = numbered_negatives(table.column_names, columns)
    if numbered:
        log.info("%s: hard negatives are read from %s too", source.path, ", ".join(map(repr, numbered)))
    source = replace(source, columns=columns)
    return _without_image_tokens(table, source), source


def _without_image_tokens(table: pa.Table, source: PairSource) -> pa.Table:
    """Clean the texts of a file that holds MMEB's placeholder for images."""
    names = [source.columns[name] for name in ("qry", "pos_text", "neg_text") if name in source.columns]
    names += numbered_negatives(table.column_names, source.columns)
    texts = {name: table[name].to_pylist() for name in names}
    n_found = sum(IMAGE_TOKEN in str(value) for values in texts.values() for value in values)
    if n_found:
        log.info("%s: %s taken out of the texts of %d cells", source.path, IMAGE_TOKEN, n_found)
        for name, values in texts.items():
            column = pa.array([_without_image_token(value) for value in values], table[name].type)
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def _without_image_token(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_image_token(one) for one in value]
    return without_image_token(value) if isinstance(value, str) else value


def _read_columns(table: pa.Table, source: PairSource) -> dict[str, list[str]]:
    if table.num_rows == 0:
        raise ValueError(f"{source.path} holds no rows")
    read = {}
    for name in COLUMNS:
        theirs, numbers = source.columns.get(name), name == "group"
        read[name] = [""] * table.num_rows if theirs is None else read_strings(table, theirs, source.path, numbers)
    for side, pair in TEXT_AND_IMAGE.items():
        _check_side(side, pair, table.column_names, source)
    _check_filled(read, table.column_names, source)
    for column, prompt in (("qry", source.query_prompt), ("pos_text", source.target_prompt)):
        if prompt:
            read[column] = [prompt + text for text in read[column]]
    return read


def read_negatives(table: pa.Table, source: PairSource) -> Iterator[list[Item]]:
    """Every row's hard negatives, a few rows at a time, those of numbered columns last.

    The target's prompt goes before their texts too.

    Raises:
        ValueError: on the first of them, where the columns hold what is no text, or not as many texts as images.
    """
    nothing = pa.nulls(table.num_rows, pa.string())
    names = [source.columns.get(name) for name in NEGATIVE_COLUMNS]
    names += numbered_negatives(table.column_names, source.columns)
    columns = [nothing if name is None else _decoded(table[name]) for name in names]
    counts = [_count_listed(column) for column in columns]
    for name, column, count_N in zip(names, columns, counts, strict=True):
        kind = column.type.value_type if is_list(column.type) else column.type
        if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
            rows = name_rows(count_N.nonzero()[0].tolist())
            raise ValueError(f"{source.path}: {name!r} must hold texts or lists of texts; not so in {rows}")
    texts_N, images_N = counts[:2]
    uneven = ((texts_N != images_N) & (texts_N > 0) & (images_N > 0)).nonzero()[0].tolist()
    if uneven:
        raise ValueError(
            f"{source.path}: as many texts as images of negatives are needed; not so in {name_rows(uneven)}"
        )
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        parts = [column.slice(start, _ROWS_AT_ONCE).to_pylist() for column in columns]
        for texts, images, *more in zip(*([_listed(value) for value in part] for part in parts), strict=True):
            both = [(text or "", image or "") for text, image in itertools.zip_longest(texts, images)]
            both += [(text or "", "") for text in itertools.chain(*more)]
            yield [Item(source.target_prompt + text, image) for text, image in both if text.strip() or image]


def _count_listed(column: pa.Array | pa.ChunkedArray) -> Any:
    """(N,) how many values each row of a column holds, be they listed or not."""
    count = pc.list_value_length(column) if is_list(column.type) else pc.is_valid(column).cast(pa.int32())
    return pc.fill_null(count, 0).to_numpy()


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def read_strings(table: pa.Table, column: str, path: str, numbers: bool) -> list[str]:
    """The column's texts, null as the empty one; whole numbers as texts where ``numbers`` may stand too."""
    values = _decoded(table[column])
    if numbers:
        values = whole_numbers(values)
    if numbers and pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    if pa.types.is_null(values.type):
        return [""] * table.num_rows
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        needed = "texts or whole numbers are needed" if numbers else "text is needed (of images: their paths)"
        raise ValueError(f"{path}: column {column!r} holds {values.type}; {needed}")
    return pc.fill_null(values, "").to_pylist()  # type: ignore[no-any-return]


def _decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Pandas' categories as what they stand for."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _check_side(side: str, pair: tuple[str, str], found: list[str], source: PairSource) -> None:
    text, image = pair
    if not set(pair) & set(source.columns):
        raise ValueError(
            f"{source.path} has neither a column {text!r} nor {image!r} for the {side}; it has {found}. "
            f"Map yours: {{path: {source.path}, columns: {{{text}: YOUR_COLUMN}}}} instead of the path alone"
        )


def _check_filled(read: dict[str, list[str]], found: list[str], source: PairSource) -> None:
    wrong = []
    for side, (text, image) in TEXT_AND_IMAGE.items():
        empty = [row for row in range(len(read[text])) if not read[text][row].strip() and not read[image][row].strip()]
        if empty:
            hint = "" if text in source.columns else f" (it has no column {text!r}, only {found})"
            wrong.append(f"the {side} is null or empty in {name_rows(empty)}{hint}")
    if wrong:
        raise ValueError(f"{source.path}: {', and '.join(wrong)}, counted from 0; mend or remove them")


def count_negatives(pairs: PairTable, wanted: int) -> None:
    """Log how many of the rows' own hard negatives are unused and how many are lacking, ``wanted`` being trained on.

    Raises:
        ValueError: where ``wanted`` is negative, or above 0 and the pairs hold none.
    """
    counts = pairs.n_negatives
    if wanted < 0:
        raise ValueError(f"data.n_file_negatives={wanted} must not be negative")
    if wanted and not any(counts):
        raise ValueError(f"data.n_file_negatives={wanted}, but the pairs hold none (column neg_text, neg_image_path)")
    unused = sum(max(0, count - wanted) for count in counts)
    lacking = sum(max(0, wanted - count) for count in counts)
    if unused:
        log.info(
            "%d hard negatives of the pairs files are not trained on: data.n_file_negatives=%d a row", unused, wanted
        )
    if lacking:
        log.info("data.n_file_negatives=%d: the pairs files lack %d of them", wanted, lacking)
