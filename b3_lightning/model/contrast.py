"""The vectors of this process's rows in, the loss over the global batch out: gathers, masks, both directions.

Shapes: B = rows of this process, G = rows of the global batch, N = places for its hard negatives, C = columns
that a query is scored against: G positives of all processes, then their hard negatives; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from b3_lightning.model.distributed import gather_rows
from b3_lightning.model.loss import Direction, LossSettings, Rows, contrastive_loss, ignored_columns


class Contrast(NamedTuple):
    """A training batch as the loss saw it, without gradients: for callbacks that look at its hardness."""

    query_BD: Tensor
    target_BD: Tensor
    score_BC: Tensor
    ignore_BC: Tensor
    column_row_C: Tensor
    first_row: int
    loss: Tensor


def contrast_batch(
    query_BD: Tensor,
    target_BD: Tensor,
    negative_ND: Tensor | None,
    batch: Mapping[str, Any],
    *,
    settings: LossSettings,
    temperature: float | Tensor,
    rank: int = 0,
) -> tuple[Tensor, Contrast]:
    """The loss of this process's rows; its mean over the processes is the loss of the global batch.

    Args:
        query_BD: unit vectors, as many rows in every process.
        negative_ND: of hard negatives; any vector stands where one is lacking.
        batch: ids and keys of the rows (``row_B``, ``query_key_B``, ``target_key_B``, ``group_key_B``) and of the
            negatives (``negative_row_N``, -1 for a lacking one, ...), ``known_BM``, the keys of targets of rows
            with the same query or group, and ``masked_BM``, of those that a plan lists.
        rank: of this process.
    """
    rows = Rows.of(batch)
    column_CD, about_C4 = gather_rows(target_BD), gather_rows(torch.stack(rows, dim=1))
    n_global, first_row = len(column_CD), rank * len(query_BD)
    if negative_ND is not None:
        column_CD = torch.cat([column_CD, gather_rows(negative_ND)])
        about_C4 = torch.cat([about_C4, gather_rows(torch.stack(Rows.of_negatives(batch), dim=1))])
    columns = Rows(*about_C4.unbind(1))
    score_BC = query_BD.detach() @ column_CD.detach().T
    known_BM, masked_BM = batch.get("known_BM"), batch.get("masked_BM")
    ignore_BC = ignored_columns(score_BC, rows, columns, known_BM, masked_BM, settings, first_row)
    directions = [Direction(query_BD, column_CD, ignore_BC)]
    if settings.symmetric:
        # which queries leave out this process's targets, the processes of those queries know
        ignore_GG = gather_rows(ignore_BC[:, :n_global].to(torch.uint8)).bool()
        own = slice(first_row, first_row + len(query_BD))
        directions.append(Direction(target_BD, gather_rows(query_BD), ignore_GG[:, own].T))
    loss = contrastive_loss(directions, settings=settings, temperature=temperature, first_row=first_row)
    seen = (query_BD.detach(), target_BD.detach(), score_BC, ignore_BC, columns.row_B, first_row, loss.detach())
    return loss, Contrast(*seen)
