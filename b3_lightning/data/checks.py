"""What is checked before training, so that a mistake is told in the first minute and not in the first epoch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from b3_lightning.data.pairs import Item, PairTable
from b3_lightning.data.sampler import limited
from b3_lightning.mining import MinedPlan, MiningSettings
from b3_lightning.mining.batches import BatchPlan, check_batch_size
from b3_lightning.mining.store import sha256

log = logging.getLogger(__name__)


def check_loading(eval_batch_size: int, num_workers: int, prefetch_factor: int | None) -> None:
    """Refuse numbers that no loader can have, and batches to be prefetched by nobody; ValueError names them."""
    if eval_batch_size < 1:
        raise ValueError(f"data.eval_batch_size={eval_batch_size} must be at least 1")
    if num_workers < 0:
        raise ValueError(f"data.num_workers={num_workers} must not be negative")
    if prefetch_factor is not None and (num_workers == 0 or prefetch_factor < 1):
        raise ValueError(
            f"data.prefetch_factor={prefetch_factor} must be at least 1 and needs workers that prefetch: set "
            f"data.num_workers={num_workers} above 0, or leave it out"
        )


def check_mining(mining: MiningSettings, pairs: PairTable, batch_size: int) -> None:
    """Refuse settings with which these pairs cannot be mined.

    Raises:
        ValueError: where batches are not made of whole clusters, the window does not fit, a setting is without effect,
            or a task is unknown.
    """
    check_batch_size(batch_size, mining.cluster_size)
    mining.check_used()
    mining.check_tasks(tuple(pairs.task_weights))
    mining.check_fits(task_sizes(pairs))


def task_sizes(pairs: PairTable) -> dict[str, tuple[int, int]]:
    """Rows and distinct targets of every task."""
    targets: dict[str, set[Item]] = {}
    for task, target in zip(pairs.tasks, pairs.items("target"), strict=True):
        targets.setdefault(task, set()).add(target)
    return {task: (n_rows, len(targets[task])) for task, n_rows in Counter(pairs.tasks).items()}


def check_epochs(plan: BatchPlan, trainer: Any) -> None:
    """Refuse epochs that repeat the first, that have no batch, where Lightning ends a run, or none validated.

    Args:
        plan: of random batches, which are as many as mined ones.
        trainer: where there is one.

    Raises:
        ValueError: naming the setting to be changed.
    """
    if trainer is not None:
        _check_reloading(trainer)
    n_batches = plan.n_batches(0)
    if n_batches == 0:
        raise ValueError(
            f"an epoch offers fewer rows of any task than data.batch_size={plan.batch_size}, by the weights "
            "of data.train_pairs: raise the weights, or lower data.batch_size"
        )
    if trainer is not None:
        _check_limits(n_batches, trainer)


def _check_limits(n_batches: int, trainer: Any) -> None:
    """Refuse limits that leave nothing to train on, and validations that lie beyond an epoch."""
    n_trained = limited(n_batches, trainer.limit_train_batches)
    nothing = [f"trainer.{name}=0" for name in ("max_epochs", "max_steps") if getattr(trainer, name) == 0]
    if n_trained == 0:
        nothing.append(f"trainer.limit_train_batches={trainer.limit_train_batches} of {n_batches} batches")
    if nothing:
        raise ValueError(f"{' and '.join(nothing)}: that leaves nothing to train on; raise the limit")
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1")
    if trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches={trainer.overfit_batches}: every epoch has batches of its own, so those of the "
            "first would not come again. To overfit, give data.train_pairs a file of few rows"
        )
    if trainer._val_check_time_interval is not None:
        raise ValueError(
            "trainer.val_check_interval is a time, and a run that goes on would validate after other steps: give it a "
            "number of batches, or a part of an epoch"
        )
    every = trainer.val_check_interval
    if isinstance(every, int) and trainer.check_val_every_n_epoch is not None and every > n_trained:
        raise ValueError(
            f"trainer.val_check_interval={every} is more than the {n_trained} batches of an epoch: set it to at "
            f"most {n_trained}, or --trainer.check_val_every_n_epoch=null, which counts batches on over epochs"
        )


def _check_reloading(trainer: Any) -> None:
    """Every epoch has batches of its own, shared out already: Lightning must ask anew, and leave them alone."""
    reload = trainer.reload_dataloaders_every_n_epochs
    if reload != 1 and trainer.max_epochs != 1:
        raise ValueError(
            f"trainer.reload_dataloaders_every_n_epochs={reload} would train later epochs on the batches of the first; "
            "set it to 1"
        )
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler=True would share out batches among processes that are shared out already; "
            "set it to False"
        )


def check_miner(batches: str, before_epoch: Sequence[object]) -> None:
    """Refuse to begin with random batches where they are to be mined and nobody ever will."""
    if batches == "b3" and not before_epoch:
        raise ValueError(
            "data.teacher=student mines with the model in training, so the trainer needs the callback "
            "Remine(enabled=True); or name another teacher, or set data.batches=random"
        )


def check_plan(folder: str, pairs: PairTable, fingerprint: str, batch_size: int | None) -> None:
    """Refuse a plan of other pairs, or one whose clusters do not make whole batches.

    Args:
        fingerprint: of the pairs.
        batch_size: of the batches that are drawn from the plan; None where none are.

    Raises:
        FileNotFoundError, ValueError: where the folder holds no such plan.
    """
    plan = MinedPlan.load(folder)
    plan.check_rows(len(pairs), fingerprint)
    if batch_size is not None:
        try:
            check_batch_size(batch_size, plan.clusters.cluster_size)
        except ValueError as error:
            raise ValueError(f"data.plan={folder}: {error}; or mine a plan with other clusters") from None


def refuse_other(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse to train on from a checkpoint whose batches were drawn from anything else.

    Args:
        here: what the batches depend on.
        there: the same, of the checkpoint.

    Raises:
        ValueError: naming what differs.
    """
    differing = _differing(here, there)
    if differing:
        raise ValueError(
            f"the checkpoint is of a run with other batches; it differs in {differing}. "
            "Give it what it was made with, or start a new run"
        )


