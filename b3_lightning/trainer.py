"""``B3Trainer``: Lightning's Trainer with ``mine`` and ``plan`` beside fit, over the same processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.constants import default_pg_timeout

from b3_lightning.callbacks import MiningReport
from b3_lightning.console import open_console
from b3_lightning.data import PairsDataModule
from b3_lightning.mining import PATIENCE, MinedPlan
from b3_lightning.mining.precision import tell_slow_bfloat16
from b3_lightning.mining.whatif import Questions
from b3_lightning.model import ContrastiveModule
from b3_lightning.reports.whatif import tell_what_if
from b3_lightning.stopping import StopSignals, StopTogether

LOADING: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False}
"""Every epoch has batches of its own, and they come shared out over the processes."""


def suit(strategy: Strategy) -> None:
    """Set what contrastive training on mined batches needs of several processes, where nothing else was given.

    They wait for each other as long as one may mine. DDP looks in every step for weights that took no part: a BERT's
    pooler never does, and a model of pictures and texts meets batches without pictures.
    """
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = PATIENCE  # type: ignore[attr-defined]
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


class B3Trainer(L.Trainer):
    """Lightning's Trainer, which also mines without training.

    Its defaults let every epoch have batches of its own: ``reload_dataloaders_every_n_epochs=1`` and
    ``use_distributed_sampler=False``, with which ``lightning.Trainer`` trains on mined batches too. Under DDP it looks
    for weights that take no part, and its processes wait for one that mines, unless the strategy says otherwise.
    SIGTERM or Ctrl-C end a training after an optimiser step, in all processes.
    """

    def __init__(self, **kwargs: Any) -> None:
        for name, value in LOADING.items():
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)
        suit(self.strategy)
        self._signal_connector = StopSignals(self)
        self.callbacks.insert(0, StopTogether())  # type: ignore[attr-defined]
        if self.is_global_zero and str(self.precision).startswith("bf16"):
            name = "trainer.precision"
            tell_slow_bfloat16(self.strategy.root_device, f"{name}={self.precision}", f"--{name}=32-true")

    def mine(self, model: ContrastiveModule, datamodule: PairsDataModule, output: str) -> MinedPlan | None:
        """Mine the training pairs into a plan and write it with a report.

        Args:
            output: the folder to write.
        """
        mined: MinedPlan | None = self._launched(self._mine, model, datamodule, output)
        return mined

    def plan(
        self,
        model: ContrastiveModule,
        datamodule: PairsDataModule,
        output: str | None = None,
        questions: Questions = Questions(),  # noqa: B008 - frozen
    ) -> None:
        """Say before training what mining will buy, for which batch size, cluster size and window.

        Args:
            output: folder for what_if.html and what_if.parquet; ``what_if`` in the run's folder where absent.
            questions: batch sizes, cluster sizes and windows to compare.
        """
        folder = Path(output if output is not None else Path(self.default_root_dir) / "what_if")
        self._launched(self._plan, model, datamodule, folder, questions)

    def _launched(self, work: Callable[..., Any], *arguments: Any) -> Any:
        launch = self.strategy.launcher
        return work(*arguments) if launch is None else launch.launch(work, *arguments, trainer=self)

    def _plan(self, model: ContrastiveModule, datamodule: PairsDataModule, folder: Path, questions: Questions) -> None:
        self._prepare(model, datamodule)
        processes = datamodule.processes()
        with datamodule.ending_at_once(), processes.failing_together():
            answers = datamodule.what_if(questions)
            if answers is not None:
                tell_what_if(open_console(), answers, datamodule.batch_size, folder)
            processes.barrier()

    def _mine(self, model: ContrastiveModule, datamodule: PairsDataModule, output: str) -> MinedPlan | None:
        self._prepare(model, datamodule)
        processes = datamodule.processes()
        with datamodule.ending_at_once(), processes.failing_together():
            mined = datamodule.mine(Path(output))
            if mined is not None:
                for callback in self.callbacks:  # type: ignore[attr-defined]
                    if isinstance(callback, MiningReport):
                        callback.write(mined, datamodule, Path(output), f"Mined plan: {Path(output).name}")
            processes.barrier()
        return mined

    def _prepare(self, model: ContrastiveModule, datamodule: PairsDataModule) -> None:
        datamodule.trainer, self.datamodule = self, datamodule
        model.trainer = self
        self.strategy._lightning_module = model
        self.strategy.setup_environment()
        if datamodule.teacher == "student":
            model.configure_model()
            model.to(self.strategy.root_device)
