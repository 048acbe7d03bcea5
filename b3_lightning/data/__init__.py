"""Pairs, images, vectors and the LightningDataModule that owns the mining."""

from typing import TYPE_CHECKING, Any

from b3_lightning.data.pairs import PairSource as PairSource
from b3_lightning.data.pairs import PairTable as PairTable
from b3_lightning.data.pairs import load_pairs as load_pairs
from b3_lightning.lazy import attribute

if TYPE_CHECKING:
    from b3_lightning.data.datamodule import PairsDataModule as PairsDataModule
    from b3_lightning.data.datamodule import datamodule_of as datamodule_of

_LAZY = {
    "PairsDataModule": "b3_lightning.data.datamodule",
    "datamodule_of": "b3_lightning.data.datamodule",
}


def __getattr__(name: str) -> Any:
    """What needs Lightning: pairs are read and audited without."""
    return attribute(__name__, _LAZY, name)
