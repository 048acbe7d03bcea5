"""Seconds and peak memory of every stage of mining as the number of rows grows.

    python benchmarks/mining.py --rows 10000 30000 100000 [--dimensions 384] [--approximate] [--cluster-size 32]

Targets lie in nested groups of 10,000 to 300 rows, with a query about each, so that a row has 8 or 9 edges (tldr has 5,
wordnet 4); the vectors are written to a .npy file and memory-mapped, as a user's would be. Every size runs in a process
of its own, so that peaks do not add up. Prints a Markdown table: seconds of a stage, then in brackets the largest
resident memory (GiB) that it saw.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROWS_A_GROUP = (10_000, 3_000, 1_000, 300)
STAGES = ("ranks", "neighbours", "edges", "communities", "clusters", "swaps", "negatives")


def write_vectors(path: Path, n_rows: int, n_dims: int) -> None:
    """(2, rows, dimensions): nested groups of targets, queries about them; in pieces, so that no size needs memory."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...], share: float) -> np.ndarray:
        return (share / n_dims) ** 0.5 * rng.normal(size=shape).astype(np.float32)

    levels = [normal((max(1, n_rows // rows_a_group), n_dims), 0.1) for rows_a_group in ROWS_A_GROUP]
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(2, n_rows, n_dims))
    for start in range(0, n_rows, 50_000):
        stop = min(start + 50_000, n_rows)
        place = rng.random(stop - start)
        target = normal((stop - start, n_dims), 0.6)
        for centers in levels:
            target += centers[(place * len(centers)).astype(np.int64)]
        file[1, start:stop], file[0, start:stop] = target, target + normal(target.shape, 3.0)
    file.flush()


def resident_gib() -> float:
    """Resident memory of this process, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class Peaks:
    """The largest resident memory during each stage, looked at every 50 ms."""

    def __init__(self) -> None:
        self.stage, self.of_stage = "vectors", {"vectors": 0.0}
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stage = stage

    def _watch(self) -> None:
        while True:
            self.of_stage[self.stage] = max(self.of_stage.get(self.stage, 0.0), resident_gib())
            time.sleep(0.05)


def measure(path: str, cluster_size: int, neighbors: str) -> None:
    """Mine the file's vectors; prints JSON."""
    from b3_lightning.data.vectors import load_vectors
    from b3_lightning.mining import MiningSettings, mine

    peaks, start = Peaks(), time.perf_counter()
    vectors = load_vectors(Path(path))
    settings = MiningSettings(first_rank=30, n_ranks=100, cluster_size=cluster_size, neighbors=neighbors)  # type: ignore[arg-type]
    mined = mine(vectors.query_ND, vectors.target_ND, settings=settings, progress=peaks)
    found = {
        "seconds": dict(mined.seconds) | {"all": time.perf_counter() - start},
        "peaks": peaks.of_stage,
        "n_edges": len(mined.edges),
        "kept": mined.summary()["kept_frac"],
    }
    print(json.dumps(found))


def main() -> None:
    """Measure the sizes asked for, one process each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--cluster-size", type=int, default=32)
    parser.add_argument("--approximate", action="store_true")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    given = parser.parse_args()
    how = "approximate" if given.approximate else "exact"
    if given.file:
        measure(given.file, given.cluster_size, how)
        return
    print(f"{how}, {torch.get_num_threads()} threads\n")
    print(f"| rows | edges | kept | {' | '.join(STAGES)} | all | neighbours / others | peak GiB |")
    print("|" + "---|" * (len(STAGES) + 6))
    for n_rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vectors.npy"
            write_vectors(path, n_rows, given.dimensions)
            command = [sys.executable, __file__, "--file", str(path), "--cluster-size", str(given.cluster_size)]
            command += ["--approximate"] if given.approximate else []
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        seconds, peaks = found["seconds"], found["peaks"]
        cells = [f"{seconds[stage]:.1f} ({peaks.get(stage, 0):.1f})" for stage in STAGES]
        others = sum(seconds[stage] for stage in STAGES if stage != "neighbours")
        cells += [f"{seconds['all']:.1f}", f"{seconds['neighbours'] / others:.1f}", f"{max(peaks.values()):.1f}"]
        print(f"| {n_rows:,} | {found['n_edges']:,} | {found['kept']:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
