"""A bar with rate and time left for the stages of mining, drawn by rich on the terminal."""

from __future__ import annotations

from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="progress.data.speed")


class StageProgress:
    """Call with (stage, done, total); use as a context manager.

    Args:
        enabled: nothing is drawn otherwise (other ranks, or progress bars switched off).
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._progress = Progress(
            TextColumn("  {task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not enabled,
        )
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}

    def __enter__(self) -> StageProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        # begin and end are told as 0 and 1 of 1; a stage that counts its own items keeps its count
        if total == 1:
            total = self._totals.get(stage, 1)
            done *= total
        self._totals[stage] = total
        self._progress.update(self._tasks[stage], completed=done, total=total)
