"""Check a downloaded MMEB: files, columns, rows and images of every dataset; say what is missing and what gets it.

    python -m b3_lightning prepare --train MMEB-train --eval MMEB-eval

Ends with 1 where anything is missing. Nothing is downloaded or written; an empty folder gives the commands for all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from b3_lightning.console import open_console
from b3_lightning.data.downloaded import Finding, Place, check_dataset, commands
from b3_lightning.data.mmeb import TASKS, TRAIN_TASKS, MmebTask, find_task
from b3_lightning.progress import StageProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=Path, metavar="DIR", help="folder of TIGER-Lab/MMEB-train")
    parser.add_argument("--eval", type=Path, metavar="DIR", help="folder of TIGER-Lab/MMEB-eval")
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help="data.image_root of the training: the folder that holds images/ (default: that of --train)",
    )  # fmt: skip
    parser.add_argument("--eval_images", type=Path, metavar="DIR", help="of the evaluation (default: EVAL/images)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these datasets (default: 20 and 36)")
    parser.add_argument("--split", default="original", help="of MMEB-train (default: original)")
    parser.add_argument(
        "--sample", type=int, default=200, metavar="N",
        help="images of a dataset to look for, drawn at random; 0 looks for all (default: 200)",
    )  # fmt: skip


def run(given: argparse.Namespace) -> None:
    places = _places(given)
    if not places:
        raise ValueError("nothing to check: give --train DIR, --eval DIR or both")
    chosen = None if given.tasks is None else [find_task(name) for name in given.tasks]
    console, steps = open_console(), []
    for place, all_of_it in places:
        findings = _check([task for task in all_of_it if chosen is None or task in chosen], place)
        console.print(_table(findings, place))
        steps += commands(findings, place)
    if steps:
        console.print("\nget what is missing (hf: pip install huggingface_hub), then check again:", highlight=False)
        for step in steps:
            console.print(step, soft_wrap=True, highlight=False, markup=False)
        sys.exit(1)
    console.print("everything that was looked for is there", highlight=False)


def _places(given: argparse.Namespace) -> list[tuple[Place, Sequence[MmebTask]]]:
    sample = given.sample if given.sample > 0 else None
    found: list[tuple[Place, Sequence[MmebTask]]] = []
    if given.train is not None:
        place = Place("train", given.train, given.images or given.train, given.split, sample)
        found.append((place, TRAIN_TASKS))
    if given.eval is not None:
        images = given.eval_images or given.eval / "images"
        found.append((Place("eval", given.eval, images, "test", sample), TASKS))
    return found


def _check(tasks: Sequence[MmebTask], place: Place) -> list[Finding]:
    findings = []
    with StageProgress() as progress:
        for done, task in enumerate(tasks):
            progress(f"MMEB-{place.part}", done, len(tasks))
            findings.append(check_dataset(task, place))
        progress(f"MMEB-{place.part}", len(tasks), len(tasks))
    return findings


def _table(findings: Sequence[Finding], place: Place) -> Table:
    whole = sum(finding.is_whole for finding in findings)
    title = f"MMEB-{place.part}: {whole} of {len(findings)} datasets whole"
    table = Table(title=title, caption=str(place.folder))
    for name in ("dataset", "rows", "images looked for"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    table.add_column("missing", overflow="fold")
    for finding in findings:
        checked = f"{finding.n_checked:,} of {finding.n_images:,}" if finding.n_images else "-"
        table.add_row(finding.name, f"{finding.n_rows:,}" if finding.n_rows else "-", checked, _missing(finding))
    return table


def _missing(finding: Finding) -> str:
    said = [finding.wrong] if finding.wrong else []
    if finding.absent:
        said.append(f"{len(finding.absent):,} of {finding.n_checked:,} images, such as {finding.absent[0]}")
    if said:
        return f"[red]{escape('; '.join(said))}[/red]"
    return f"[yellow]{finding.odd}[/yellow]" if finding.odd else "[green]nothing[/green]"
