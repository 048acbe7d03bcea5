"""LightningCLI with ``mine`` and ``plan`` beside fit and the others."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from b3_lightning import __version__
from b3_lightning.callbacks import (
    Clock,
    EmbeddingWriter,
    Export,
    HardnessMonitor,
    KeepRanks,
    MiningReport,
    Remine,
    Requeue,
    TerminateOnNaN,
)
from b3_lightning.callbacks.requeue import where_to_begin
from b3_lightning.checkpoints import (
    BestCheckpoint,
    CheckedCheckpointIO,
    LastCheckpoint,
    StepCheckpoint,
    existing_checkpoint,
)
from b3_lightning.console import open_console
from b3_lightning.data import PairsDataModule
from b3_lightning.mining.store import check_folder
from b3_lightning.mistakes import (
    Parser,
    check_devices,
    check_monitors,
    check_peers,
    tell_idle,
    tell_interrupted,
    tell_weights,
)
from b3_lightning.model import ContrastiveModule, FullyShardedStrategy
from b3_lightning.model.embedder import SmallEmbedder
from b3_lightning.options import COMMAND
from b3_lightning.reports.outcome import print_outcome, print_scores
from b3_lightning.reports.record import RunRecord
from b3_lightning.reports.wandb_mode import WandbMode, has_wandb_key, is_offline
from b3_lightning.terminal import quieten
from b3_lightning.trainer import LOADING, B3Trainer
from b3_lightning.verbs import TRAINER_COMMANDS, VERBS

DESCRIPTION = "Train embedding models on batches mined to be hard (B3)."
EPILOG = (
    "also (VERB --help says more):\n"
    + "".join(f"  {name:<10}{does}\n" for name, does in VERBS.items())
    + """
start with:
  python -m b3_lightning glyphs --output data/glyphs
  python -m b3_lightning fit --config configs/quickstart.yaml
  python -m b3_lightning fit --help             every setting of a config
"""
)


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives and how it is logged.

    Args:
        dir: the run's folder: config.yaml, metrics.csv, checkpoints, plans, export, wandb.
        project: of W&B.
        group: of W&B; runs to be compared share one. Absent: the folder's name.
        tags: of W&B.
        wandb: ``auto`` is online where a key is set and offline elsewhere.
        checkpoint_every_n_steps: write ``last.ckpt`` also after so many optimiser steps, and not at the end of an epoch
            only; a killed run goes on from there with the batches that were left, to the same losses.
        merge_adapter: export a LoRA model whole, with the adapter put into its weights, and not the adapter alone.
    """

    dir: str = "runs/default"
    project: str = "b3_lightning"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    wandb: WandbMode = "auto"
    checkpoint_every_n_steps: int | None = None
    merge_adapter: bool = False

    def is_offline(self) -> bool:
        """Does W&B stay on this machine?"""
        return is_offline(self.wandb)


