"""InfoNCE over the targets of the global batch: pure functions of vectors, keys and masks.

Shapes: B = rows of this process, G = rows of the global batch, C = columns: what a query is scored against, the
positives of all processes and then their hard negatives; D = dimensions, M = masked targets of a row, padded with -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b3_lightning.mining import equal, listed
from b3_lightning.types import OF_FILE, ROW_VALUES


@dataclass(frozen=True)
class LossSettings:
    """InfoNCE and what it leaves out.

    Args:
        temperature: divides the cosines (B3 trains at 0.02); where it is learned, its first value.
        learn_temperature: ``none``, one for all tasks (``global``), or one for each (``per_task``).
        temperature_range: a learned temperature stays between these.
        symmetric: add the loss of targets against queries, and halve.
        mask_same: leave out targets that equal a row's own, and those of other rows with the same query or group.
        mask_planned: leave out targets that the plan lists for a row: ranks before the window, and too similar ones.
        mask_margin: leave out targets that the student itself scores above the positive by more than this; 0.1 is
            usual.
        hardness: adds ``hardness * cosine`` to a negative's logit, without gradient, so that hard negatives weigh more
            (arXiv 2503.04812 uses 9).
        matryoshka_dims: train also the first so many dimensions of the vectors, as embeddings of their own; the loss is
            the mean over these and the full width.
    """

    temperature: float = 0.02
    learn_temperature: Literal["none", "global", "per_task"] = "none"
    temperature_range: tuple[float, float] = (0.005, 0.5)
    symmetric: bool = False
    mask_same: bool = True
    mask_planned: bool = True
    mask_margin: float | None = None
    hardness: float = 0.0
    matryoshka_dims: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        low, high = self.temperature_range
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a number above 0")
        if not 0 < low < high:
            raise ValueError(f"temperature_range={self.temperature_range} must be positive and rising")
        if self.learn_temperature == "none" and self.temperature_range != LossSettings.temperature_range:
            raise ValueError(
                f"model.loss.temperature_range={self.temperature_range} is without effect with learn_temperature=none: "
                "set that to global or per_task, or leave temperature_range out"
            )
        if self.learn_temperature != "none" and not low <= self.temperature <= high:
            raise ValueError(f"temperature={self.temperature} lies outside temperature_range={self.temperature_range}")
        if not self.hardness >= 0 or not (self.mask_margin is None or self.mask_margin >= 0):
            raise ValueError(f"hardness={self.hardness} and mask_margin={self.mask_margin} must be at least 0")
        if any(width < 1 for width in self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims={self.matryoshka_dims} must be above 0")


class Rows(NamedTuple):
    """What tells whether two rows may be each other's negatives: ids, and keys of content and group.

    An id of -1 is an empty place, one of ``OF_FILE`` a hard negative of the pairs file; a key of -1 is none.
    """

    row_B: Tensor
    query_key_B: Tensor
    target_key_B: Tensor
    group_key_B: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Rows:
        """The rows of a batch."""
        return cls(*(batch[f"{name}_B"] for name in ROW_VALUES))

    @classmethod
    def of_negatives(cls, batch: Mapping[str, Any]) -> Rows:
        """The hard negatives of a batch."""
        return cls(*(batch[f"negative_{name}_N"] for name in ROW_VALUES))


def info_nce(
    score_BC: Tensor,
    *,
    temperature: float | Tensor,
    first_row: int = 0,
    ignore_BC: Tensor | None = None,
    hardness: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of each query against the columns.

    Args:
        score_BC: cosines; the positive of query b is column ``first_row + b``.
        temperature: divides the cosines.
        ignore_BC: bool, columns that are no negatives of a query; its positive is never left out.
        hardness: adds ``hardness * cosine`` to the logits of negatives, without gradient.
    """
    positive_B = first_row + torch.arange(len(score_BC), device=score_BC.device)
    logits_BC = score_BC / temperature
    if hardness:
        logits_BC = logits_BC + (hardness * score_BC.detach()).scatter(1, positive_B[:, None], 0.0)
    if ignore_BC is not None:
        ignore_BC = ignore_BC.scatter(1, positive_B[:, None], value=False)
        logits_BC = logits_BC.masked_fill(ignore_BC, -torch.inf)
    return F.cross_entropy(logits_BC, positive_B)


