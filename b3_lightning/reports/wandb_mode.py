"""Does W&B send what it is given, or keep it on this machine?"""

from __future__ import annotations

import logging
import netrc
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "online", "offline", "disabled"]
"""``auto`` is online where a key is set and offline elsewhere."""


def is_offline(mode: WandbMode) -> bool:
    """Does W&B stay on this machine?"""
    if mode != "auto":
        return mode == "offline"
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return True
    return not has_wandb_key()


def has_wandb_key() -> bool:
    """Did the user log in, by WANDB_API_KEY or ``wandb login`` (which writes ~/.netrc)?"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except netrc.NetrcParseError as error:
        log.warning("%s cannot be read (%s); no W&B key is taken from it", path, error)
        return False
