"""Commands that need neither a trainer nor its config: one module a verb, imported when it is called.

The module of each of ``VERBS`` holds ``add_arguments(parser)`` and ``run(given)``; its docstring is the help.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from b3_lightning.options import COMMAND, OptionParser

VERBS = {
    "glyphs": "write the quickstart's data: pictures of characters and their names",
    "doctor": "what is installed, where mining can run, and a test of it",
    "prepare": "check a downloaded MMEB, say what is missing and what gets it",
    "evaluate": "a model on MMEB, caption retrieval or STS, published rows beside it",
    "mteb": "a text model on BEIR and others, by mteb's runner (extra mteb)",
    "batches": "write a plan's batches for another trainer: the pairs in batch order, or with a batch column",
    "audit": "look for wrong negatives, duplicates and useless batches in pairs, triplets or batches",
    "compare": "finished runs side by side: metrics, intervals, settings, curves",
}
"""Every verb and what it does, in one line of the help."""


def run_verb(name: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a verb and run it."""
    verb = importlib.import_module(f"{__name__}.{name}")
    parser = OptionParser(
        prog=f"{COMMAND} {name}",
        description=verb.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    verb.run(parser.parse_args(arguments))
