"""``OptimSettings`` and the optimiser and schedule that they ask for."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up, then decay to 0.

    Args:
        learning_rate: at its peak.
        weight_decay: of matrices; biases and norms have none.
        warmup_frac: share of all steps that the rate rises.
        schedule: how it falls afterwards.
        fused: step in one kernel, several times faster where the optimiser takes a share of the time that counts
            (large tables of word vectors on a CPU). Not with mixed precision and clipped gradients together.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_frac: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    fused: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"model.optim.learning_rate={self.learning_rate} must be at least 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"model.optim.weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.warmup_frac <= 1:
            raise ValueError(f"model.optim.warmup_frac={self.warmup_frac} is a share of all steps: between 0 and 1")

    def factor(self, step: int, total_steps: int) -> float:
        """The rate at a step as a share of its peak."""
        warmup = max(1, round(self.warmup_frac * total_steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if self.schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0

    def check_precision(self, precision: Precision, clip: float | None) -> None:
        """Refuse what Lightning would refuse at the first step, after hours of mining.

        Args:
            precision: the trainer's plugin.
            clip: its ``gradient_clip_val``.

        Raises:
            ValueError: for weights in float16; for a fused step, mixed precision and clipped gradients together.
        """
        if isinstance(precision, HalfPrecision) and precision.precision == "16-true":
            raise ValueError(
                "trainer.precision=16-true: AdamW's epsilon is 0 in float16, so that weights are no numbers after two "
                "steps, whatever the rate. Set --trainer.precision=bf16-true, or 16-mixed or bf16-mixed"
            )
        if self.fused and clip and isinstance(precision, MixedPrecision):
            raise ValueError(
                f"model.optim.fused=true with --trainer.precision={precision.precision} and gradients clipped at "
                f"{clip:g}: Lightning clips no gradients of a fused optimiser in mixed precision. Leave out "
                "model.optim.fused, or set --trainer.gradient_clip_val=null, or another --trainer.precision"
            )

    def check_end(self, max_epochs: int | None, max_steps: int) -> None:
        """Refuse a schedule over steps that nobody can count.

        Args:
            max_epochs: of the trainer, -1 where nothing but a time ends the run.
            max_steps: of the trainer, -1 where there is no such limit.

        Raises:
            ValueError: where both are without limit, and the rate is to rise or fall.
        """
        if max_epochs == -1 and max_steps == -1 and (self.schedule != "constant" or self.warmup_frac):
            raise ValueError(
                f"model.optim.schedule={self.schedule}, model.optim.warmup_frac={self.warmup_frac:g}: the rate follows "
                "the share of all steps that are done, and neither --trainer.max_epochs nor --trainer.max_steps says "
                "how many there are. Set one of them (max_time may end the run before), or "
                "--model.optim.schedule=constant --model.optim.warmup_frac=0"
            )

    def put_into(self, checkpoint: dict[str, Any], total_steps: int) -> None:
        """Have a run that goes on from a checkpoint do so with these settings; PyTorch would take the checkpoint's."""
        # a checkpoint of weights alone has neither; Lightning says so
        states = checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", [])
        for optimizer, scheduler in zip(*states, strict=True):
            groups = optimizer["param_groups"]
            for name, then in checkpoint.get("b3_optim", {}).items():
                if getattr(self, name) != then:
                    log.warning("model.optim.%s is %s from here on; it was %s", name, getattr(self, name), then)
            rate = self.learning_rate * self.factor(scheduler["last_epoch"], total_steps)
            scheduler |= {"base_lrs": [self.learning_rate] * len(groups), "_last_lr": [rate] * len(groups)}
            for group in groups:
                group |= {"lr": rate, "initial_lr": self.learning_rate, "fused": self.fused or None}
            groups[0]["weight_decay"] = self.weight_decay  # that of the matrices, as ``make`` groups them

    def make(self, embedder: nn.Module, temperature: nn.Module) -> torch.optim.AdamW:
        """AdamW over what is trained of the two, without decay of biases, norms and temperatures."""
        trained = [parameter for parameter in embedder.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        if scalars := [*(p for p in trained if p.ndim == 0), *temperature.parameters()]:
            # never cut over processes, so they cannot be stepped together with what may be
            groups.append({"params": scalars, "weight_decay": 0.0})
        # None where not fused: False would switch foreach off too
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=self.fused or None)
