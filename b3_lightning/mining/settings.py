"""What a user can set about mining; every field is a key of ``data.mining`` in a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EdgeKind = Literal["mutual", "either"]
CommunityAlgorithm = Literal["louvain", "leiden", "metis", "none"]


@dataclass(frozen=True)
class MiningSettings:
    """How hard negatives become clusters (B3, section 4).

    Args:
        first_rank: ranks below it count as likely false negatives and get no edge (the paper's p).
        n_ranks: how many ranks from ``first_rank`` on are hard negatives (the paper's m).
        cluster_size: rows in a cluster (the paper's K); the batch size must be a multiple of it.
        edges: ``mutual`` keeps i-j where each lies in the other's window (the paper), ``either`` where one does.
        communities: ``louvain`` or ``leiden`` (then cut by KaMinPar inside the communities), ``metis`` (the paper's own
            k-way partition), or ``none`` (KaMinPar on the whole graph).
        resolution: of Louvain and Leiden; above 1 gives smaller communities.
        swap_rounds: at most so many rounds of swaps that raise the share of edges kept inside clusters; 0 leaves the
            clusters as they were cut (the paper's recipe is ``communities: metis`` with 0).
        backend: where mining runs.
        seed: of every random choice; the same seed and settings give the same plan.
        memory_budget_gib: bounds the tile of scores held while neighbours are searched.
    """

    first_rank: int = 30
    n_ranks: int = 100
    cluster_size: int = 32
    edges: EdgeKind = "mutual"
    communities: CommunityAlgorithm = "louvain"
    resolution: float = 1.0
    swap_rounds: int = 30
    backend: Literal["cpu"] = "cpu"
    seed: int = 0
    memory_budget_gib: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("first_rank", 0), ("n_ranks", 1), ("cluster_size", 2), ("swap_rounds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; it must be at least {least}")
        for name, allowed in (
            ("edges", ("mutual", "either")),
            ("communities", ("louvain", "leiden", "metis", "none")),
            ("backend", ("cpu",)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.resolution <= 0 or self.memory_budget_gib <= 0:
            raise ValueError(
                f"resolution={self.resolution} and memory_budget_gib={self.memory_budget_gib} must be above 0"
            )

    @property
    def n_neighbors(self) -> int:
        """W: how many neighbours are kept for every row."""
        return self.first_rank + self.n_ranks

    def check_fits(self, n_rows: int) -> None:
        """Refuse a row count that leaves no full window or no full cluster."""
        if n_rows < self.cluster_size:
            raise ValueError(
                f"{n_rows} rows are fewer than cluster_size={self.cluster_size}; "
                f"set cluster_size to at most {n_rows} or bring more pairs"
            )
        if n_rows <= self.n_neighbors:
            raise ValueError(
                f"{n_rows} rows are too few for the ranks up to first_rank={self.first_rank} + n_ranks={self.n_ranks}: "
                f"more than {self.n_neighbors} rows are needed; lower first_rank and n_ranks"
            )
