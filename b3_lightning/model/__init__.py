"""The embedder, its loss and metrics, and the LightningModule around them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b3_lightning.model.embedder import LoadSettings as LoadSettings
    from b3_lightning.model.embedder import LoraSettings as LoraSettings
    from b3_lightning.model.embedder import SmallEmbedder as SmallEmbedder
    from b3_lightning.model.module import ContrastiveModule as ContrastiveModule
    from b3_lightning.model.optim import OptimSettings as OptimSettings
    from b3_lightning.model.sharding import FullyShardedStrategy as FullyShardedStrategy

_LAZY = {
    "LoadSettings": "embedder",
    "LoraSettings": "embedder",
    "SmallEmbedder": "embedder",
    "ContrastiveModule": "module",
    "OptimSettings": "optim",
    "FullyShardedStrategy": "sharding",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: the loss needs neither Lightning nor sentence-transformers."""
    if name not in _LAZY:
        raise AttributeError(f"module 'b3_lightning.model' has no attribute {name!r}")
    return getattr(import_module(f"b3_lightning.model.{_LAZY[name]}"), name)
