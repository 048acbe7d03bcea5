"""Mined batches against random ones of equal and of larger size, each arm at the best of several learning rates.

    python benchmarks/arms.py --train TRAIN.parquet --val VAL.parquet --model MODEL --output runs/arms \
        [--vectors TEACHER.npy] [--epochs 1] [--rates 5e-5 1e-4 2e-4] [--large-rates 1e-4 2e-4 4e-4] [--seeds 0 1]

Three arms: ``mined@64``, ``random@64``, ``random@1024``, all in chunks of ``--chunk-tokens`` tokens
sorted by length: the same gradients in little memory and with less padding. The first seed tries every rate, the others
the arm's best by MRR. Every run is one ``fit`` on the command line into a folder of its own; finished ones are not
repeated, so a stopped benchmark goes on. Prints all runs and the arms' means.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean

from b3_lightning.reports.compare import best_validation

METRICS = ("val/hit@1", "val/hit@10", "val/mrr")
ARMS = {
    "mined@64": ("--data.batches=b3", "--data.batch_size=64"),
    "random@64": ("--data.batches=random", "--data.batch_size=64"),
    "random@1024": ("--data.batches=random", "--data.batch_size=1024"),
}


def run(given: argparse.Namespace, arm: str, rate: float, seed: int) -> dict[str, float]:
    """Fit, unless that is done, and read the best validation."""
    folder = Path(given.output) / f"{arm}-{rate:g}-{seed}"
    if not (folder / "export").is_dir():
        command = [
            sys.executable, "-m", "b3_lightning", "fit", f"--run.dir={folder}", "--run.wandb=disabled",
            f"--seed_everything={seed}", f"--data.seed={seed}", f"--data.train_pairs={given.train}",
            f"--data.val_pairs={given.val}", f"--model.embedder={given.model}",
            f"--data.teacher={given.vectors or given.model}", f"--data.cache={given.output}/cache",
            f"--data.mining={{first_rank: {given.first_rank}, n_ranks: 100, cluster_size: {given.cluster_size}}}",
            f"--model.loss.temperature={given.temperature}", f"--model.optim.learning_rate={rate}",
            f"--trainer.max_epochs={given.epochs}", f"--trainer.precision={given.precision}",
            f"--model.chunks.tokens={given.chunk_tokens}", "--trainer.gradient_clip_val=1.0",
            "--trainer.num_sanity_val_steps=0", *ARMS[arm],
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
    return best_validation(folder)


def row(label: str, found: dict[str, float]) -> str:
    """A line of the table."""
    return f"| {label} | " + " | ".join(f"{found[name]:.4f}" for name in METRICS) + " |"


def main() -> None:
    """Run what is missing, print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "val", "model", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--vectors")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4])
    parser.add_argument("--large-rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--first-rank", type=int, default=5)
    parser.add_argument("--cluster-size", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--precision", default="bf16-mixed")
    given = parser.parse_args()
    header = " | ".join(name.removeprefix("val/") for name in METRICS)
    print(f"| arm | rate | seed | {header} |\n|---|---|---|---|---|---|")
    means = []
    for arm in ARMS:
        rates = given.large_rates if arm.endswith("1024") else given.rates
        first = given.seeds[0]
        tried = {rate: run(given, arm, rate, first) for rate in rates}
        best = max(tried, key=lambda rate: tried[rate]["val/mrr"])
        for rate, found in tried.items():
            print(row(f"{arm} | {rate:g} | {first}", found), flush=True)
        chosen = [tried[best]]
        for seed in given.seeds[1:]:
            chosen.append(run(given, arm, best, seed))
            print(row(f"{arm} | {best:g} | {seed}", chosen[-1]), flush=True)
        means.append(row(f"**{arm}** | {best:g} | mean", {n: mean(found[n] for found in chosen) for n in METRICS}))
    print("\n".join(means))


if __name__ == "__main__":
    main()
