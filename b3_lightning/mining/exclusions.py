"""Targets that a row must not have as neighbours, because they share a key with it.

Targets are sorted by key once; a tile asks for its (query, target) pairs in pieces of bounded size, so 10,000 rows
with one key cost time and no memory.

Shapes: Q = queries of a tile, M = targets, C = columns of a tile, P = pairs of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LARGE = 256
"""Targets of a key from which on its columns are blanked as a whole: pair by pair takes 1 us each."""
_ROWS_AT_ONCE = 64
_PIECE = 2**16
"""Pairs a piece: about 3 MB of indices."""


class Exclusions:
    """The target sides of the key pairs; ``blank`` takes the query sides."""

    def __init__(self, target_keys: Sequence[Tensor]) -> None:
        self._sorted = [_SortedKeys(key_M) for key_M in target_keys]

    def blank(
        self,
        score_QC: Tensor,
        query_keys: Sequence[Tensor],
        start: int,
        stop: int,
        column_of: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set the scores of excluded pairs to -inf, in place.

        Args:
            score_QC: scores against the targets ``[start, stop)``.
            query_keys: for every key pair the (Q,) int64 keys of the queries, or (Q, M), several each, padded with -1.
            column_of: the column of a target id; absent, columns are in the order of ids.
        """
        columns = column_of or (lambda id_P: id_P - start)
        for sorted_keys, key_Q in zip(self._sorted, query_keys, strict=True):
            if key_Q.numel() == 0:
                continue
            n_each = key_Q.numel() // len(key_Q)
            spans = sorted_keys.spans(key_Q.flatten(), start, stop)
            large_Q = spans.count_Q > _LARGE
            for rows, id_G in sorted_keys.large_groups(spans, large_Q):
                mask_C = torch.zeros(score_QC.shape[1], dtype=torch.bool, device=score_QC.device)
                mask_C[columns(id_G)] = True
                for part in (rows // n_each).split(_ROWS_AT_ONCE):
                    score_QC[part] = score_QC[part].masked_fill_(mask_C, -torch.inf)
            spans.count_Q.masked_fill_(large_Q, 0)
            for query_P, id_P in sorted_keys.pairs(spans):
                score_QC[query_P // n_each, columns(id_P)] = -torch.inf


class _Spans(NamedTuple):
    """Where the entries of each query's key lie among the sorted ones, and the number to take off to get ids."""

    first_Q: Tensor
    count_Q: Tensor
    base_Q: Tensor


class _SortedKeys:
    """Target ids by key: ``entry_M`` holds (number of the key) x M + id, ascending."""

    def __init__(self, key_M: Tensor) -> None:
        self._n_targets = len(key_M)
        self._key_G, number_M = key_M.unique(return_inverse=True)
        ids_M = torch.arange(len(key_M), device=key_M.device)
        self._entry_M = (number_M * self._n_targets + ids_M).sort().values

    def spans(self, key_Q: Tensor, start: int, stop: int) -> _Spans:
        """The entries with equal keys and ``start <= id < stop``."""
        number_Q = torch.searchsorted(self._key_G, key_Q).clamp_(max=len(self._key_G) - 1)
        base_Q = number_Q * self._n_targets
        first_Q = torch.searchsorted(self._entry_M, base_Q + start)
        count_Q = torch.searchsorted(self._entry_M, base_Q + stop) - first_Q
        return _Spans(first_Q, count_Q.masked_fill_(self._key_G[number_Q] != key_Q, 0), base_Q)

    def large_groups(self, spans: _Spans, large_Q: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(queries, target ids) of each key with many targets."""
        for base in spans.base_Q[large_Q].unique().tolist():
            rows = (large_Q & (spans.base_Q == base)).nonzero().flatten()
            first = int(spans.first_Q[rows[0]])
            yield rows, self._entry_M[first : first + int(spans.count_Q[rows[0]])] - base

    def pairs(self, spans: _Spans) -> Iterator[tuple[Tensor, Tensor]]:
        """(query, target id) of every pair with equal keys, in pieces."""
        first_Q, count_Q, base_Q = spans
        end_Q = count_Q.cumsum(0)
        for piece in range(0, int(end_Q[-1]), _PIECE):
            pair_P = torch.arange(piece, min(piece + _PIECE, int(end_Q[-1])), device=end_Q.device)
            query_P = torch.searchsorted(end_Q, pair_P, right=True)
            entry_P = first_Q[query_P] + pair_P - (end_Q - count_Q)[query_P]
            yield query_P, self._entry_M[entry_P] - base_Q[query_P]
