"""What ``fit`` leaves: a folder that ``SentenceTransformer(folder)`` loads without this package."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import nn

from b3_lightning.checkpoints import CheckedCheckpointIO, best_checkpoint
from b3_lightning.data.datamodule import datamodule_of
from b3_lightning.data.mixture import Prompts, prompts_of
from b3_lightning.model.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)

_MAGNITUDE = "lora_magnitude_vector"
_PROMPT_NAMES = {"query": "query", "target": "document"}  # side -> sentence-transformers' name
_VALIDATION = "validation"  # in a checkpoint: metric -> value
_TAG = "tags:\n- b3_lightning\n"


class Export(Callback):
    """Write ``export/`` with the weights of the best checkpoint, or the last ones where none is kept.

    The export holds the prompts that the model was trained with, where one goes before all texts of a side.

    Args:
        description: lines of the model card that say how the model was trained.
        merge_adapter: put LoRA's weights into the model's own, so that the export loads without peft; else the adapter
            alone is written, and the model it belongs to is named in it.
    """

    def __init__(self, description: str = "", merge_adapter: bool = False) -> None:
        self.description, self.merge_adapter = description, merge_adapter

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the figures of the validation that a checkpoint is saved after, for the card of its export."""
        checkpoint[_VALIDATION] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = best_checkpoint(trainer)
        cut = isinstance(trainer.strategy, FullyShardedStrategy)
        last = trainer.strategy.lightning_module_state_dict() if cut and best is None else {}  # from all processes
        if not trainer.is_global_zero:
            return
        checkpoint = {"state_dict": last} if best is None else CheckedCheckpointIO().load_checkpoint(best)
        module: Any = pl_module
        if best is not None and not cut:
            module.prepare_for(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        embedder: Any = module.whole_embedder(checkpoint["state_dict"]) if cut else module.embedder
        folder = Path(trainer.default_root_dir) / "export"
        temporary = folder.with_name(".export.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        if self.merge_adapter:
            merge_adapters(embedder)
        prompts = prompts_of(datamodule_of(trainer).sources["train"] or [])
        kept = keep_prompts(embedder, prompts)
        embedder.save_pretrained(str(temporary), create_model_card=False)
        _name_dora_weights(temporary)
        _name_base_wholly(temporary)
        if best is None:
            self.on_save_checkpoint(trainer, pl_module, checkpoint)
            checkpoint |= {"global_step": trainer.global_step}
        card = self._card(checkpoint, best, told_prompts(prompts, kept))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        _as_readable(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        log.info("exported to %s", folder)

    def _card(self, checkpoint: Mapping[str, Any], best: str | None, prompts: str) -> str:
        found = checkpoint.get(_VALIDATION, {})  # callbacks have no part in a checkpoint of weights alone
        metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(found.items()))
        weights = f"best checkpoint `{Path(best).name}`" if best else "the last step"
        return (
            "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
            f"{_TAG}---\n\n"
            "# Embedding model trained with b3_lightning\n\n"
            f"Weights: {weights}, after {checkpoint['global_step']} optimiser steps.\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("THIS_FOLDER")\nvectors = model.encode(["a text"])\n```\n\n'
            f"{prompts}## Training\n\n```yaml\n{self.description.strip()}\n```\n\n"
            f"## Validation\n\n| metric | value |\n|---|---|\n{metrics}\n"
        )


def _as_readable(folder: Path) -> None:
    """Give all files the mode of the card: safetensors makes files that only their owner can read."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def keep_prompts(embedder: Any, prompts: Prompts) -> dict[str, str]:
    """Give the model the prompt of each side that all its texts were trained with, as ``query`` and ``document``.

    A side whose tasks differ has none there, nor has one whose prompt the model would put elsewhere than before the
    text: with a chat template sentence-transformers makes it a system message. Prompts that the model brought are
    emptied under these names, and none is the default: no text was trained with them.

    Returns:
        Side -> the prompt given to the model.
    """
    kept = {side: next(iter(found)) if len(found) == 1 else "" for side, found in prompts.items()}
    kept = {side: prompt if _goes_before_texts(embedder, prompt) else "" for side, prompt in kept.items()}
    embedder.prompts |= {_PROMPT_NAMES[side]: prompt for side, prompt in kept.items()}
    embedder.default_prompt_name = None
    return kept


def _goes_before_texts(embedder: Any, prompt: str) -> bool:
    """Does the model read a prompt that it is given just as a text that begins with it?"""
    if not prompt:
        return True
    if any(getattr(module, "include_prompt", True) is False for module in embedder):
        return False  # left out of the mean, as it was not in training
    given = embedder.preprocess(["text"], prompt=prompt).get("input_ids")
    written = embedder.preprocess([f"{prompt}text"]).get("input_ids")
    return given is written or torch.equal(given, written)


def told_prompts(prompts: Prompts, kept: Mapping[str, str]) -> str:
    """The card's section on prompts: which, and who puts them there; nothing where there are none."""
    lines = []
    for side, found in prompts.items():
        if kept[side]:
            name = _PROMPT_NAMES[side]
            lines.append(
                f"- {side}: `encode_{name}` puts `{json.dumps(kept[side], ensure_ascii=False)}` before the text"
            )
        elif any(found):
            each = "; ".join(
                f"`{json.dumps(prompt, ensure_ascii=False)}` ({', '.join(tasks)})" for prompt, tasks in found.items()
            )
            lines.append(f"- {side}: put the prompt of its task before the text yourself: {each}")
    return "\n".join(["## Prompts", "", *lines, "", ""]) if lines else ""


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


def _name_base_wholly(folder: Path) -> None:
    """Let an adapter find the folder of its base model from wherever the export is loaded."""
    for path in folder.rglob("adapter_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if base and Path(base).is_dir() and not Path(base).is_absolute():
            config["base_model_name_or_path"] = str(Path(base).resolve())
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
