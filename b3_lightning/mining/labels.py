"""Tasks in which few targets serve many rows: rank the labels, then let one row stand for each label.

An edge to every row of a near label would be as many edges as rows squared. Instead the rows of every label are put in
a random order, and the row at place p meets, of each label in its window, the row at place p (counted round where that
label has fewer rows). So rows at one place of several near labels become densely joined, and a cluster is made of
different labels that are hard for one another.

Shapes: N = rows, U = labels, W = labels ranked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from b3_lightning.mining.alike import Alike
from b3_lightning.mining.groups import permutation, place_in_group
from b3_lightning.mining.neighbors import find_neighbors, positive_scores
from b3_lightning.types import PADDING, Embeddings, Neighbors


def rank_labels(
    embeddings: Embeddings,
    alike: Alike,
    *,
    n_ranks: int,
    seed: int,
    **search: Any,
) -> Neighbors:
    """Rank the other labels for every query; every label is given as one of its rows.

    Args:
        alike: rows of equal targets have one label; a label of any row of the same query or group is right and left
            out.
        search: of ``find_neighbors``.
    """
    _, label_N = alike.target_N.unique(return_inverse=True)
    members = _Members(label_N, seed)
    label_NW, score_NW = find_neighbors(
        embeddings.query_ND,
        embeddings.target_ND[members.first_U],
        n_neighbors=n_ranks,
        exclude=alike.exclusions(targets=members.first_U),
        **search,
    )
    ids_NW = members.stand_in(label_NW.clamp(min=0)).masked_fill_(score_NW == -torch.inf, PADDING)
    return Neighbors(ids_NW, score_NW, positive_scores(embeddings.query_ND, embeddings.target_ND))


class _Members:
    """The rows of every label in random order."""

    def __init__(self, label_N: Tensor, seed: int) -> None:
        shuffled = permutation(len(label_N), seed, label_N.device)
        self._row_N = shuffled[label_N[shuffled].argsort(stable=True)]
        self._count_U = torch.bincount(label_N)
        self._start_U = self._count_U.cumsum(0) - self._count_U
        self._place_N = torch.empty_like(label_N)
        self._place_N[self._row_N] = place_in_group(label_N[self._row_N], len(self._count_U))
        self.first_U = self._row_N[self._start_U]

    def stand_in(self, label_NW: Tensor) -> Tensor:
        """(N, W) the row of each label that stands at the place that the asking row has in its own."""
        place_NW = self._place_N[:, None] % self._count_U[label_NW]
        return self._row_N[self._start_U[label_NW] + place_NW]
