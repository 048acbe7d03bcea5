"""What passes between the stages: frozen dataclasses of tensors that check their own contract.

All tensors of a value lie on one device; a finished plan's on the CPU.

Shapes: N = rows, D = dimensions, W = first_rank + n_ranks, E = edges, C = clusters, K = cluster_size,
M = batches of one epoch, B = global batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

PADDING = -1
"""Fills the last cluster of a task and the ranks that a small task does not have."""
OF_FILE = 2**62
"""The row of a hard negative that the pairs file names: none, and above all there are."""
ROW_VALUES = ("row", "query_key", "target_key", "group_key")
"""What a batch says of its rows and of their hard negatives."""
GRID = 2.0**26
"""Vectors are whole multiples of 1 / GRID, of which mining/exact.py computes the same cosines on every machine."""
_TILE_ROWS = 2**15
_LEAST_NORM = 1e-15
"""Of rows shorter than this, or longer than its inverse, the squares lose figures or are no float32 at all."""


def round_to_grid_(vector_QD: Tensor) -> Tensor:
    """Round to multiples of 1 / GRID, in place."""
    return vector_QD.mul_(GRID).round_().mul_(1 / GRID)


def name_rows(rows: Sequence[int] | Tensor) -> str:
    """Name the first five rows and how many there are, for an error message."""
    listed = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    shown = ", ".join(str(row) for row in listed[:5])
    return f"rows {shown}, ... ({len(listed)} in all)" if len(listed) > 5 else f"row(s) {shown}"


Value = TypeVar("Value")


def by_epoch(values: Mapping[int, Value], epoch: int, default: Value) -> Value:
    """What holds in an epoch, where ``values`` says from which epoch on each value holds; ``default`` before the first.

    Raises:
        ValueError: where an epoch is negative.
    """
    if any(first < 0 for first in values):
        raise ValueError(f"{dict(values)} names an epoch below 0; epochs count from 0")
    begun = [first for first in values if first <= epoch]
    return values[max(begun)] if begun else default


def _check_dtype(owner: str, **tensors: tuple[Tensor, torch.dtype]) -> None:
    for name, (tensor, dtype) in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{owner}.{name} is {tensor.dtype}; it must be {dtype}")


@dataclass(frozen=True)
class ChunkSettings:
    """How a batch is cut for GradCache; each chunk is embedded on its own.

    Args:
        items: at most so many queries, targets or negatives in a chunk.
        tokens: at most so many tokens, padding included; items are sorted by length, and one longer than this is a
            chunk of its own. Costs preprocessing everything twice.
    """

    items: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.items is None) == (self.tokens is None):
            raise ValueError(f"chunks: items={self.items} and tokens={self.tokens}; give one of them")
        if (self.items or self.tokens or 0) < 1:
            raise ValueError(f"chunks: items={self.items} and tokens={self.tokens} must be above 0")


Moved = TypeVar("Moved", bound="Embeddings | Neighbors | Window | Edges | Communities | Clusters")


def to_device(value: Moved, device: torch.device) -> Moved:
    """The same value on another device; itself where it lies there."""
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    tensors = {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
    if all(tensor.device == device for tensor in tensors.values()):
        return value
    moved: Any = {name: tensor.to(device) for name, tensor in tensors.items()}
    return replace(value, **moved)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Teacher vectors of the rows: ``query_ND`` and ``target_ND``, float32, unit norm."""

    query_ND: Tensor
    target_ND: Tensor

    @classmethod
    def from_arrays(cls, query: Any, target: Any) -> Embeddings:
        """Normalise two (N, D) arrays or tensors of any float type.

        Raises:
            ValueError: where a shape is not (N, D), and where rows hold NaN, infinity or only zeros.
        """
        return cls(_unit_rows("query", query), _unit_rows("target", target))

    def __post_init__(self) -> None:
        if self.query_ND.shape != self.target_ND.shape:
            raise ValueError(
                f"query vectors are {tuple(self.query_ND.shape)} and target vectors {tuple(self.target_ND.shape)}; "
                "both need one row a pair and the same dimension (one teacher for both sides)"
            )

    def __len__(self) -> int:
        return len(self.query_ND)

    def take(self, rows_N: Tensor) -> Embeddings:
        """The vectors of these rows; without a copy where that is all of them in order."""
        if len(rows_N) == len(self) and torch.equal(rows_N, torch.arange(len(self), device=rows_N.device)):
            return self
        return Embeddings(self.query_ND[rows_N], self.target_ND[rows_N])


