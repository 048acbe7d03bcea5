"""What two processes of ``test_stopping`` do; apart from it, since they import this anew."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from conftest import losses, validations

from b3_lightning.cli import main
from b3_lightning.model import ContrastiveModule

Moment = tuple[str, int, int]
"""A method of the module, the number of optimiser steps done when it is called, and the signal that comes then."""


@contextmanager
def once(act: Callable[[], None], name: str, step: int, n_calls: int = 1) -> Iterator[None]:
    """Act where the module's method is called for the n-th time after so many optimiser steps."""
    method = getattr(ContrastiveModule, name)
    n_left = n_calls

    def acting(module: ContrastiveModule, *given: Any) -> Any:
        nonlocal n_left
        if module.trainer.global_step == step:
            n_left -= 1
            if n_left == 0:
                act()
        return method(module, *given)

    setattr(ContrastiveModule, name, acting)
    try:
        yield
    finally:
        setattr(ContrastiveModule, name, method)


def stop_and_go_on(rank: int, port: int, folder: str, command: list[str], moments: dict[str, list[Moment]]) -> None:
    """For every strategy, run whole, and stopped by a signal to the second process at these moments; tell both."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    processes = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in processes.items()}
    os.chdir(folder)
    told: dict[str, Any] = {}
    for strategy, signals in moments.items():
        settings = [*command, f"--trainer.strategy={strategy}"]
        whole, run = (Path(f"{name}-{strategy}") for name in ("whole", "run"))
        main([*settings, f"--run.dir={whole}"])
        found: dict[str, Any] = {"codes": [], "losses": {}, "validations": {}}
        for name, step, number in [*signals, ("", 0, 0)]:
            stops = rank == 1 and name
            last = run / "checkpoints" / "last.ckpt"
            goes_on = [f"--ckpt_path={last}"] if last.exists() else []
            with once(partial(signal.raise_signal, number), name, step) if stops else nullcontext():
                found["codes"].append(_code([*settings, f"--run.dir={run}", *goes_on]))
            if rank == 0:
                found["losses"] |= losses(run)
                found["validations"] |= validations(run)
        told[strategy] = found
        if rank == 0:
            found["whole"] = {"losses": losses(whole), "validations": validations(whole)}
    Path(f"{rank}.json").write_text(json.dumps(told))


def _code(command: list[str]) -> int:
    try:
        main(command)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
