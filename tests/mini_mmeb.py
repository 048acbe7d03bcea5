"""A miniature MMEB: pictures of shapes, drawn here, in the files, columns and quirks of MMEB-train and MMEB-eval.

A scene is one or two things (shape, colour, size, corner) on a background; one thing is a picture of its own. Of the
20 trained tasks it holds 11: three classifications, three VQA, four retrievals and one grounding; MMEB-eval has these
and a second grounding that is not trained on (RefCOCO-Matching). Text is MMEB's own, from ``TASKS``.

Quirks that the real files have: the image token in texts with and without an image, line breaks at the ends, nulls and
empty strings for what is absent, lists of hard negatives in one task (as B3's copies hold), a task in two files, two
splits, duplicate candidates, from 2 candidates up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from b3_lightning.data.mmeb import MmebTask, find_task

COLOURS = {"red": "#d02020", "green": "#20a040", "blue": "#2040d0", "yellow": "#e0c020", "purple": "#8030b0",
           "orange": "#f08020", "black": "#101010", "cyan": "#20b0c0"}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "bar", "ring")
SIZES = ("small", "large")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = {"white": "#ffffff", "grey": "#b8b8b8", "pink": "#f8d0d8"}
TRAIN_ROWS = {"classification": 96, "vqa": 176, "retrieval": 136, "grounding": 136}
"""By meta-task: just more than the paper's rank windows need (170 and 130)."""


