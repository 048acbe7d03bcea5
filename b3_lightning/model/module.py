"""``ContrastiveModule``: embeds a batch, gathers it, logs; the loss itself is ``loss.contrastive_loss``.

Shapes: B = rows of this process, N = their places for hard negatives, P = items of a chunk, C = columns that a query is
scored against (positives of all processes, then their hard negatives), D = dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from b3_lightning.checkpoints import begin_validation_anew, check_weights
from b3_lightning.model.contrast import contrast_batch
from b3_lightning.model.distributed import average_gradients, world_size
from b3_lightning.model.embedder import (
    LoadSettings,
    LoraSettings,
    SmallEmbedder,
    check_supports,
    check_trained,
    load_embedder,
    small_vocabulary,
)
from b3_lightning.model.fused import FusedEmbedder
from b3_lightning.model.gradcache import Encode, GradCache, check_chunkable
from b3_lightning.model.loss import LossSettings, Rows, Temperature
from b3_lightning.model.metrics import RetrievalMetrics
from b3_lightning.model.optim import OptimSettings
from b3_lightning.model.sharding import (
    EqualPasses,
    FullyShardedStrategy,
    check_shardable,
    check_strategy,
    clip_gradients,
    collect_weights,
    drop_weights,
    shard,
    whole_weights,
)
from b3_lightning.types import ChunkSettings

log = logging.getLogger(__name__)


class ContrastiveModule(L.LightningModule):
    """Train an embedder with InfoNCE over the global batch.

    Args:
        embedder: folder or name of a SentenceTransformer or transformers model, or a small architecture to build.
            Not needed where nothing but a teacher is asked.
        load: how a folder or name is loaded.
        lora: train an adapter instead of all weights.
        loss: temperature, masks, directions, widths.
        optim: optimiser and schedule.
        chunks: embed the batch in chunks and keep no activations (GradCache): any batch size in the memory of a chunk,
            for a second forward pass. Only the chunk at hand is on the device.
        teacher_load: how a teacher is loaded. Where absent, as the student, but not with its trust and revision, and
            in bfloat16 where the trainer computes in it and ``load`` names no dtype.
        fuse_teacher: a teacher that takes texts and images, but not both in one item (CLIP), gets the sum of the two.
    """

    def __init__(
        self,
        embedder: str | SmallEmbedder | None = None,
        load: LoadSettings = LoadSettings(),  # noqa: B008 - frozen
        lora: LoraSettings | None = None,
        loss: LossSettings = LossSettings(),  # noqa: B008 - frozen
        optim: OptimSettings = OptimSettings(),  # noqa: B008 - frozen
        chunks: ChunkSettings | None = None,
        teacher_load: LoadSettings | None = None,
        fuse_teacher: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.load, self.lora = embedder, load, lora
        self.loss, self.optim, self.chunks = loss, optim, chunks
        self.teacher_load, self.fuse_teacher = teacher_load, fuse_teacher
        self.temperature = Temperature(loss)
        self.metrics = RetrievalMetrics()
        self._cache: GradCache | None = None
        self._passes: EqualPasses | None = None
        self._seed: int | None = None
        self._total_steps: int | None = None
        self._lacks_vocabulary = False
        self._validated = False  # since the last step

    @property
    def embedder(self) -> SentenceTransformer:
        """The model, there from ``configure_model`` on."""
        return cast(SentenceTransformer, self._modules["model"])

    def configure_model(self) -> None:
        if "model" in self._modules:
            return
        strategy = self.trainer.strategy
        check_strategy(strategy)
        if isinstance(strategy, FullyShardedStrategy):
            self._check_shardable()
        if not self.source:
            raise ValueError("model.embedder is not set: name a model's folder or hub name, or a small architecture")
        if isinstance(self.source, SmallEmbedder):
            if self.lora is not None:
                raise ValueError("model.lora adapts a model that exists; a small embedder trains all of its weights")
            texts = self.trainer.datamodule.train_texts()  # type: ignore[attr-defined]
            self._lacks_vocabulary = texts is None
            self.model = self.source.build(texts or ())
        else:
            self.model = load_embedder(self.source, self.load, self.lora)
        name = self.source if isinstance(self.source, str) else type(self.source).__name__
        check_supports(self.model, f"model.embedder={name}", self.trainer.datamodule.modalities())  # type: ignore[attr-defined]
        self.model.train()  # what is loaded comes in evaluation mode: without dropout, with frozen batch statistics
        if self.loss.learn_temperature == "per_task":
            self.temperature = Temperature(self.loss, self.trainer.datamodule.n_tasks)  # type: ignore[attr-defined]
        if self.chunks is not None:
            check_chunkable(self.model)
        n_dims = self.model.get_embedding_dimension()
        if n_dims is not None and max(self.loss.matryoshka_dims, default=0) > n_dims:
            raise ValueError(f"model.loss.matryoshka_dims={self.loss.matryoshka_dims}: {name} has {n_dims} dimensions")
        # Lightning does so after a checkpoint's weights are put in, and would round float64 to what was loaded
        self.trainer.precision_plugin.convert_module(self)
        if isinstance(strategy, FullyShardedStrategy):
            shard(self.model, strategy.device_mesh["data_parallel"], str(self.trainer.precision))
            self._passes = EqualPasses(self.model)

    def _check_shardable(self) -> None:
        trainer = self.trainer
        check_shardable(
            small=isinstance(self.source, SmallEmbedder),
            lora=self.lora is not None,
            precision=str(trainer.precision),
            clip_by=trainer.gradient_clip_algorithm,
        )

    def whole_weights(self) -> AbstractContextManager[None]:
        """All weights in every process, where a strategy cuts them over the processes: for encoding alone."""
        return whole_weights(self.embedder)

    def whole_embedder(self, state: dict[str, Any]) -> SentenceTransformer:
        """Load the embedder anew, for one process alone, with weights of this module's ``state_dict``."""
        assert isinstance(self.source, str)
        model = load_embedder(self.source, replace(self.load, gradient_checkpointing=False), None)
        prefix = "model."
        own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        model.to(next(value.dtype for value in own.values() if value.is_floating_point()))  # that of the precision
        model.load_state_dict(own)
        return model

    def load_teacher(self, path: str, modalities: set[Any]) -> SentenceTransformer | FusedEmbedder:
        """Load another model for items of these kinds, without an adapter to be trained and without checkpointing."""
        load = self.teacher_load or self.load.for_teacher(
            same_model=path == self.source, precision=str(self.trainer.precision)
        )
        loaded = load_embedder(path, replace(load, gradient_checkpointing=False), None)
        teacher = FusedEmbedder(loaded) if self.fuse_teacher else loaded
        check_supports(teacher, f"data.teacher={path}", modalities)
        return teacher

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        """Texts, images or dicts of both -> the embedder's features; for the loader's workers."""
        features: dict[str, Any] = self.embedder.preprocess(inputs)
        return features

    def encode(self, tensors: dict[str, Any]) -> Tensor:
        """Features of one kind of input, on any device -> (P, D) vectors."""
        vector_PD: Tensor = self.embedder(move_data_to_device(dict(tensors), self.device))["sentence_embedding"]
        return vector_PD

    def embed(self, features: Sequence[tuple[Tensor, dict[str, Any]]], encode: Encode | None = None) -> Tensor:
        """(positions, tensors) of each kind of input in a batch -> (B, D) float32 unit vectors, in positions' order."""
        # a pass that is made only because other processes make one is for no position
        vector_PD = torch.cat([(encode or self.encode)(tensors)[: len(position_P)] for position_P, tensors in features])
        order_P = torch.cat([position_P for position_P, _ in features]).argsort()
        return F.normalize(vector_PD[order_P].to(torch.promote_types(vector_PD.dtype, torch.float32)), dim=1)

    def on_train_start(self) -> None:
        n_weights = sum(weight.numel() for weight in self.parameters())
        n_trained = sum(weight.numel() for weight in self.parameters() if weight.requires_grad)
        part = "all" if n_trained == n_weights else f"{n_trained:,} of them"
        log.info("model: %s weights, %s trained", f"{n_weights:,}", part)
        if self.chunks is not None:
            model: Any = self.trainer.strategy.model
            if isinstance(model, DistributedDataParallel):
                # every chunk would be averaged over processes; ``backward`` does it once, for all of them
                model.require_backward_grad_sync = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._validated = False
        # what loggers call the step: after an interrupt in a step that validates, Lightning counts one too many
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        # what dropout draws depends on the step alone, so that a resumed run repeats it; each process draws its own
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**32
        step = (self._seed * 10_007 + self.current_epoch) * 1_000_003 + batch_idx
        torch.manual_seed((step * 65_537 + self.global_rank) % 2**63)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        self.temperature.keep_in_range()
        if self._passes is not None:
            batch = self._passes.complete(batch, self.device)
        self._cache = None if self.chunks is None else GradCache(self.encode)
        encode = None if self._cache is None else self._cache.encode
        query_BD, target_BD = self.embed(batch["query"], encode), self.embed(batch["target"], encode)
        negative_ND = self._embed_negatives(batch, encode, query_BD)
        with torch.autocast(self.device.type, enabled=False):  # cosines of bfloat16 would be off by 0.004 / temperature
            temperature = self.temperature(batch["task"])
            loss, contrast = contrast_batch(
                query_BD,
                target_BD,
                negative_ND,
                batch,
                settings=self.loss,
                temperature=temperature,
                rank=self.global_rank,
            )
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(query_BD), sync_dist=True)
        self.log("train/learning_rate", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        if isinstance(temperature, Tensor):
            self.log("train/temperature", temperature.detach())
        return {"loss": loss, "contrast": contrast}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)
        if self._cache is not None:
            self._cache.backward(self.trainer.precision_plugin.forward_context)
        if self._passes is not None:
            # those of cut weights come averaged
            average_gradients(parameter for parameter in self.parameters() if not isinstance(parameter, DTensor))
        elif self._cache is not None:
            average_gradients(self.parameters())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self._passes is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_gradients(self.parameters(), gradient_clip_val)

    def _embed_negatives(self, batch: dict[str, Any], encode: Encode | None, query_BD: Tensor) -> Tensor | None:
        if "negative" not in batch:
            return None
        features = batch["negative"]
        place_ND = query_BD.new_zeros(len(batch["negative_row_N"]), query_BD.shape[1])
        if not features:
            return place_ND
        there_P = torch.cat([position_P for position_P, _ in features]).sort().values
        return place_ND.index_copy(0, there_P, self.embed(features, encode))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Any]) -> None:
        self.metrics.update(self.embed(batch["query"]), self.embed(batch["target"]), **Rows.of(batch)._asdict())

    def _begin_evaluation(self) -> None:
        if self._lacks_vocabulary:
            raise ValueError(
                "a small embedder learns its vocabulary from the training pairs: set data.train_pairs too, "
                "name the run's export as model.embedder, or its checkpoint as ckpt_path"
            )
        collect_weights(self.embedder)

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation()

    def on_validation_epoch_end(self) -> None:
        drop_weights(self.embedder)
        self._log_metrics("val")
        self._validated = True

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation()

    def on_test_epoch_end(self) -> None:
        drop_weights(self.embedder)
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        shown = ("hit@1", "mrr")
        with torch.no_grad():
            self.metrics.temperature = float(self.temperature())
        for name, value in self.metrics.compute().items():
            self.log(f"{split}/{name}", value, prog_bar=name in shown)
        self.metrics.reset()

    def on_predict_epoch_start(self) -> None:
        self._begin_evaluation()

    def on_predict_epoch_end(self) -> None:
        drop_weights(self.embedder)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return {
            "row": batch["row_B"],
            "query": self.embed(batch["query"]),
            "target": self.embed(batch["target"]),
        }

    def configure_optimizers(self) -> Any:
        check_trained(self.embedder, str(self.trainer.precision))
        self.optim.check_end(self.trainer.max_epochs, self.trainer.max_steps)
        self.optim.check_precision(self.trainer.precision_plugin, self.trainer.gradient_clip_val)
        optimizer = self.optim.make(self.embedder, self.temperature)
        total_steps = self._total_steps or self.trainer.datamodule.total_steps()  # type: ignore[attr-defined]
        self._total_steps = None  # of this fit alone
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["b3_vocabulary"] = small_vocabulary(self.embedder)
        checkpoint["b3_seed"] = self._seed
        checkpoint["b3_validates"] = self.trainer.validating and not self._validated
        checkpoint["b3_optim"] = asdict(self.optim)
        if self.lora is not None:
            frozen = self._frozen()
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training:
            # the model is restored before the data: other pairs should be named before weights of another shape are
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            data.refuse_other_batches(checkpoint)
            # what was done may have been counted otherwise: by other epochs, or gradients of fewer batches added up
            self._total_steps = data.total_steps(checkpoint)
            self.optim.put_into(checkpoint, self._total_steps)
        begin_validation_anew(checkpoint, cut_short=checkpoint.get("b3_validates", False))
        self._seed = checkpoint.get("b3_seed")
        self.prepare_for(checkpoint)

    def prepare_for(self, checkpoint: dict[str, Any]) -> None:
        """Take the shape that a checkpoint's weights have, and complete them with those that it leaves out.

        Raises:
            ValueError: where they are of another model.
        """
        state = checkpoint["state_dict"]
        if self.lora is not None:
            # only what is trained was saved; the rest is as it was loaded
            state |= {name: value for name, value in self.state_dict().items() if name in self._frozen()}
        learned = state.get("temperature.log_scale_T")
        per_task = learned is not None and self.loss.learn_temperature == "per_task"
        if per_task and learned.shape != self.temperature.log_scale_T.shape:
            # of another number of tasks; where it fits, it is kept, since an optimiser may hold it
            self.temperature = Temperature(self.loss, len(learned)).to(self.device)
        vocabulary = checkpoint.get("b3_vocabulary")
        if vocabulary is not None and isinstance(self.source, SmallEmbedder):
            # subwords were learned from the training texts; those of the checkpoint count, whatever pairs are given now
            self._lacks_vocabulary = False
            self.model = self.source.assemble(Tokenizer.from_str(vocabulary)).to(self.device).train()
        check_weights(state, self.state_dict())

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Give every process the first one's buffers: after a step, each has batch statistics of its own."""
        if world_size() > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, src=0)

    def _frozen(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