class SaveRunConfig(SaveConfigCallback):
    """Give W&B the settings that the run's config.yaml holds."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        settings = yaml.safe_load(self.parser.dump(self.config))
        settings.pop("ckpt_path", None)  # of one start alone, as in config.yaml
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(settings)


class B3CLI(LightningCLI):
    """Adds ``run`` and ``remine`` to the settings, loggers and callbacks to the trainer, and checks before a run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "mine": {"model", "datamodule"}, "plan": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunSettings, "run")
        parser.add_lightning_class_args(Remine, "remine")
        parser.add_lightning_class_args(HardnessMonitor, "hardness")
        parser.add_lightning_class_args(MiningReport, "report")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        listing: Any = parser._subcommands_action
        for listed in listing._choices_actions:
            listed.help = TRAINER_COMMANDS[listed.dest]  # Lightning's own end in the middle of a sentence

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # Lightning's table of them; ours is printed after
        return parser

    def before_instantiate_classes(self) -> None:
        unused = self.subcommand in ("mine", "plan") and self._get(self.config, "data").teacher != "student"
        if self._get(self.config, "model").embedder is None and not unused:
            raise ValueError(
                f"{self.subcommand} needs model.embedder: --model.embedder=PATH_OR_NAME, or a small one's sizes, such "
                "as {hidden_sizes: [32, 64]}. Only mine and plan do without, where data.teacher is not the student"
            )

    @property
    def run(self) -> RunSettings:
        return RunSettings(**vars(self._get(self.config_init, "run")))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        given = self._get(self.config_init, "trainer")
        check_devices(given.get("accelerator"), given.get("devices"))
        kwargs.setdefault("default_root_dir", self.run.dir)
        kwargs["plugins"] = [*_listed(given.get("plugins")), CheckedCheckpointIO()]
        if given.get("logger") is None:
            kwargs["logger"] = self._loggers()
        callbacks = _listed(given.get("callbacks"))
        if self.subcommand == "fit":
            callbacks += self._checkpoints(callbacks)
            export = Export(self.parser_dump(), self.run.merge_adapter)
            callbacks += [TerminateOnNaN(), Clock(), KeepRanks(), Requeue(), export]
        else:
            kwargs["enable_checkpointing"] = False
        if self.subcommand == "predict":
            callbacks.append(EmbeddingWriter())
        if given.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False  # a line says it: Lightning's table knows the model as one row
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given.get("enable_progress_bar") is not False and not own_bar:
            callbacks.append(RichProgressBar(leave=True))
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, ImportError) as error:  # Lightning's
            raise ValueError(f"the trainer cannot be made as it is set: {error}") from error

    def parser_dump(self) -> str:
        """The run's settings as YAML, without the checkpoint that it goes on from: that is of one start alone."""
        config = self.config.get(str(self.subcommand), self.config).clone()
        config.pop("ckpt_path", None)
        text: str = self._parser(self.subcommand).dump(config, skip_unset=True)
        return text

    def _parse_ckpt_path(self) -> None:
        """Not here: a checkpoint holds no settings, and is read by ``CheckedCheckpointIO`` alone."""

    def _loggers(self) -> list[Any]:
        if self.subcommand in ("mine", "plan", "predict"):
            return []
        run = self.run
        if run.wandb == "online" and not has_wandb_key():
            raise ValueError(
                "run.wandb=online, but there is no key: `wandb login` or set WANDB_API_KEY; "
                "--run.wandb=offline needs none"
            )
        name = "" if self.subcommand == "fit" else str(self.subcommand)
        loggers: list[Any] = [CSVLogger(run.dir, name=name, version="")]
        if run.wandb != "disabled" and self.subcommand == "fit":
            loggers.append(
                WandbLogger(
                    project=run.project,
                    name=Path(run.dir).name,
                    save_dir=run.dir,
                    offline=run.is_offline(),
                    group=run.group or Path(run.dir).name,
                    job_type=self._get(self.config_init, "data").batches,
                    tags=run.tags,
                )
            )
        return loggers

    def _checkpoints(self, others: list[Any]) -> list[ModelCheckpoint]:
        """The best by validation, where there is one, and the last; a run that is interrupted leaves its last too.

        None beside a ModelCheckpoint among the ``others``, which are set, nor where ``enable_checkpointing`` is off.
        """
        given = self._get(self.config_init, "trainer")
        own = any(isinstance(callback, ModelCheckpoint) for callback in others)
        if own or given.get("enable_checkpointing") is False:
            if self.run.checkpoint_every_n_steps is not None:
                why = (
                    "trainer.callbacks holds a ModelCheckpoint of your own: set every_n_train_steps there"
                    if own
                    else "trainer.enable_checkpointing=false: leave one of them out"
                )
                raise ValueError(f"run.checkpoint_every_n_steps is without effect where {why}")
            return []
        folder = Path(self.run.dir) / "checkpoints"
        about: dict[str, Any] = {"dirpath": folder, "filename": "last", "enable_version_counter": False}
        checkpoints: list[ModelCheckpoint] = [
            LastCheckpoint(**about, save_on_exception=True, save_on_train_epoch_end=True)
        ]
        if self.run.checkpoint_every_n_steps is not None:
            checkpoints.append(StepCheckpoint(**about, every_n_train_steps=self.run.checkpoint_every_n_steps))
        if self._get(self.config, "data").get("val_pairs") is None:
            return checkpoints
        best = BestCheckpoint(
            dirpath=folder,
            monitor="val/mrr",
            mode="max",
            filename="best-epoch{epoch:04d}-step{step:06d}",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )
        return [best, *checkpoints]

    def _run_subcommand(self, subcommand: str) -> None:
        self.datamodule.trainer = self.trainer
        if subcommand in ("validate", "test", "predict"):
            self.datamodule.setup(subcommand)  # before other processes start, as ``before_fit`` and the others do
        self._record: RunRecord | None = None
        try:
            super()._run_subcommand(subcommand)
        except (KeyboardInterrupt, SystemExit) as end:
            if self.trainer.is_global_zero:
                tell_interrupted(subcommand, Path(self.run.dir))
                if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's 1 in place of it
                    raise end.__context__ from None
            raise
        except RuntimeError as error:
            check_peers(subcommand, self.trainer, Path(self.run.dir), error)
            raise
        finally:
            if self._record is not None:
                self._record.end(trained=self._trained())

    def _trained(self) -> bool:
        keepers = [one for one in self.trainer.checkpoint_callbacks if type(one) is LastCheckpoint]
        return all(one.trains for one in keepers)  # none in a fast_dev_run

    def before_fit(self) -> None:
        check_folder(Path(self.run.dir))
        if self.trainer.is_global_zero:
            self._record = RunRecord(Path(self.run.dir))
        given = self._get(self.config, "ckpt_path")
        self.config_init["fit"]["ckpt_path"] = where_to_begin(Path(self.run.dir), self.parser_dump(), given)
        self._get(self.config_init, "remine").check(self.datamodule)
        check_monitors(self.trainer, validates=self.datamodule.sources["val"] is not None)
        self.datamodule.setup("fit")
        if self._record is not None:
            tell_idle(self.datamodule, self._get(self.config_init, "remine"))
            self._record.begin(self.parser_dump())

    def before_mine(self) -> None:
        output = Path(self._get(self.config, "output"))
        check_folder(output)
        if (output / "plan.json").exists():
            raise ValueError(f"output={output} holds another plan; name a new folder")
        self._before_looking()

    def before_plan(self) -> None:
        check_folder(Path(self._get(self.config, "output") or self.run.dir))
        self._before_looking()

    def _before_looking(self) -> None:
        self.datamodule.load("train")
        untrained = self.datamodule.teacher == "student" and isinstance(self.model.source, SmallEmbedder)
        if self.trainer.is_global_zero and untrained:
            tell_weights(None, self.model.source, Path(self.run.dir), can_load=False)

    def before_validate(self) -> None:
        given = self._get(self.config, "ckpt_path")
        if given is not None:
            given = existing_checkpoint(given, Path(self.run.dir))
            self.config_init[self.subcommand]["ckpt_path"] = given
        if self.trainer.is_global_zero:
            tell_weights(given, self.model.source, Path(self.run.dir))

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            offline = self.run.is_offline()
            print_outcome(self.trainer, Path(self.run.dir), trained=self._trained(), offline=offline)

    def after_validate(self) -> None:
        self._print_scores("val")

    def after_test(self) -> None:
        self._print_scores("test")

    def _print_scores(self, split: str) -> None:
        if self.trainer.is_global_zero:
            print_scores(self.trainer.callback_metrics, self.model.metrics, split)

    def after_mine(self) -> None:
        if self.trainer.is_global_zero:
            output = self._get(self.config, "output")
            said = f"plan and report: {output}  (report.html)\ntrain on it: --data.plan={shlex.quote(str(output))}"
            open_console().print(said, markup=False, soft_wrap=True)


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the epilog."""


def _cli_of(words: list[str]) -> type[B3CLI]:
    """With the parser of the command that is asked for alone, where one is: those of all take six times as long."""
    known = B3CLI.subcommands()
    if not words or words[0] not in known:
        return B3CLI

    class OneCommand(B3CLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {words[0]: known[words[0]]}

    return OneCommand


def run_lightning(args: list[str] | None) -> None:
    """Run a command that needs a trainer; ``args`` default to those of the process."""
    quieten()
    cli = _cli_of(sys.argv[1:] if args is None else args)
    FullyShardedStrategy.register()
    mode = {"parser_mode": "omegaconf+", "allow_abbrev": False}  # a slip is told, not taken for a longer name
    # DDP starts its other processes with sys.argv, so that must stay as it is on a real command line
    argv = sys.argv
    if args is not None:
        sys.argv = argv[:1]
    try:
        cli(
            ContrastiveModule,
            PairsDataModule,
            trainer_class=B3Trainer,
            parser_class=Parser,
            trainer_defaults=LOADING,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                **mode,
                "prog": COMMAND,
                "version": __version__,
                "formatter_class": _Help,
                "description": DESCRIPTION,
                "epilog": EPILOG,
                **{name: {**mode, "description": TRAINER_COMMANDS[name]} for name in cli.subcommands()},
            },
            args=args,
        )
    finally:
        sys.argv = argv
