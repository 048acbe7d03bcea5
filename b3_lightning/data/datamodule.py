"""``PairsDataModule`` owns the pairs and the mining; callbacks decide when it mines, it knows how."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from b3_lightning.data import checks
from b3_lightning.data.collate import PairCollator, PairDataset, move_batch
from b3_lightning.data.handed import cache_folder, images_check
from b3_lightning.data.images import ImageCheck
from b3_lightning.data.miner import MiningRequest, NewPlan, PairMiner, processes_of
from b3_lightning.data.mixture import Sources, choose, mining_of, place
from b3_lightning.data.pairs import Modality, PairTable, TeacherPrompts, count_negatives, load_pairs
from b3_lightning.data.sampler import Done, EpochBatches, EpochLoader, count_steps, random_batches
from b3_lightning.data.splits import Split
from b3_lightning.data.teacher import check_teacher
from b3_lightning.data.vectors import VECTOR_SUFFIXES, check_vectors
from b3_lightning.mining import BatchPlan, HandOver, MinedPlan, MiningSettings, Processes
from b3_lightning.mining.store import sha256
from b3_lightning.mining.whatif import Questions, TaskAnswer
from b3_lightning.signals import end_by_parent_alone

log = logging.getLogger(__name__)

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""What is read of a dataset that has splits, unless its source says."""


