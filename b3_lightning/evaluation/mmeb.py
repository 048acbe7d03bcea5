"""MMEB's 36 evaluation sets: TIGER-Lab/MMEB-eval as the hub lays it out.

A set is a folder ``NAME/test-*.parquet`` (or ``NAME.parquet``) with the columns ``qry_text``, ``qry_img_path``, and the
lists ``tgt_text``, ``tgt_img_path`` of one length: a query's own candidates, the first of which is right.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from b3_lightning.data.mmeb import find_task, without_image_token
from b3_lightning.data.pairs import Item
from b3_lightning.evaluation.scoring import OwnCandidates
from b3_lightning.evaluation.sets import EvalSet, ItemTable, ReadSettings, read_files
from b3_lightning.mining import fingerprint
from b3_lightning.types import name_rows

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
NOTHING = Item("", "")


def read_mmeb(name: str, settings: ReadSettings) -> EvalSet:
    """Read one set.

    ``<|image_1|>`` is taken out of the texts: the model's own processor puts its token where an image is. A candidate
    with neither text nor image can win nothing: it is left out and counted.

    Raises:
        FileNotFoundError: where the set or an image is not there.
        ValueError: where columns or rows are not as above.
    """
    columns, where = read_files(settings.data, name, COLUMNS)
    query_Q = [_item(*row) for row in zip(columns["qry_text"], columns["qry_img_path"], strict=True)]
    _refuse(where, "the query is empty", [row for row, item in enumerate(query_Q) if item == NOTHING])
    bare_QC = _targets(columns, where)
    _refuse(where, "there are no targets", [row for row, bare in enumerate(bare_QC) if not bare])
    _refuse(
        where, "the first target, the right one, is empty", [r for r, bare in enumerate(bare_QC) if bare[0] == NOTHING]
    )
    target_prompt = settings.target_prompt + (find_task(name).target_prompt if settings.prompts else "")
    target_QC = [[Item(target_prompt + item.text, item.image) for item in bare if item != NOTHING] for bare in bare_QC]
    query_Q = [Item(settings.query_prompt + item.text, item.image) for item in query_Q]
    table = ItemTable([*query_Q, *(item for targets in target_QC for item in targets)], settings, where)
    candidates_QC = [table.positions(targets) for targets in target_QC]
    notes = {
        "n_candidates": max(len(bare) for bare in bare_QC),
        "n_empty_candidates": sum(Counter(bare)[NOTHING] for bare in bare_QC),
        "n_equal_to_gold": sum(candidates.count(candidates[0]) - 1 for candidates in candidates_QC),
    }
    scoring = OwnCandidates(table.positions(query_Q), candidates_QC)
    rows = fingerprint(**columns)
    return EvalSet(name, table.items, table.contents, settings.root, {name: scoring}, rows, notes)


def _item(text: str | None, image: str | None) -> Item:
    return Item(without_image_token(text or ""), image or "")


def _targets(columns: dict[str, list[Any]], where: str) -> list[list[Item]]:
    pairs = list(zip(columns["tgt_text"], columns["tgt_img_path"], strict=True))
    no_list = [row for row, both in enumerate(pairs) if not all(isinstance(side, list) for side in both)]
    _refuse(where, "tgt_text and tgt_img_path must be lists", no_list)
    uneven = [row for row, (texts, images) in enumerate(pairs) if len(texts) != len(images)]
    _refuse(where, "tgt_text and tgt_img_path must be lists of one length", uneven)
    return [[_item(*both) for both in zip(*row, strict=True)] for row in pairs]


def _refuse(where: str, what: str, rows: list[int]) -> None:
    if rows:
        raise ValueError(f"{where}: {what} in {name_rows(rows)}; mend the file, or get it again")
