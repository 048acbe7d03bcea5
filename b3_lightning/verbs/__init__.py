"""What each command does, and the verbs: those that need neither a trainer nor its config, a module each.

A verb's module is imported when it is called; it holds ``add_arguments(parser)`` and ``run(given)``, and its docstring
is the help.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from b3_lightning.options import COMMAND, OptionParser

TRAINER_COMMANDS = {
    "fit": "train, and export the best weights",
    "validate": "score a model or a checkpoint on the validation pairs",
    "test": "the same on the test pairs",
    "predict": "embed the test pairs and write their vectors",
    "mine": "mine the training pairs into a plan, and write it with a report",
    "plan": "what mining will buy, for which batch size, cluster size and window; nothing is trained",
}
"""The commands that take a config and have a trainer, in the same words."""

VERBS = {
    "glyphs": "write the quickstart's data: pictures of characters and their names",
    "doctor": "what is installed, where mining can run, and a test of it",
    "prepare": "check a downloaded MMEB, say what is missing and what gets it",
    "evaluate": "a model on MMEB, caption retrieval or STS, published rows beside it",
    "mteb": "a text model on BEIR and others, by mteb's runner (extra mteb)",
    "batches": "write a plan's pairs in batch order, for another trainer",
    "audit": "wrong negatives, duplicates, useless batches in files that you have",
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