class PairsDataModule(L.LightningDataModule):
    """Pairs in, batches out: mined to be hard, or random.

    Args:
        train_pairs: a file, a dataset folder or hub name, a ``PairSource``, or a list of these.
        val_pairs: the same, for validation; of a dataset with splits, ``validation``, where its source names none.
        test_pairs: the same, for ``test``, the split of that name; ``predict`` embeds them too.
        pairs_root: folder that relative paths of pairs files are relative to.
        tasks: train on these of the tasks of ``train_pairs`` only.
        prompts: put the sources' prompts before their texts.
        image_root: folder that image paths are relative to; none may leave it.
        batches: ``b3`` mines, ``random`` is the baseline arm with everything else the same.
        batch_size: of the global batch, all processes together.
        eval_batch_size: rows a process embeds at once without gradients.
        teacher: whose vectors rank negatives: folder or name of a SentenceTransformer, a file of vectors, or
            ``student``: the model in training, whose first epochs then run on random batches.
        teacher_prompts: what a teacher that is a model reads before the texts; the sources' prompts where absent.
        plan: folder of a plan mined before; nothing is mined at the start then.
        mining: rank window, cluster size, algorithms.
        mined_frac: epoch -> the share of clusters that is kept from then on, the others' rows being dealt at random,
            such as ``{0: 0.0, 2: 0.5, 4: 1.0}``; 1 before the first.
        n_file_negatives: how many of a row's hard negatives in the pairs files (``neg_text``, ``neg_image_path``) are
            trained on, beside those that mining writes; the others are not kept.
        cache: folder of the teacher's finished vectors and neighbours; runs that share it share these, and a killed run
            goes on from there. ``cache`` in the run's folder where absent.
        num_workers: processes that read and prepare batches.
        prefetch_factor: batches that each of them holds ready; torch's 2 where absent.
        pin_memory: hold batches in memory that a GPU copies from while it computes; where there is one, unless set.
        image_check: ``decode`` every image before training, or only its ``header``; each file is read once, to know it.
        seed: of the draw of batches.
    """

    def __init__(
        self,
        train_pairs: Sources | None = None,
        val_pairs: Sources | None = None,
        test_pairs: Sources | None = None,
        pairs_root: str = ".",
        tasks: list[str] | None = None,
        prompts: bool = True,
        image_root: str = ".",
        batches: Literal["b3", "random"] = "b3",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        teacher: str = "student",
        teacher_prompts: TeacherPrompts = TeacherPrompts(),  # noqa: B008 - frozen
        plan: str | None = None,
        mining: MiningSettings = MiningSettings(),  # noqa: B008 - frozen
        mined_frac: dict[int, float] | None = None,
        n_file_negatives: int = 0,
        cache: str | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
        image_check: ImageCheck = "decode",
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {"train": train_pairs, "val": val_pairs, "test": test_pairs}
        self.sources = {
            name: None if sources is None else place(sources, pairs_root, prompts=prompts, split=_SPLITS[name])
            for name, sources in given.items()
        }
        mixture = self.sources["train"] or []
        if mixture:
            self.sources["train"] = choose(mixture, tasks)
        check_teacher(teacher, teacher_prompts)
        self.image_root, self.teacher_prompts = Path(image_root), teacher_prompts
        self.batches, self.batch_size, self.eval_batch_size = batches, batch_size, eval_batch_size
        self.teacher, self.plan_folder, self.mining = teacher, plan, mining_of(mining, mixture, tasks)
        self.mined_frac, self.n_file_negatives, self.cache = mined_frac or {}, n_file_negatives, cache
        checks.check_loading(eval_batch_size, num_workers, prefetch_factor)
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.image_check, self.seed = image_check, seed
        self.mined: MinedPlan | None = None
        self.before_epoch: list[Callable[[int], None]] = []
        self.after_mining: list[Callable[[MinedPlan | None, MinedPlan, int, float], None]] = []
        self._batch_plan: BatchPlan | None = None
        self._splits: dict[str, Split] = {}
        self._checked, self._decided_epoch = False, -1
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
            n_negatives = self.n_file_negatives if name == "train" else 0
            check = images_check(self.trainer, self.cache, name)
            self._splits[name] = Split.read(sources, self.image_root, self.image_check, check, n_negatives)
        if "train" in splits and not self._checked:
            self._check_training()
            self._checked = True  # ``fit`` sets up twice, and a plan's checksums take time

    def _check_training(self) -> None:
        pairs, is_mined = self.pairs("train"), self.batches == "b3"
        if is_mined and self.plan_folder is None:
            self.check_mining()
        checks.check_epochs(BatchPlan(**self._random_plan(), mined_frac=self.mined_frac), self.trainer)
        count_negatives(pairs, self.n_file_negatives)
        if self.plan_folder is not None:
            checks.check_plan(self.plan_folder, pairs, self.fingerprint("train"), self.batch_size if is_mined else None)
        elif is_mined and self.teacher.endswith(VECTOR_SUFFIXES):
            check_vectors(self.teacher, len(pairs))

    def check_mining(self) -> None:
        """Refuse settings with which the training pairs cannot be mined; a plan that is given needs none."""
        checks.check_mining(self.mining, self.pairs("train"), self.batch_size)

    def pairs(self, split: str) -> PairTable:
        """The rows of a loaded split."""
        return self._splits[split].pairs

    def fingerprint(self, split: str) -> str:
        """SHA-256 of all that a loaded split's rows hold."""
        return self._splits[split].fingerprint

    @property
    def n_tasks(self) -> int:
        """How many tasks the training pairs hold; 1 where there are none."""
        return len({source.name for source in self.sources["train"] or []}) or 1

    def modalities(self) -> set[Modality]:
        """What the loaded pairs hold: text, images, both in one item."""
        return set().union(*(split.modalities(self.n_file_negatives) for split in self._splits.values()))

    def train_texts(self) -> Iterator[str] | None:
        """Every text of the training pairs, for learning a vocabulary; None where there are no such pairs."""
        if "train" in self._splits:
            return self.pairs("train").texts()
        sources = self.sources["train"]
        return None if sources is None else load_pairs(sources, n_negatives=0).texts()

    def setup(self, stage: str) -> None:
        wanted = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["test"]}[stage]
        if stage == "fit" and self.sources["val"] is not None:
            wanted.append("val")
        self.load(*wanted)
        if stage == "fit":
            self.mined, self._batch_plan, self._in_use, self._decided_epoch = None, None, {}, -1
        if stage == "fit" and self.trainer is not None and self.batch_size % self.trainer.world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} must be a multiple of the {self.trainer.world_size} processes"
            )

    # ---- batches

    def _random_plan(self) -> dict[str, Any]:
        return random_batches(self.pairs("train"), self.batch_size, self.seed)

    def total_steps(self, checkpoint: dict[str, Any] | None = None) -> int:
        """Optimiser steps of the whole run, without touching a loader; what a checkpoint has done as it counts it."""
        done = Done() if checkpoint is None else Done.of(checkpoint)
        return count_steps(BatchPlan(**self._random_plan()), self._trainer(), done)

    def train_dataloader(self) -> EpochLoader:
        trainer = self._trainer()
        epoch = trainer.current_epoch
        plan = self._plan_of(epoch)
        batches = EpochBatches(plan.epoch(epoch), rank=trainer.global_rank, world_size=trainer.world_size)
        log.info("epoch %d: %d batches, %d rows carried over", epoch, len(batches), len(plan.carried_after(epoch)))
        module: Any = trainer.lightning_module
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        return EpochLoader(
            **self._loading("train", chunks=module.chunks, mined=self.mined, n_file_negatives=self.n_file_negatives),
            batches=batches,
            n_trained=lambda: int(progress.current.processed),
        )

    def val_dataloader(self) -> DataLoader[int] | list[Any]:
        return self._share_loader("val") if "val" in self._splits else []

    def test_dataloader(self) -> DataLoader[int]:
        return self._share_loader("test")

    def predict_dataloader(self) -> DataLoader[int]:
        return self._share_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        module: Any = self._trainer().lightning_module
        return move_batch(batch, device, by_chunk=module.chunks is not None)

    def _share_loader(self, split: str) -> DataLoader[int]:
        """This process's share of the rows, or all where there are fewer than processes: none may have nothing to do.

        The metrics put the shares together, and so does the writer of embeddings; both count a row once.
        """
        trainer, n_rows = self._trainer(), len(self.pairs(split))
        every = trainer.world_size if n_rows >= trainer.world_size else 1
        share = range(trainer.global_rank % every, n_rows, every)
        return DataLoader(**self._loading(split), sampler=share, batch_size=self.eval_batch_size)

    def _loading(self, split: str, **collating: Any) -> dict[str, Any]:
        rows = self._splits[split]
        trainer = self._trainer()
        preprocess: Any = trainer.lightning_module.preprocess
        has_gpu = trainer.strategy.root_device.type == "cuda"
        return {
            "dataset": PairDataset(len(rows.pairs)),
            "collate_fn": PairCollator(rows, self.image_root, preprocess, **collating),
            "num_workers": self.num_workers,
            "prefetch_factor": self.prefetch_factor,
            "pin_memory": has_gpu if self.pin_memory is None else self.pin_memory,
            # a generator of its own: to begin an epoch must not draw from the one that dropout draws from
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": end_by_parent_alone,
        }

    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None
        return self.trainer

    # ---- mining

    def _plan_of(self, epoch: int) -> BatchPlan:
        """The plan in use; before an epoch's first batch is the moment to mine, with the weights as they are then."""
        if self._batch_plan is None:
            self._restore_plan()
        if self._batch_plan is None and self.batches == "b3" and self.plan_folder is not None:
            folder = Path(self.plan_folder).resolve()
            self._use(MinedPlan.load(folder), epoch, folder=str(folder), plan_sha256=sha256(folder / "plan.json"))
        if self._batch_plan is None and self.batches == "b3" and self.teacher != "student":
            with self.ending_at_once():
                plan = self.new_plan(epoch, MiningRequest("teacher"))
                assert plan is not None, "there is none yet that could stay"
                self.take_over(plan, epoch)
        if self._batch_plan is None:
            checks.check_miner(self.batches, self.before_epoch)
            self._batch_plan = BatchPlan(**self._random_plan())
        if epoch > self._decided_epoch:
            for mine_if_due in self.before_epoch:
                mine_if_due(epoch)
            self._decided_epoch = epoch
        return self._batch_plan

    def new_plan(self, epoch: int, request: MiningRequest) -> NewPlan | None:
        """Mine batches to be used from ``epoch`` on; None where the plan in use is what would be mined."""
        return self._miner().new_plan(self.mined_folder(epoch), request, in_use=self._in_use.get("key"))

    def take_over(self, plan: NewPlan, epoch: int) -> None:
        """Draw batches from the plan from ``epoch`` on, and tell of it."""
        before = self.mined
        self._use(plan.mined, epoch, **plan.about)
        for tell in self.after_mining:
            tell(before, plan.mined, epoch, plan.seconds)

    def mine(self, folder: Path) -> MinedPlan | None:
        """Mine the training pairs with the teacher into a folder; all processes share the work, the first has the plan.

        A killed one goes on from what lies in the cache or, of a student, in the folder.
        """
        miner = replace(self._miner(), student_cache=folder / "unfinished")
        return miner.mine_into(folder, MiningRequest("teacher"))

    def what_if(self, questions: Questions) -> list[TaskAnswer] | None:
        """Simulate batches of the training pairs from the teacher's vectors; the first process has the answer."""
        return self._miner().what_if(questions)

    def ending_at_once(self) -> AbstractContextManager[None]:
        """Around all mining: SIGTERM is not kept for a step of the training, which may be hours away."""
        return self._miner().ending_at_once()

    def processes(self) -> Processes:
        """Those that share the mining, and what ``predict`` embeds."""
        return processes_of(self._trainer())

    def _miner(self) -> PairMiner:
        trainer = self._trainer()
        return PairMiner(
            train=self._splits["train"],
            trainer=trainer,
            teacher=self.teacher,
            teacher_prompts=self.teacher_prompts,
            mining=self.mining,
            image_root=self.image_root,
            cache=cache_folder(trainer, self.cache),
            student_cache=Path(trainer.default_root_dir) / "plans" / "unfinished",
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
        )

    def _use(self, mined: MinedPlan, epoch: int, **about: Any) -> None:
        """Draw batches from ``mined`` from this epoch on; rows that the last plan carried come first."""
        old = self._batch_plan
        begun = HandOver() if old is None else old.hand_over(epoch)
        self._in_use = {"begun": begun._asdict(), **about}
        self._draw_from(mined)

    def _draw_from(self, mined: MinedPlan) -> None:
        self.mined = mined
        self._batch_plan = BatchPlan(
            **self._random_plan() | {"clusters": mined.clusters},
            begun=HandOver(**self._in_use["begun"]),
            mined_frac=self.mined_frac,
        )

    # ---- resume

    def _about(self) -> dict[str, Any]:
        """What the batches of a run depend on."""
        return {
            "pairs": self.fingerprint("train"),
            "validation": self.fingerprint("val") if "val" in self._splits else None,
            "task_weights": self.pairs("train").task_weights,
            "batches": self.batches,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "mined_frac": {str(epoch): frac for epoch, frac in self.mined_frac.items()},
            "n_file_negatives": self.n_file_negatives,
            **({"negatives": self._splits["train"].negatives_fingerprint} if self.n_file_negatives else {}),
        }

    def _mines(self) -> dict[str, Any]:
        mining = {f"data.mining.{name}": value for name, value in asdict(self.mining).items()}
        return {"data.teacher": self.teacher, **mining}

    def state_dict(self) -> dict[str, Any]:
        """Which plan is in use and what the batches depend on, so that a resumed run goes on with them."""
        about = {"about": self._about(), "mines": self._mines()}
        return {"plan": self._in_use, "decided_epoch": self._decided_epoch, **about}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict

    def refuse_other_batches(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on from a checkpoint whose batches were drawn from anything else; ValueError names it."""
        checks.refuse_other(self._about(), checkpoint.get(type(self).__qualname__, {}).get("about", {}))

    def _restore_plan(self) -> None:
        state, self._resume_from = self._resume_from, None
        if state is None:
            return
        self._decided_epoch, self._in_use = state["decided_epoch"], state["plan"]
        if not self._in_use:
            return
        mined = checks.load_plan_of(self._in_use, self._trainer().default_root_dir, self.plan_folder)
        checks.tell_other_mining(self._mines(), state)
        mined.check_rows(len(self.pairs("train")), self.fingerprint("train"))
        self._draw_from(mined)

    def mined_folder(self, epoch: int) -> Path:
        """Where the plan lies that is mined before an epoch."""
        return Path(self._trainer().default_root_dir) / "plans" / f"epoch-{epoch:04d}"


def datamodule_of(trainer: L.Trainer) -> PairsDataModule:
    """The trainer's data module, for callbacks that need this one."""
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PairsDataModule):
        raise TypeError(f"a PairsDataModule is needed, not {type(data).__name__}")
    return data
