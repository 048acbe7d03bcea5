"""The registry of suites: how a suite's sets are found and read, which means are taken, what others report.

A new suite is a reader that makes an ``EvalSet`` of a name, and an entry here; its tasks bring their own metric (of
``scoring.METRICS``), so that a suite may mix them, as MMEB-V2 does with hit@1 and NDCG@5.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from b3_lightning.data.mmeb import METAS, TASKS
from b3_lightning.evaluation.mmeb import read_mmeb
from b3_lightning.evaluation.published import MMEB, RETRIEVAL, STS, PublishedRow
from b3_lightning.evaluation.retrieval import read_retrieval
from b3_lightning.evaluation.sets import EvalSet, ReadSettings, discover
from b3_lightning.evaluation.sts import STS_NAMES, read_sts
from b3_lightning.evaluation.visdoc import read_visdoc

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Args:
        does: one line of help.
        read: a set of this name.
        figure: what its figures are, in a title.
        sets: names of its sets, in their order; empty where any file of the layout is one.
        groups: name of a mean -> the tasks that it is taken over, unweighted.
        published: what others report.
        probe: which files show that a set is there, its name filled in.
    """

    name: str
    does: str
    read: Callable[[str, ReadSettings], EvalSet]
    figure: str
    sets: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    published: tuple[PublishedRow, ...] = ()
    probe: str = "{}"

    def choose(self, settings: ReadSettings, wanted: list[str] | None) -> list[str]:
        """Names of the sets to run: those wanted, or all that the folder has.

        Raises:
            FileNotFoundError: where the folder, or any set in it, is not there.
            ValueError: where a wanted name is none of the suite's.
        """
        found = discover(settings.data, self.sets, self.probe)
        unknown = sorted(set(wanted or ()) - set(self.sets or wanted or ()))
        if unknown:
            raise ValueError(f"--tasks {' '.join(unknown)}: no set of {self.name}; they are {', '.join(self.sets)}")
        absent = [name for name in wanted or () if name not in found]
        if absent or not found:
            name = self.probe.format(absent[0] if absent else "NAME")
            looked = f"{name}/test-*.parquet or {name}.parquet (or .jsonl, .csv)"
            names = f"; the sets are {', '.join(self.sets)}" if self.sets and not absent else ""
            raise FileNotFoundError(
                f"{settings.data} has no {' '.join(absent) or f'set of {self.name}'}: looked for {looked}; "
                f"it has {', '.join(found) or 'none'}{names}"
            )
        if wanted:
            return list(dict.fromkeys(wanted))
        if self.sets:
            self._tell_others(settings)
        return found

    def _tell_others(self, settings: ReadSettings) -> None:
        """Name what looks like a set there and is none of the suite's, such as one of a misspelt name."""
        others = [name for name in discover(settings.data, (), self.probe) if name not in self.sets]
        if others:
            log.info("no sets of %s, not scored: %s (its sets: %s)", self.name, _few(others), _few(self.sets))


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])])


def _mmeb_groups() -> dict[str, tuple[str, ...]]:
    by_meta = {str(meta): tuple(task.name for task in TASKS if task.meta == meta) for meta in METAS}
    by_split = {split: tuple(task.name for task in TASKS if task.split == split) for split in ("IND", "OOD")}
    return {**by_meta, **by_split, "all": tuple(task.name for task in TASKS)}


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "mmeb", "MMEB's 36 image tasks (TIGER-Lab/MMEB-eval): precision@1", read_mmeb, "precision@1",
            tuple(task.name for task in TASKS), _mmeb_groups(), MMEB,
        ),
        Suite(
            "retrieval", "captions and images, both ways (Flickr30K, COCO, Urban1k layout): recall@1", read_retrieval,
            "recall@1", published=RETRIEVAL,
        ),
        Suite(
            "sts", "similarity of sentences (STS12-16, STSb, SICK-R): Spearman", read_sts, "Spearman x 100", STS_NAMES,
            {"all": STS_NAMES}, STS,
        ),
        Suite(
            "visdoc", "pages of documents, MMEB-V2's ViDoRe and VisRAG: NDCG@5 with linear gain", read_visdoc,
            "NDCG@5 x 100", probe="{}/queries",
        ),
    )
}  # fmt: skip
"""Every suite by name."""
