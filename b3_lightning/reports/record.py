"""What a run's folder tells of it: the settings that it was begun with, and the metrics of every start."""

from __future__ import annotations

from pathlib import Path

from b3_lightning.mining.lock import FolderLock
from b3_lightning.mining.store import remove_unfinished, write_text
from b3_lightning.reports.runs import read_csv_rows

_PATIENCE_S = 10.0
"""Processes that load data outlive one that was killed by five seconds, and its lock is theirs too."""


class RunRecord:
    """The folder of a run, for one start of it: no other process trains there until the start ends.

    Raises:
        ValueError: where another process does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._config = folder, folder / "config.yaml"
        self._before: str | None = None
        self._kept: Path | None = None
        self._begun = False
        self._lock = FolderLock(folder)
        if not self._lock.take(seconds=_PATIENCE_S):
            raise ValueError(
                f"run.dir={folder} is in use by {self._lock.holder()}: wait until that ends, or set --run.dir to a new "
                "folder"
            )

    def begin(self, settings: str) -> None:
        """Write ``config.yaml``, and put the metrics of the start before aside: Lightning's logger begins them anew.

        What a process that was killed had begun to write is removed.
        """
        remove_unfinished(self._folder, self._folder / "checkpoints")
        if self._config.is_file():
            self._before = self._config.read_text(encoding="utf-8")
        write_text(self._config, settings)
        self._kept = keep_old_metrics(self._folder)
        self._begun = True

    def end(self, *, trained: bool) -> None:
        """Give the folder back; after a start that trained nothing the run is what it was.

        A first start's settings stay; of one that was refused before it began nothing does.
        """
        if self._begun and not trained:
            if self._before is not None:
                write_text(self._config, self._before)
            if self._kept is not None:
                self._kept.replace(self._folder / "metrics.csv")
        self._lock.release(empty=not self._begun)


def keep_old_metrics(folder: Path) -> Path | None:
    """Move the metrics of a run that is resumed aside; where to, None where there are none."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return None
    step = int(max((row["step"] for row in read_csv_rows(path) if "step" in row), default=0))
    n_before = len(list(folder.glob("metrics-until-*.csv")))
    return path.rename(folder / f"metrics-until-{step:08d}-{n_before}.csv")
