"""Say what is installed, where mining and training can run, and why not elsewhere; test every backend that can.

Ends with 1 where a test fails, or where --backend names one that cannot run here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Mapping

import torch
from rich.markup import escape
from rich.table import Table

from b3_lightning import __version__
from b3_lightning.console import open_console
from b3_lightning.mining.backends import SLIM, TABLES, Backend, choose_backend, missing, why_no_gpu
from b3_lightning.mining.precision import cpu_computes_bfloat16
from b3_lightning.mining.selftest import check_backend
from b3_lightning.mining.settings import MiningSettings

MODULES = (
    "torch", "lightning", "sentence_transformers", "transformers", "peft", "networkit", "graspologic_native",
    "kaminpar", "pymetis", "wandb",
    "faiss", *SLIM, *TABLES, "cuvs", "dask_cuda",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("cpu", "gpu"), help="test this one only, and fail where it cannot run")
    parser.add_argument("--rows", type=int, default=8192, help="of the planted graph (default: 8192)")


def run(given: argparse.Namespace) -> None:
    console = open_console()
    console.print(f"b3_lightning {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    console.print(_versions())
    console.print(_devices())
    passed = True
    table = Table("backend", "test", "outcome", "", title="self-test on a planted graph")
    for name in (given.backend,) if given.backend else ("cpu", "gpu"):
        backend = _available(name)
        if isinstance(backend, str):
            table.add_row(name, "-", escape(backend), "absent")
            passed &= given.backend is None
            continue
        for check in check_backend(backend, n_rows=given.rows):
            table.add_row(name, check.name, check.outcome, "[green]ok[/]" if check.passed else "[red]FAILED[/]")
            passed &= check.passed
    console.print(table)
    if not passed:
        sys.exit(1)


def _available(name: str) -> Backend | str:
    """The backend, or why it cannot run."""
    lacks = why_no_gpu() if name == "gpu" else None
    if lacks is not None:
        return lacks
    return choose_backend(MiningSettings(backend="gpu" if name == "gpu" else "cpu"))


def _versions() -> Table:
    table = Table(show_header=False, title="packages", box=None, padding=(0, 2))
    packages = importlib.metadata.packages_distributions()  # reads every package: a second
    found = [(name, _version(name, packages)) for name in MODULES]
    width = 3
    for start in range(0, len(found), width):
        table.add_row(*(f"{name} [bold]{version}[/]" for name, version in found[start : start + width]))
    return table


def _version(module: str, packages: Mapping[str, list[str]]) -> str:
    if missing([module]):
        return "-"
    return importlib.metadata.version(packages[module][0]) if module in packages else "unknown"


def _devices() -> Table:
    table = Table("device", "memory", "precision", title="devices")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        table.add_row(f"cuda:{index} {about.name}", f"{free:.0f} of {total:.0f} GiB free", bfloat16)
    bfloat16 = "bfloat16" if cpu_computes_bfloat16() else "no bfloat16 (slower than float32)"
    table.add_row(f"cpu, {torch.get_num_threads()} threads", "", bfloat16)
    return table
