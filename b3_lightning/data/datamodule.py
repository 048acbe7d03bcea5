"""``PairsDataModule`` owns the pairs and the mining; callbacks decide when it mines, it knows how."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from b3_lightning.data.collate import PairCollator, PairDataset
from b3_lightning.data.images import ImageCheck, check_images
from b3_lightning.data.pairs import TEXT_AND_IMAGE, Modality, PairSource, PairTable, load_pairs, modality_of
from b3_lightning.data.sampler import EpochBatches
from b3_lightning.data.teacher import VECTOR_SUFFIXES, PairEncoder, check_vectors, student_embed, teacher_embed
from b3_lightning.mining import (
    BatchPlan,
    MinedPlan,
    MiningSettings,
    Processes,
    Stages,
    help_mine,
    mine,
    random_clusters,
)
from b3_lightning.mining.batches import check_batch_size
from b3_lightning.progress import StageProgress
from b3_lightning.types import Embeddings

log = logging.getLogger(__name__)

Sources = str | PairSource | list[str | PairSource]
Miner = Literal["teacher", "student"]


@dataclass(frozen=True)
class _Split:
    pairs: PairTable
    keys: dict[str, Tensor]
    contents: dict[str, list[tuple[str, str]]]


class PairsDataModule(L.LightningDataModule):
    """Pairs in, batches out: mined to be hard, or random.

    Args:
        train_pairs: a file, a dataset folder or hub name, a ``PairSource``, or a list of these.
        val_pairs: the same, for validation.
        test_pairs: the same, for ``test``; ``predict`` embeds them too.
        image_root: folder that image paths are relative to; none may leave it.
        batches: ``b3`` mines, ``random`` is the baseline arm with everything else the same.
        batch_size: of the global batch, all processes together.
        eval_batch_size: rows a process embeds at once without gradients.
        teacher: whose vectors rank negatives: folder or name of a SentenceTransformer, a file of vectors, or
            ``student``: the model in training, whose first epochs then run on random batches.
        plan: folder of a plan mined before; nothing is mined at the start then.
        mining: rank window, cluster size, algorithms.
        cache: folder of the teacher's finished vectors and neighbours; runs that share it share these, and a killed run
            goes on from there. ``cache`` in the run's folder where absent.
        num_workers: processes that read and prepare batches.
        image_check: ``decode`` every image before training, or read only each ``header``.
        seed: of the draw of batches.
    """

    def __init__(
        self,
        train_pairs: Sources | None = None,
        val_pairs: Sources | None = None,
        test_pairs: Sources | None = None,
        image_root: str = ".",
        batches: Literal["b3", "random"] = "b3",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        teacher: str = "student",
        plan: str | None = None,
        mining: MiningSettings = MiningSettings(),  # noqa: B008 - frozen
        cache: str | None = None,
        num_workers: int = 0,
        image_check: ImageCheck = "decode",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = {"train": train_pairs, "val": val_pairs, "test": test_pairs}
        self.image_root = Path(image_root)
        self.batches, self.batch_size, self.eval_batch_size = batches, batch_size, eval_batch_size
        self.teacher, self.plan_folder, self.mining = teacher, plan, mining
        self.cache = cache
        self.num_workers, self.image_check, self.seed = num_workers, image_check, seed
        self.mined: MinedPlan | None = None
        self.before_epoch: list[Callable[[int], None]] = []
        self.after_mining: list[Callable[[MinedPlan | None, MinedPlan, int, float], None]] = []
        self._batch_plan: BatchPlan | None = None
        self._splits: dict[str, _Split] = {}
        self._in_use: dict[str, Any] = {}
        self._resume_from: dict[str, Any] | None = None

    # ---- pairs

    def load(self, *splits: str) -> None:
        """Read and check splits once: files, columns, images, sizes.

        Raises:
            FileNotFoundError: where a file is missing.
            ValueError: on anything wrong with rows, images, batch size or the rank window.
        """
        for name in splits:
            if name in self._splits:
                continue
            sources = self.sources[name]
            if sources is None:
                raise ValueError(f"data.{name}_pairs is not set; give a pairs file, such as --data.{name}_pairs=FILE")
            pairs = load_pairs(sources)
            digests = check_images(pairs.image_paths(), self.image_root, how=self.image_check)
            contents = {side: _contents(pairs, side, digests) for side in ("query", "target")}
            keys = {side: _keys(contents[side]) for side in contents}
            self._splits[name] = _Split(pairs, keys, contents)
        if "train" in splits:
            self._check_training()

    def _check_training(self) -> None:
        pairs = self.pairs("train")
        if self.batches == "b3":
            check_batch_size(self.batch_size, self.mining.cluster_size)
            self.mining.check_fits(len(pairs))
            self.mining.check_tasks(tuple(pairs.task_weights))
        BatchPlan(**self._random_plan())
        if self.plan_folder is not None:
            MinedPlan.load(self.plan_folder).check_rows(len(pairs))
        elif self.batches == "b3" and self.teacher.endswith(VECTOR_SUFFIXES):
            check_vectors(self.teacher, len(pairs))

    def pairs(self, split: str) -> PairTable:
        """The rows of a loaded split."""
        return self._splits[split].pairs

    def modalities(self) -> set[Modality]:
        """What the loaded pairs hold: text, images, both in one item."""
        items = (item for split in self._splits.values() for side in TEXT_AND_IMAGE for item in split.pairs.items(side))
        return {modality_of(item) for item in items}

    def train_texts(self) -> Iterator[str]:
        """Every text of the training pairs, for learning a vocabulary."""
        if "train" not in self._splits:
            raise ValueError(
                "a small embedder learns its vocabulary from the training pairs: set data.train_pairs too, "
                "or name the run's export as model.embedder"
            )
        for side in ("query", "target"):
            yield from (item.text for item in self.pairs("train").items(side) if item.text)

    def setup(self, stage: str) -> None:
        wanted = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["test"]}[stage]
        if stage == "fit" and self.sources["val"] is not None:
            wanted.append("val")
        if self.sources["train"] is not None and "train" not in wanted:
            wanted.append("train")
        self.load(*wanted)
        if stage == "fit" and self.trainer is not None and self.batch_size % self.trainer.world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} must be a multiple of the {self.trainer.world_size} processes"
            )

    # ---- batches

    def _random_plan(self) -> dict[str, Any]:
        pairs = self.pairs("train")
        names = tuple(pairs.task_weights)
        code = {name: task for task, name in enumerate(names)}
        return {
            "clusters": random_clusters(len(pairs)),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "task_N": torch.tensor([code[task] for task in pairs.tasks]),
            "task_names": names,
            "task_weights": pairs.task_weights,
        }

    def total_steps(self) -> int:
        """Optimiser steps of the whole run, without touching a loader."""
        trainer = self._trainer()
        plan = BatchPlan(**self._random_plan())
        per_epoch = trainer.limit_train_batches
        counts = (plan.n_batches(epoch) for epoch in range(max(0, trainer.max_epochs or 0)))
        limited = (min(n, per_epoch) if isinstance(per_epoch, int) else int(n * per_epoch) for n in counts)
        steps = sum(-(-n // trainer.accumulate_grad_batches) for n in limited)
        if trainer.max_steps > 0:
            return min(steps, trainer.max_steps) if steps else trainer.max_steps
        return max(1, steps)

    def train_dataloader(self) -> DataLoader[int]:
        trainer = self._trainer()
        epoch = trainer.current_epoch
        plan = self._plan_of(epoch)
        batches = EpochBatches(plan.epoch(epoch), rank=trainer.global_rank, world_size=trainer.world_size)
        log.info("epoch %d: %d batches, %d rows carried over", epoch, len(batches), len(plan.carried_after(epoch)))
        return self._loader("train", batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[int] | list[Any]:
        return self._loader("val", batch_size=self.eval_batch_size) if "val" in self._splits else []

    def test_dataloader(self) -> DataLoader[int]:
        return self._loader("test", batch_size=self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[int]:
        return self.test_dataloader()

    def _loader(self, split: str, **batching: Any) -> DataLoader[int]:
        rows = self._splits[split]
        preprocess: Any = self._trainer().lightning_module.preprocess
        return DataLoader(
            PairDataset(len(rows.pairs)),
            collate_fn=PairCollator(rows.pairs, rows.keys, self.image_root, preprocess),
            num_workers=self.num_workers,
            **batching,
        )

    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None
        return self.trainer

    # ---- mining

    def _plan_of(self, epoch: int) -> BatchPlan:
        """The plan in use; before an epoch's first batch is the moment to mine, with the weights as they are then."""
        if self._batch_plan is None:
            self._restore_plan()
        if self._batch_plan is None and self.batches == "b3" and self.plan_folder is not None:
            self._use(MinedPlan.load(self.plan_folder), epoch)
        if self._batch_plan is None and self.batches == "b3" and self.teacher != "student":
            self.remine(epoch, miner="teacher")
        if self._batch_plan is None:
            self._batch_plan = BatchPlan(**self._random_plan())
        for mine_if_due in self.before_epoch:
            mine_if_due(epoch)
        return self._batch_plan

    @property
    def plan_epoch(self) -> int | None:
        """The epoch from which on the mined plan is in use; None before the first."""
        epoch: int | None = self._in_use.get("epoch")
        return epoch

    def remine(self, epoch: int, *, miner: Miner) -> MinedPlan:
        """Mine batches that are used from ``epoch`` on; rank 0 makes the plan, every rank reads it."""
        trainer = self._trainer()
        folder = self._plan_folder(epoch)
        before, start = self.mined, time.perf_counter()
        mined = self.mine(miner=miner)
        if mined is not None:
            mined.save(folder)
            shutil.rmtree(self._student_folder(), ignore_errors=True)
        trainer.strategy.barrier("mined")
        mined = MinedPlan.load(folder)
        self._use(mined, epoch)
        seconds = time.perf_counter() - start
        for tell in self.after_mining:
            tell(before, mined, epoch, seconds)
        return mined

    def mine(self, *, miner: Miner = "teacher") -> MinedPlan | None:
        """Embed the training pairs and mine them; all processes share the work, the first returns the plan."""
        train, trainer = self._splits["train"], self._trainer()
        by_student = miner == "student" or self.teacher == "student"
        folder = self._student_folder() if by_student else self._cache_folder()
        processes = Processes(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
        stages = Stages(folder, processes)
        enabled = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with stages.locked(), StageProgress(enabled=enabled) as progress:
            embeddings = self._vectors(by_student, stages, progress)
            about: dict[str, Any] = {
                "settings": self.mining,
                "target_keys": train.keys["target"],
                "query_keys": train.keys["query"],
                "groups": train.pairs.groups,
                "tasks": train.pairs.tasks,
                "stages": stages,
            }
            vector_pair = embeddings.query_ND, embeddings.target_ND
            if not trainer.is_global_zero:
                help_mine(*vector_pair, **about)
                return None
            mined = mine(*vector_pair, **about, batch_size=self.batch_size, progress=progress)
        log.info("mined in %.1f s: %s", sum(mined.seconds.values()), _in_words(mined.summary()))
        return mined

    def _cache_folder(self) -> Path:
        return Path(self.cache) if self.cache is not None else Path(self._trainer().default_root_dir) / "cache"

    def _student_folder(self) -> Path:
        """Its vectors serve one plan only, so what is in here goes when that is saved."""
        return Path(self._trainer().default_root_dir) / "plans" / "unfinished"

    def _use(self, mined: MinedPlan, epoch: int) -> None:
        """Draw batches from ``mined`` from this epoch on; rows that the last plan carried come first."""
        old = self._batch_plan
        carried = old.carried_after(epoch - 1) if old is not None and epoch > 0 else None
        first_epoch = epoch if carried is not None else 0
        self.mined = mined
        self._batch_plan = BatchPlan(
            **self._random_plan() | {"clusters": mined.clusters}, first_epoch=first_epoch, carried=carried
        )
        self._in_use = {"epoch": first_epoch, "carried": [] if carried is None else carried.tolist()}

    def _vectors(self, by_student: bool, stages: Stages, progress: StageProgress) -> Embeddings:
        trainer, train = self._trainer(), self._splits["train"]
        if not by_student and self.teacher.endswith(VECTOR_SUFFIXES):
            return check_vectors(self.teacher, len(train.pairs))
        encoder = PairEncoder(
            train.pairs,
            self.image_root,
            contents=train.contents,
            precision=str(trainer.precision),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            stages=stages,
            progress=progress,
        )
        module: Any = trainer.lightning_module
        if by_student:
            with student_embed(trainer) as embed:
                return encoder.encode(module.embedder, embed)
        teacher = module.load_teacher(self.teacher)
        return encoder.encode(teacher, teacher_embed(teacher, trainer.strategy.root_device))

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """Which plan is in use, so that a resumed run goes on with it."""
        return self._in_use

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict

    def _restore_plan(self) -> None:
        state, self._resume_from = self._resume_from, None
        if not state or self.batches != "b3":
            return
        folder = self._plan_folder(state["epoch"])
        self.mined = MinedPlan.load(folder if (folder / "plan.json").is_file() else self.plan_folder or folder)
        self.mined.check_rows(len(self.pairs("train")))
        self._in_use = state
        self._batch_plan = BatchPlan(
            **self._random_plan() | {"clusters": self.mined.clusters},
            first_epoch=state["epoch"],
            carried=torch.tensor(state["carried"], dtype=torch.int64),
        )

    def _plan_folder(self, epoch: int) -> Path:
        return Path(self._trainer().default_root_dir) / "plans" / f"epoch-{epoch:04d}"


def _in_words(summary: dict[str, float]) -> str:
    hardness = " / ".join(f"{summary[f'hardness_{name}']:.2f}" for name in ("random", "mined", "best"))
    return (
        f"{summary['n_edges']:,.0f} edges, {summary['kept_frac']:.1%} of them inside {summary['n_clusters']:,.0f} "
        f"clusters, {summary['n_fillers']:,.0f} fillers; hardness {hardness} (random / mined / best)"
    )


def _contents(pairs: PairTable, side: str, digests: dict[str, str]) -> list[tuple[str, str]]:
    """Text and image content of every row."""
    return [(item.text, digests[item.image] if item.image else "") for item in pairs.items(side)]


def _keys(contents: list[tuple[str, str]]) -> Tensor:
    """(N,) int64: rows with equal text and image content share a key."""
    codes: dict[tuple[str, str], int] = {}
    return torch.tensor([codes.setdefault(content, len(codes)) for content in contents])
