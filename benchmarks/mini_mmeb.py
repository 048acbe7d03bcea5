"""B3 against random batches on a larger miniature MMEB, with a small Qwen2-VL trained from scratch; several seeds.

    python benchmarks/mini_mmeb.py --output runs/mini_mmeb [--start teacher] [--seeds 0 1 2 3 4] [--rows 6000]

Pictures, texts and tasks are those of tests/mini_mmeb.py, the config is configs/b3_2b.yaml with a smaller model, batch
and window. As in the paper, the teacher is a model of the same size trained on random batches (of a seed of its own);
with --start teacher it is also what every arm begins from, as the paper's arms begin from one trained model. Every run
is one ``fit`` and one ``evaluate`` on the command line, on one thread; finished ones are not repeated. Other settings
need a folder of their own, and are refused elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny_models  # noqa: E402
import torch  # noqa: E402
from mini_mmeb import TRAIN_ROWS, TRAINED, MiniMmeb, tasks  # noqa: E402
from transformers import Qwen2VLModel  # noqa: E402

from b3_lightning.data.pairs import PairSource, load_pairs  # noqa: E402

SHOWN = ("retrieval", "classification", "vqa", "grounding", "IND", "OOD", "all")
WANTED = ("output", "seeds", "arms", "start", "together")
ARMS = {
    "random": (f"--config={ROOT / 'configs' / 'ablations' / 'random.yaml'}",),
    "mined": (),
    "random-then-mined": ("--data.mined_frac={0: 0.0, 1: 1.0}",),
    "negatives": ("--data.mining.n_negatives=1",),
}
"""What differs; in the third, batches are random for one epoch first, in the last every row has a hard negative too."""


def write_data(folder: Path, given: argparse.Namespace) -> None:
    """The miniature and an untrained model whose subwords are those of its texts."""
    data = MiniMmeb(folder, dict.fromkeys(TRAIN_ROWS, given.rows), given.queries, given.candidates, side=56)
    data.write()
    sources: list[str | PairSource] = [
        PairSource(str(folder / "MMEB-train" / name), split="original") for name in TRAINED
    ]
    pairs = load_pairs(sources)
    texts = sorted({item.text for side in ("query", "target") for item in pairs.items(side)})
    path = tiny_models.qwen2_vl(folder / "model", lines=texts, vocab_size=800)
    model = Qwen2VLModel.from_pretrained(path)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        # transformers' 0.02 suits thousands of dimensions; at 32 nothing gets through
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    model.save_pretrained(path)


def fit(folder: Path, given: argparse.Namespace, name: str, arm: str, seed: int, start: Path, teacher: Path) -> None:
    """One training run from the weights of ``start``."""
    low = json.dumps({task: {"first_rank": given.first_rank} for task in tasks("vqa")})
    _run(
        folder / name / "export", "fit", f"--config={ROOT / 'configs' / 'b3_2b.yaml'}", *ARMS[arm],
        f"--run.dir={folder / name}", "--run.wandb=disabled", "--run.checkpoint_every_n_steps=null",
        f"--seed_everything={seed}", f"--data.seed={seed}", f"--data.pairs_root={folder / 'MMEB-train'}",
        f"--data.image_root={folder / 'MMEB-train'}", f"--data.tasks={json.dumps(TRAINED)}",
        f"--data.batch_size={given.batch_size}", "--data.num_workers=0", f"--data.cache={folder / 'cache'}",
        f"--data.teacher={teacher}", f"--data.mining.first_rank={given.first_rank}",
        f"--data.mining.n_ranks={given.n_ranks}", f"--data.mining.cluster_size={given.cluster_size}",
        f"--data.mining.per_task={low}", f"--model.embedder={start}", "--model.lora=null",
        f"--model.load.pooling={given.pooling}",
        "--model.chunks=null", "--model.load.dtype=float32", "--model.load.gradient_checkpointing=false",
        f"--model.loss.temperature={given.temperature}", f"--model.optim.learning_rate={given.rate}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true",
        f"--trainer.max_steps={given.steps}", "--trainer.enable_progress_bar=false",
    )  # fmt: skip


def evaluate(folder: Path, name: str) -> dict[str, float]:
    """Precision@1 by group of one run."""
    output = folder / name / "evaluation"
    _run(
        output / "results.json", "evaluate", "--suite=mmeb", f"--model={folder / name / 'export'}",
        f"--data={folder / 'MMEB-eval'}", f"--output={output}", "--wandb=disabled", "--batch-size=64",
    )  # fmt: skip
    means = json.loads((output / "results.json").read_text())["means"]
    return {group: 100 * means[group]["value"] for group in SHOWN}


def _run(done: Path, *command: str) -> None:
    if done.exists():
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [sys.executable, "-m", "b3_lightning", *command], env=environment, capture_output=True, text=True
    )
    if ended.returncode:
        sys.exit(ended.stderr[-3000:])


def refuse_other_settings(folder: Path, given: argparse.Namespace) -> None:
    """A folder's data and runs share all settings but those that say which of them are wanted."""
    settings = {name: value for name, value in vars(given).items() if name not in WANTED}
    told = folder / "settings.json"
    if (folder / "model").is_dir() and (not told.is_file() or json.loads(told.read_text()) != settings):
        sys.exit(f"{folder} was made with other settings ({told}); give --output another folder")
    folder.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(settings, indent=1))


def main() -> None:
    """Run what is missing, print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    for name, default in (
        ("rows", 6000),
        ("steps", 4125),
        ("batch-size", 32),
        ("cluster-size", 8),
        ("queries", 1000),
        ("candidates", 1000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--first-rank", type=int, default=10)
    parser.add_argument("--n-ranks", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--start", default="untrained", choices=("untrained", "teacher"), help="weights of every arm")
    parser.add_argument("--together", type=int, default=2, help="runs at a time")
    given = parser.parse_args()
    folder = given.output.resolve()
    refuse_other_settings(folder, given)
    if not (folder / "model").is_dir():
        write_data(folder, given)
    untrained, teacher = folder / "model", folder / "teacher" / "export"
    fit(folder, given, "teacher", "random", 99, untrained, untrained)
    start, prefix = (teacher, "further-") if given.start == "teacher" else (untrained, "")
    runs = {(arm, seed): f"{prefix}{arm}-{seed}" for seed in given.seeds for arm in given.arms}
    with ThreadPoolExecutor(given.together) as pool:
        trained = [
            pool.submit(fit, folder, given, name, arm, seed, start, teacher) for (arm, seed), name in runs.items()
        ]
        for run in trained:
            run.result()
        found = dict(zip(runs, pool.map(lambda name: evaluate(folder, name), runs.values()), strict=True))
    print("| arm | seed | " + " | ".join(SHOWN) + " |\n|" + "---|" * (2 + len(SHOWN)))
    reached = evaluate(folder, "teacher")
    print("| teacher (random) | 99 | " + " | ".join(f"{reached[group]:.1f}" for group in SHOWN) + " |")
    for (arm, seed), values in found.items():
        print(f"| {arm} | {seed} | " + " | ".join(f"{values[group]:.1f}" for group in SHOWN) + " |")
    for arm in given.arms:
        columns = [[found[arm, seed][group] for seed in given.seeds] for group in SHOWN]
        spread = [f"{mean(c):.1f} ± {stdev(c) if len(c) > 1 else 0:.1f}" for c in columns]
        print(f"| **{arm}** | mean ± s.d. | " + " | ".join(spread) + " |")


if __name__ == "__main__":
    main()
