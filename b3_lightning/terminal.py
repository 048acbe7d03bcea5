"""What reaches the terminal: this package's log, without the advice and the bars of the libraries beneath."""

from __future__ import annotations

import logging
import sys
import warnings

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar


class _ToStderr(logging.Handler):
    """Looks ``sys.stderr`` up for each line, since a live progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")

    def filter(self, record: logging.LogRecord) -> bool:
        """Only warnings from other processes than the first, as Lightning counts them under any launcher."""
        return record.levelno >= logging.WARNING or rank_zero_only.rank == 0  # type: ignore[attr-defined]


def show_log() -> None:
    """Show what the package logs: once, not from every process."""
    log = logging.getLogger("b3_lightning")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())


def quieten() -> None:
    """Silence advice about choices that this program makes on purpose, and bars that last a moment."""
    for message in (
        ".*does not have many workers",
        ".*is smaller than the logging interval",
        ".*exists and is not empty",
        ".*callbacks used to create the checkpoint need to be provided",
        ".*could not find the monitored key",
        ".*Total length of `list` across ranks is zero",  # no validation pairs
        ".*isinstance.treespec, LeafSpec.",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)
    # Lightning has no switch for its advertisements
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    _hide_loading_bars()


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip:")


def _hide_loading_bars() -> None:
    """Hide transformers' bars of reading and writing weights, and leave those of downloads, which may take hours."""
    downloads_shown = not are_progress_bars_disabled()
    disable_progress_bar()  # hides both
    if downloads_shown:
        enable_progress_bars()
