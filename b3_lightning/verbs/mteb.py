"""Evaluate a text model on tasks of mteb (BEIR and others), by mteb's own runner. Needs the extra ``mteb``.

python -m b3_lightning mteb --model runs/mine/export --tasks NFCorpus SciFact --output evaluations/mteb
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from b3_lightning.console import open_console
from b3_lightning.evaluation.text import folder_of, named_tasks, run_mteb
from b3_lightning.mining.store import check_folder, write_json
from b3_lightning.verbs.loading import add_loading, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name of a SentenceTransformer, such as an export")
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="NAME", help="as mteb names them; it gets the data"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder; every model has one of its own in there")
    parser.add_argument("--batch_size", type=int, default=32, help="texts at once (default: 32)")
    add_loading(parser)


def run(given: argparse.Namespace) -> None:
    if given.batch_size < 1:
        raise ValueError(f"--batch_size {given.batch_size} must be above 0")
    check_folder(given.output)
    tasks = named_tasks(given.tasks)
    model = load_model(given)
    scores = run_mteb(model, tasks, given.output, batch_size=given.batch_size)
    path = folder_of(model, given.output) / "scores.json"
    before = json.loads(path.read_text(encoding="utf-8"))["scores"] if path.is_file() else {}
    about = {"model": given.model, "model_sha256": model.fingerprint}
    write_json(path, {**about, "scores": before | scores})  # of the same weights
    table = Table("task", "main score", title=f"mteb: {given.model}", box=SIMPLE_HEAD, title_justify="left")
    for name, score in scores.items():
        table.add_row(name, f"{100 * score:.2f}")
    console = open_console()
    console.print(table)
    console.print(f"scores  {path}", highlight=False, soft_wrap=True, markup=False)
