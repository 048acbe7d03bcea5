"""Contrastive training of embedding models on batches mined to be hard (B3, arXiv 2505.11293).

pairs file -> ``data.pairs.PairTable`` -> teacher vectors -> ``mining.mine``: neighbours, edges, communities, clusters
-> ``mining.BatchPlan`` -> ``data.PairsDataModule`` -> ``model.ContrastiveModule`` -> export, metrics.
"""

from typing import TYPE_CHECKING, Any

from b3_lightning.lazy import attribute

if TYPE_CHECKING:
    from b3_lightning.data import PairsDataModule as PairsDataModule
    from b3_lightning.data.trainer_sampler import B3BatchSampler as B3BatchSampler
    from b3_lightning.mining import MinedPlan as MinedPlan
    from b3_lightning.mining import MiningSettings as MiningSettings
    from b3_lightning.mining import mine as mine
    from b3_lightning.model import ContrastiveModule as ContrastiveModule
    from b3_lightning.trainer import B3Trainer as B3Trainer

__version__ = "0.1.0"

_LAZY = {
    "MinedPlan": "b3_lightning.mining",
    "MiningSettings": "b3_lightning.mining",
    "mine": "b3_lightning.mining",
    "ContrastiveModule": "b3_lightning.model",
    "PairsDataModule": "b3_lightning.data",
    "B3BatchSampler": "b3_lightning.data.trainer_sampler",
    "B3Trainer": "b3_lightning.trainer",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    return attribute(__name__, _LAZY, name)
