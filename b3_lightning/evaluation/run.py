"""One model through the sets of a suite; finished sets are kept, and reused where nothing changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from b3_lightning.evaluation.encode import Encoder
from b3_lightning.evaluation.results import SetResult
from b3_lightning.evaluation.sets import EvalSet, ReadSettings
from b3_lightning.evaluation.suites import Suite
from b3_lightning.mining import fingerprint

log = logging.getLogger(__name__)

_SCORING = 1
"""Raised where a figure of the same vectors becomes another, so that kept results are not reused."""


def evaluate(
    suite: Suite, names: Sequence[str], settings: ReadSettings, encoder: Encoder, output: Path
) -> list[SetResult]:
    """Evaluate sets one after the other, each written to ``output/sets/NAME.json`` when it is finished.

    All processes encode; the first scores and writes. Every one returns the results.

    Raises:
        FileNotFoundError: where a file of a set is not there.
        ValueError: where a set's rows are not as its layout asks, or the model cannot take them.
    """
    return [_evaluate_set(suite.read(name, settings), encoder, output / "sets" / f"{name}.json") for name in names]


def _evaluate_set(eval_set: EvalSet, encoder: Encoder, path: Path) -> SetResult:
    about = fingerprint(
        rows=eval_set.rows,
        contents=eval_set.contents,
        tasks=[[name, repr(scoring)] for name, scoring in eval_set.tasks.items()],  # which items are queries of which
        suite_scoring=_SCORING,
        settings=encoder.settings(),
    )
    kept = SetResult.load(path, about)
    encoder.processes.barrier()  # all have looked before one of them writes
    if kept is not None:
        log.info("%s: finished before, kept in %s", eval_set.name, path)
        return kept
    if path.is_file() and encoder.processes.rank == 0:
        log.warning("%s is of another model, data or setting, or not whole: evaluated again", path)
    for name, count in eval_set.notes.items():
        if name == "n_empty_candidates" and count:
            log.warning("%s: %d empty candidates are left out", eval_set.name, count)
    vector_UD = encoder.encode(eval_set)
    encoder.processes.barrier()  # all have read the parts before they are removed
    if encoder.processes.rank == 0:
        SetResult.of(eval_set, vector_UD, about).save(path)
        encoder.forget()
    encoder.processes.barrier()
    result = SetResult.load(path, about)
    if result is None:
        raise FileNotFoundError(f"{path} of the first process is not there: all processes must see one folder")
    return result
