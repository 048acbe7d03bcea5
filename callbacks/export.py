"""What ``fit`` leaves: a folder that ``SentenceTransformer(folder)`` loads without this package."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn

from b3_lightning.checkpoints import CheckedCheckpointIO
from b3_lightning.model.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)

_MAGNITUDE = "lora_magnitude_vector"
_TAG = "tags:\n- b3_lightning\n"


class Export(Callback):
    """Write ``export/`` with the weights of the best checkpoint, or the last ones where none is kept.

    Args:
        description: lines of the model card that say how the model was trained.
        merge_adapter: put LoRA's weights into the model's own, so that the export loads without peft; else the adapter
            alone is written, and the model it belongs to is named in it.
    """

    def __init__(self, description: str = "", merge_adapter: bool = False) -> None:
        self.description, self.merge_adapter = description, merge_adapter

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = _best_checkpoint(trainer)
        cut = isinstance(trainer.strategy, FullyShardedStrategy)
        last = trainer.strategy.lightning_module_state_dict() if cut and best is None else {}  # from all processes
        if not trainer.is_global_zero:
            return
        checkpoint = {"state_dict": last} if best is None else CheckedCheckpointIO().load_checkpoint(best)
        module: Any = pl_module
        if best is not None and not cut:
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        embedder: Any = module.whole_embedder(checkpoint["state_dict"]) if cut else module.embedder
        folder = Path(trainer.default_root_dir) / "export"
        temporary = folder.with_name(".export.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        if self.merge_adapter:
            merge_adapters(embedder)
        embedder.save_pretrained(str(temporary), create_model_card=False)
        _name_dora_weights(temporary)
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
            f"{_TAG}---\n\n"
            "# Embedding model trained with b3_lightning\n\n"
            f"Weights: {weights}; {trainer.global_step} optimiser steps, {trainer.current_epoch} epochs.\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("THIS_FOLDER")\nvectors = model.encode(["a text"])\n```\n\n'
            f"## Training\n\n```yaml\n{self.description.strip()}\n```\n\n"
            f"## Last validation\n\n| metric | value |\n|---|---|\n{metrics}\n"
        )


def is_export(folder: Path) -> bool:
    """Was the model in this folder trained by a run? Its card says so."""
    card = folder / "README.md"
    return card.is_file() and _TAG in card.read_text(encoding="utf-8")


def merge_adapters(embedder: nn.Module) -> None:
    """Add every LoRA layer's product to the weights beneath it, and take the layer away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(embedder.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(embedder.get_submodule(parent), child, module.get_base_layer())
    for module in embedder.modules():
        if getattr(module, "_hf_peft_config_loaded", False):
            vars(module)["_hf_peft_config_loaded"] = False
            vars(module).pop("peft_config")


def _name_dora_weights(folder: Path) -> None:
    """Name DoRA's magnitudes as transformers looks for them.

    peft writes them without the ending and reads both; transformers (5.23) would start them anew, saying so in passing.
    """
    for path in folder.rglob("adapter_model.safetensors"):
        weights = load_file(path)
        named = {f"{name}.weight" if name.endswith(_MAGNITUDE) else name: value for name, value in weights.items()}
        save_file(named, path, metadata={"format": "pt"})


def _best_checkpoint(trainer: Trainer) -> str | None:
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.monitor and keeper.best_model_path:
        return str(keeper.best_model_path)
    return None
