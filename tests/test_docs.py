"""The documentation names what there is, its links lead somewhere, and its first tutorial runs as it is written."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import b3_lightning
from b3_lightning.cli import main
from b3_lightning.mining import MinedPlan

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def _block(page: str, title: str) -> str:
    """The code block of a page that bears this title."""
    found = re.search(rf'^```\w+ title="{title}"\n(.*?)^```$', (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert found, title
    return found.group(1)


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"[\w/-]+\.md", config)
    assert sorted(named) == [str(page.relative_to(ROOT / "docs")) for page in PAGES]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_the_first_page_has_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = [line.split("|")[1] for line in (ROOT / "docs/index.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(rows))) == sorted(project["optional-dependencies"])


def test_every_public_name_has_its_entry() -> None:
    pages = "\n".join(page.read_text() for page in PAGES if page.parent.name == "api")
    named = {entry.rpartition(".")[2] for entry in re.findall(r"^::: ([\w.]+)$", pages, re.M)}
    callbacks = re.findall(r"import (\w+) as", (ROOT / "callbacks/__init__.py").read_text())
    assert {*b3_lightning.__all__, *callbacks} - {"__version__"} <= named


def test_the_first_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = _block("tutorials/your-own-pairs.md", "make_pairs.py").replace("4_000", "600").replace("3_500", "500")
    exec(compile(script, "make_pairs.py", "exec"), {})
    Path("dates.yaml").write_text(_block("tutorials/your-own-pairs.md", "dates.yaml"))
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--run.wandb=disabled"]
    main(["fit", "--config", "dates.yaml", "--trainer.max_epochs=3", *quiet])
    assert len(MinedPlan.load("runs/dates/plans/epoch-0002").task_N) == 500
    exec(compile(_block("tutorials/vectors-from-an-api.md", "own_vectors.py"), "own_vectors.py", "exec"), {})
    main(["mine", "--config", "dates.yaml", "--data.teacher=teacher.npy", "--output", "plan", quiet[0]])
    assert MinedPlan.load("plan").summary()["n_edges"] > 500


def test_the_settings_that_pages_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.embedder=x", "--print_config"])
    known = yaml.safe_load(capsys.readouterr().out)
    groups = r"run|trainer|data|model|remine|hardness|report(?!\.html|\.md)"
    for page in [ROOT / "README.md", *PAGES]:
        text = page.read_text()
        named = [name.split(".") for name in re.findall(rf"(?:--|`)((?:{groups})\.\w+(?:\.\w+)*)(?=[`=: ])", text)]
        for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```$", text, re.M | re.S):
            named += _paths(yaml.safe_load(block))
        assert [".".join(path) for path in named if not _exists(path, known)] == [], page.name


def _paths(group: dict[str, Any]) -> Iterator[list[str]]:
    for name, value in group.items():
        yield [name]
        if isinstance(value, dict):
            yield from ([name, *rest] for rest in _paths(value))


def _exists(path: list[str], known: object) -> bool:
    """What is absent by default, or a value, may have parts that are not listed."""
    for name in path:
        if not isinstance(known, dict) or not known:
            return True
        if name not in known:
            return False
        known = known[name]
    return True
