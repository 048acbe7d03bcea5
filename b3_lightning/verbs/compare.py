"""Print the best validation of finished runs side by side, and how their settings differ."""

from __future__ import annotations

import argparse

from b3_lightning.reports.compare import compare_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")


def run(given: argparse.Namespace) -> None:
    compare_runs(given.runs)
