"""Scores that are the same on every machine, and the order that they put targets in.

Vectors are rounded to whole multiples of 2^-26 (which moves a component by at most 7e-9). The products of two such
components are multiples of 2^-52, and every partial sum of a cosine lies within +-1, so float64 holds each of them
without rounding: any library, thread count, tile or device sums to the same bits.

Shapes: Q = queries, M = targets, D = dimensions, V = candidates of a row, W = neighbours kept, C = columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3_lightning.types import PADDING, name_rows, round_to_grid_

MAX_NORM = 1.001
"""Above unit norm by more than rounding, partial sums could leave the range in which they are exact."""
_CHUNK_ROWS, _CHUNK_ROWS_OF_GPU = 8, 4096
"""Of the CPU: their candidates fit a cache, and 32 rows take twice the time; a GPU wants few large products."""
_LAST_ID = 2**31 - 1


def to_grid(vector_QD: Tensor) -> Tensor:
    """The vectors in float64, rounded to multiples of 2^-26."""
    return round_to_grid_(vector_QD.to(torch.float64, copy=True))


def check_unit(side: str, vector_QD: Tensor, first_row: int) -> Tensor:
    """(Q,) the norms of ``vector_QD``.

    Raises:
        ValueError: where a norm exceeds 1 by more than 0.001 or is not a number.
    """
    norm_Q: Tensor = vector_QD.norm(dim=1, dtype=torch.float32)
    bad_Q = (~(norm_Q <= MAX_NORM)).nonzero().flatten()
    if len(bad_Q):
        raise ValueError(
            f"{side} vectors are longer than 1 or not finite in {name_rows(bad_Q + first_row)}; "
            "normalise them first (Embeddings.from_arrays does)"
        )
    return norm_Q


def order_keys(score_QV: Tensor, ids_QV: Tensor) -> Tensor:
    """One int64 for each (float32 score, id), greater for the better score and, between equals, for the lower id."""
    bits_QV = (score_QV + 0.0).view(torch.int32)  # -0.0 becomes 0.0: equal scores must have equal bits
    bits_QV = torch.where(bits_QV < 0, bits_QV ^ 0x7FFFFFFF, bits_QV)
    return (bits_QV.long() << 32) + (_LAST_ID - ids_QV)


def missing_keys(n_rows: int, width: int, device: torch.device) -> Tensor:
    """(n_rows, width) keys worse than that of any target."""
    nothing = torch.full((n_rows, width), -torch.inf, device=device)
    return order_keys(nothing, torch.full((n_rows, width), _LAST_ID, device=device))


def read_keys(key_QW: Tensor) -> tuple[Tensor, Tensor]:
    """The ids (int64; -1 where the score is -inf) and the scores (float32) that ``order_keys`` packed."""
    bits_QW = (key_QW >> 32).int()
    score_QW = torch.where(bits_QW < 0, bits_QW ^ 0x7FFFFFFF, bits_QW).view(torch.float32)
    ids_QW = _LAST_ID - (key_QW & 0xFFFFFFFF)
    return ids_QW.masked_fill(score_QW == -torch.inf, PADDING), score_QW


def score_candidates(
    query_QD: Tensor, target_MD: Tensor, ids_QV: Tensor, count_Q: Tensor, *, on_grid: bool, chunk_bytes: int
) -> Tensor:
    """(Q, V) float32: the exact scores of the first ``count_Q`` candidates of every row, -inf beyond them.

    Args:
        query_QD: float64, of ``to_grid``.
        on_grid: whether all targets are multiples of 2^-26 already, which saves rounding them here.
    """
    width, n_dims = ids_QV.shape[1], target_MD.shape[1]
    most_rows = _CHUNK_ROWS if ids_QV.device.type == "cpu" else _CHUNK_ROWS_OF_GPU
    chunk_rows = max(1, min(most_rows, chunk_bytes // max(1, width * n_dims * (target_MD.element_size() + 8))))
    # two buffers for all chunks: fresh memory for each would double the time
    near = torch.empty(chunk_rows * width, n_dims, dtype=target_MD.dtype, device=ids_QV.device)
    wide = torch.empty(chunk_rows * width, n_dims, dtype=torch.float64, device=ids_QV.device)
    by_count = count_Q.argsort(stable=True)  # rows of one chunk are padded to its longest
    counts, ids_QV, query_Q1D = count_Q[by_count].tolist(), ids_QV[by_count], query_QD[by_count][:, None]
    score_QV = torch.full(ids_QV.shape, -torch.inf, device=ids_QV.device)
    for start in range(0, len(counts), chunk_rows):
        stop = min(start + chunk_rows, len(counts))
        longest = counts[stop - 1]
        size = (stop - start) * longest
        if size == 0:
            continue
        torch.index_select(target_MD, 0, ids_QV[start:stop, :longest].flatten(), out=near[:size])
        wide[:size].copy_(near[:size])
        if not on_grid:
            round_to_grid_(wide[:size])
        found_qVD = wide[:size].view(stop - start, longest, n_dims)
        # the query on the left: the other order runs MKL's matrix-vector product, 5 times slower
        score_QV[start:stop, :longest] = torch.bmm(query_Q1D[start:stop], found_qVD.transpose(1, 2))[:, 0]
    score_QV = torch.empty_like(score_QV).index_copy_(0, by_count, score_QV)
    return score_QV.masked_fill_(torch.arange(width, device=ids_QV.device) >= count_Q[:, None], -torch.inf)
