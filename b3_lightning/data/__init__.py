"""Pairs, images, vectors and the LightningDataModule that owns the mining."""

from b3_lightning.data.datamodule import PairsDataModule as PairsDataModule
from b3_lightning.data.datamodule import datamodule_of as datamodule_of
from b3_lightning.data.pairs import PairSource as PairSource
from b3_lightning.data.pairs import PairTable as PairTable
from b3_lightning.data.pairs import load_pairs as load_pairs
