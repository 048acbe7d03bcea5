"""Image files: kept inside their root, checked before training, decoded lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from b3_lightning.types import name_rows

ImageCheck = Literal["decode", "header"]


def resolve(path: str, image_root: Path) -> Path:
    """The file of a relative path; ValueError where it lies outside ``image_root``."""
    root = image_root.resolve()
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise ValueError(f"image path {path!r} leaves image_root {root}")
    return full


def load_image(path: str, image_root: Path, *, at_least: int | None = None) -> Image.Image:
    """Decode an image of any mode to RGB; transparent parts become white, 16 bits a channel become 8.

    It is turned as its EXIF orientation says, as sentence-transformers turns what it is given.

    With ``at_least``, a JPEG may come smaller, by a power of 2, with sides of at least so many pixels: much faster.

    Raises:
        ValueError: where it is broken, as one may be whose header alone was checked.
    """
    try:
        return _decode(resolve(path, image_root), at_least)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the image {path} under {image_root} cannot be decoded ({error}); image_check: decode finds all such first"
        ) from error


def _decode(path: Path, at_least: int | None) -> Image.Image:
    with Image.open(path) as image:
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)).convert(
                "RGB"
            )
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")


CheckImages = Callable[..., dict[str, str]]
"""``check_images``, or what spares opening some."""


class Seen(NamedTuple):
    """An image as it was found: its size in bytes, when it was changed last, the SHA-256 of its content."""

    size: int
    changed_ns: int
    digest: str


def check_images(rows_of_path: Mapping[str, list[int]], image_root: Path, *, how: ImageCheck) -> dict[str, str]:
    """Open every image once and return the digest of its content; arguments and errors as of ``examine_images``."""
    return {path: seen.digest for path, seen in examine_images(rows_of_path, image_root, how=how).items()}


def _told(root: Path) -> str:
    there = root.resolve()
    return f"{there} (image_root{'' if there.is_dir() else ', which is no folder'})"


def examine_images(
    rows_of_path: Mapping[str, list[int]],
    image_root: Path,
    *,
    how: ImageCheck,
    known: Mapping[str, Seen] = MappingProxyType({}),
) -> dict[str, Seen]:
    """Open every image once.

    Args:
        how: ``decode`` reads every pixel (finds truncated files), ``header`` only what names format and size.
        known: images that were found whole before; those that did not change since are not opened.

    Raises:
        ValueError: naming the first five missing, broken or outlying images, how many there are, and their rows.
    """

    def examine(path: str) -> tuple[Seen | None, str]:
        try:
            full = resolve(path, image_root)
            if not full.is_file():
                return None, "missing"
            stat, before = full.stat(), known.get(path)
            if before is not None and before[:2] == (stat.st_size, stat.st_mtime_ns):
                return before, ""
            with Image.open(full) as image:
                if how == "decode":
                    image.load()
            with full.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Seen(stat.st_size, stat.st_mtime_ns, digest), ""
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return None, str(error)

    with ThreadPoolExecutor() as pool:
        results = dict(zip(rows_of_path, pool.map(examine, rows_of_path), strict=True))
    bad = {path: why for path, (seen, why) in results.items() if seen is None}
    if bad:
        rows = {path: f" ({name_rows(rows)})" if rows else "" for path, rows in rows_of_path.items() if path in bad}
        listed = "\n".join(f"  {path}: {why}{rows[path]}" for path, why in list(bad.items())[:5])
        raise ValueError(
            f"{len(bad)} of {len(results)} images under {_told(image_root)} cannot be used:\n{listed}"
            + ("\n  ..." if len(bad) > 5 else "")
        )
    return {path: seen for path, (seen, _) in results.items() if seen is not None}
