"""Names of a package that are imported when they are asked for, since what they need takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def attribute(package: str, modules: Mapping[str, str], name: str) -> Any:
    """What a package's ``__getattr__`` returns.

    Args:
        modules: name -> the module that has it.

    Raises:
        AttributeError: where the name is none of these.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)
