"""Tasks in which few targets serve many rows: rank the labels, then let one row stand for each label.

An edge to every row of a near label would be as many edges as rows squared. Instead the rows of every label are put in
a random order, and the row at place p meets, of each label in its window, the row at place p (counted round where that
label has fewer rows). So rows at one place of several near labels become densely joined, and a cluster is made of
different labels that are hard for one another.

Shapes: N = rows, U = labels, W = labels ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from b3_lightning.mining.groups import permutation, place_in_group
from b3_lightning.mining.neighbors import find_neighbors, positive_scores
from b3_lightning.types import PADDING, Embeddings, Neighbors


def rank_labels(
    embeddings: Embeddings,
    target_key_N: Tensor,
    known_keys: Sequence[Tensor],
    *,
    n_ranks: int,
    seed: int,
    **search: Any,
) -> Neighbors:
    """Rank the other labels for every query; every label is given as one of its rows.

    Args:
        target_key_N: (N,) int64, the label of every row.
        known_keys: (N,) int64 each; a label that any row with an equal key has is known to be right, and left out.
        search: of ``find_neighbors``.
    """
    _, label_N = target_key_N.unique(return_inverse=True)
    members = _Members(label_N, seed)
    known = [_known_labels(key_N, label_N, len(members)) for key_N in known_keys]
    n_found = min(len(members), n_ranks + sum(most for _, _, most in known))
    label_NW, score_NW = find_neighbors(
        embeddings.query_ND,
        embeddings.target_ND[members.first_U],
        n_neighbors=n_found,
        exclude=[(label_N, torch.arange(len(members), device=label_N.device))],
        **search,
    )
    for key_N, code_P, _ in known:
        score_NW[torch.isin(key_N[:, None] * len(members) + label_NW, code_P)] = -torch.inf
    best = score_NW.sort(dim=1, descending=True, stable=True)
    score_NW, label_NW = best.values[:, :n_ranks], label_NW.gather(1, best.indices)[:, :n_ranks]
    ids_NW = members.stand_in(label_NW.clamp(min=0)).masked_fill_(score_NW == -torch.inf, PADDING)
    return Neighbors(ids_NW, score_NW.contiguous(), positive_scores(embeddings.query_ND, embeddings.target_ND))


def _known_labels(key_N: Tensor, label_N: Tensor, n_labels: int) -> tuple[Tensor, Tensor, int]:
    """Keys counted from 0; every (key, label) that occurs, as one number; the most labels of one key, less its own."""
    _, key_N = key_N.unique(return_inverse=True)
    code_P = (key_N * n_labels + label_N).unique()
    return key_N, code_P, int(torch.bincount(code_P // n_labels).max()) - 1


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

    def __len__(self) -> int:
        return len(self._count_U)

    def stand_in(self, label_NW: Tensor) -> Tensor:
        """(N, W) the row of each label that stands at the place that the asking row has in its own."""
        place_NW = self._place_N[:, None] % self._count_U[label_NW]
        return self._row_N[self._start_U[label_NW] + place_NW]
