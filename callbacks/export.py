"""What ``fit`` leaves: a folder that ``SentenceTransformer(folder)`` loads without this package."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger(__name__)


class Export(Callback):
    """Write ``export/`` with the weights of the best checkpoint, or the last ones where none is kept.

    Args:
        description: lines of the model card that say how the model was trained.
    """

    def __init__(self, description: str = "") -> None:
        self.description = description

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = _best_checkpoint(trainer)
        if best is not None:
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            # a checkpoint under LoRA holds what was trained only, so the rest stays as it is
            pl_module.load_state_dict(checkpoint["state_dict"], strict=False)
        folder = Path(trainer.default_root_dir) / "export"
        temporary = folder.with_name(".export.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        embedder: Any = pl_module.embedder
        embedder.save_pretrained(str(temporary), create_model_card=False)
        (temporary / "README.md").write_text(self._card(trainer, best), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        log.info("exported to %s", folder)

    def _card(self, trainer: Trainer, best: str | None) -> str:
        metrics = "\n".join(
            f"| {name} | {float(value):.4f} |"
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith("val/")
        )
        weights = f"best checkpoint `{Path(best).name}`" if best else "the last step"
        return (
            "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
            "tags:\n- b3_lightning\n---\n\n"
            "# Embedding model trained with b3_lightning\n\n"
            f"Weights: {weights}; {trainer.global_step} optimiser steps, {trainer.current_epoch} epochs.\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("THIS_FOLDER")\nvectors = model.encode(["a text"])\n```\n\n'
            f"## Training\n\n```yaml\n{self.description.strip()}\n```\n\n"
            f"## Last validation\n\n| metric | value |\n|---|---|\n{metrics}\n"
        )


def _best_checkpoint(trainer: Trainer) -> str | None:
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.monitor and keeper.best_model_path:
        return str(keeper.best_model_path)
    return None