def same_key(rows: Rows, columns: Rows, known_BM: Tensor | None = None) -> Tensor:
    """(B, C) bool: column c holds row b's own target, or that of a row with the same query or group.

    Args:
        known_BM: keys of targets of rows with the same query or group, which other rows may hold too; padded with -1.
    """
    same_BC = equal(rows.target_key_B, columns.target_key_B)
    same_BC |= equal(rows.query_key_B, columns.query_key_B)
    same_BC |= equal(rows.group_key_B, columns.group_key_B)
    return same_BC if known_BM is None else same_BC | listed(known_BM, columns.target_key_B)


def ignored_columns(
    score_BC: Tensor,
    rows: Rows,
    columns: Rows,
    known_BM: Tensor | None,
    masked_BM: Tensor | None,
    settings: LossSettings,
    first_row: int,
) -> Tensor:
    """(B, C) bool: the columns that are no negatives of a query; never its positive.

    Args:
        known_BM: as of ``same_key``.
        masked_BM: keys of the targets that a plan lists for each row, padded with -1.
    """
    ignore_BC = (columns.row_B < 0)[None].expand(score_BC.shape)
    if settings.mask_same:
        ignore_BC = ignore_BC | same_key(rows, columns, known_BM)
    if settings.mask_planned and masked_BM is not None:
        # a negative of the pairs file was called one by somebody who knows more than the plan
        ignore_BC = ignore_BC | (listed(masked_BM, columns.target_key_B) & (columns.row_B != OF_FILE))
    positive_B = first_row + torch.arange(len(score_BC), device=score_BC.device)
    if settings.mask_margin is not None:
        own_B1 = score_BC.detach().gather(1, positive_B[:, None])
        ignore_BC = ignore_BC | (score_BC.detach() > own_B1 + settings.mask_margin)
    return ignore_BC.scatter(1, positive_B[:, None], value=False)


class Direction(NamedTuple):
    """One side scored against the other: unit vectors of this process, of all columns, and what to leave out."""

    vector_BD: Tensor
    column_CD: Tensor
    ignore_BC: Tensor


def contrastive_loss(
    directions: Sequence[Direction], *, settings: LossSettings, temperature: float | Tensor, first_row: int
) -> Tensor:
    """The mean of ``info_nce`` over the directions and over the Matryoshka widths."""
    losses = []
    for vector_BD, column_CD, ignore_BC in directions:
        for width in dict.fromkeys([*settings.matryoshka_dims, vector_BD.shape[1]]):  # the whole once, if listed too
            score_BC = truncate(vector_BD, width) @ truncate(column_CD, width).T
            losses.append(
                info_nce(
                    score_BC,
                    temperature=temperature,
                    first_row=first_row,
                    ignore_BC=ignore_BC,
                    hardness=settings.hardness,
                )
            )
    return torch.stack(losses).mean()


def truncate(vector_BD: Tensor, width: int) -> Tensor:
    """The first ``width`` dimensions, of unit norm again."""
    if width == vector_BD.shape[1]:
        return vector_BD
    return F.normalize(vector_BD[:, :width], dim=1)


class Temperature(nn.Module):
    """The temperature of a task: fixed, or learned as the logarithm of its inverse (as CLIP's logit scale)."""

    def __init__(self, settings: LossSettings, n_tasks: int = 1) -> None:
        super().__init__()
        self.settings = settings
        if settings.learn_temperature != "none":
            n_learned = n_tasks if settings.learn_temperature == "per_task" else 1
            self.log_scale_T = nn.Parameter(-torch.tensor(settings.temperature).log().repeat(n_learned))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move to another device or type, but never below float32: there, the steps are lost in rounding."""

        def widened(value: Tensor) -> Tensor:
            moved = fn(value)
            return value.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        found: nn.Module = super()._apply(widened, recurse)  # type: ignore[no-untyped-call]
        return found

    def forward(self, task: int | None = None) -> float | Tensor:
        """The temperature of a task, or of the geometric mean of all."""
        if self.settings.learn_temperature == "none":
            return self.settings.temperature
        own = slice(None) if task is None or len(self.log_scale_T) == 1 else slice(task, task + 1)
        return (-self.log_scale_T[own].mean()).exp()

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Bring learned values back between the bounds; called before a step."""
        if self.settings.learn_temperature != "none":
            low, high = (-torch.tensor(bound).log() for bound in reversed(self.settings.temperature_range))
            self.log_scale_T.clamp_(low.to(self.log_scale_T), high.to(self.log_scale_T))
