"""What a process knows of the images, handed to those that it starts: each would else open every one of them again.

Lightning starts the other processes of ``--trainer.devices=8`` with the same command line once this one has checked
everything. A file in the cache folder tells them what was found: whole or absent, with a checksum, and of use for an
image only where path, size and time of change are still the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from b3_lightning.data.images import CheckImages, ImageCheck, Seen, check_images, examine_images
from b3_lightning.mining.store import write_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handed:
    """The images of one split.

    Args:
        file: where they are told of.
        was_started: this process reads the file; the one that starts others writes it.
    """

    file: Path
    was_started: bool

    @classmethod
    def of(cls, trainer: L.Trainer, file: Path) -> Handed | None:
        """For a trainer that starts its processes itself, or that runs in one of those; None for any other."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not isinstance(environment, LightningEnvironment) or trainer.num_devices == 1:
            return None
        return cls(file, was_started=environment.creates_processes_externally)

    def check_images(
        self, rows_of_path: Mapping[str, list[int]], image_root: Path, *, how: ImageCheck
    ) -> dict[str, str]:
        """The digest of every image, as of ``images.check_images``; those that were handed over are not opened."""
        about = {"image_root": str(image_root.resolve()), "how": how}
        known = self._read(about) if self.was_started and rows_of_path else {}
        seen = examine_images(rows_of_path, image_root, how=how, known=known)
        if not self.was_started and seen:
            self._write(about, seen)
        return {path: one.digest for path, one in seen.items()}

    def _write(self, about: Mapping[str, str], seen: Mapping[str, Seen]) -> None:
        content = json.dumps({"about": about, "images": seen}).encode()
        write_bytes(self.file, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    def _read(self, about: Mapping[str, str]) -> dict[str, Seen]:
        if not self.file.is_file():
            return {}
        checksum, _, content = self.file.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != checksum:
            log.warning("%s is damaged, so this process checks all images itself", self.file)
            return {}
        found: dict[str, Any] = json.loads(content)
        if found["about"] != about:
            return {}
        return {path: Seen(*one) for path, one in found["images"].items()}


def cache_folder(trainer: L.Trainer, cache: str | None) -> Path:
    """The folder that is set, or the one in the run's."""
    return Path(cache) if cache is not None else Path(trainer.default_root_dir) / "cache"


def images_check(trainer: L.Trainer | None, cache: str | None, split: str) -> CheckImages:
    """How a split's images are checked: all of them, but where a process may hand over what it knows."""
    if trainer is None:
        return check_images
    handed = Handed.of(trainer, cache_folder(trainer, cache) / f"images-{split}.json")
    return check_images if handed is None else handed.check_images
