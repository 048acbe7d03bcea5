"""Does `plan`, which trains nothing, put settings in the order in which they train? Rank correlation over trained arms.

    python benchmarks/what_if.py runs/barrier

of a folder that `batch_barrier.py` filled, best with ``--search`` (no search: every arm at one point) and variants that
differ in K and window, since arms of different sizes differ in their number of steps too. Variants that change other
settings than those of the window and K are left out. Figures are those of the validation part.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
from scipy.stats import spearmanr

from b3_lightning.cli import main as b3

Setting = tuple[int, int, int, int]
"""Batch size, first rank, ranks, K; the last three are -1 for random batches."""
FORESEEN = ("hardness", "clean", "kept_frac", "suspected")
METRICS = ("hit@1", "hit@10", "mrr")


def trained(folder: Path) -> dict[Setting, dict[str, float]]:
    """Setting -> metrics on the validation part, means over seeds of its best point, runs of a search apart."""
    all_runs = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]
    compared = {_besides(run["arm"]) for run in all_runs if not run["arm"]["variant"]}
    runs: dict[Setting, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in all_runs:
        plain = all(setting.startswith(("--data.plan", "--data.mining")) for setting in run["arm"]["settings"])
        if plain and _besides(run["arm"]) in compared:
            runs[_setting(run["arm"])][json.dumps([run["point"], run["fit"]])].append(run)
    found = {}
    for setting, points in runs.items():
        best = max(points.values(), key=lambda seeds: (len(seeds), mean(seed["mrr"] for seed in seeds)))
        found[setting] = {metric: mean(seed[metric] for seed in best) for metric in METRICS}
    return found


def _plan(arm: dict[str, Any]) -> dict[str, Any] | None:
    if arm["batches"] != "b3":
        return None
    folder = next(setting.partition("=")[2] for setting in arm["settings"] if setting.startswith("--data.plan"))
    about: dict[str, Any] = json.loads((Path(folder) / "plan.json").read_text())
    return about


def _besides(arm: dict[str, Any]) -> str:
    """What an arm's plan was mined with, but for window and K; empty for random batches."""
    about = _plan(arm)
    asked = ("first_rank", "n_ranks", "cluster_size")
    return "" if about is None else json.dumps({k: v for k, v in about["settings"].items() if k not in asked})


def _setting(arm: dict[str, Any]) -> Setting:
    about = _plan(arm)
    if about is None:
        return arm["size"], -1, -1, -1
    (ranks,) = about["ranks"].values()  # what ``auto`` chose, where that was set
    return arm["size"], ranks["first_rank"], ranks["n_ranks"], about["settings"]["cluster_size"]


def foreseen(folder: Path, settings: list[Setting]) -> dict[Setting, dict[str, float]]:
    """Setting -> what `plan` says of it."""
    found = {}
    for n_ranks in sorted({setting[2] for setting in settings} - {-1}):
        output = folder / f"what_if-{n_ranks}"
        own = [setting for setting in settings if setting[2] in (n_ranks, -1)]
        sizes, firsts, _, clusters = (sorted({*values} - {-1}) for values in zip(*own, strict=True))
        if not (output / "what_if.parquet").is_file():
            b3([
                "plan", f"--output={output}", f"--data.train_pairs={folder}/data/train.parquet",
                f"--data.teacher={folder}/data/train.npy", f"--model.embedder={folder}/student",
                f"--data.cache={folder}/cache/what_if", f"--run.dir={folder}", "--trainer.accelerator=cpu",
                f"--data.mining={{n_ranks: {n_ranks}, first_rank: {firsts[0]}}}",
                f"--questions.batch_sizes={sizes}", f"--questions.cluster_sizes={clusters}",
                f"--questions.first_ranks={firsts}",
            ])  # fmt: skip
        for row in pq.read_table(output / "what_if.parquet").to_pylist():
            key = row["batch_size"], row["first_rank"], row["n_ranks"], row["cluster_size"]
            found[key] = {name: row[name] for name in FORESEEN}
    return found


def main() -> None:
    """Print both figures of every arm, and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    results = trained(folder)
    guesses = foreseen(folder, list(results))
    print("| \\|B\\| | first rank | ranks | K | " + " | ".join([*FORESEEN, *METRICS]) + " |\n" + "|---" * 11 + "|")
    for setting in sorted(results):
        figures = [f"{guesses[setting][name]:.3f}" for name in FORESEEN]
        figures += [f"{100 * results[setting][metric]:.1f}" for metric in METRICS]
        print("| " + " | ".join([*map(str, setting), *figures]) + " |")
    print("\n| Spearman, arms | " + " | ".join(METRICS) + " |\n" + "|---" * 4 + "|")
    for name in FORESEEN:
        for label, chosen in (("all", list(results)), ("mined", [setting for setting in results if setting[1] >= 0])):
            guessed = [guesses[setting][name] for setting in chosen]
            cells = [
                f"{spearmanr(guessed, [results[setting][metric] for setting in chosen]).statistic:+.2f}"
                for metric in METRICS
            ]
            print(f"| {name}, {len(chosen)} {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
