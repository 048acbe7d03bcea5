"""What a task measures, from vectors of its items; every figure keeps what each query gave.

Shapes: U = distinct items, D = dimensions, Q = queries, T = queries of a tile, C = candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Columns = dict[str, NDArray[np.float64]]
"""Values by name, of shape (Q,), or (resamples, Q)."""
_TILE_QUERIES = 128


class Scoring(Protocol):
    """How one task is scored."""

    @property
    def metric(self) -> str:
        """The task's figure: a key of ``METRICS``."""

    def columns(self, vector_UD: Tensor) -> Columns:
        """What each query gives, by name; ``METRICS`` makes figures of it."""


def _mean(name: str) -> Callable[[Columns], NDArray[np.float64]]:
    return lambda columns: np.asarray(columns[name].mean(axis=-1))


def spearman(columns: Columns) -> NDArray[np.float64]:
    """Correlation of the ranks of ``cosine`` and ``score``, equal values sharing their mean rank.

    0 where all of one are equal, as those of a collapsed model are: they tell nothing of the other.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(columns[name], axis=-1) for name in ("cosine", "score")]
    first, second = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    both = np.asarray((first * second).sum(axis=-1))
    spread = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    return np.asarray(np.divide(both, spread, out=np.zeros_like(both), where=spread > 0))


METRICS: dict[str, Callable[[Columns], NDArray[np.float64]]] = {
    "hit@1": _mean("hit@1"),
    "hit@1_strict": _mean("hit@1_strict"),
    "ndcg_linear@5": _mean("ndcg_linear@5"),
    "spearman": spearman,
}
"""Figures by name: of columns (..., Q) -> (...)."""


def check_vectors(vector_UD: Tensor) -> None:
    """Refuse vectors that cannot be compared.

    Raises:
        ValueError: where some hold NaN or infinity.
    """
    bad = (~torch.isfinite(vector_UD).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"the model gives NaN or infinity for {len(bad)} of {len(vector_UD)} items; try --dtype float32"
        )


def _tiles(vector_UD: Tensor, query_Q: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """First query and cosines (T, U) of each tile; of one query, equal items have one cosine, to the last bit."""
    double_UD = torch.nn.functional.normalize(vector_UD.double(), dim=1)
    index_Q = torch.as_tensor(query_Q)
    for start in range(0, len(index_Q), _TILE_QUERIES):
        yield start, double_UD[index_Q[start : start + _TILE_QUERIES]] @ double_UD.T


@dataclass(frozen=True)
class OwnCandidates:
    """Every query has candidates of its own, the first of which is right (MMEB).

    ``hit@1`` as VLM2Vec counts it: the first of the highest cosines wins, so that a tie with the gold is a hit.
    ``hit@1_strict``: a tie with another item is none. A candidate that equals the gold in text and image is the gold.

    Args:
        query_Q: position of each query among the items.
        candidates_QC: positions of its candidates, the gold first.
    """

    query_Q: Sequence[int]
    candidates_QC: Sequence[Sequence[int]]

    @property
    def metric(self) -> str:
        return "hit@1"

    def columns(self, vector_UD: Tensor) -> Columns:
        hit, strict = np.zeros((2, len(self.query_Q)))
        for start, cosine_TU in _tiles(vector_UD, self.query_Q):
            for row, cosine_U in enumerate(cosine_TU, start):
                gold, *others = self.candidates_QC[row]
                different = [other for other in others if other != gold]
                best_other = cosine_U[different].max() if different else -torch.inf
                hit[row] = cosine_U[gold] >= best_other
                strict[row] = cosine_U[gold] > best_other
        return {"hit@1": hit, "hit@1_strict": strict}


@dataclass(frozen=True)
class SharedCandidates:
    """All queries are ranked against the same candidates, of which one or more are right.

    ``hit@1``: the best is right; of equal cosines the first wins. ``hit@1_strict``: every best one is right.

    Args:
        query_Q: position of each query among the items.
        candidates_C: positions of the candidates, each once.
        relevance_Q: position of each right item -> how right it is (above 0), for each query.
        metric: ``hit@1``; or ``ndcg_linear@5``, as MMEB-V2 scores documents: the gain is the relevance, and the ideal
            ranking is of all right items.
    """

    query_Q: Sequence[int]
    candidates_C: Sequence[int]
    relevance_Q: Sequence[dict[int, float]]
    metric: str = "hit@1"

    def columns(self, vector_UD: Tensor) -> Columns:
        found = {name: np.zeros(len(self.query_Q)) for name in ("hit@1", "hit@1_strict", "ndcg_linear@5")}
        candidate_C = torch.as_tensor(self.candidates_C)
        for start, cosine_TU in _tiles(vector_UD, self.query_Q):
            cosine_TC = cosine_TU[:, candidate_C]
            best_T = cosine_TC.max(dim=1).values
            order_TC = cosine_TC.argsort(dim=1, descending=True, stable=True)[:, :5]
            for row, order in enumerate(candidate_C[order_TC].tolist(), start):
                right = self.relevance_Q[row]
                tied = candidate_C[cosine_TC[row - start] == best_T[row - start]].tolist()
                found["hit@1"][row] = order[0] in right
                found["hit@1_strict"][row] = all(item in right for item in tied)
                found["ndcg_linear@5"][row] = _ndcg([right.get(item, 0.0) for item in order], list(right.values()))
        if self.metric != "ndcg_linear@5":
            del found["ndcg_linear@5"]
        return found


def _ndcg(gains: list[float], all_gains: list[float]) -> float:
    ideal = sorted(all_gains, reverse=True)[:5]
    weights = 1 / np.log2(np.arange(2, 7))
    return float(np.dot(gains, weights[: len(gains)]) / np.dot(ideal, weights[: len(ideal)]))


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs that people scored: Spearman's correlation of the cosines with these scores (STS).

    Args:
        first_Q: position of each pair's first item.
        second_Q: position of its second.
        score_Q: what people gave it.
    """

    first_Q: Sequence[int]
    second_Q: Sequence[int]
    score_Q: Sequence[float]

    @property
    def metric(self) -> str:
        return "spearman"

    def columns(self, vector_UD: Tensor) -> Columns:
        double_UD = torch.nn.functional.normalize(vector_UD.double(), dim=1)
        first_Q, second_Q = torch.as_tensor(self.first_Q), torch.as_tensor(self.second_Q)
        cosine_Q = (double_UD[first_Q] * double_UD[second_Q]).sum(dim=1)
        cosine_Q[first_Q == second_Q] = 1.0  # equal sentences tie, which rounding would not let them
        return {"cosine": cosine_Q.numpy(), "score": np.asarray(self.score_Q, dtype=np.float64)}