class Thing(NamedTuple):
    """One shape."""

    size: str
    colour: str
    shape: str
    corner: str

    @property
    def words(self) -> str:
        """Size, colour, shape."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; equal scenes are equal pictures."""

    things: tuple[Thing, ...]
    ground: str

    @property
    def caption(self) -> str:
        """All of it in words."""
        return " and ".join(f"a {thing.words} at the {thing.corner}" for thing in self.things) + f" on {self.ground}"

    def draw(self, side: int) -> Image.Image:
        """An RGB picture of ``side`` pixels."""
        image = Image.new("RGB", (side, side), GROUNDS[self.ground])
        for thing in self.things:
            _draw_thing(ImageDraw.Draw(image), thing, side)
        return image


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    half, colour = side // 2, COLOURS[thing.colour]
    left, top = half * ("right" in thing.corner), half * ("bottom" in thing.corner)
    margin = half // 12 if thing.size == "large" else half // 4
    x0, y0, x1, y1 = left + margin, top + margin, left + half - margin - 1, top + half - margin - 1
    middle, width = (x0 + x1) // 2, max(2, (x1 - x0) // 4)
    if thing.shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=colour)
    elif thing.shape == "ring":
        draw.ellipse((x0, y0, x1, y1), outline=colour, width=width)
    elif thing.shape == "square":
        draw.rectangle((x0, y0, x1, y1), fill=colour)
    elif thing.shape == "triangle":
        draw.polygon([(middle, y0), (x0, y1), (x1, y1)], fill=colour)
    else:
        draw.rectangle((x0, (y0 + y1 - width) // 2, x1, (y0 + y1 + width) // 2), fill=colour)
        if thing.shape == "cross":
            draw.rectangle((middle - width // 2, y0, middle + width // 2, y1), fill=colour)


def _any_scene(rng: random.Random, n_things: int) -> Scene:
    corners = rng.sample(CORNERS, n_things)
    colours = rng.sample(list(COLOURS), n_things)
    shapes = rng.sample(SHAPES, n_things)
    things = [Thing(rng.choice(SIZES), *look) for look in zip(colours, shapes, corners, strict=True)]
    return Scene(tuple(things), rng.choice(list(GROUNDS)))


class Row(NamedTuple):
    """One pair in words and scenes; the empty string is filled into an instruction that takes none."""

    query: str
    query_scene: Scene | None
    target: str
    target_scene: Scene | None


def _label_row(rng: random.Random, label: Callable[[Scene], str], query: str = "") -> Row:
    scene = _any_scene(rng, 1)
    return Row(query.format(ground=scene.ground), scene, label(scene), None)


def _question_row(rng: random.Random, ask: Callable[[Thing], tuple[str, str]]) -> Row:
    scene = _any_scene(rng, 2)
    question, answer = ask(rng.choice(scene.things))
    return Row(question, scene, answer, None)


def _look_alike_row(rng: random.Random) -> Row:
    scene = _any_scene(rng, 2)
    other = rng.choice([ground for ground in GROUNDS if ground != scene.ground])
    return Row("", scene, "", replace(scene, ground=other))


def _caption_row(rng: random.Random, to_image: bool) -> Row:
    scene = _any_scene(rng, 2)
    return Row(scene.caption, None, "", scene) if to_image else Row("", scene, scene.caption, None)


def _wiki_row(rng: random.Random) -> Row:
    scene = _any_scene(rng, 2)
    first, second = scene.things
    return Row(f"which {first.colour} {first.shape} has company?", None, f"it is near a {second.shape}", scene)


def _crop_row(rng: random.Random, named: bool) -> Row:
    scene = _any_scene(rng, 2)
    thing = rng.choice(scene.things)
    crop = Scene((thing._replace(corner="top left"),), scene.ground)
    return Row(f"{thing.colour} {thing.shape}", scene, thing.words if named else "", crop)


ROWS: dict[str, Callable[[random.Random], Row]] = {
    "ImageNet-1K": partial(_label_row, label=lambda scene: scene.things[0].words),
    "N24News": partial(
        _label_row, label=lambda scene: f"{scene.things[0].colour} things", query="seen on {ground} today"
    ),
    "HatefulMemes": partial(
        _label_row, label=lambda scene: "Yes" if scene.things[0].shape in ("cross", "ring") else "No"
    ),
    "OK-VQA": partial(_question_row, ask=lambda thing: (f"What colour is the {thing.shape}?", thing.colour)),
    "DocVQA": partial(
        _question_row,
        ask=lambda thing: (f"Where is the {thing.colour} {thing.shape}?", f"{thing.size}, {thing.corner}"),
    ),
    "ChartQA": partial(
        _question_row, ask=lambda thing: (f"What is at the {thing.corner}?", f"{thing.colour} {thing.shape}")
    ),
    "MSCOCO_t2i": partial(_caption_row, to_image=True),
    "MSCOCO_i2t": partial(_caption_row, to_image=False),
    "NIGHTS": _look_alike_row,
    "WebQA": _wiki_row,
    "MSCOCO": partial(_crop_row, named=False),
    "RefCOCO-Matching": partial(_crop_row, named=True),
}
"""How a row of each dataset is made."""
TRAINED = tuple(find_task(name).train_name for name in ROWS if find_task(name).in_domain)
"""Tasks of MMEB-train that there are, for ``--data.tasks``."""


@dataclass(frozen=True)
class MiniMmeb:
    """Writes ``MMEB-train`` and ``MMEB-eval`` below ``folder``; the images lie below each.

    Args:
        train_rows: by meta-task.
        n_queries: of every evaluation set.
        n_candidates: at most, of every query; fewer where a task has fewer targets.
        side: pixels of a picture's side.
    """

    folder: Path
    train_rows: dict[str, int]
    n_queries: int = 12
    n_candidates: int = 10
    side: int = 56
    seed: int = 0

    def write(self) -> None:
        """Draw and write everything."""
        for index, name in enumerate(ROWS):
            task, rng = find_task(name), random.Random(self.seed * 1000 + index)
            if task.in_domain:
                self._write_train(task, [ROWS[name](rng) for _ in range(self.train_rows[task.meta])], rng)
            # the target pool of an evaluation set is that of more rows than there are queries
            self._write_eval(task, [ROWS[name](rng) for _ in range(max(self.n_queries, self.n_candidates) * 2)], rng)

    def _write_train(self, task: MmebTask, rows: list[Row], rng: random.Random) -> None:
        save = partial(self._save, self.folder / "MMEB-train", f"images/{task.train_name}/Train")
        negatives = [rows[rng.randrange(len(rows))] for _ in rows]
        columns: dict[str, list[Any]] = {
            "qry": [_filled(task.query_text, row.query) for row in rows],
            "qry_image_path": [save(row.query_scene) for row in rows],
            "pos_text": [_filled(task.target_text, row.target) for row in rows],
            "pos_image_path": [save(row.target_scene) for row in rows],
            "neg_text": [_filled(task.target_text, row.target) for row in negatives],
            "neg_image_path": [save(row.target_scene) for row in negatives],
        }
        if task.name == "MSCOCO_i2t":
            columns["neg_text"] = [[text, ""] for text in columns["neg_text"]]
            columns["neg_image_path"] = [["", ""] for _ in rows]
        if task.name == "NIGHTS":
            columns["neg_text"], columns["neg_image_path"] = [""] * len(rows), [None] * len(rows)
        table, folder = pa.table(columns), self.folder / "MMEB-train" / task.train_name
        folder.mkdir(parents=True)
        for split in ("original", "diverse_instruction"):
            n_files = 2 if task.name == "WebQA" else 1
            cut = -(-len(rows) // n_files)
            for part in range(n_files):
                name = f"{split}-{part:05d}-of-{n_files:05d}.parquet"
                pq.write_table(table.slice(part * cut, cut), folder / name)

    def _write_eval(self, task: MmebTask, rows: list[Row], rng: random.Random) -> None:
        save = partial(self._save, self.folder / "MMEB-eval" / "images", task.name)
        pool = list(
            dict.fromkeys((_filled(task.target_text, row.target), save(row.target_scene) or "") for row in rows)
        )
        listed = []
        for row in rows[: self.n_queries]:
            gold = (_filled(task.target_text, row.target), save(row.target_scene) or "")
            others = [target for target in pool if target != gold]
            others = rng.sample(others, min(len(others), self.n_candidates - 1))
            # a candidate twice, as in the real files
            listed.append([gold, *others, *others[:1]] if len(others) > 1 else [gold, *others])
        table = pa.table(
            {
                "qry_text": [_filled(task.query_text, row.query) for row in rows[: self.n_queries]],
                "qry_img_path": [save(row.query_scene) or "" for row in rows[: self.n_queries]],
                "tgt_text": [[text for text, _ in targets] for targets in listed],
                "tgt_img_path": [[image for _, image in targets] for targets in listed],
            }
        )
        folder = self.folder / "MMEB-eval" / task.name
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "test-00000-of-00001.parquet")

    def _save(self, root: Path, folder: str, scene: Scene | None) -> str | None:
        """Draw a scene once, named by what it shows; None for none."""
        if scene is None:
            return None
        path = f"{folder}/{scene.caption.replace(' ', '-')}.png"
        if not (root / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            scene.draw(self.side).save(root / path)
        return path


def _filled(instruction: str, words: str) -> str:
    return instruction.format(words) + ("\n" if instruction != "{}" else "")


def tasks(meta: str) -> Iterator[str]:
    """The datasets of a meta-task that there are."""
    return (name for name in ROWS if find_task(name).meta == meta)
