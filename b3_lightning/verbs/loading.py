"""The options of a verb that loads a model, and the model that they name."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from b3_lightning.evaluation.encode import EvalModel, device_of
from b3_lightning.model.embedder import LoadSettings
from b3_lightning.terminal import quieten


def add_loading(group: Any) -> None:
    """Options of ``LoadSettings`` that models of every kind have, and the device."""
    group.add_argument("--device", help="such as cpu or cuda:1 (default: this process's GPU, or the CPU)")
    group.add_argument("--dtype", help="of the weights, such as bfloat16 (default: float32)")
    group.add_argument("--revision", help="branch, tag or commit of a model on the hub (default: its main branch)")
    group.add_argument("--trust_remote_code", action="store_true", help="run code of the model's repository: a risk")
    group.add_argument("--pooling", choices=["lasttoken", "mean", "cls"], help="for a plain transformers model")
    group.add_argument("--max_seq_length", type=int, help="tokens a text is cut to (default: the model's own)")


def load_model(given: argparse.Namespace, *, fuse: bool = False) -> EvalModel:
    """``--model``, loaded by those settings that the verb has as options."""
    quieten()
    names = (field.name for field in fields(LoadSettings))
    settings = {name: getattr(given, name) for name in names if hasattr(given, name)}
    return EvalModel.load(given.model, LoadSettings(**settings), device_of(given.device), fuse=fuse)
