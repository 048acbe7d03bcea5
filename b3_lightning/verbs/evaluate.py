"""Evaluate a model on a benchmark: figures by task, means, published rows beside them; resumable, under torchrun too.

  python -m b3_lightning evaluate --suite mmeb --model runs/mine/export --data MMEB-eval
  torchrun --nproc_per_node 8 -m b3_lightning evaluate --suite mmeb --model NAME --data MMEB-eval --dtype bfloat16

Layouts: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from b3_lightning.console import open_console
from b3_lightning.evaluation.bootstrap import compare
from b3_lightning.evaluation.encode import Encoder, joined_processes
from b3_lightning.evaluation.results import Results
from b3_lightning.evaluation.run import evaluate
from b3_lightning.evaluation.sets import ReadSettings
from b3_lightning.evaluation.suites import SUITES
from b3_lightning.mining import Processes, Stages
from b3_lightning.mining.store import check_folder
from b3_lightning.progress import StageProgress
from b3_lightning.reports.evaluation import (
    Sheet,
    difference_sheet,
    log_to_wandb,
    model_sheet,
    show,
    task_sheet,
    write_report,
)
from b3_lightning.verbs.loading import add_loading, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = "; ".join(f"{suite.name}: {suite.does}" for suite in SUITES.values())
    parser.add_argument("--suite", required=True, choices=list(SUITES), help=suites)
    parser.add_argument("--model", required=True, help="folder or hub name of a SentenceTransformer, such as an export")
    parser.add_argument("--data", required=True, type=Path, help="folder of the suite's files")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these sets (default: all that the folder has)")
    parser.add_argument("--output", type=Path, help="folder to write (default: evaluations/SUITE/MODEL)")
    parser.add_argument("--against", type=Path, metavar="RESULTS", help="another results.json: paired bootstrap")
    _add_reading(parser.add_argument_group("reading"))
    _add_encoding(parser.add_argument_group("encoding"))
    wandb = parser.add_argument_group("W&B")
    wandb.add_argument("--wandb", default="auto", choices=["auto", "online", "offline", "disabled"])
    wandb.add_argument("--project", default="b3_lightning")
    wandb.add_argument("--group", help="runs to be compared share one (default: the suite)")


def _add_reading(group: Any) -> None:
    group.add_argument("--image_root", type=Path, help="of image paths (default: DATA/images, or DATA without it)")
    group.add_argument("--image_check", default="header", choices=["header", "decode"], help="before encoding")
    group.add_argument(
        "--no_target_prompts", dest="target_prompts", action="store_false",
        help="mmeb: not B3's prompts before targets; retrieval: not MMEB's instructions for captions and images",
    )  # fmt: skip
    group.add_argument("--query_prompt", default="", metavar="TEXT", help="before every query")
    group.add_argument(
        "--target_prompt", default="", metavar="TEXT", help="before every target, beside the suite's own"
    )


def _add_encoding(group: Any) -> None:
    group.add_argument("--batch_size", type=int, default=32, help="items at once, in each process (default: 32)")
    group.add_argument("--num_workers", type=int, default=0, help="processes that read images (default: 0)")
    add_loading(group)
    group.add_argument("--min_pixels", type=int, help="of an image, for Qwen2-VL and its kin; with --max_pixels")
    group.add_argument("--max_pixels", type=int)
    group.add_argument("--chat_template", metavar="JINJA", help="instead of the model's own; an export keeps its own")
    group.add_argument(
        "--fuse", action="store_true",
        help="for a model that takes image or text but not both (CLIP): add their unit vectors",
    )  # fmt: skip


def run(given: argparse.Namespace) -> None:
    if given.batch_size < 1 or given.num_workers < 0:
        raise ValueError(
            f"--batch_size {given.batch_size} must be above 0, and --num_workers {given.num_workers} not negative"
        )
    other = None if given.against is None else Results.load(given.against)
    output = given.output or Path("evaluations") / given.suite / "-".join(Path(given.model).parts[-2:]).strip("/.")
    check_folder(output)
    with joined_processes() as processes, processes.failing_together():
        results = _evaluate(given, output, processes)
        if processes.rank == 0:
            _report(given, output, results, other)
        processes.barrier()


def _evaluate(given: argparse.Namespace, output: Path, processes: Processes) -> Results:
    suite = SUITES[given.suite]
    reading = ReadSettings(
        given.data,
        given.image_root,
        given.target_prompts,
        given.query_prompt,
        given.target_prompt,
        given.image_check,
    )
    names = suite.choose(reading, given.tasks)
    model = load_model(given, fuse=given.fuse)
    if not given.query_prompt and not given.target_prompt:
        model.tell_unused_prompts()
    shown = processes.rank == 0 and sys.stdout.isatty()
    with Stages(output, processes).locked(), StageProgress(enabled=shown) as progress:
        encoder = Encoder(model, output / "unfinished", processes, given.batch_size, given.num_workers, progress)
        sets = evaluate(suite, names, reading, encoder, output)
    settings = {
        "model_sha256": model.fingerprint,
        "target_prompts": given.target_prompts,
        "query_prompt": given.query_prompt,
        "target_prompt": given.target_prompt,
        "batch_size": given.batch_size,
        "dtype": given.dtype or "float32",
        "fuse": given.fuse,
        "n_items": sum(result.n_items for result in sets),
    }
    return Results(suite, given.model, settings, sets)


def _report(given: argparse.Namespace, output: Path, results: Results, other: Results | None) -> None:
    results.save(output / "results.json")
    sheets: list[Sheet] = [task_sheet(results)]
    models = model_sheet(results)
    sheets += [] if models is None else [models]
    if other is not None:
        groups, tasks = compare(results, other)
        if groups:
            sheets.append(difference_sheet(groups, other.model, "differences of the means, in points"))
        sheets.append(difference_sheet(tasks, other.model, "differences task by task, in points"))
    console = open_console()
    show(sheets, console)
    write_report(sheets, results, output / "results.md")
    console.print(f"\nresults  {output}/results.json, results.md", highlight=False, soft_wrap=True, markup=False)
    if given.wandb != "disabled":
        name = f"{results.suite.name} {Path(given.model).name}"
        about = {"project": given.project, "group": given.group or results.suite.name, "name": name}
        said = log_to_wandb(results, sheets, output, given.wandb, about)
        console.print(f"W&B      {output}/wandb  ({said})", highlight=False, soft_wrap=True, markup=False)
