"""Layers, packages, sizes, lightness of import, and every shipped config."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from b3_lightning.cli import main
from b3_lightning.lightning_cli import B3CLI
from b3_lightning.verbs import TRAINER_COMMANDS, VERBS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "b3_lightning"
LAYERS = (
    "lazy",
    "types",
    "progress",
    "console",
    "options",
    "signals",
    "mining",
    "checkpoints",
    "stopping",
    "model",
    "data",
    "evaluation",
    "reports",
    "callbacks",
    "trainer",
    "terminal",
    "verbs",
    "mistakes",
    "lightning_cli",
    "cli",
    "__main__",
)


def _files() -> list[Path]:
    return sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")])


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_left_only() -> None:
    for path in _files():
        layer = _layer(path)
        if layer == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("b3_lightning."):
                target = str(node.module).split(".")[1]
                assert LAYERS.index(target) <= LAYERS.index(layer), f"{path} must not import {target}"
                assert {layer, target} != {"model", "data"}, f"{path}: model and data do not import each other"


def test_packages_in_pyproject_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"b3_lightning"} | {f"b3_lightning.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert set(listed) == found


def test_files_and_functions_stay_small() -> None:
    for path in _files():
        source = path.read_text()
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}: {node.name}"


def test_backends_are_imported_in_one_place() -> None:
    heavy = {
        "networkit",
        "graspologic_native",
        "kaminpar",
        "pymetis",
        "igraph",
        "faiss",
        "cupy",
        "cudf",
        "cugraph",
        "pylibcugraph",
        "cuvs",
    }
    for path in _files():
        if path.name not in ("cpu.py", "gpu.py", "many_gpus.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not heavy & set(names), path


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, b3_lightning.cli; assert not {'torch', 'lightning', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize("verb", ["audit", "batches", "compare"])
def test_commands_that_read_tables_do_not_wait_for_a_trainer(verb: str) -> None:
    heavy = {"lightning", "torchmetrics", "transformers", "wandb"}
    code = f"import sys, b3_lightning.verbs.{verb}; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True).strip() == ""


def test_the_commands_of_the_trainer_are_those_that_lightning_adds() -> None:
    assert list(B3CLI.subcommands()) == list(TRAINER_COMMANDS)


def test_the_help_says_in_80_columns_what_every_command_does() -> None:
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "b3_lightning"]
    listed = subprocess.check_output([*command, "--help"], text=True, env=environment)
    assert max(map(len, listed.splitlines())) <= 80
    for does in (*TRAINER_COMMANDS.values(), *VERBS.values()):
        assert does in " ".join(listed.split())
    one = subprocess.check_output([*command, "test", "--help"], text=True, env=environment)
    assert TRAINER_COMMANDS["test"] in one


CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "ablations").glob("*.yaml")])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_says_how_to_run_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any("Hardware:" in line for line in header)
    command = next(line for line in header if "Command:" in line)
    # an overlay's command names the config below it
    given = [f"--config={ROOT / name}" for name in re.findall(r"--config[ =](configs/[^ ]+\.yaml)", command)]
    assert given[-1] == f"--config={config}"
    with pytest.raises(SystemExit) as stop:
        main(["fit", *given, "--print_config"])
    assert stop.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    for path, value in _leaves(yaml.safe_load(config.read_text())):
        if path != ("data", "train_pairs"):
            found = functools.reduce(lambda group, name: group[name], path, parsed)
            assert found == value, f"{'.'.join(path)} of {config.name} is lost"


def _leaves(group: dict[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _leaves(value, *path, name)
        else:
            yield (*path, name), value