def load_plan_of(in_use: Mapping[str, Any], run: str, given: str | None) -> MinedPlan:
    """The plan that a checkpoint goes on with.

    Args:
        in_use: what the checkpoint says of it: its folder, relative to the run's plans unless it was given as
            ``data.plan``, and its checksum.
        run: folder of the run.
        given: ``data.plan`` now: the same plan may lie elsewhere.

    Raises:
        ValueError: where it is not there, or another one is.
    """
    was_given = _was_given(in_use)
    if given is not None and not was_given:
        raise ValueError(
            f"the checkpoint goes on with {in_use['folder']}, which its run mined, so data.plan={given} would be "
            "without effect: leave it out, or begin a new run with it"
        )
    folder = Path(given) if was_given and given is not None else Path(run) / "plans" / in_use["folder"]
    if not (folder / "plan.json").is_file():
        how = "name it as --data.plan" if was_given else "set --run.dir to the run that it is of"
        raise ValueError(f"the checkpoint goes on with a plan that is not in {folder}: {how}")
    plan = MinedPlan.load(folder)
    if sha256(folder / "plan.json") != in_use["plan_sha256"]:
        how = f"name that one ({in_use['folder']}), or begin anew" if was_given else "restore it from a backup"
        raise ValueError(f"{folder} is not the plan that the checkpoint was trained on; {how}")
    return plan


def tell_other_mining(here: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Warn of a run that goes on with settings of mining that its own plan was not mined with.

    One given as ``data.plan`` is compared with the settings at every start, whether a run begins or goes on.

    Args:
        here: what the run would mine with now.
        state: the data's in the checkpoint: ``plan`` is in use, ``mines`` is as ``here``.
    """
    differing = _differing(here, state["mines"])
    if differing and not _was_given(state["plan"]):
        log.warning("%s: counts from the next time on that this run mines; the plan in use stays until then", differing)


def _was_given(in_use: Mapping[str, Any]) -> bool:
    """As ``data.plan``; what a run mined is named relative to its plans."""
    return Path(in_use["folder"]).is_absolute()


def _differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} ({there.get(name)} then, {value} now)" for name, value in here.items() if value != there.get(name)
    )
