"""Semantic similarity of sentences: Spearman's correlation of cosines with people's scores.

A set is ``NAME.parquet``, .jsonl or .csv (or ``NAME/test-*.parquet``) with the columns ``sentence1``, ``sentence2``,
``score``; a set of several years' parts, such as STS12, is one file of all of them, as SimCSE and mteb have it.
"""

from __future__ import annotations

import math

from b3_lightning.data.pairs import Item
from b3_lightning.evaluation.scoring import ScoredPairs
from b3_lightning.evaluation.sets import EvalSet, ItemTable, ReadSettings, read_files
from b3_lightning.mining import fingerprint
from b3_lightning.types import name_rows

STS_NAMES = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSb", "SICK-R")
"""The seven of the paper's Table 6, by the names that their files need."""
COLUMNS = ("sentence1", "sentence2", "score")


def read_sts(name: str, settings: ReadSettings) -> EvalSet:
    """Read one set; the prompt of queries goes before all sentences.

    Raises:
        FileNotFoundError: where the set is not there.
        ValueError: where a sentence or a score is missing, fewer than two scores differ, or a prompt of targets is set.
    """
    if settings.target_prompt:
        raise ValueError("sts has no queries and targets, and one prompt for all sentences: --query_prompt")
    columns, where = read_files(settings.data, name, COLUMNS)
    first, second, score = (columns[column] for column in COLUMNS)
    bad = [
        row for row in range(len(score))
        if not all(isinstance(side[row], str) and side[row].strip() for side in (first, second))
        or not isinstance(score[row], int | float)
        or not math.isfinite(score[row])
    ]  # fmt: skip
    if bad:
        raise ValueError(f"{where}: two sentences and a number are needed; not so in {name_rows(bad)}")
    if len(set(score)) < 2:
        raise ValueError(f"{where}: every score is {score[0]}; a correlation needs two that differ")
    sides = [[Item(settings.query_prompt + text, "") for text in side] for side in (first, second)]
    table = ItemTable([*sides[0], *sides[1]], settings, where)
    scoring = ScoredPairs(table.positions(sides[0]), table.positions(sides[1]), score)
    return EvalSet(name, table.items, table.contents, settings.root, {name: scoring}, fingerprint(**columns))
