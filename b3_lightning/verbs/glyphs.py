"""Write the quickstart's data: pictures of characters and their names."""

from __future__ import annotations

import argparse

from b3_lightning.data.glyphs import write_glyphs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="pixels of a picture's side (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the split by character (default: 0)")


def run(given: argparse.Namespace) -> None:
    write_glyphs(**vars(given))
