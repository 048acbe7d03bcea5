"""``ContrastiveModule``: embeds both sides of a batch, gathers, logs; the loss itself is ``loss.info_nce``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import lightning as L
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from b3_lightning.model.embedder import (
    LoadSettings,
    LoraSettings,
    SmallEmbedder,
    check_supports,
    load_embedder,
    small_vocabulary,
)
from b3_lightning.model.loss import gather_rows, info_nce, same_key
from b3_lightning.model.metrics import RetrievalMetrics


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up, then decay to 0.

    Args:
        learning_rate: at its peak.
        weight_decay: of matrices; biases and norms have none.
        warmup_frac: share of all steps that the rate rises.
        schedule: how it falls afterwards.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_frac: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"

    def factor(self, step: int, total_steps: int) -> float:
        """The rate at a step as a share of its peak."""
        warmup = max(1, round(self.warmup_frac * total_steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if self.schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0


class ContrastiveModule(L.LightningModule):
    """Train an embedder with InfoNCE over the global batch.

    Args:
        embedder: folder or name of a SentenceTransformer or transformers model, or a small architecture to build.
        load: how a folder or name is loaded.
        lora: train an adapter instead of all weights.
        temperature: of InfoNCE (B3 trains at 0.02).
        symmetric: add the loss of targets against queries.
        optim: optimiser and schedule.
    """

    def __init__(
        self,
        embedder: str | SmallEmbedder,
        load: LoadSettings = LoadSettings(),  # noqa: B008 - frozen
        lora: LoraSettings | None = None,
        temperature: float = 0.02,
        symmetric: bool = False,
        optim: OptimSettings = OptimSettings(),
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        self.source, self.load, self.lora = embedder, load, lora
        self.temperature, self.symmetric, self.optim = temperature, symmetric, optim
        self.metrics = RetrievalMetrics()

    @property
    def embedder(self) -> SentenceTransformer:
        """The model, there from ``configure_model`` on."""
        return cast(SentenceTransformer, self._modules["model"])

    def configure_model(self) -> None:
        if "model" in self._modules:
            return
        if isinstance(self.source, SmallEmbedder):
            self.model = self.source.build(self.trainer.datamodule.train_texts())  # type: ignore[attr-defined]
        else:
            self.model = load_embedder(self.source, self.load, self.lora)
        name = self.source if isinstance(self.source, str) else type(self.source).__name__
        check_supports(self.model, f"model.embedder={name}", self._modalities())
        self.model.train()  # what is loaded comes in evaluation mode: without dropout, with frozen batch statistics

    def load_teacher(self, path: str) -> SentenceTransformer:
        """Load another model the way the student is loaded, without adapter and without checkpointing."""
        teacher = load_embedder(path, replace(self.load, gradient_checkpointing=False), None)
        check_supports(teacher, f"data.teacher={path}", self._modalities())
        return teacher

    def _modalities(self) -> set[Any]:
        return self.trainer.datamodule.modalities()  # type: ignore[attr-defined, no-any-return]

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        """Texts, images or dicts of both -> the embedder's features; for the loader's workers."""
        features: dict[str, Any] = self.embedder.preprocess(inputs)
        return features

    def embed(self, features: Sequence[tuple[Tensor, dict[str, Any]]]) -> Tensor:
        """(positions, tensors) of each kind of input in a batch -> (B, D) float32 unit vectors, in positions' order."""
        vector_PD = torch.cat([self.embedder(dict(tensors))["sentence_embedding"] for _, tensors in features])
        order_P = torch.cat([position_P for position_P, _ in features]).argsort()
        return F.normalize(vector_PD[order_P].float(), dim=1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        query_BD, target_BD = self.embed(batch["query"]), self.embed(batch["target"])
        loss = self._loss(query_BD, target_BD, batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(query_BD))
        self.log("train/learning_rate", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        return loss

    def _loss(self, query_BD: Tensor, target_BD: Tensor, batch: dict[str, Any]) -> Tensor:
        query_key_B, target_key_B = batch["query_key_B"], batch["target_key_B"]
        key_G2 = gather_rows(torch.stack([query_key_B, target_key_B], dim=1))
        ignore_BG = same_key(query_key_B, key_G2[:, 0], target_key_B, key_G2[:, 1])
        loss_of = partial(
            info_nce,
            temperature=self.temperature,
            first_row=self.global_rank * len(query_BD),
            ignore_BG=ignore_BG,
        )
        if not self.symmetric:
            return loss_of(query_BD, gather_rows(target_BD))
        return (loss_of(query_BD, gather_rows(target_BD)) + loss_of(target_BD, gather_rows(query_BD))) / 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        query_BD, target_BD = self.embed(batch["query"]), self.embed(batch["target"])
        keys = {name: batch[name] for name in ("query_key_B", "target_key_B")}
        self.metrics.update(query_BD, target_BD, row_B=batch["row_B"], **keys)
        ignore_BB = same_key(keys["query_key_B"], keys["query_key_B"], keys["target_key_B"], keys["target_key_B"])
        loss = info_nce(query_BD, target_BD, temperature=self.temperature, ignore_BG=ignore_BB)
        self.log(f"{split}/loss", loss, batch_size=len(query_BD), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        shown = ("hit@1", "mrr")
        for name, value in self.metrics.compute().items():
            self.log(f"{split}/{name}", value, prog_bar=name in shown)
        self.metrics.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return {
            "row": batch["row_B"],
            "query": self.embed(batch["query"]),
            "target": self.embed(batch["target"]),
        }

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.optim.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.optim.learning_rate)
        total_steps = self.trainer.datamodule.total_steps()  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["b3_vocabulary"] = small_vocabulary(self.embedder)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vocabulary = checkpoint.get("b3_vocabulary")
        if vocabulary is not None and isinstance(self.source, SmallEmbedder):
            # subwords were learned from the training texts; those of the checkpoint count, whatever pairs are given now
            self.model = self.source.assemble(Tokenizer.from_str(vocabulary)).to(self.device).train()
