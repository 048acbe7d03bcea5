"""Results of an evaluation for a person: tables on the terminal, as Markdown, and in W&B."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from b3_lightning.data.mmeb import TASKS
from b3_lightning.evaluation.bootstrap import Difference
from b3_lightning.evaluation.published import PublishedRow
from b3_lightning.evaluation.results import Mean, Results
from b3_lightning.mining.store import write_text
from b3_lightning.reports.wandb_mode import WandbMode, is_offline

_SHORT = {"retrieval": "Ret", "classification": "Cla", "vqa": "VQA", "grounding": "Gro", "all": "Avg"}
OURS = "ours"
_ANY = 10_000
_LEAST_OF_WORDS = (20, 6)
"""Characters of the first column, and of others, that words are not squeezed below."""


@dataclass(frozen=True)
class Sheet:
    """One table: numbers stand on the right, the first ``n_words`` columns on the left; ``marked`` rows are ours."""

    title: str
    header: list[str]
    rows: list[list[str]]
    n_words: int = 1
    note: str = ""

    def rich(self, console: Console) -> Table:
        """For a terminal; our own row, where others stand beside it, in bold.

        Columns that do not fit are left out from the right, and counted.
        """
        table = self._first(len(self.header))
        for n_shown in range(len(self.header), self.n_words, -1):
            table = self._first(n_shown)
            if Measurement.get(console, console.options.update(width=_ANY), table).minimum <= console.width:
                break
        return table

    def _first(self, n_shown: int) -> Table:
        """The table's first columns."""
        n_left = len(self.header) - n_shown
        left = f"columns that do not fit here: {n_left}; results.md has all" if n_left else ""
        note = "; ".join(part for part in (self.note, left) if part)
        table = Table(title=self.title, caption=note or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.title_justify = table.caption_justify = "left"
        for index, name in enumerate(self.header[:n_shown]):
            cells = [name, *(row[index] for row in self.rows)]
            widest = max(len(line) for cell in cells for line in cell.splitlines() or [""])
            words = index < self.n_words
            least = min(widest, _LEAST_OF_WORDS[index > 0]) if words else widest
            justify: Literal["left", "right"] = "left" if words else "right"
            table.add_column(name, justify=justify, no_wrap=not words, overflow="fold", min_width=least)
        for row in self.rows:
            table.add_row(*row[:n_shown], style="bold" if OURS in row else None)
        return table

    def markdown(self) -> str:
        """A heading, a table, a note."""
        ruler = ["---" if index < self.n_words else "---:" for index in range(len(self.header))]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        header = [name.replace("\n", " ") for name in self.header]
        table = "\n".join(["| " + " | ".join(header) + " |", "|" + "|".join(ruler) + "|", *lines])
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")


def task_sheet(results: Results) -> Sheet:
    """Every task, and in MMEB what its teachers are published with."""
    about = {task.name: (task.meta, task.split) for task in TASKS} if results.suite.name == "mmeb" else {}
    strict = _has_strict(results)
    published = [row for row in results.suite.published if about and set(row.tasks) & set(results.tasks())]
    header = ["task", *(["meta-task", "split"] if about else []), "n", results.suite.figure]
    header += [
        *(["ties lose"] if strict else []),
        *("\n".join(["published", *row.model.split()[:2]]) for row in published),
    ]
    rows = []
    for name, task in results.tasks().items():
        n_queries = len(next(iter(task.columns.values())))
        row = [name, *about.get(name, ()), str(n_queries), _percent(task.value)]
        row += [_percent(task.figures["hit@1_strict"]) if task.metric == "hit@1" else ""] if strict else []
        rows.append(row + [_given(other.tasks.get(name)) for other in published])
    note = "ties lose: a query counts only where the right target beats every other one" if strict else ""
    return Sheet(f"{results.suite.name}: every task{_unit(results)}", header, rows, 3 if about else 1, note)


def model_sheet(results: Results) -> Sheet | None:
    """Ours above the published models: the suite's means, and its tasks where they are few; None without either."""
    groups = list(results.suite.groups)
    tasks = [] if results.suite.name == "mmeb" else list(results.tasks())
    others = [row for row in results.suite.published if row.values or set(row.tasks) & set(tasks)]
    if not groups and not others:
        return None
    header = ["model", "from", *tasks, *(_SHORT.get(group, group) for group in groups)]
    rows = [[results.model, OURS, *_own(results, tasks, groups, None)]]
    if _has_strict(results):
        rows.append(["  the same, ties lose", OURS, *_own(results, tasks, groups, "hit@1_strict")])
    rows += [
        [row.model, f"published: {row.source}", *(_given({**row.tasks, **row.values}.get(name)) for name in header[2:])]
        for row in [_with_short_names(row) for row in others]
    ]
    partial = [
        f"{_SHORT.get(name, name)} {mean.n_tasks} of {mean.n_group}"
        for name, mean in results.means().items()
        if not mean.complete
    ]
    note = "Avg and its like: unweighted means over tasks" if groups else ""
    if partial:
        note += f"; * some tasks only, not comparable with the published: {', '.join(partial)}"
    return Sheet(f"{results.suite.name}: {results.suite.figure}{_unit(results)}", header, rows, 2, note)


def _own(results: Results, tasks: list[str], groups: list[str], figure: str | None) -> list[str]:
    found, means = results.tasks(), results.means(figure)
    own = [_percent(found[name].figures[figure or found[name].metric]) for name in tasks]
    return own + [_mean(means.get(group)) for group in groups]


def _with_short_names(row: PublishedRow) -> PublishedRow:
    return replace(row, values={_SHORT.get(name, name): value for name, value in row.values.items()})


def _has_strict(results: Results) -> bool:
    """Are ties told apart? Of other figures than hit@1 they are not."""
    return any(task.metric == "hit@1" and "hit@1_strict" in task.figures for task in results.tasks().values())


def difference_sheet(differences: dict[str, Difference], other: str, title: str) -> Sheet:
    """Ours against another result."""
    rows = [
        [
            _SHORT.get(name, name), str(found.n_tasks), _percent(found.ours), _percent(found.other),
            f"{100 * found.value:+.2f}", f"{100 * found.low:+.2f} to {100 * found.high:+.2f}", f"{found.p:.3f}",
        ]
        for name, found in differences.items()
    ]  # fmt: skip
    header = ["", "tasks", "ours", "other", "difference", "95% interval", "p"]
    note = f"other: {other}; queries drawn again within each task, the same for both (paired bootstrap)"
    return Sheet(title, header, rows, 1, note)


def write_report(sheets: list[Sheet], results: Results, path: Path) -> None:
    """Write the tables as one Markdown page."""
    settings = "\n".join(f"- {name}: {value}" for name, value in results.settings.items() if value not in ("", None))
    write_text(path, "\n".join([f"# {results.model}\n", settings, "", *(sheet.markdown() for sheet in sheets)]))


def show(sheets: list[Sheet], console: Console) -> None:
    """Print the tables."""
    for sheet in sheets:
        console.print()
        console.print(sheet.rich(console))


def log_to_wandb(results: Results, sheets: list[Sheet], folder: Path, mode: WandbMode, about: dict[str, Any]) -> str:
    """Log figures and tables as one run; returns what to tell of it."""
    from lightning.pytorch.loggers import WandbLogger

    offline = is_offline(mode)
    logger = WandbLogger(save_dir=folder, offline=offline, job_type="evaluate", settings={"silent": True}, **about)
    logger.log_hyperparams({"model": results.model, "suite": results.suite.name, **results.settings})
    name = results.suite.name
    figures = {f"{name}/{task}": found.value for task, found in results.tasks().items()}
    figures |= {f"{name}/mean/{group}": mean.value for group, mean in results.means().items()}
    logger.log_metrics(figures)
    for sheet in sheets:
        logger.log_table(
            sheet.title, columns=[text.replace("\n", " ") or "group" for text in sheet.header], data=sheet.rows
        )
    logger.experiment.finish()
    return f"offline; upload with: wandb sync {folder}/wandb/offline-run-*" if offline else "online"


def _unit(results: Results) -> str:
    return "" if "x 100" in results.suite.figure else ", in percent"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _mean(mean: Mean | None) -> str:
    return "" if mean is None else _percent(mean.value) + ("" if mean.complete else "*")


def _given(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.2f}".removesuffix("0")
