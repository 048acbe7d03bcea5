"""The embedder, its loss and metrics, and the LightningModule around them."""

from typing import TYPE_CHECKING, Any

from b3_lightning.lazy import attribute

if TYPE_CHECKING:
    from b3_lightning.model.embedder import LoadSettings as LoadSettings
    from b3_lightning.model.embedder import LoraSettings as LoraSettings
    from b3_lightning.model.embedder import SmallEmbedder as SmallEmbedder
    from b3_lightning.model.module import ContrastiveModule as ContrastiveModule
    from b3_lightning.model.optim import OptimSettings as OptimSettings
    from b3_lightning.model.sharding import FullyShardedStrategy as FullyShardedStrategy

_LAZY = {
    "LoadSettings": "b3_lightning.model.embedder",
    "LoraSettings": "b3_lightning.model.embedder",
    "SmallEmbedder": "b3_lightning.model.embedder",
    "ContrastiveModule": "b3_lightning.model.module",
    "OptimSettings": "b3_lightning.model.optim",
    "FullyShardedStrategy": "b3_lightning.model.sharding",
}


def __getattr__(name: str) -> Any:
    """The loss needs neither Lightning nor sentence-transformers."""
    return attribute(__name__, _LAZY, name)
