"""The sdist makes a wheel that holds the program and nothing else, and that runs where there is no checkout."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import b3_lightning

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "b3_lightning"
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt")
FOLDERS = ("b3_lightning", "callbacks", "configs", "docs", "notebooks", "tests")
INFO = f"b3_lightning-{b3_lightning.__version__}.dist-info"


@dataclass(frozen=True)
class Built:
    """An sdist and the wheel that was made of it."""

    sdist: Path
    wheel: Path

    def metadata(self) -> Message:
        return Parser().parsestr(zipfile.ZipFile(self.wheel).read(f"{INFO}/METADATA").decode())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "source"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _run("-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(folder)!r})", at=copy)
    (sdist,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "wheel", str(sdist), "--no-deps", "--no-index", "--no-build-isolation")
    _run(*pip, "--wheel-dir", str(folder), at=folder)
    (wheel,) = folder.glob("*.whl")
    return Built(sdist, wheel)


def _run(*arguments: str, at: Path, python: str = sys.executable) -> str:
    done = subprocess.run([python, *arguments], cwd=at, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _program() -> set[str]:
    """Every file of the package, whatever its kind; ``callbacks`` is reached by a link in it."""
    own = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    linked = {f"b3_lightning/callbacks/{path.name}" for path in (ROOT / "callbacks").iterdir() if path.is_file()}
    return {name for name in own | linked if "__pycache__" not in name}


def test_the_wheel_holds_the_program_and_nothing_else(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    about = {name for name in names if name.startswith(f"{INFO}/")}
    assert names - about == _program()
    assert f"{INFO}/licenses/LICENSE" in about


def test_the_sdist_holds_what_the_readme_names_and_no_half_of_the_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith("tests")]
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    links = set(re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / "README.md").read_text()))
    assert links <= names


def test_an_index_can_read_the_metadata(built: Built) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = built.metadata()
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == (ROOT / "README.md").read_text()
    assert found.get_all("Provides-Extra") == list(project["optional-dependencies"])
    pythons = {one.rpartition(" ")[2] for one in found.get_all("Classifier") or () if "Python :: 3." in one}
    allowed = SpecifierSet(str(found["Requires-Python"]))
    assert pythons == {version for version in ("3.10", "3.11", "3.12", "3.13", "3.14") if version in allowed}


def _required(metadata: Message) -> list[importlib.metadata.Distribution]:
    """The installed packages that pip would bring with the wheel and no extra.

    Raises:
        PackageNotFoundError: one is not installed here.
    """
    todo = [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]
    todo = [one for one in todo if _holds(one, ())]
    for one in todo:
        assert one.specifier.contains(importlib.metadata.version(one.name), prereleases=True), str(one)
    found: dict[tuple[str, frozenset[str]], importlib.metadata.Distribution] = {}
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key not in found:
            found[key] = importlib.metadata.distribution(one.name)
            inner = [Requirement(line) for line in found[key].requires or ()]
            todo += [other for other in inner if _holds(other, one.extras)]
    return list(found.values())


def _holds(requirement: Requirement, extras: Collection[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _link(packages: Sequence[importlib.metadata.Distribution], folder: Path) -> None:
    """Make a folder that holds these packages and no others, as links to where they are installed."""
    folder.mkdir()
    for package in packages:
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.is_symlink():
                link.symlink_to(str(package.locate_file(top)))


COMMANDS = """
import runpy, sys
import b3_lightning

print("from", b3_lightning.__file__)
for line in sys.argv[1:]:
    sys.argv = ["b3_lightning", *line.split()]
    try:
        runpy.run_module("b3_lightning", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
"""
"""``python -m b3_lightning`` once for every line, in one process: its imports are most of the time."""


def test_the_wheel_runs_with_what_it_asks_for_and_without_a_checkout(built: Built, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    _run("-m", "venv", "--without-pip", str(venv), at=tmp_path)
    python = str(venv / "bin" / "python")
    _run("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(built.wheel), at=tmp_path)
    (site,) = venv.glob("lib/python*/site-packages")
    # no other packages than those that the wheel asks for: not pytest, not the extras, not an editable install
    _link(_required(built.metadata()), tmp_path / "required")
    (site / "required.pth").write_text(str(tmp_path / "required"))
    with (tmp_path / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps({"qry": f"query {row}", "pos_text": f"target {row}"}) + "\n" for row in range(64))
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(2, 64, 8)))
    mine = (
        "mine --data.train_pairs=pairs.jsonl --data.teacher=vectors.npy --data.batch_size=16 --output=plan "
        "--data.mining.first_rank=1 --data.mining.n_ranks=10 --data.mining.cluster_size=4 "
        "--model.embedder.vocabulary_size=512 --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
    )
    out = _run("-I", "-c", COMMANDS, "--version", "doctor --rows=512 --backend=cpu", mine, at=tmp_path, python=python)
    assert f"from {site / 'b3_lightning' / '__init__.py'}" in out
    assert out.count(b3_lightning.__version__) >= 2
    assert "FAILED" not in out
    assert (tmp_path / "plan" / "plan.parquet").is_file()
    assert "target 63" in (tmp_path / "plan" / "report.html").read_text(encoding="utf-8")
    script = subprocess.run([venv / "bin" / "b3_lightning", "mien"], capture_output=True, text=True, check=False)
    assert script.returncode == 1
    assert "did you mean mine?" in script.stderr
