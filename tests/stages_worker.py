"""What processes of ``test_stages`` mine; apart from it, since they import this anew and need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from b3_lightning.mining import MinedPlan, MiningSettings, Stages, mine

SETTINGS = MiningSettings(first_rank=1, n_ranks=6, cluster_size=4)


def vectors(n_rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n_rows, 8)).astype(np.float32)


def mine_in(folder: Path, **changes: object) -> MinedPlan:
    arguments = {"settings": SETTINGS, "target_keys": range(200), **changes}
    return mine(vectors(200), vectors(200, seed=1), stages=Stages(folder), **arguments)  # type: ignore[arg-type]
