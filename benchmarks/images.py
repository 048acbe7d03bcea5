"""Images a second through the loader, against PIL and the processor in a bare loop.

    python benchmarks/images.py [--images 512] [--size 640 480] [--workers 0 2] [--rounds 3]

Writes JPEGs of noise and shapes, then decodes and preprocesses them as CLIP does (224 x 224): in a bare loop of
``PIL.Image.open`` and the processor, and through ``PairCollator`` in the loader with so many workers. They take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from b3_lightning.data.collate import ItemCollator, PairDataset
from b3_lightning.data.pairs import Item
from b3_lightning.model.embedder import LoadSettings, load_embedder

BATCH = 32


def write_images(folder: Path, n_images: int, size: tuple[int, int]) -> list[Item]:
    """JPEGs that take about as long to decode as photographs."""
    rng = np.random.default_rng(0)
    items = []
    for index in range(n_images):
        small = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        ImageDraw.Draw(image).ellipse(rng.integers(0, min(size), 2).tolist() + list(size), outline="red", width=9)
        image.save(folder / f"{index:05d}.jpg", quality=90)
        items.append(Item("", f"{index:05d}.jpg"))
    return items


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny_models

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = write_images(folder, given.images, tuple(given.size))
        tiny_models.clip(folder / "model", image_size=224)
        model = load_embedder(str(folder / "model"), LoadSettings(), None)
        processor = model[0].processor

        def bare() -> None:
            for start in range(0, len(items), BATCH):
                images = [Image.open(folder / item.image).convert("RGB") for item in items[start : start + BATCH]]
                processor(images=images, return_tensors="pt")

        def loader(n_workers: int) -> Callable[[], None]:
            collate = ItemCollator(items, folder, model.preprocess)
            rows = DataLoader(
                PairDataset(len(items)), batch_size=BATCH, num_workers=n_workers, collate_fn=collate,
                persistent_workers=n_workers > 0,
            )  # fmt: skip
            return lambda: [None for _ in rows] and None

        ways = {"bare loop": bare, **{f"loader, {n} workers": loader(n) for n in given.workers}}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(given.rounds + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
    print(f"{torch.get_num_threads()} threads, {given.size[0]} x {given.size[1]}\n")
    print("| | images a second | of the bare loop |")
    print("|---|---|---|")
    middle = {way: median(times[1:]) for way, times in seconds.items()}  # the first round starts the workers
    for way, time_taken in middle.items():
        print(f"| {way} | {given.images / time_taken:.0f} | {middle['bare loop'] / time_taken:.2f} |")


if __name__ == "__main__":
    main()
