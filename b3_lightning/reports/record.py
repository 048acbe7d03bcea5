"""What a run's folder tells of it: the settings that it was begun with, and the metrics of every start."""

from __future__ import annotations

from pathlib import Path

from b3_lightning.mining.store import write_text
from b3_lightning.reports.runs import read_csv_rows


class RunRecord:
    """Write ``config.yaml`` for a start of the run in ``folder``, and put the metrics of the start before aside.

    Lightning's logger begins ``metrics.csv`` anew each time.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config, self._metrics = folder / "config.yaml", folder / "metrics.csv"
        self._before = self._config.read_text(encoding="utf-8") if self._config.is_file() else None
        write_text(self._config, settings)
        self._kept = keep_old_metrics(folder)

    def take_back(self) -> None:
        """Of a start that trained nothing: the run is what it was. A first start's settings stay."""
        if self._before is not None:
            write_text(self._config, self._before)
        if self._kept is not None:
            self._kept.replace(self._metrics)


def keep_old_metrics(folder: Path) -> Path | None:
    """Move the metrics of a run that is resumed aside; where to, None where there are none."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return None
    step = int(max((row["step"] for row in read_csv_rows(path) if "step" in row), default=0))
    n_before = len(list(folder.glob("metrics-until-*.csv")))
    return path.rename(folder / f"metrics-until-{step:08d}-{n_before}.csv")
