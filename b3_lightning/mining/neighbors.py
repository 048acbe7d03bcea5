"""Unit vectors in, the exact nearest targets of every query out.

Candidates come from a bfloat16 product where the machine is fast at it, else from a float32 one, with a proven bound on
the error (candidates.py); they are scored again exactly (exact.py). On one Zen 4 core the float32 product of 57,000 x
384 alone takes 1.3 times as long as all of this, faiss's flat index 1.4 times. Rows with too many candidates, such as
those among many near-duplicates, go on to the float32 product, and what is left, such as rows among exact duplicates,
to the exact product of all their scores.

The answer does not depend on threads, tiles, memory budget, path or device. On a GPU the targets lie there and queries
come tile by tile; where its memory runs out, the tiles are halved.

Shapes: N = queries, M = targets, Q = queries of a tile, D = dimensions, W = neighbours kept, V = candidates of a row.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from b3_lightning.mining.alike import KnownTargets
from b3_lightning.mining.candidates import Bounds, Panels, Shortlist, max_candidates
from b3_lightning.mining.exact import check_unit, missing_keys, order_keys, read_keys, score_candidates, to_grid
from b3_lightning.mining.exclusions import Exclusions
from b3_lightning.mining.precision import float32_sums
from b3_lightning.mining.stages import Stage, Stages, Tensors
from b3_lightning.types import PADDING

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as a stage goes on."""

TILE_ROWS = 4096
"""Queries a call of ``TargetIndex.search`` when the work is cut up; any cut gives the same answer."""


_LEAST_BUDGET_BYTES = 2**24
"""Where tiles for this much do not fit, smaller ones will not either."""


def tiles(n_rows: int) -> Iterator[slice]:
    """The rows in tiles of ``TILE_ROWS``."""
    for start in range(0, n_rows, TILE_ROWS):
        yield slice(start, min(start + TILE_ROWS, n_rows))


