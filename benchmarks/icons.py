"""Pictures of icons and their names as pairs, from npm's ``@iconify/json``, some of them for testing.

    npm pack @iconify/json && tar xzf iconify-json-*.tgz && pip install resvg-py
    python benchmarks/icons.py --package package --output data/icons [--train 20000] [--test 2000] [--same 2000]

``test`` holds icons of sets not trained on, ``test_same`` icons of those trained on that are not in ``train``.
Sets of one colour under MIT, Apache-2.0 or ISC only. An icon that looks exactly like one before it is left out, and so
is one whose name has no letters; what a set is left with is drawn from at random.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import resvg_py
from PIL import Image

from b3_lightning.data.glyphs import write_pictures

LICENCES = ("MIT", "Apache-2.0", "ISC")
CATEGORIES = ("UI 24px", "UI 16px / 32px", "UI Other / Mixed Grid", "Material")


def main() -> None:
    """Draw all, split by set, write the pictures and two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--same", type=int, default=2_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    sets = wanted_sets(given.package)
    chance.shuffle(sets)
    seen: set[bytes] = set()
    n_other = len(sets) // 5
    test = draw_sets(given.package, sets[:n_other], given.test, given.size, chance, seen)
    trained = draw_sets(given.package, sets[n_other:], given.train + given.same, given.size, chance, seen)
    parts = {"test": test, "train": trained[: given.train], "test_same": trained[given.train :]}
    for name, drawn in parts.items():
        write_pictures(given.output, name, [(f"{name}{i:06d}", *one) for i, one in enumerate(drawn)])


def draw_sets(
    package: Path, sets: list[str], count: int, size: int, chance: random.Random, seen: set[bytes]
) -> list[tuple[str, Image.Image]]:
    """(name, picture) of so many icons of the sets, drawn at random."""
    icons = [icon for prefix in sets for icon in icons_of(package, prefix)]
    chance.shuffle(icons)
    drawn = draw_unseen(icons, count, size, seen)
    print(f"{len(drawn):,} of {len(icons):,} icons of {len(sets)} sets")
    return drawn


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


def draw_unseen(
    icons: Iterable[tuple[str, str]], count: int, size: int, seen: set[bytes]
) -> list[tuple[str, Image.Image]]:
    """(name, picture) of the first so many that look like none in ``seen``, to which they are added."""
    found = []
    for words, svg in icons:
        picture = draw(svg, size)
        if picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            found.append((words, picture))
        if len(found) == count:
            break
    return found


def draw(svg: str, size: int) -> Image.Image:
    """Black on white."""
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white")
    return Image.open(io.BytesIO(bytes(data))).convert("L")


if __name__ == "__main__":
    main()
