"""The quickstart's data: pictures of Unicode characters and their names, from the font that matplotlib ships."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from b3_lightning.mining.store import write_atomic

_N_TEST = 750


def write_glyphs(output: str, size: int = 32, seed: int = 0) -> None:
    """Write train.parquet, test.parquet and one PNG a character (about 5,700; seconds).

    Test characters that look exactly like a training character are left out, so that every test picture is unseen.

    Args:
        output: the folder to write.
        size: width and height of a picture in pixels.
        seed: of the split by character.
    """
    folder = Path(output)
    pictures = list(_draw_all(size))
    random.Random(seed).shuffle(pictures)
    test, train = pictures[:_N_TEST], pictures[_N_TEST:]
    seen = {image.tobytes() for _, _, image in train}
    unseen = [entry for entry in test if entry[2].tobytes() not in seen]
    for part, entries in (("train", train), ("test", unseen)):
        write_pictures(folder, part, [(f"{code:05x}", name, image) for code, name, image in entries])


def write_pictures(folder: Path, part: str, pictures: Sequence[tuple[str, str, Image.Image]]) -> None:
    """Write PART.parquet, whose queries are pictures and whose targets their names, and the pictures as PNG files.

    Args:
        folder: into which the table goes; the pictures go into its folder ``images``.
        part: name of the table.
        pictures: (name of the file without its ending, name of what is to be seen, picture) of each.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    paths = [f"images/{file}.png" for file, _, _ in pictures]
    for path, (_, _, image) in zip(paths, pictures, strict=True):
        image.save(folder / path)
    none = [""] * len(pictures)
    names = [name for _, name, _ in pictures]
    table = pa.table({"qry": none, "qry_image_path": paths, "pos_text": names, "pos_image_path": none})
    write_atomic(folder / f"{part}.parquet", lambda path: pq.write_table(table, path))


def _draw_all(size: int) -> list[tuple[int, str, Image.Image]]:
    """(code point, name in lower case, picture) of every character that the font draws."""
    import matplotlib
    from fontTools.ttLib import TTFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), size * 3 // 4, layout_engine=ImageFont.Layout.BASIC)
    drawn = []
    for code in sorted(TTFont(path).getBestCmap()):
        name = unicodedata.name(chr(code), "").lower()
        image = Image.new("L", (size, size), 255)
        draw = ImageDraw.Draw(image)
        left, top, right, bottom = draw.textbbox((0, 0), chr(code), font=font)
        if not name or right <= left or bottom <= top:
            continue
        corner = ((size - left - right) / 2, (size - top - bottom) / 2)
        draw.text(corner, chr(code), font=font, fill=0)
        drawn.append((code, name, image))
    return drawn
