"""What processes of ``test_stages`` and ``test_remine`` do; apart from them, since they import this anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from b3_lightning.mining import MinedPlan, MiningSettings, PeerError, Processes, Stages, mine

SETTINGS = MiningSettings(first_rank=1, n_ranks=6, cluster_size=4)


def vectors(n_rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n_rows, 8)).astype(np.float32)


def mine_in(folder: Path, **changes: object) -> MinedPlan:
    arguments = {"settings": SETTINGS, "target_keys": range(200), **changes}
    return mine(vectors(200), vectors(200, seed=1), stages=Stages(folder), **arguments)  # type: ignore[arg-type]


def share_and_fail(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def all_true(mine: bool) -> bool:
        told = torch.tensor(int(mine))
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return bool(told)

    processes, outcome = Processes(rank, 2, all_true), "nothing"
    try:
        with processes.failing_together():
            processes.barrier()
            if rank == 1:
                raise ValueError("disk full")
            processes.barrier()
    except (ValueError, PeerError) as error:
        outcome = type(error).__name__
    processes.barrier()  # both are out of it and go on together
    Path(folder, str(rank)).write_text(outcome)
    dist.destroy_process_group()
