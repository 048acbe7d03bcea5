"""What the libraries beneath print, without their advice and their bars."""

from __future__ import annotations

import logging
import warnings

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from transformers.utils.logging import disable_progress_bar


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
        ".*It is recommended to use .self.log",  # what is logged is the same in all processes
        ".*functional.all_gather is deprecated",  # Lightning's call
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_of_use)
    _hide_loading_bars()


def _is_of_use(record: logging.LogRecord) -> bool:
    """Neither an advertisement, for which Lightning has no switch, nor what we say in words of a run that is ended."""
    return not record.getMessage().startswith(("💡 Tip:", "An SIGTERMException was raised"))


def _hide_loading_bars() -> None:
    """Hide transformers' bars of reading and writing weights, and leave those of downloads, which may take hours."""
    downloads_shown = not are_progress_bars_disabled()
    disable_progress_bar()  # hides both
    if downloads_shown:
        enable_progress_bars()
