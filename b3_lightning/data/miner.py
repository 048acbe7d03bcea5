"""From the training pairs to a plan: vectors of teacher, student or both, then ``mine``, shared over the processes."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch

from b3_lightning.checkpoints import last_checkpoint
from b3_lightning.data.pairs import TeacherPrompts
from b3_lightning.data.splits import Split
from b3_lightning.data.teacher import (
    PairEncoder,
    encoder_fingerprint,
    student_embed,
    teacher_embed,
)
from b3_lightning.data.vectors import VECTOR_SUFFIXES, check_vectors
from b3_lightning.mining import MinedPlan, MiningSettings, Processes, Stages, fingerprint, help_mine, mine
from b3_lightning.mining.plan import LITTLE_OF_THE_WAY
from b3_lightning.mining.store import sha256
from b3_lightning.mining.whatif import Questions, TaskAnswer, what_if
from b3_lightning.progress import StageProgress
from b3_lightning.signals import ends_at_once
from b3_lightning.stopping import noted_signal, started_processes
from b3_lightning.types import Embeddings

log = logging.getLogger(__name__)

Miner = Literal["teacher", "student"]


@dataclass(frozen=True)
class MiningRequest:
    """Whose vectors rank negatives, and what differs from the settings.

    Args:
        miner: ``student`` is the model in training.
        teacher_weight: of the teacher's cosines in those that the student mines with; the rest is the student's.
        first_rank: instead of the one set.
    """

    miner: Miner = "teacher"
    teacher_weight: float = 0.0
    first_rank: int | None = None


class NewPlan(NamedTuple):
    """A plan, what it was mined from and where it lies, and the seconds that it took."""

    mined: MinedPlan
    about: dict[str, str]
    seconds: float


_LEAST_FOUND = 0.01
"""Of the queries, whose own target leads; the weakest teacher that was of use found 6% (docs/results.md, wordnet)."""

_MANY_FILLERS = 0.01


def processes_of(trainer: L.Trainer) -> Processes:
    """Those of a trainer, which share work through files that all see."""
    return Processes(trainer.global_rank, trainer.world_size, trainer.strategy.reduce_boolean_decision)


@dataclass(frozen=True)
class PairMiner:
    """Mines the training pairs as ``PairsDataModule`` is set; every process of the trainer calls it alike."""

    train: Split
    trainer: L.Trainer
    teacher: str
    teacher_prompts: TeacherPrompts
    mining: MiningSettings
    image_root: Path
    cache: Path
    student_cache: Path
    batch_size: int
    eval_batch_size: int
    num_workers: int

    @property
    def processes(self) -> Processes:
        """Those of the trainer."""
        return processes_of(self.trainer)

    def ending_at_once(self) -> AbstractContextManager[None]:
        """While mining, SIGTERM ends this process and those that it started: finished parts are on disk."""
        trainer = self.trainer
        for logger in trainer.loggers:
            logger.save()  # what the file of metrics lacks so far
        last = last_checkpoint(Path(trainer.default_root_dir))
        how = "the same command goes on" if last is None else f"--ckpt_path={last} goes on"
        return ends_at_once(
            f"ended by a signal while mining; what was finished is kept, and {how} from there",
            others=[process.pid for process in started_processes(trainer)],
            tells=trainer.local_rank == 0,
            due=noted_signal(trainer),
        )

    def new_plan(self, folder: Path, request: MiningRequest, *, in_use: str | None) -> NewPlan | None:
        """Mine into a folder; rank 0 makes the plan, every rank reads it. Where one process fails, all do.

        None where ``in_use``, the key of the plan in use, says that nothing changed that it was mined from.
        """
        start = time.perf_counter()
        with self.processes.failing_together():
            key = self.key(request)
            if key == in_use:
                log.info("neither weights nor settings changed, so the plan in use stays")
                return None
            self.mine_into(folder, request)
            about = {"key": key, "folder": folder.name, "plan_sha256": sha256(folder / "plan.json")}
            mined = MinedPlan.load(folder)
            self.processes.barrier()
        return NewPlan(mined, about, time.perf_counter() - start)

    def mine_into(self, folder: Path, request: MiningRequest) -> MinedPlan | None:
        """Mine and write the plan; all processes share the work, the first returns the plan."""
        mined = self._mine(request)
        if mined is not None:
            mined.save(folder)
        self.processes.barrier()
        if mined is not None:
            shutil.rmtree(self.student_cache, ignore_errors=True)  # its vectors serve one plan only
        return mined

    def _mine(self, request: MiningRequest) -> MinedPlan | None:
        trainer = self.trainer
        stages = Stages(self.cache if self._weights(request) == {"teacher"} else self.student_cache, self.processes)
        enabled = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with stages.locked(), StageProgress(enabled=enabled) as progress:
            embeddings = self._vectors(request, stages, progress)
            about: dict[str, Any] = {
                "settings": self._settings(request),
                "stages": stages,
                **self._values(),
            }
            vector_pair = embeddings.query_ND, embeddings.target_ND
            if not trainer.is_global_zero:
                help_mine(*vector_pair, **about)
                return None
            mined = mine(*vector_pair, **about, batch_size=self.batch_size, progress=progress)
            mined = replace(mined, pairs=self.train.fingerprint)
        _tell(mined)
        if self._weights(request) == {"teacher"}:
            _tell_blind_teacher(mined)
        return mined

    def what_if(self, questions: Questions) -> list[TaskAnswer] | None:
        """Embed the pairs and simulate batches; all processes share the embedding, the first has the answer."""
        trainer = self.trainer
        stages = Stages(self.cache, self.processes)
        enabled = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with stages.locked(), StageProgress(enabled=enabled) as progress:
            embeddings = self._vectors(MiningRequest("teacher"), stages, progress)
            if not trainer.is_global_zero:
                return None
            return what_if(
                embeddings.query_ND,
                embeddings.target_ND,
                settings=self.mining,
                questions=questions.of(self.batch_size),
                stages=Stages(self.cache),
                progress=progress,
                **self._values(),
            )

    def _values(self) -> dict[str, Any]:
        """Of every row: what makes it alike to others, and its task."""
        keys, pairs = self.train.keys, self.train.pairs
        return {
            "target_keys": keys["target"],
            "query_keys": keys["query"],
            "groups": pairs.groups,
            "tasks": pairs.tasks,
        }

    def key(self, request: MiningRequest) -> str:
        """Of all that a plan depends on: equal keys, equal plans."""
        weights = self._weights(request)
        student = self._student_fingerprint if "student" in weights else ""
        settings = self._settings(request)
        return fingerprint(
            student=student,
            teacher=[self.teacher, request.teacher_weight, asdict(self.teacher_prompts)]
            if "teacher" in weights
            else [],
            settings=repr(replace(settings, memory_budget_gib=1.0)),
            pairs=self.train.fingerprint,
        )

    @cached_property
    def _student_fingerprint(self) -> str:
        module: Any = self.trainer.lightning_module
        module.sync_buffers()
        return encoder_fingerprint(module.embedder)

    def _settings(self, request: MiningRequest) -> MiningSettings:
        return self.mining if request.first_rank is None else replace(self.mining, first_rank=request.first_rank)

    def _weights(self, request: MiningRequest) -> set[str]:
        if request.miner == "teacher" and self.teacher != "student":
            return {"teacher"}
        if self.teacher != "student" and request.teacher_weight > 0:
            return {"teacher", "student"}
        return {"student"}

    def _vectors(self, request: MiningRequest, stages: Stages, progress: StageProgress) -> Embeddings:
        whose = self._weights(request)
        if whose == {"teacher"}:
            return self._teacher_vectors(stages, progress)
        module: Any = self.trainer.lightning_module
        weights = self._student_fingerprint  # taken before ``student_embed`` collects weights that a strategy cuts
        with student_embed(self.trainer) as embed:
            student = self._encoder(self.train, stages, progress).encode(module.embedder, embed, weights)
        if whose == {"student"}:
            return student
        teacher = self._teacher_vectors(Stages(self.cache, self.processes), progress)
        return mix(teacher, student, request.teacher_weight)

    def _teacher_vectors(self, stages: Stages, progress: StageProgress) -> Embeddings:
        if self.teacher.endswith(VECTOR_SUFFIXES):
            return check_vectors(self.teacher, len(self.train.pairs))
        module: Any = self.trainer.lightning_module
        rows = self.train.with_prompts(self.teacher_prompts)
        teacher = module.load_teacher(self.teacher, rows.modalities())
        embed = teacher_embed(teacher, self.trainer.strategy.root_device)
        return self._encoder(rows, stages, progress).encode(teacher, embed, encoder_fingerprint(teacher))

    def _encoder(self, rows: Split, stages: Stages, progress: StageProgress) -> PairEncoder:
        return PairEncoder(
            rows.pairs,
            self.image_root,
            contents=rows.contents,
            precision=str(self.trainer.precision),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            stages=stages,
            progress=progress,
        )


def mix(teacher: Embeddings, student: Embeddings, teacher_weight: float) -> Embeddings:
    """Vectors whose cosines are the weighted means of the teacher's and the student's.

    Unit vectors scaled by the roots of the weights and put end to end have just these products.
    """
    sides = []
    for theirs_ND, own_ND in ((teacher.query_ND, student.query_ND), (teacher.target_ND, student.target_ND)):
        sides.append(torch.cat([teacher_weight**0.5 * theirs_ND, (1 - teacher_weight) ** 0.5 * own_ND], dim=1))
    return Embeddings.from_arrays(*sides)


def _tell(mined: MinedPlan) -> None:
    """Log what was mined, and warn where that is little more than random batches."""
    summary = mined.summary()
    log.info("mined in %.1f s: %s", summary["seconds"], _in_words(summary))
    way = mined.way_to_hardest()
    if mined.settings.communities == "none" or way is None or (way >= LITTLE_OF_THE_WAY and summary["n_edges"]):
        return
    hardness = mined.hardness
    if hardness["mined"] < hardness["random_masked"]:
        little = f"easier than random ones (hardness {hardness['mined']:.2f} against {hardness['random_masked']:.2f})"
    else:
        little = f"{way:.0%} of the way from random ones to the hardest possible, so little harder than random ones"
    share = summary["n_fillers"] / summary["n_rows"]
    why = f"; {share:.0%} of the rows have nothing hard in their cluster" if share >= _MANY_FILLERS else ""
    log.warning(
        "The batches are %s%s. %s; where a student mines, it may be too weak yet: raise remine.start_epoch",
        little,
        why,
        _how_to_harden(mined),
    )


def _how_to_harden(mined: MinedPlan) -> str:
    """What to set, for batches that are hardly hard: score filters may leave nothing of the window."""
    own = mined.own_settings()
    filters = sorted({name for settings in own for name in settings.score_filters})
    if not filters:
        widen = " or set data.mining.edges=either" if any(settings.edges != "either" for settings in own) else ""
        return f"Raise data.mining.n_ranks{widen}"
    n_ranks = torch.tensor([mined.ranks[name].n_ranks for name in mined.task_names])[mined.task_N]
    left = float(mined.window.hard_NW.sum(dim=1).double().mean())
    return (
        f"{', '.join(f'data.mining.{name}' for name in filters)} and the ranks leave {left:.1f} hard negatives a row "
        f"of {n_ranks.double().mean():.0f}: loosen the filter, or raise data.mining.n_ranks"
    )


def _tell_blind_teacher(mined: MinedPlan) -> None:
    """Warn of tasks whose queries do not find their own targets: most likely the vectors stand in another order."""
    found_N = mined.neighbors.positive_score_N > mined.neighbors.scores_NW[:, 0]
    for task, name in enumerate(mined.task_names):
        own = found_N[mined.task_N == task]
        share = float(own.double().mean())
        if share < max(_LEAST_FOUND, min(3 / len(own), 0.1)):
            log.warning(
                "task %r: the teacher puts the own target first for %.1f%% of the %d queries, as chance would: are its "
                "vectors in the order of the pairs, and is it a model of such data? What it mines is as good as random",
                name, 100 * share, len(own),
            )  # fmt: skip


def _in_words(summary: dict[str, float]) -> str:
    hardness = " / ".join(f"{summary[f'hardness_{name}']:.2f}" for name in ("random_masked", "mined", "best"))
    return (
        f"{summary['n_edges']:,.0f} edges, {summary['kept_frac']:.1%} of them inside {summary['n_clusters']:,.0f} "
        f"clusters, {summary['n_fillers']:,.0f} fillers; hardness {hardness} (random / mined / best)"
        + (f"; {lacking:,.0f} hard negatives lacking" if (lacking := summary["n_negatives_lacking"]) else "")
    )