def find_neighbors(
    query_ND: Tensor,
    target_MD: Tensor,
    *,
    n_neighbors: int,
    exclude: Sequence[tuple[Tensor | KnownTargets, Tensor]] = (),
    memory_budget_gib: float = 1.0,
    candidate_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    stage: Stage | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank the targets of every query by cosine, ties by id, and keep the best ``n_neighbors``.

    Args:
        query_ND: (N, D), unit norm.
        target_MD: (M, D), unit norm; may lie on disk (torch.from_numpy of a memory map).
        exclude: pairs of keys, (N,) of the queries (or several each, padded with -1) and (M,) of the targets, int64; a
            target is no neighbour of a query that it shares a key with in any pair. A row's own target is kept out by
            its key.
        memory_budget_gib: bounds what the search allocates besides its result, and on a GPU besides the targets.
        candidate_dtype: the type of the first product; by default what this machine is fastest at.
        device: that searches; by default where the targets are. The result lies where the queries are.
        stage: keeps finished tiles and shares them out over processes.
        progress: told ("neighbours", rows done, N).

    Returns:
        (N, W) int64 ids, -1 where a row has fewer eligible targets, and (N, W) float32 scores, -inf there.

    Raises:
        ValueError: on shapes that disagree and on vectors longer than 1 or not finite.
    """
    index = TargetIndex(
        target_MD,
        n_neighbors=n_neighbors,
        target_keys=[target_key_M for _, target_key_M in exclude],
        memory_budget_gib=memory_budget_gib,
        candidate_dtype=candidate_dtype,
        device=device,
    )

    def search(tile: slice) -> tuple[Tensor, Tensor]:
        keys = [query_key_N[tile].to(index.device) for query_key_N, _ in exclude]
        ids_QW, scores_QW = index.search(query_ND[tile].to(index.device), keys)
        return ids_QW.to(query_ND.device), scores_QW.to(query_ND.device)

    return search_in_tiles(search, query_ND, n_neighbors, stage, progress)


def search_in_tiles(
    search: Callable[[slice], tuple[Tensor, Tensor]],
    query_ND: Tensor,
    n_neighbors: int,
    stage: Stage | None,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """(N, W) ids and scores of all queries from those of each tile, which ``stage`` keeps and shares out."""
    n_rows = len(query_ND)
    cut = list(tiles(n_rows))

    def compute(part: int) -> Tensors:
        ids_QW, scores_QW = search(cut[part])
        if progress is not None:
            progress("neighbours", cut[part].stop, n_rows)
        return {"ids_QW": ids_QW, "scores_QW": scores_QW}

    ids_NW = torch.full((n_rows, n_neighbors), PADDING, dtype=torch.int64, device=query_ND.device)
    scores_NW = torch.full((n_rows, n_neighbors), -torch.inf, device=query_ND.device)
    parts = (stage or Stages().stage("neighbours", "")).each(len(cut), compute)
    for tile, part in zip(cut, parts, strict=True):
        ids_NW[tile], scores_NW[tile] = part["ids_QW"], part["scores_QW"]
    return ids_NW, scores_NW


def positive_scores(query_ND: Tensor, target_ND: Tensor) -> Tensor:
    """(N,) float32: the exact score of every query with the target of the same row."""
    parts = [(to_grid(query_ND[tile]) * to_grid(target_ND[tile])).sum(dim=1).float() for tile in tiles(len(query_ND))]
    return torch.cat(parts) if parts else query_ND.new_empty(0)


class TargetIndex:
    """Targets made ready once, to be searched with tiles of queries of any size.

    Args and Raises: as for ``find_neighbors``; ``target_keys`` are the target sides of ``exclude``.
    """

    def __init__(
        self,
        target_MD: Tensor,
        *,
        n_neighbors: int,
        target_keys: Sequence[Tensor] = (),
        memory_budget_gib: float = 1.0,
        candidate_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        for key_M in target_keys:
            if len(key_M) != len(target_MD):
                raise ValueError(f"{len(key_M)} target keys for {len(target_MD)} targets; one each is needed")
        self.device = device or target_MD.device
        self.target_MD = target_MD = target_MD.to(self.device)
        self.n_neighbors = n_neighbors
        self.exclusions = Exclusions([key_M.to(self.device) for key_M in target_keys])
        self._budget_bytes = int(memory_budget_gib * 2**30)
        self._n_key_pairs = len(target_keys)
        dtypes: list[torch.dtype] = []
        if len(target_MD) > max_candidates(n_neighbors):  # else every target is a candidate
            dtypes = [fast_dtype(target_MD.device) if candidate_dtype is None else candidate_dtype, torch.float32]
        else:
            check_unit("target", target_MD, 0)
        self._dtypes = list(dict.fromkeys(dtypes))
        self._tiers: dict[torch.dtype, _Tier] = {}

    def search(self, query_QD: Tensor, query_keys: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """(Q, W) ids and scores of the nearest targets, as ``find_neighbors`` returns them."""
        self._check(query_QD, query_keys)
        while True:
            try:
                with float32_sums():
                    return self._search(query_QD, query_keys)
            except torch.OutOfMemoryError as error:
                self._halve(error)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Make do with half the memory."""
        if self._budget_bytes < 2 * _LEAST_BUDGET_BYTES:
            raise error
        self._budget_bytes //= 2
        self._tiers.clear()
        torch.cuda.empty_cache()
        log.warning("out of memory while searching: tiles are halved, to %d MiB", self._budget_bytes // 2**20)

    def _search(self, query_QD: Tensor, query_keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        best_QW = missing_keys(len(query_QD), self.n_neighbors, query_QD.device)
        left = torch.arange(len(query_QD), device=query_QD.device)
        for dtype in self._dtypes:
            if len(left):
                tier = self._tier(dtype)
                sure = torch.zeros(len(left), dtype=torch.bool, device=left.device)
                for part in torch.arange(len(left), device=left.device).split(tier.plan.tile_rows):
                    rows = left[part]
                    best_QW[rows], sure[part] = tier.search(query_QD[rows], [key_Q[rows] for key_Q in query_keys])
                left = left[~sure]
        if len(left):
            best_QW[left] = self._search_all(query_QD[left], [key_Q[left] for key_Q in query_keys])
        return read_keys(best_QW)

    def _check(self, query_QD: Tensor, query_keys: Sequence[Tensor]) -> None:
        if query_QD.shape[1:] != self.target_MD.shape[1:]:
            raise ValueError(
                f"queries are {tuple(query_QD.shape)} and targets {tuple(self.target_MD.shape)}; "
                "the dimension must agree"
            )
        if [len(key_Q) for key_Q in query_keys] != [len(query_QD)] * self._n_key_pairs:
            raise ValueError(
                f"{len(query_QD)} queries came with keys of lengths {[len(key_Q) for key_Q in query_keys]}; "
                f"{self._n_key_pairs} keys each are needed, as many as target_keys"
            )
        check_unit("query", query_QD, 0)

    def _tier(self, dtype: torch.dtype) -> _Tier:
        if dtype not in self._tiers:
            self._tiers[dtype] = _Tier(self.target_MD, self.exclusions, dtype, self.n_neighbors, self._budget_bytes)
        return self._tiers[dtype]

    def _search_all(self, query_QD: Tensor, query_keys: Sequence[Tensor]) -> Tensor:
        """(Q, W) order keys by the exact scores of all targets."""
        n_dims, device = query_QD.shape[1], query_QD.device
        columns = max(64, min(8192, self._budget_bytes // (4 * 16 * n_dims)))
        tile_rows = max(1, min(1024, self._budget_bytes // (4 * (32 * columns + 8 * n_dims))))
        best = []
        for rows in torch.arange(len(query_QD), device=device).split(tile_rows):
            exact_QD = to_grid(query_QD[rows])
            best_QW = missing_keys(len(rows), self.n_neighbors, device)
            for start in range(0, len(self.target_MD), columns):
                stop = min(start + columns, len(self.target_MD))
                score_QC = (exact_QD @ to_grid(self.target_MD[start:stop]).T).float()
                self.exclusions.blank(score_QC, [key_Q[rows] for key_Q in query_keys], start, stop)
                key_QC = order_keys(score_QC, torch.arange(start, stop, device=device))
                best_QW = torch.cat([best_QW, key_QC], dim=1).topk(self.n_neighbors, dim=1).values
            best.append(best_QW)
        return torch.cat(best)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one search fits its memory budget."""

    tile_rows: int
    columns: int
    cached: bool
    chunk_bytes: int

    @classmethod
    def fit(cls, budget_bytes: int, n_targets: int, n_dims: int, n_neighbors: int, dtype: torch.dtype) -> _Plan:
        """Keep a copy of the targets if it takes less than half; give the rest to the score tile."""
        copy_bytes = n_targets * n_dims * dtype.itemsize
        cached = dtype.itemsize == 2 and copy_bytes <= budget_bytes // 2
        left = (budget_bytes - copy_bytes if cached else budget_bytes) // 4 * 3
        # the panel, once more as the product packs it; scores, their copy by groups, masks; lists of candidates
        column_bytes = n_dims * dtype.itemsize * 2
        cell_bytes = 2 * dtype.itemsize + 2
        row_bytes = 20 * n_dims + 80 * max_candidates(n_neighbors)
        tile_rows, columns = (1024, 65536) if dtype.itemsize == 2 else (2048, 16384)
        columns = min(columns, n_targets)
        while tile_rows * (columns * cell_bytes + row_bytes) + columns * column_bytes > left:
            if tile_rows > 128 or columns <= 1024:
                tile_rows //= 2
            else:
                columns //= 2
            if tile_rows <= 16:
                break
        return cls(tile_rows, columns, cached, budget_bytes // 8)


class _Tier:
    """The search by one type of product: sure of most rows, silent on the others."""

    def __init__(
        self, target_MD: Tensor, exclusions: Exclusions, dtype: torch.dtype, n_neighbors: int, budget_bytes: int
    ) -> None:
        n_dims = target_MD.shape[1]
        self.plan = _Plan.fit(budget_bytes, len(target_MD), n_dims, n_neighbors, dtype)
        self._target_MD, self._exclusions, self._dtype, self._n_neighbors = target_MD, exclusions, dtype, n_neighbors
        self._bounds = Bounds.measure(target_MD, dtype, max(64, min(8192, budget_bytes // (48 * n_dims))))
        self._panels = Panels(
            target_MD, dtype, columns=self.plan.columns, n_neighbors=n_neighbors, cached=self.plan.cached
        )
        self._buffer = torch.empty(0, dtype=dtype, device=target_MD.device)

    def search(self, query_QD: Tensor, query_keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(Q, W) order keys, and (Q,) of which rows they are proven to be right."""
        panels = self._panels
        seen_QD = query_QD.to(self._dtype)
        shortlist = Shortlist(self._bounds.eps(query_QD, self._dtype), self._dtype, self._n_neighbors)
        needed = len(query_QD) * panels.n_groups(0) * panels.group
        if len(self._buffer) < needed:
            self._buffer = seen_QD.new_empty(needed)  # kept: fresh memory costs a third of the product's time
        for start in panels.starts:
            score_QC = panels.scores(seen_QD, start, self._buffer)
            column_of = functools.partial(panels.column_of, start)
            self._exclusions.blank(score_QC, query_keys, start, panels.stop(start), column_of)
            shortlist.add(panels, start, score_QC)
        return self._finish(query_QD, shortlist)

    def _finish(self, query_QD: Tensor, shortlist: Shortlist) -> tuple[Tensor, Tensor]:
        count_Q = shortlist.counts()
        exact_QV = score_candidates(
            to_grid(query_QD),
            self._target_MD,
            shortlist.ids_QV,
            count_Q,
            on_grid=self._bounds.on_grid,
            chunk_bytes=self.plan.chunk_bytes,
        )
        key_QV = order_keys(exact_QV, shortlist.ids_QV)
        sure_Q = shortlist.sure_Q & shortlist.confirms(exact_QV)
        if key_QV.shape[1] < self._n_neighbors:  # then no row is sure
            return missing_keys(len(query_QD), self._n_neighbors, query_QD.device), sure_Q
        return key_QV.topk(self._n_neighbors, dim=1).values, sure_Q


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type of product to choose candidates by: bfloat16 on CPUs that are fast at it, float16 on GPUs."""
    return torch.float16 if device.type == "cuda" else _measured_dtype()


@functools.cache
def _measured_dtype() -> torch.dtype:
    """Time a small product in both types (20 ms); the choice changes speed, never the answer."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        query, target = torch.ones(128, 256, dtype=dtype), torch.ones(2048, 256, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            query @ target.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32
