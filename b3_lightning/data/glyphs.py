"""The quickstart's data: pictures of Unicode characters and their names, from the font that matplotlib ships."""

from __future__ import annotations

import random
import unicodedata
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
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, entries in (("train", train), ("test", unseen)):
        for code, _, image in entries:
            image.save(folder / "images" / f"{code:05x}.png")
        table = pa.table(
            {
                "qry": [""] * len(entries),
                "qry_image_path": [f"images/{code:05x}.png" for code, _, _ in entries],
                "pos_text": [text for _, text, _ in entries],
                "pos_image_path": [""] * len(entries),
            }
        )
        write_atomic(folder / f"{name}.parquet", lambda path, table=table: pq.write_table(table, path))  # type: ignore[misc]


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