def _unit_rows(side: str, values: Any) -> Tensor:
    """Unit rows on the grid.

    In tiles, so that nothing but the result takes memory; values that are such rows already are not copied.
    """
    vector_ND = torch.as_tensor(values).detach().cpu()
    if vector_ND.ndim != 2 or 0 in vector_ND.shape:
        raise ValueError(f"{side} vectors have shape {tuple(vector_ND.shape)}; needed: (rows, dimensions), neither 0")
    unit_ND: Tensor | None = None
    bad: list[int] = []
    for start in range(0, len(vector_ND), _TILE_ROWS):
        tile_QD = vector_ND[start : start + _TILE_ROWS].float()
        norm_Q = tile_QD.norm(dim=1)
        beyond = ((norm_Q < _LEAST_NORM) | (norm_Q > 1 / _LEAST_NORM)).nonzero().flatten()
        if len(beyond):  # their squares leave float32
            tile_QD = tile_QD.index_copy(0, beyond, tile_QD[beyond] / tile_QD[beyond].abs().amax(dim=1, keepdim=True))
            norm_Q = tile_QD.norm(dim=1)
        bad += ((~torch.isfinite(norm_Q) | (norm_Q == 0)).nonzero().flatten() + start).tolist()
        if unit_ND is None and vector_ND.dtype == torch.float32 and _is_unit(tile_QD, norm_Q):
            continue
        if unit_ND is None:
            unit_ND = torch.empty(vector_ND.shape)
            unit_ND[:start] = vector_ND[:start]
        unit_ND[start : start + _TILE_ROWS] = round_to_grid_(tile_QD / norm_Q[:, None])
    if bad:
        raise ValueError(f"{side} vectors hold NaN, infinity or only zeros in {name_rows(bad)}; embed these again")
    return vector_ND if unit_ND is None else unit_ND


