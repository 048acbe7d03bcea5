"""What is refused before a run begins: plans and settings that do not go with the batches."""

from __future__ import annotations

import pytest
import torch

from b3_lightning.data import PairsDataModule, checks
from b3_lightning.mining import MiningSettings, mine


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    path.write_text("qry,pos_text\n" + "".join(f"question {row},answer {row}\n" for row in range(48)))
    return str(path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of 48 rows in clusters of 4."""
    folder = tmp_path_factory.mktemp("plan")
    vectors = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    mine(vectors, vectors, settings=MiningSettings(first_rank=1, n_ranks=8, cluster_size=4)).save(folder)
    return str(folder)


@pytest.mark.parametrize(("batch_size", "near"), [(10, "8 or 12"), (3, "4")])
def test_a_plan_is_checked_by_its_own_clusters(batch_size: int, near: str, pairs: str, plan: str) -> None:
    message = rf"data.plan=.*: batch_size={batch_size} must be a multiple of cluster_size=4; nearest: {near}; or mine"
    with pytest.raises(ValueError, match=message):
        PairsDataModule(train_pairs=pairs, plan=plan, batch_size=batch_size).load("train")


def test_a_plan_that_a_run_going_on_would_not_use_is_refused(plan: str) -> None:
    with pytest.raises(ValueError, match=r"goes on with epoch-0001, which its run mined, so data\.plan=other would be"):
        checks.load_plan_of({"folder": "epoch-0001"}, "run", "other")


def test_sizes_that_no_loader_can_have(pairs: str) -> None:
    with pytest.raises(ValueError, match=r"data\.eval_batch_size=0 must be at least 1"):
        PairsDataModule(train_pairs=pairs, eval_batch_size=0)


def test_settings_of_a_mining_that_a_plan_makes_needless_are_not_checked(pairs: str, plan: str) -> None:
    """Clusters of 8 and a window of 130 ranks go neither with batches of 12 nor with 48 rows."""
    data = PairsDataModule(train_pairs=pairs, plan=plan, batch_size=12)
    data.load("train")
    with pytest.raises(ValueError, match="batch_size=12 must be a multiple of cluster_size=8"):
        data.check_mining()  # as re-mining does
    PairsDataModule(train_pairs=pairs, plan=plan, batch_size=10, batches="random").load("train")
