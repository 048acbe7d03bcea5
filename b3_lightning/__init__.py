"""Contrastive training of embedding models on batches mined to be hard (B3, arXiv 2505.11293).

pairs file -> ``data.pairs.PairTable`` -> teacher vectors -> ``mining.mine``: neighbours, edges, communities, clusters
-> ``mining.BatchPlan`` -> ``data.PairsDataModule`` -> ``model.ContrastiveModule`` -> export, metrics.
"""

from typing import Any

from b3_lightning.lazy import attribute

__version__ = "0.1.0"

_LAZY = {
    "MinedPlan": "b3_lightning.mining",
    "MiningSettings": "b3_lightning.mining",
    "mine": "b3_lightning.mining",
    "ContrastiveModule": "b3_lightning.model",
    "PairsDataModule": "b3_lightning.data",
    "B3BatchSampler": "b3_lightning.data.trainer_sampler",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    return attribute(__name__, _LAZY, name)
