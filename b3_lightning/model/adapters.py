"""Adapters: kept in float32, and, read from disk, checked to be in the model as they are in their file.

transformers reads a peft adapter that lies beside no base model, but (5.x) not the magnitudes of DoRA, and it only
prints what it could not place. The teachers of the B3 paper are DoRA adapters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft.functional import cast_adapter_dtype
from safetensors.torch import load_file
from torch import nn

_BLOCK = re.compile(r"(?:layers|blocks|layer)\.\d+\..*")


def keep_in_float32(model: nn.Module) -> None:
    """Give adapters float32 weights, whatever their base has, as peft does where it makes the model itself.

    A step of 1e-4 on a weight of 0.1 is below half of bfloat16's last place: such a weight would never move.
    """
    cast_adapter_dtype(model, "default")


@torch.no_grad()
def complete_adapter(model: Any, path: str, revision: str | None = None) -> None:
    """Give the adapter in ``model`` the weights of the file that it was read from, under whatever names.

    Nothing happens to a model without an adapter. Layers are told by what follows ``layers.3`` in their names, since
    versions of transformers differ in what stands before.

    Raises:
        ValueError: where a weight of the file has no place in the model, or the adapter none in the file.
    """
    keep_in_float32(model)  # before the file's weights are copied, which would be rounded
    places = {_key(name): weight for name, weight in model.named_parameters() if _is_of_adapter(name)}
    file = _adapter_file(path, revision) if places else None
    if file is None:
        return
    saved = {_key(name): weight for name, weight in load_file(file).items() if _is_of_adapter(name)}
    amiss = sorted(set(saved) ^ set(places))
    if amiss:
        raise ValueError(
            f"{path}: {len(amiss)} of {len(set(saved) | set(places))} weights of the adapter do not fit, such as "
            f"{amiss[0]}; merge it into its base model with the version of transformers that it was made with"
        )
    for key, weight in saved.items():
        places[key].copy_(weight.reshape(places[key].shape))


def _is_of_adapter(name: str) -> bool:
    return "lora_" in name


def _key(name: str) -> str:
    """A weight's name from its block on, without peft's ``default`` and ``weight``."""
    found = _BLOCK.search(name)
    prefix = "visual." if "visual" in name else ""
    return prefix + re.sub(r"\.default|\.weight", "", found[0] if found else name)


def _adapter_file(path: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        path, "adapter_model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)
