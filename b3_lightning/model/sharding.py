"""Weights, gradients and optimiser states cut over the processes (FSDP2), for training all weights of a large model.

Between forward passes each process holds its share of every weight; a layer's weights are collected right before they
are needed and dropped right after. So every process must make the same passes in the same order, though its share of a
batch may hold other kinds of input, or fewer chunks: ``EqualPasses`` sees to that in training. Where the processes do
uneven work without gradients - validation, encoding for mining - ``whole_weights`` collects all weights for as long.

Shapes: S = sides of a batch (query, target, negative), K = kinds of input (text, picture, both).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

SIDES = ("query", "target", "negative")
_N_KINDS = 3

Part = tuple[Tensor, dict[str, Any]]
"""Positions in the batch, and features of one kind of input."""


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes, with checkpoints as those of one process.

    Optimiser states are numbered as torch numbers them, and not as Lightning does here, so that a run may go on with
    another strategy or number of processes.
    """

    NAME = "fsdp2"

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @classmethod
    def register(cls) -> None:
        """Make it known as ``trainer.strategy=fsdp2``."""
        StrategyRegistry.register(cls.NAME, cls, description="fully sharded (FSDP2)", override=True)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights on the CPU in the first process, nothing in the others; every process must call it."""
        assert self.lightning_module is not None
        state = _gathered(self.lightning_module.state_dict(), self.is_global_zero)
        return state if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _cut_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As ``lightning_module_state_dict``."""
        state: dict[str, Any] = optimizer.state_dict()
        whole = {index: _gathered(values, self.is_global_zero) for index, values in state["state"].items()}
        return {**state, "state": whole} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            cut = {
                index: {
                    name: _cut_like(value, parameters[index]) if value.shape == parameters[index].shape else value
                    for name, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": cut})


def _gathered(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """One tensor after the other, so that no more than one is whole on the device."""
    whole: dict[str, Tensor] = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        if keep:
            whole[name] = full.detach().cpu()
    return whole


def _cut_like(value: Tensor, own: Any) -> Tensor:
    """This process's share of a tensor that every process has read."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def check_strategy(strategy: Any) -> None:
    """Refuse what cuts up weights in a way that this package does not know of.

    Raises:
        ValueError: for anything but one process, DDP and ``fsdp2``.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy):
        raise ValueError(
            f"trainer.strategy is a {type(strategy).__name__}; it must be auto or ddp, or fsdp2 where weights, "
            "gradients and optimiser states are to be cut over the processes"
        )


def check_shardable(*, small: bool, lora: bool, precision: str, clip_by: str | None) -> None:
    """Refuse to cut what need not or cannot be cut, and what is not known of cut gradients.

    Raises:
        ValueError: for a small embedder, LoRA, float16, and clipping by value.
    """
    if small or lora:
        what = "a small embedder fits in every process" if small else "with model.lora only the adapter is trained"
        raise ValueError(f"trainer.strategy=fsdp2 trains all weights of a loaded model; {what}: use ddp")
    if precision.startswith("16"):
        raise ValueError(f"trainer.strategy=fsdp2 knows no loss scaling for precision={precision}: use bf16-mixed")
    if clip_by not in (None, "norm"):
        raise ValueError(f"trainer.strategy=fsdp2 clips gradients by norm, not gradient_clip_algorithm={clip_by}")


def shard(model: SentenceTransformer, mesh: DeviceMesh, precision: str) -> None:
    """Cut the model over the processes, each layer on its own and the rest together.

    With ``bf16-mixed`` weights are collected in bfloat16; each process's share and the sums of gradients stay float32.
    Scalars, such as CLIP's own temperature, stay whole in every process.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32 if precision.startswith("bf16") else None,
        cast_forward_inputs=False,  # autocast does
    )
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=scalars)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """What is repeated in a model: the members of its outermost lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)


def collect_weights(model: nn.Module) -> None:
    """Make all weights whole in every process until ``drop_weights``: forward passes then need no other process.

    Every process must call it. A model that is not cut is left alone.
    """
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False)
        with torch.inference_mode(False):  # training goes on with the same tensors
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()


def drop_weights(model: nn.Module) -> None:
    """Undo ``collect_weights``."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """All weights in every process, for uneven work without gradients."""
    collect_weights(model)
    try:
        yield
    finally:
        drop_weights(model)


class EqualPasses:
    """Completes a process's share of a batch, so that all processes make the same forward passes in the same order.

    A pass that this process lacks is made on a blank input of the same kind, whose vector is for no position: its
    gradient is zero.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._blanks: dict[int, dict[str, Any]] = {}

    def complete(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The batch with its parts sorted by kind and passes added; every process must call it."""
        sides = [side for side in SIDES if side in batch]
        own_SK = torch.zeros(len(sides), _N_KINDS, dtype=torch.int64, device=device)
        for row, side in enumerate(sides):
            for _, tensors in batch[side]:
                own_SK[row, _kind(tensors)] += 1
        most_SK = own_SK.clone()
        dist.all_reduce(most_SK, op=dist.ReduceOp.MAX)
        missing = (most_SK - own_SK).tolist()
        return {**batch, **{side: self._parts(batch[side], missing[row], device) for row, side in enumerate(sides)}}

    def _parts(self, own: Sequence[Part], missing: Sequence[int], device: torch.device) -> list[Part]:
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        parts: list[Part] = []
        for kind, n_missing in enumerate(missing):
            parts += [part for part in own if _kind(part[1]) == kind]
            parts += [(nowhere, self._blank(kind, device)) for _ in range(n_missing)]
        return parts

    def _blank(self, kind: int, device: torch.device) -> dict[str, Any]:
        if kind not in self._blanks:
            image = Image.new("RGB", (56, 56), "white")
            inputs = {"text": ".", "image": image, ("image", "text"): {"image": image, "text": "."}}
            supported = [self._model.preprocess([item]) for name, item in inputs.items() if self._model.supports(name)]
            (self._blanks[kind], *_) = (tensors for tensors in supported if _kind(tensors) == kind)
        blank: dict[str, Any] = move_data_to_device(dict(self._blanks[kind]), device)
        return blank


def _kind(tensors: Mapping[str, Any]) -> int:
    """Which parts of a model the features run through: words (0), pictures (1) or both (2)."""
    words, pictures = "input_ids" in tensors, "pixel_values" in tensors
    return (2 if words else 1) if pictures else 0


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm over all processes, as ``torch.nn.utils.clip_grad_norm_`` does in one.

    Some are cut over the processes, others are whole, and the same, in each.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    cut = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = torch.nn.utils.get_total_norm(cut) ** 2
    dist.all_reduce(square)
    norm = (square + torch.nn.utils.get_total_norm(whole).to(square) ** 2).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in [*cut, *whole]:
        gradient.mul_(factor.to(gradient))
    return norm
