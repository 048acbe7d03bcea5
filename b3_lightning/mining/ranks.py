"""Which window a task gets: ``first_rank: auto`` from its vectors, ``n_ranks: auto`` from K, labels where they are few.

``first_rank: auto`` looks at a sample of queries and asks at every rank how many have a target there that is likely to
be right too. Evidence is a target nearly identical to the query's own, or a target of a query nearly identical to it;
and, where the teacher puts the positive first for most queries, a score above the positive's. What evidence remains in
the last quarter of the ranks is taken for chance. The window begins where less than one query in a hundred shows more.

Shapes: S = sampled queries, W = ranks looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from b3_lightning.mining.alike import Alike
from b3_lightning.mining.groups import permutation
from b3_lightning.mining.neighbors import find_neighbors, positive_scores
from b3_lightning.mining.settings import MiningSettings
from b3_lightning.types import PADDING, Embeddings

_N_SAMPLED = 1000
_N_RANKS = 256
_SMOOTHED = 8
"""Ranks averaged: with 1,000 queries, one rank alone is known to a third of a percent."""
_SUSPICIOUS_SHARE = 0.01
_MOST_BY_CHANCE = 0.5
"""More at the last ranks looked at is no chance: likely right targets reach further."""
_NEARLY_IDENTICAL = 0.2
"""Of the median distance (1 - cosine) between two rows drawn at random: a scale that fits any teacher."""


@dataclass(frozen=True, slots=True)
class RankChoice:
    """The window of a task and why; ``suspicious``: the share of likely false negatives at each rank, if estimated."""

    labels: bool
    first_rank: int
    n_ranks: int
    reason: str
    suspicious: Sequence[float] = ()

    @property
    def last_rank(self) -> int:
        """The last rank of the window."""
        return self.first_rank + self.n_ranks - 1


def choose_ranks(embeddings: Embeddings, alike: Alike, settings: MiningSettings) -> RankChoice:
    """Fix what ``settings`` leaves to the data."""
    n_rows, n_targets = len(embeddings), len(alike.target_N.unique())
    by_size = max(1, min(40 + 2 * settings.cluster_size, n_rows // 10))
    n_ranks = by_size if isinstance(settings.n_ranks, str) else settings.n_ranks
    if settings.ranks_labels(n_rows, n_targets):
        n_ranks = max(1, min(n_ranks, -(-int(settings.label_share * 1e6) * (n_targets - 1) // 10**6)))
        reason = f"{n_targets} targets serve {n_rows} rows, so labels are ranked: the nearest {n_ranks} others are hard"
        return RankChoice(True, 0, n_ranks, reason)
    if not isinstance(settings.first_rank, str):
        return RankChoice(False, settings.first_rank, n_ranks, "as set")
    return _estimate(embeddings, alike, n_ranks, settings.seed)


def _estimate(embeddings: Embeddings, alike: Alike, n_ranks: int, seed: int) -> RankChoice:
    n_looked_at = min(_N_RANKS, max(1, len(embeddings) // 10))
    near_SW, beaten_SW, reliable = _evidence(embeddings, alike, n_looked_at, seed)
    evidence_SW = near_SW | beaten_SW
    share_W = evidence_SW.double().mean(dim=0)
    # a score above the positive's can be chance, a nearly identical text cannot, however far such a family reaches
    by_chance = (beaten_SW & ~near_SW)[:, -max(1, n_looked_at // 4) :].double().mean()
    width = min(_SMOOTHED, max(1, n_looked_at // 4))
    smooth_W = (share_W - by_chance).unfold(0, width, 1).mean(dim=1)
    clean = ((smooth_W < _SUSPICIOUS_SHARE) & (by_chance <= _MOST_BY_CHANCE)).nonzero().flatten()
    first_rank = int(clean[0]) if len(clean) else n_looked_at
    found = (
        "from rank {} on fewer than {:.0%}"
        if len(clean)
        else "at all ranks below {}, the last looked at, {:.0%} or more"
    )
    reason = (
        f"{found.format(first_rank, _SUSPICIOUS_SHARE)} of {len(evidence_SW)} sampled queries have "
        f"a target that is likely right too ({share_W[0]:.1%} at rank 0, {by_chance:.1%} by chance); the positive's "
        f"score {'counted as evidence' if reliable else 'was no evidence: it leads in less than half of the queries'}"
    )
    return RankChoice(False, first_rank, n_ranks, reason, tuple(share_W.tolist()))


def _evidence(embeddings: Embeddings, alike: Alike, n_ranks: int, seed: int) -> tuple[Tensor, Tensor, bool]:
    """(S, W) bool each: is the target at this rank, or its query, nearly the row's own; does it score above the
    positive, where that counts as evidence? And: does it count?"""
    query_ND, target_ND = embeddings.query_ND, embeddings.target_ND
    order = permutation(len(embeddings), seed, query_ND.device)
    sample, other = order[:_N_SAMPLED], order.roll(1)[:_N_SAMPLED]
    ids_SW, score_SW = find_neighbors(
        query_ND[sample],
        target_ND,
        n_neighbors=n_ranks,
        exclude=alike.exclusions(sample),
    )
    alike_SW = torch.zeros_like(ids_SW, dtype=torch.bool)
    for vector_ND in (query_ND, target_ND):
        nearly_identical = near_distance(vector_ND, sample, other)
        pairs = zip(ids_SW.clamp(min=0), sample, strict=True)
        near_SW = torch.stack([vector_ND[ids_W] @ vector_ND[row] for ids_W, row in pairs])
        alike_SW |= 1 - near_SW < nearly_identical
    beaten_SW = score_SW > positive_scores(query_ND[sample], target_ND[sample])[:, None]
    reliable = bool(beaten_SW[:, 0].double().mean() < 0.5)
    return alike_SW & (ids_SW != PADDING), beaten_SW & (ids_SW != PADDING) & reliable, reliable


def near_distance(vector_ND: Tensor, sample: Tensor, other: Tensor) -> Tensor:
    """Rows nearer than this (1 - cosine) are nearly identical; measured on these pairs of random rows."""
    return _NEARLY_IDENTICAL * (1 - (vector_ND[sample] * vector_ND[other]).sum(dim=1).median())
