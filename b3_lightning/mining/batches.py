"""Clusters in, the global batches of any epoch out, from (seed, epoch) alone.

Clusters are shuffled and combined anew every epoch. A batch holds ``batch_size`` rows of one task, no row twice. Rows
that do not fill a batch are carried: they come first in the next epoch, so nothing is dropped.

Shapes: N = rows, C = clusters, K = cluster size, M = batches of an epoch, B = global batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from b3_lightning.types import PADDING, Clusters, by_epoch


class HandOver(NamedTuple):
    """Where a plan takes over from an older one.

    Args:
        epoch: its first.
        carried: the rows that the older plan left over; they come first.
        offered_N: (N,) int64, how often each row was offered before, carried ones included, in excess of the row of
            its task that was so least often; None where all are alike, as with whole weights.
    """

    epoch: int = 0
    carried: Tensor = torch.empty(0, dtype=torch.int64)
    offered_N: Tensor | None = None


class BatchPlan:
    """The batches of every epoch.

    Args:
        clusters: every row once.
        batch_size: rows in a global batch, B; a multiple of the cluster size.
        seed: of the shuffles.
        task_N: (N,) int64, the task of every row; one task when absent. Clusters hold one task each.
        task_names: by task id, for messages.
        task_weights: how many times an epoch passes over a task, by name; 1 where absent.
        begun: where the plan takes over from an older one. Its passes begin with the clusters whose rows were offered
            least often, as a pass that the older plan had begun is not gone on with.
        mined_frac: epoch -> the share of clusters that is kept from then on; the rows of the others, another share each
            epoch, are dealt at random, and nearly all batches hold either mined or random clusters. 1 before the first.
            It is a share of a pass over the task, mined batches first, and changes where one begins.

    Raises:
        ValueError: where B is no multiple of K, or exceeds the rows of a task, or a share lies outside 0 to 1.
    """

    def __init__(
        self,
        clusters: Clusters,
        *,
        batch_size: int,
        seed: int,
        task_N: Tensor | None = None,
        task_names: Sequence[str] = ("default",),
        task_weights: Mapping[str, float] | None = None,
        begun: HandOver = HandOver(),  # noqa: B008 - immutable
        mined_frac: Mapping[int, float] | None = None,
    ) -> None:
        wrong = {epoch: frac for epoch, frac in (mined_frac or {}).items() if not 0 <= frac <= 1}
        if wrong:
            raise ValueError(f"mined_frac={wrong} must lie between 0 and 1")
        check_batch_size(batch_size, clusters.cluster_size)
        weights = dict(task_weights or {})
        unknown = sorted(set(weights) - set(task_names))
        if unknown:
            raise ValueError(f"weights name unknown tasks {unknown}; the tasks are {list(task_names)}")
        task_N = torch.zeros(clusters.n_rows, dtype=torch.int64) if task_N is None else task_N
        task_C = task_N[clusters.ids_CK[:, 0]]
        self.clusters = clusters
        self.batch_size = batch_size
        self.seed = seed
        self.begun = begun
        self._streams = [
            _TaskStream(
                clusters.ids_CK[task_C == task],
                name=name,
                batch_size=batch_size,
                weight=weights.get(name, 1.0),
                seed=seed * 1_000_003 + task,
                begun=begun._replace(carried=begun.carried[task_N[begun.carried] == task]),
                mined_frac=mined_frac or {},
            )
            for task, name in enumerate(task_names)
        ]

    def n_batches(self, epoch: int) -> int:
        """M of this epoch, by arithmetic: it does not depend on how rows were clustered."""
        return sum(stream.n_batches(epoch) for stream in self._streams)

    def carried_after(self, epoch: int) -> Tensor:
        """The rows of this epoch that filled no batch; they come first in the next."""
        return torch.cat([stream.carried_after(epoch) for stream in self._streams])

    def hand_over(self, epoch: int) -> HandOver:
        """What a plan has to know that takes over at ``epoch``."""
        if epoch == self.begun.epoch:
            return self.begun
        before_N = self.begun.offered_N
        offered_N = torch.zeros(self.clusters.n_rows, dtype=torch.int64) if before_N is None else before_N.clone()
        for stream in self._streams:
            offered_N += torch.bincount(stream.offered_until(epoch), minlength=len(offered_N))
            offered_N[stream.ids] -= offered_N[stream.ids].min()
        return HandOver(epoch, self.carried_after(epoch - 1), offered_N if offered_N.any() else None)

    def epoch(self, epoch: int) -> Tensor:
        """(M, B) int64 row ids, tasks mixed at random."""
        assert epoch >= self.begun.epoch, "this plan takes over later"
        ids_MB = torch.cat([stream.epoch(epoch) for stream in self._streams])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return ids_MB[torch.randperm(len(ids_MB), generator=generator)]


def check_batch_size(batch_size: int, cluster_size: int) -> None:
    """Refuse a batch that is not made of whole clusters."""
    if batch_size < 1 or batch_size % cluster_size:
        below = max(0, batch_size - batch_size % cluster_size)
        near = " or ".join(str(size) for size in (below, below + cluster_size) if size > 0)
        raise ValueError(f"batch_size={batch_size} must be a multiple of cluster_size={cluster_size}; nearest: {near}")


class _TaskStream:
    """One task's endless stream of rows, cut into batches; an epoch is ``weight`` passes over the rows long."""

    def __init__(
        self,
        ids_CK: Tensor,
        *,
        name: str,
        batch_size: int,
        weight: float,
        seed: int,
        begun: HandOver,
        mined_frac: Mapping[int, float],
    ) -> None:
        self.ids = ids_CK[ids_CK != PADDING]
        self.n_rows = len(self.ids)
        if self.n_rows < batch_size:
            raise ValueError(
                f"task {name!r} has {self.n_rows} rows, fewer than batch_size={batch_size}, and a batch holds no row "
                "twice; lower the batch size or leave the task out"
            )
        if weight <= 0:
            raise ValueError(f"the weight of task {name!r} is {weight}; it must be above 0")
        self.ids_CK, self.batch_size, self.weight, self.seed = ids_CK, batch_size, weight, seed
        self.begun, self.mined_frac = begun, mined_frac

    def _offered(self, n_epochs: int) -> int:
        """How many rows the first so many epochs offer."""
        return round(n_epochs * self.weight * self.n_rows)

    def n_batches(self, epoch: int) -> int:
        return self._offered(epoch + 1) // self.batch_size - self._offered(epoch) // self.batch_size

    def epoch(self, epoch: int) -> Tensor:
        before, after = (self._offered(epoch + n) // self.batch_size * self.batch_size for n in (0, 1))
        return self._rows(before, after).view(-1, self.batch_size)

    def carried_after(self, epoch: int) -> Tensor:
        offered = self._offered(epoch + 1)
        return self._rows(offered // self.batch_size * self.batch_size, offered)

    def offered_until(self, epoch: int) -> Tensor:
        """The rows that this plan's epochs before ``epoch`` offer; those carried into it were offered before."""
        return self._rows(self._offered(self.begun.epoch), self._offered(epoch))

    def _rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the stream, counted from epoch 0."""
        origin = self._offered(self.begun.epoch) - len(self.begun.carried)
        parts: list[Tensor] = []
        carried = self.begun.carried
        n_rows, passed = 0, 0
        while n_rows + len(carried) < stop - origin:
            generator = torch.Generator().manual_seed((self.seed + self.begun.epoch) * 7_919 + passed)
            epoch = self.begun.epoch + int(passed / self.weight)
            rows = self._one_pass(carried, self._shuffled(generator, by_epoch(self.mined_frac, epoch, 1.0)))
            full = len(rows) // self.batch_size * self.batch_size
            parts.append(rows[:full])
            carried = rows[full:]
            n_rows += full
            passed += 1
        return torch.cat([*parts, carried])[start - origin : stop - origin]

    def _shuffled(self, generator: torch.Generator, mined_frac: float) -> Tensor:
        """(C, K) the whole clusters in random order, the rows of all but a share of them dealt anew at the end."""
        shuffled_CK = self._whole_CK[torch.randperm(len(self._whole_CK), generator=generator)]
        kept = round(mined_frac * len(shuffled_CK))
        rows = shuffled_CK[kept:].flatten()
        if len(rows):
            shuffled_CK[kept:] = rows[torch.randperm(len(rows), generator=generator)].view(-1, self.ids_CK.shape[1])
        return torch.cat([self._least_offered(shuffled_CK[:kept]), self._least_offered(shuffled_CK[kept:])])

    def _least_offered(self, ids_CK: Tensor) -> Tensor:
        """Those first whose rows were offered least often before this plan."""
        offered_N = self.begun.offered_N
        return ids_CK if offered_N is None else ids_CK[offered_N[ids_CK].sum(dim=1).argsort(stable=True)]

    def _one_pass(self, carried: Tensor, shuffled_CK: Tensor) -> Tensor:
        """Carried rows, then every cluster once.

        The first batch is filled with clusters that share no row with the carried ones; the cluster it has to cut
        gives its other rows to the end, where the padded cluster stands too, so that all other batches are whole
        clusters.
        """
        if len(carried) == 0:
            return torch.cat([shuffled_CK.flatten(), self._partial])
        overlaps = torch.isin(shuffled_CK, carried).any(dim=1)
        first_CK = torch.cat([shuffled_CK[~overlaps], shuffled_CK[overlaps]])
        n_missing = self.batch_size - len(carried)
        whole, cut = divmod(n_missing, self.ids_CK.shape[1])
        split = first_CK[whole : whole + 1].flatten() if cut else carried[:0]
        stream = [carried, first_CK[:whole].flatten(), split[:cut]]
        rest_CK = first_CK[whole + (1 if cut else 0) :]
        stream += [rest_CK.flatten(), split[cut:], self._partial]
        return self._without_repeats(torch.cat(stream), len(carried))

    def _without_repeats(self, stream: Tensor, n_carried: int) -> Tensor:
        """Mend a first batch that met a carried row again (only where a task has hardly more rows than a batch)."""
        head = stream[: self.batch_size]
        repeated = torch.isin(head[n_carried:], head[:n_carried]).nonzero().flatten() + n_carried
        if len(repeated) == 0:
            return stream
        later = torch.arange(self.batch_size, len(stream))
        fresh = later[~torch.isin(stream[later], head)][: len(repeated)]
        mended = stream.clone()
        mended[repeated], mended[fresh] = stream[fresh], stream[repeated]
        return mended

    @cached_property
    def _whole_CK(self) -> Tensor:
        return self.ids_CK[self.ids_CK[:, -1] != PADDING]

    @cached_property
    def _partial(self) -> Tensor:
        rest_K = self.ids_CK[self.ids_CK[:, -1] == PADDING].flatten()
        return rest_K[rest_K != PADDING]


def random_clusters(n_rows: int) -> Clusters:
    """The random arm: every row a cluster of its own, drawn by the very same plan."""
    return Clusters(torch.arange(n_rows)[:, None])
