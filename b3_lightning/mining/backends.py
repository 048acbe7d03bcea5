"""Where a plan is mined: chosen by ``backend``, with the reason said, and never changed behind the user's back."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from b3_lightning.mining.gpu import Libraries
from b3_lightning.mining.many_gpus import DaskLibraries
from b3_lightning.mining.settings import BackendName, MiningSettings
from b3_lightning.types import Edges, to_device

log = logging.getLogger(__name__)

SLIM = ("cupy", "pylibcugraph")
"""What the GPU backend needs at least."""
TABLES = ("cudf", "cugraph")
"""With these the edges are a cuDF table."""
MANY = ("dask_cuda", "distributed", "dask_cudf", "cugraph")
"""With these a graph can be spread over several GPUs."""
INSTALL = "pip install 'b3_lightning[gpu-cu13]', or with cuDF tables [rapids-cu13]"
_NO_DEVICE = "torch sees no CUDA device"
_FREE_SHARE = 0.5
"""Of the free memory, for the tiles of a search; the rest is left to the library of the next stage."""


@dataclass(frozen=True)
class Backend:
    """The device of all stages, and what finds communities there; ``reason`` says why it was chosen."""

    name: BackendName
    device: torch.device
    reason: str
    libraries: Libraries | None = None
    many: DaskLibraries | None = None

    def budget_gib(self, settings: MiningSettings) -> float:
        """What a search may hold beside vectors and result: as set on the CPU, half of what is free on a GPU."""
        if self.device.type != "cuda":
            return settings.memory_budget_gib
        return _FREE_SHARE * torch.cuda.mem_get_info(self.device)[0] / 2**30

    def check_memory(self, n_rows: int, n_dims: int, n_ranks: int) -> None:
        """Refuse, before hours are spent, what a GPU cannot hold."""
        if self.device.type == "cuda":
            check_fits(n_rows, n_dims, n_ranks, torch.cuda.mem_get_info(self.device)[0])


CPU = Backend("cpu", torch.device("cpu"), "as set")


def on_host(edges: Edges, why: str) -> Edges:
    """The edges on the CPU; how much is moved for it is logged."""
    if edges.source_E.device.type != "cpu":
        size = sum(tensor.nbytes for tensor in (edges.source_E, edges.target_E, edges.weight_E))
        log.info("%s runs on the host: %.1f MiB of edges are copied", why, size / 2**20)
    return to_device(edges, torch.device("cpu"))


def missing(modules: Sequence[str]) -> list[str]:
    """Which of these modules are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def why_no_gpu() -> str | None:
    """What the GPU backend lacks here, and the command that brings it; None where it lacks nothing."""
    absent = missing(SLIM)
    lacks = [] if torch.cuda.is_available() else [_NO_DEVICE]
    if absent:
        lacks.append(f"{', '.join(absent)} not installed: {INSTALL}")
    return "; ".join(lacks) or None


def choose_backend(settings: MiningSettings) -> Backend:
    """Settle ``backend``, and say why.

    Raises:
        ValueError: where ``gpu`` is asked for and a device or a package is missing.
    """
    reason = "backend=cpu" if settings.backend == "cpu" else why_no_gpu()
    if reason is None:
        return _gpu(settings)
    if settings.backend == "gpu":
        raise ValueError(f"data.mining.backend=gpu cannot be had: {reason}. Set it to cpu or auto")
    for given, needed in (
        (f"graph_gpus={settings.graph_gpus}", settings.graph_gpus > 1),
        ("neighbors='cuvs'", settings.neighbors == "cuvs"),
    ):
        if needed:
            raise ValueError(f"data.mining.{given} needs the GPU backend: {reason}")
    if settings.backend == "cpu":
        return CPU
    if not torch.cuda.is_available():
        reason = _NO_DEVICE  # what else is missing matters only to those who have one
    log.info("mining on the CPU: %s", reason)
    return replace(CPU, reason=reason)


def _gpu(settings: MiningSettings) -> Backend:
    if settings.neighbors == "approximate":
        raise ValueError(
            "data.mining.neighbors=approximate scans lists on the CPU; on a GPU the exact search is faster: "
            "set neighbors to exact, or backend to cpu"
        )
    absent = missing(TABLES)
    device = torch.device("cuda", torch.cuda.current_device())
    tables = "edges as bare arrays" if absent else "edges as a cuDF table"
    reason = f"{torch.cuda.get_device_name(device)}, {tables}"
    log.info("mining on the GPU: %s", reason)
    return Backend("gpu", device, reason, Libraries.load(tables=not absent), _many(settings))


def _many(settings: MiningSettings) -> DaskLibraries | None:
    if settings.graph_gpus == 1:
        return None
    absent = missing(MANY)
    if absent or torch.cuda.device_count() < settings.graph_gpus:
        raise ValueError(
            f"data.mining.graph_gpus={settings.graph_gpus} cannot be had: {torch.cuda.device_count()} CUDA devices, "
            f"missing packages: {', '.join(absent) or 'none'} (pip install 'b3_lightning[rapids-cu13]')"
        )
    return DaskLibraries.load()


def check_fits(n_rows: int, n_dims: int, n_ranks: int, free_bytes: int) -> None:
    """Compare what a GPU must hold with what it has.

    Raises:
        ValueError: with the arithmetic, where targets or graph need more than ``free_bytes``.
    """
    need = gpu_bytes(n_rows, n_dims, n_ranks)
    stage = max(need, key=lambda name: need[name])
    if need[stage] > free_bytes:
        gib = {name: f"{size / 2**30:.1f} GiB" for name, size in {**need, "free": free_bytes}.items()}
        raise ValueError(
            f"{n_rows:,} rows x {n_dims} with {n_ranks} ranks need {gib['neighbours']} for the search and "
            f"{gib['graph']} for the graph on the GPU, where {gib['free']} are free: lower n_ranks, mine with shorter "
            "vectors, or set data.mining.backend=cpu"
        )


def gpu_bytes(n_rows: int, n_dims: int, n_ranks: int) -> dict[str, int]:
    """What the two largest stages need on the GPU; they do not overlap.

    ``neighbours``: the targets in float32, keys, and the least tile. ``graph``: ids (8 bytes), scores (4) and marks (2)
    of all ranks, and the arcs: a code of 8 bytes for every rank at most, sorted (3 times), of which 16 bytes are kept.
    """
    return {
        "neighbours": n_rows * (4 * n_dims + 24) + 2**28,
        "graph": n_rows * n_ranks * (8 + 4 + 2) + 3 * 16 * n_rows * n_ranks,
    }
