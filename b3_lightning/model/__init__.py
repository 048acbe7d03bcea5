"""The embedder, its loss and metrics, and the LightningModule around them."""

from b3_lightning.model.embedder import LoadSettings as LoadSettings
from b3_lightning.model.embedder import LoraSettings as LoraSettings
from b3_lightning.model.embedder import SmallEmbedder as SmallEmbedder
from b3_lightning.model.module import ContrastiveModule as ContrastiveModule
from b3_lightning.model.optim import OptimSettings as OptimSettings
from b3_lightning.model.sharding import FullyShardedStrategy as FullyShardedStrategy
