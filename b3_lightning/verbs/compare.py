"""Print the best validation of runs side by side, how sure the differences are, and which settings differ.

A RUN is the folder of a run, an offline W&B file (run-ID.wandb) or its folder, wandb:ENTITY/PROJECT for all runs of
a project, or wandb:ENTITY/PROJECT/ID for one. The others are compared with the first.
"""

from __future__ import annotations

import argparse

from b3_lightning.reports.compare import compare_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, a .wandb file, wandb:ENTITY/PROJECT[/ID]"
    )
    parser.add_argument("--metric", default="val/mrr", help="by which the best step is chosen (default: val/mrr)")
    parser.add_argument(
        "--output", metavar="FILE.html", help="write a page with curves against steps, rows and seconds"
    )


def run(given: argparse.Namespace) -> None:
    compare_runs(given.runs, metric=given.metric, output=given.output)
