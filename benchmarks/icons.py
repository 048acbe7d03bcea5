"""Pictures of icons and their names as pairs, from npm's ``@iconify/json``; test icons are of sets not trained on.

    npm pack @iconify/json && tar xzf iconify-json-*.tgz && pip install resvg-py
    python benchmarks/icons.py --package package --output data/icons [--train 20000] [--test 2000] [--size 32]

Sets of one colour under MIT, Apache-2.0 or ISC only. An icon that looks exactly like one before it is left out, and so
is one whose name has no letters; what a set is left with is drawn from at random.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

LICENCES = ("MIT", "Apache-2.0", "ISC")
CATEGORIES = ("UI 24px", "UI 16px / 32px", "UI Other / Mixed Grid", "Material")


def main() -> None:
    """Draw all, split by set, write the pictures and two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    sets = wanted_sets(given.package)
    chance.shuffle(sets)
    seen: set[bytes] = set()
    for name, share, count in (
        ("test", sets[: len(sets) // 5], given.test),
        ("train", sets[len(sets) // 5 :], given.train),
    ):
        icons = [(one, icon) for one in share for icon in icons_of(given.package, one)]
        chance.shuffle(icons)
        write(given.output, name, icons, count, given.size, seen)
        print(f"{name}: {count} of {len(icons)} icons of {len(share)} sets")


def wanted_sets(package: Path) -> list[str]:
    """Sets by prefix, in order."""
    described = json.loads((package / "collections.json").read_text())
    return sorted(
        prefix
        for prefix, one in described.items()
        if one["license"].get("spdx") in LICENCES and one.get("category") in CATEGORIES and not one.get("palette")
    )


def icons_of(package: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """(name in words, SVG) of every icon of a set whose name has letters."""
    found = json.loads((package / "json" / f"{prefix}.json").read_text())
    for name, icon in found["icons"].items():
        words = " ".join(word for word in name.split("-") if not word.isdigit())
        if not any(letter.isalpha() for letter in words) or icon.get("hidden"):
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", found.get("width", 16)), icon.get("height", found.get("height", 16))
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}" color="black">'
        yield words, f"{head}{icon['body']}</svg>"


def write(
    output: Path, part: str, icons: list[tuple[str, tuple[str, str]]], count: int, size: int, seen: set[bytes]
) -> None:
    """The first so many that look like none before, as PNG files and a table."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    paths, names = [], []
    for _, (words, svg) in icons:
        picture = draw(svg, size)
        if picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        paths.append(f"images/{part}{len(paths):06d}.png")
        names.append(words)
        picture.save(output / paths[-1])
        if len(paths) == count:
            break
    none = [""] * len(paths)
    columns = {"qry": none, "qry_image_path": paths, "pos_text": names, "pos_image_path": none}
    pq.write_table(pa.table(columns), output / f"{part}.parquet")


def draw(svg: str, size: int) -> Image.Image:
    """Black on white."""
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white")
    return Image.open(io.BytesIO(bytes(data))).convert("L")


if __name__ == "__main__":
    main()
