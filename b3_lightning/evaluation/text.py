"""Text benchmarks (BEIR, MTEB) through mteb's own runner, so that the figures are those of its leaderboard."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b3_lightning.evaluation.encode import EvalModel


def named_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names.

    Raises:
        ValueError: where mteb is not installed, or has no such task.
    """
    _need_mteb()
    import mteb

    known = {task.metadata.name: task for task in mteb.get_tasks(exclude_superseded=False)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"--tasks {' '.join(unknown)}: no task of mteb {mteb.__version__}; its names are in mteb.get_tasks()"
        )
    return [known[name] for name in names]


def folder_of(model: EvalModel, output: Path) -> Path:
    """Where a model's files lie under ``output``: mteb goes by names, and those of two exports are alike."""
    return output / f"model-{model.fingerprint[:16]}"


def run_mteb(model: EvalModel, tasks: Sequence[Any], output: Path, *, batch_size: int) -> dict[str, float]:
    """Main score of each task, in shares of 1; mteb runs none again that is finished for the same weights.

    Raises:
        ValueError: where mteb is not installed or cannot get the data.
    """
    _need_mteb()
    import mteb

    cache = mteb.ResultCache(folder_of(model, output))
    encoding: Any = {"batch_size": batch_size, "show_progress_bar": False}
    try:
        result = mteb.evaluate(
            model.embedder, list(tasks), cache=cache, encode_kwargs=encoding, co2_tracker=False, show_progress_bar=False
        )
    except ConnectionError as error:
        raise ValueError(f"mteb cannot get the data ({error}): it needs a network, or the data in its cache") from error
    return {one.task_name: float(one.get_score()) for one in result.task_results}


def _need_mteb() -> None:
    if importlib.util.find_spec("mteb") is None:
        raise ValueError("mteb is not installed: pip install 'b3_lightning[mteb]'")
