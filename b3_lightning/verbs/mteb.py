"""Evaluate a text model on tasks of mteb (BEIR and others), by mteb's own runner. Needs the extra ``mteb``.

python -m b3_lightning mteb --model runs/mine/export --tasks NFCorpus SciFact --output evaluations/mteb
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from b3_lightning.evaluation.encode import EvalModel, device_of
from b3_lightning.evaluation.text import named_tasks, run_mteb
from b3_lightning.mining.store import write_json
from b3_lightning.model.embedder import LoadSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name of a SentenceTransformer, such as an export")
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="NAME", help="as mteb names them; it gets the data"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of mteb's result files and scores.json")
    parser.add_argument("--batch_size", type=int, default=32, help="texts at once (default: 32)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU, or the CPU)")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16 (default: float32)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the model's repository: a risk")
    parser.add_argument("--pooling", choices=["lasttoken", "mean", "cls"], help="for a plain transformers model")
    parser.add_argument("--max_seq_length", type=int, help="tokens a text is cut to (default: the model's own)")


def run(given: argparse.Namespace) -> None:
    tasks = named_tasks(given.tasks)
    load = LoadSettings(
        given.pooling,
        given.max_seq_length,
        dtype=given.dtype,
        trust_remote_code=given.trust_remote_code,
        revision=given.revision,
    )
    model = EvalModel.load(given.model, load, device_of(given.device))
    scores = run_mteb(model, tasks, given.output, batch_size=given.batch_size)
    write_json(
        given.output / "scores.json", {"model": given.model, "model_sha256": model.fingerprint, "scores": scores}
    )
    table = Table("task", "main score", title=f"mteb: {given.model}", box=SIMPLE_HEAD, title_justify="left")
    for name, score in scores.items():
        table.add_row(name, f"{100 * score:.2f}")
    Console().print(table)
