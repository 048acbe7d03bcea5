"""Pairs, images, vectors and the LightningDataModule that owns the mining."""

from typing import TYPE_CHECKING, Any

from b3_lightning.data.pairs import PairSource as PairSource
from b3_lightning.data.pairs import PairTable as PairTable
from b3_lightning.data.pairs import load_pairs as load_pairs

if TYPE_CHECKING:
    from b3_lightning.data.datamodule import PairsDataModule as PairsDataModule
    from b3_lightning.data.datamodule import datamodule_of as datamodule_of


def __getattr__(name: str) -> Any:
    """What needs Lightning, imported when it is asked for: pairs are read and audited without."""
    if name not in ("PairsDataModule", "datamodule_of"):
        raise AttributeError(f"module 'b3_lightning.data' has no attribute {name!r}")
    from b3_lightning.data import datamodule

    return getattr(datamodule, name)