def _is_unit(tile_QD: Tensor, norm_Q: Tensor) -> bool:
    on_grid = torch.equal(round_to_grid_(tile_QD.clone()), tile_QD)
    return on_grid and bool(((norm_Q - 1).abs() < 3e-7).all())


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The nearest other targets of every query, best first, ties by id.

    ``ids_NW`` (int64) and ``scores_NW`` (float32 cosines); where a row has fewer than W eligible targets, id -1 and
    score -inf stand at the end. ``positive_score_N`` is the cosine of each query with its own target.
    """

    ids_NW: Tensor
    scores_NW: Tensor
    positive_score_N: Tensor

    def __post_init__(self) -> None:
        _check_dtype("Neighbors", ids_NW=(self.ids_NW, torch.int64), scores_NW=(self.scores_NW, torch.float32))
        if self.ids_NW.shape != self.scores_NW.shape or len(self.ids_NW) != len(self.positive_score_N):
            raise ValueError(
                f"Neighbors disagree: ids {tuple(self.ids_NW.shape)}, scores {tuple(self.scores_NW.shape)}, "
                f"positive scores {tuple(self.positive_score_N.shape)}"
            )

    def __len__(self) -> int:
        return len(self.ids_NW)


@dataclass(frozen=True, slots=True)
class Window:
    """What each ranked neighbour counts as, (N, W) bool: ``hard_NW`` get edges, ``masked_NW`` are likely right."""

    hard_NW: Tensor
    masked_NW: Tensor

    def __post_init__(self) -> None:
        _check_dtype("Window", hard_NW=(self.hard_NW, torch.bool), masked_NW=(self.masked_NW, torch.bool))
        if self.hard_NW.shape != self.masked_NW.shape or bool((self.hard_NW & self.masked_NW).any()):
            raise ValueError("a Window's hard and masked neighbours need one shape and no neighbour in common")


@dataclass(frozen=True, slots=True)
class Edges:
    """Undirected edges, each stored once and sorted: ``source_E < target_E`` (int64), ``weight_E > 0`` (float32)."""

    source_E: Tensor
    target_E: Tensor
    weight_E: Tensor
    n_rows: int

    def __post_init__(self) -> None:
        _check_dtype(
            "Edges",
            source_E=(self.source_E, torch.int64),
            target_E=(self.target_E, torch.int64),
            weight_E=(self.weight_E, torch.float32),
        )
        if not len(self.source_E) == len(self.target_E) == len(self.weight_E):
            raise ValueError("Edges need as many sources as targets and weights")
        if len(self) and (
            bool((self.source_E >= self.target_E).any())
            or int(self.source_E.min()) < 0
            or int(self.target_E.max()) >= self.n_rows
            or not bool((self.weight_E > 0).all())
        ):
            raise ValueError(f"Edges need 0 <= source < target < {self.n_rows} and weights above 0")

    def __len__(self) -> int:
        return len(self.source_E)

    def both_directions(self) -> tuple[Tensor, Tensor, Tensor]:
        """(from, to, weight), each edge twice."""
        return (
            torch.cat([self.source_E, self.target_E]),
            torch.cat([self.target_E, self.source_E]),
            self.weight_E.repeat(2),
        )

    def within(self, label_N: Tensor) -> Edges:
        """The edges whose two ends carry the same label."""
        keep_E = label_N[self.source_E] == label_N[self.target_E]
        return Edges(self.source_E[keep_E], self.target_E[keep_E], self.weight_E[keep_E], self.n_rows)

    def is_joined(self) -> Tensor:
        """(N,) bool: whether a row has an edge."""
        joined_N = torch.zeros(self.n_rows, dtype=torch.bool, device=self.source_E.device)
        joined_N[self.source_E] = True
        joined_N[self.target_E] = True
        return joined_N


@dataclass(frozen=True, slots=True)
class Communities:
    """One label a row, ``label_N`` (int64), counted from 0 in the order in which the labels first appear."""

    label_N: Tensor

    @classmethod
    def from_labels(cls, labels: Any) -> Communities:
        """Renumber any integer labels canonically, so that equal partitions compare equal."""
        label_N = labels.to(torch.int64) if isinstance(labels, Tensor) else torch.tensor(labels, dtype=torch.int64)
        _, inverse_N = label_N.unique(return_inverse=True)
        first_L = label_N.new_full((int(inverse_N.max()) + 1,), len(label_N))
        first_L.scatter_reduce_(0, inverse_N, torch.arange(len(label_N), device=label_N.device), "amin")
        return cls(first_L.argsort().argsort()[inverse_N])

    def __post_init__(self) -> None:
        _check_dtype("Communities", label_N=(self.label_N, torch.int64))

    def __len__(self) -> int:
        """How many communities."""
        return int(self.label_N.max()) + 1


@dataclass(frozen=True, slots=True)
class Clusters:
    """``ids_CK`` (int64): every row exactly once; -1 pads the end of the last cluster of a task."""

    ids_CK: Tensor

    def __post_init__(self) -> None:
        _check_dtype("Clusters", ids_CK=(self.ids_CK, torch.int64))
        row_N = self.ids_CK[self.ids_CK != PADDING].sort().values
        if not torch.equal(row_N, torch.arange(len(row_N), device=row_N.device)):
            raise ValueError(
                f"Clusters of shape {tuple(self.ids_CK.shape)} must hold each of the rows 0 .. {len(row_N) - 1} once"
            )

    def __len__(self) -> int:
        return len(self.ids_CK)

    @property
    def n_rows(self) -> int:
        return int((self.ids_CK != PADDING).sum())

    @property
    def cluster_size(self) -> int:
        return self.ids_CK.shape[1]

    def cluster_of_row(self) -> Tensor:
        """(N,) the cluster of every row."""
        cluster_C = torch.arange(len(self), device=self.ids_CK.device)[:, None].expand_as(self.ids_CK)
        filled_CK = self.ids_CK != PADDING
        cluster_N = self.ids_CK.new_empty(self.n_rows)
        cluster_N[self.ids_CK[filled_CK]] = cluster_C[filled_CK]
        return cluster_N
