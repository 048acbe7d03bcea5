"""Where commands print: as wide as the terminal, and whole where there is none."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

_WIDE = 10_000
"""Columns of a file or a pipe: nothing is folded or left out there."""


def open_console(**settings: Any) -> Console:
    """Standard output; ``settings`` are rich's."""
    console = Console(**settings)
    if not console.is_terminal and not console.is_jupyter and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console
