"""The notebooks run, top to bottom, say what they are for without noise, and are committed without outputs."""

from __future__ import annotations

import ast
import json
import logging
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

FOLDER = Path(__file__).parent.parent / "notebooks"
CLEAR = "clear it: jupyter nbconvert --clear-output --inplace notebooks/*.ipynb"


@dataclass(frozen=True)
class Ran:
    """What a notebook left: its names, what it printed, the value that each cell ends with, its number of pictures."""

    names: dict[str, Any]
    out: str
    err: str
    shown: list[object]
    n_figures: int


def _mine_and_look(ran: Ran) -> None:
    mined = ran.names["mined"]
    assert len(mined.clusters) == 100
    assert mined.hardness["random"] < mined.hardness["mined"] / 4 < mined.hardness["best"] / 4
    assert sum(shared > 2 for shared in ran.names["in_clusters"]) > 90
    assert max(ran.names["in_random"]) < 1.5
    assert ran.names["hardness"][0] == mined.hardness["mined"]
    assert ran.names["hardness"] == sorted(ran.names["hardness"], reverse=True)  # the later the window, the easier
    assert "eight random rows" in ran.out
    assert "epoch 2: 25 batches" in ran.out
    page = Path("plan/report.html")
    assert str(page.resolve()) in ran.out
    assert ran.names["titles"][0] in page.read_text(encoding="utf-8")
    assert ran.n_figures == 3


def _train_and_compare(ran: Ran) -> None:
    random, mined = ran.names["runs"]
    assert mined.best("val/mrr")["val/mrr"] > random.best("val/mrr")["val/mrr"] + 0.03
    first, *_, last = mined.points("val/mrr", "step")
    assert first == random.points("val/mrr", "step")[0]  # one and the same run until the first mining
    assert last[1] > first[1]
    assert "points above random, both at their best val/mrr; 95% over 500 queries" in " ".join(ran.out.split())
    assert ran.out.count("better") == 2
    different = {line.split()[1] for line in ran.out.split("settings that differ")[1].splitlines() if "│" in line}
    assert different == {"data.batches", "run.dir"}
    assert ran.err.count("mined in") == 4
    assert Path("compare.html").stat().st_size > 10_000
    (similarity,) = ran.shown[-1].tolist()  # type: ignore[attr-defined]
    assert similarity[0] == max(similarity)
    assert ran.n_figures == 1


def _audit(ran: Ran) -> None:
    statuses = [value for value in ran.shown if isinstance(value, int)]
    assert statuses == [3, 0, 0, 0]  # the mistakes are found; then nothing is wrong
    rows: dict[str, list[int]] = {}
    for one in ran.names["found"]:
        rows.setdefault(one["finding"], []).append(one["row"])
    assert rows.pop("shared_target") == rows.pop("same_target_in_batch") == list(range(96, 112))
    assert len(rows.pop("positive_among_negatives_in_batch")) == 20
    assert rows == {
        "negative_is_own_positive": [3, 40, 77],
        "negative_is_positive_of_query": [20],
        "same_query_in_batch": [17, 20],
        "several_targets": [17, 20],
        "duplicate_pair": [53, 54, 55],
        "same_pair_in_batch": [53, 54, 55],
        "one_label_batch": [96],
    }
    _, mended, at_random, mined = ran.out.split("columns: ")[1:]
    assert _rows_of("positive_among_negatives_in_batch", mended) == 16
    assert "wrong" not in mended
    assert _rows_of("easier_than_random", at_random) > 2 * _rows_of("easier_than_random", mined) > 0


def _rows_of(finding: str, table: str) -> int:
    """The count that stands in the line of a finding."""
    (line,) = [line for line in table.splitlines() if f"{finding}:" in line]
    return int(line.split("│")[2])


CHECKS: dict[str, Callable[[Ran], None]] = {
    "mine_and_look": _mine_and_look,
    "train_and_compare": _train_and_compare,
    "audit": _audit,
}


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no folder but this test's; what a notebook tells libraries is forgotten after it."""

    def refuse(*given: object) -> None:
        raise AssertionError(f"a notebook went to the network: {given}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    bars = is_progress_bar_enabled()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    (enable_progress_bar if bars else disable_progress_bar)()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _run(path: Path, capsys: pytest.CaptureFixture[str]) -> Ran:
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[object] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        tree, last = ast.parse(source), None
        if isinstance(tree.body[-1], ast.Expr) and not source.endswith(";"):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        exec(compile(tree, path.name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(last, path.name, "eval"), names))
    printed = capsys.readouterr()
    return Ran(names, printed.out, printed.err, shown, len(plt.get_fignums()))


def test_every_notebook_is_looked_at() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs_and_shows_what_it_is_for(
    name: str, alone: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "115")  # as wide as rich takes a notebook to be
    ran = _run(FOLDER / f"{name}.ipynb", capsys)
    for noise in ("Warning", "Tip:", "Loading weights", "GPU available", "it/s"):
        assert noise not in ran.out + ran.err
    CHECKS[name](ran)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), CLEAR
    assert all(cell["metadata"] == {} for cell in book["cells"]), CLEAR
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
