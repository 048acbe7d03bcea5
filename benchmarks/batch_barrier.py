"""Do mined batches of 64 do the work of random ones of 1024? Every arm at its best learning rate and temperature.

    python benchmarks/batch_barrier.py --train TRAIN.parquet [--test TEST.parquet] --vectors TEACHER.npy \
        --student MODEL [--static 128] --output runs/barrier [--epochs 2] [--rate 4e-3] [--temperature 0.1] \
        [--seeds 0 1 2] [--together 2] [--fit=--model.chunks.tokens=512] [--mined 16 64] [--random 64 1024] \
        [--search rate] [--search-fit=--trainer.limit_train_batches=0.5] \
        [--candidates TRAIN.parquet]
    python benchmarks/batch_barrier.py --config configs/quickstart.yaml --train ... --test ... --output ...

Blocks of neighbouring rows of TRAIN become the validation part, on which temperature and rate are searched with the
first seed; TEST is scored with the exports of the chosen points only, and without ``--test`` the tables are of the
validation part, so that much may be tried before the test is looked at. ``--candidates`` ranks either among the texts
of more targets too, as the training file's, without those that are right by its pairs. Every arm passes over the same
rows equally often, and is scored after its last step. ``--static`` makes the student of MODEL's word embeddings alone,
on their leading principal axes; with ``--config``, student and teacher are that file's. A run is one ``fit`` on the
command line; those that are done are not repeated. ``--variant "NAME[@SIZE]=SETTING [SETTING ...]"`` adds a mined arm,
of 64 where no size is given, with settings of the command line changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: runs go side by side
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ranks_of import ranks_of
from safetensors.torch import load_file
from torch import Tensor

from b3_lightning.cli import main as b3
from b3_lightning.evaluation.bootstrap import paired_bootstrap
from b3_lightning.mining.store import sha256, write_atomic, write_text
from b3_lightning.model.ranks import query_metrics

METRICS = ("hit@1", "hit@10", "mrr")
_BLOCK = 100
_SEARCHED = ("temperature", "rate")
_LEFT = ("checkpoints", "plans", "cache")
"""Of a finished run: not needed for the table, and large."""


@dataclass(frozen=True)
class Arm:
    """Batches of one kind and size; ``settings`` of the command line are a variant's."""

    batches: str
    size: int
    variant: str = ""
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{'mined' if self.batches == 'b3' else 'random'}@{self.size}" + (self.variant and f" {self.variant}")


@dataclass(frozen=True)
class Point:
    """Where an arm is tried."""

    rate: float
    temperature: float


@dataclass(frozen=True)
class Bench:
    """What all runs share, and where they lie."""

    folder: Path
    config: tuple[str, ...]
    epochs: int
    start: Point
    seeds: tuple[int, ...]
    searched: tuple[str, ...]
    mining: str
    fit: tuple[str, ...] = ()
    search_fit: tuple[str, ...] = ()

    def run(self, arm: Arm, point: Point, seed: int, fit: tuple[str, ...] = ()) -> dict[str, Any]:
        """Fit, unless that is done; what the last epoch reads on the validation part. ``fit``: more settings."""
        fit = self.fit + fit
        about = {"arm": asdict(arm), "point": asdict(point), "seed": seed, "epochs": self.epochs}
        key = hashlib.sha256(json.dumps([about, self.mining, fit], sort_keys=True).encode()).hexdigest()[:8]
        name = f"{arm.name.replace(' ', '-')}-{point.rate:g}-{point.temperature:g}-{seed}-{key}"
        folder = self.folder / "runs" / name
        result = folder / "result.json"
        if not result.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            start = time.perf_counter()
            b3([*self._command(arm, point, seed), *fit, f"--run.dir={folder}"])
            rank_N = load_file(folder / "val_ranks.safetensors")["rank"]
            values = {metric: float(value_N.mean()) for metric, value_N in query_metrics(rank_N).items()}
            for left in _LEFT:
                shutil.rmtree(folder / left, ignore_errors=True)
            seconds = time.perf_counter() - start
            result.write_text(json.dumps({**about, "fit": fit, **values, "seconds": seconds, "folder": name}, indent=1))
            print(f"{arm.name} {point} seed {seed}: {values['hit@1']:.4f}, {seconds:.0f} s", flush=True)
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _command(self, arm: Arm, point: Point, seed: int) -> list[str]:
        data = self.folder / "data"
        return [
            "fit", *self.config, "--run.wandb=disabled", f"--seed_everything={seed}", f"--data.seed={seed}",
            f"--data.train_pairs={data}/train.parquet", f"--data.val_pairs={data}/val.parquet",
            f"--data.cache={self.folder}/cache/{os.getpid()}", f"--data.mining={self.mining}",
            f"--data.batches={arm.batches}", f"--data.batch_size={arm.size}", "--data.eval_batch_size=1024",
            f"--model.optim.learning_rate={point.rate}", f"--model.loss.temperature={point.temperature}",
            f"--trainer.max_epochs={self.epochs}", f"--trainer.check_val_every_n_epoch={self.epochs}",
            "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu", "--trainer.devices=1",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
            "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.ModelCheckpoint,"
            " init_args: {save_top_k: 0}}]",
            *arm.settings,
        ]  # fmt: skip

    def search(self, arm: Arm) -> tuple[Point, int]:
        """The best by MRR on the validation part, and how many points were tried.

        First the temperature, then the rate is doubled or halved for as long as that helps: the two are nearly
        independent, since Adam's steps do not depend on the size of gradients.
        """
        tried: dict[Point, float] = {}

        def value(point: Point) -> float:
            if point not in tried:
                tried[point] = self.run(arm, point, self.seeds[0], self.search_fit)["mrr"]
            return tried[point]

        best = replace(self.start, rate=self.start.rate * (arm.size / 64) ** 0.25)
        for setting in self.searched:
            for factor in (2.0, 0.5):
                while value(further := replace(best, **{setting: getattr(best, setting) * factor})) > value(best):
                    best = further
        return best, len(tried)

    def arm(self, arm: Arm) -> Searched:
        """Search with the first seed, then run the others at the best point."""
        best, n_tried = self.search(arm)
        return Searched(arm, best, n_tried, [self.run(arm, best, seed) for seed in self.seeds])


@dataclass(frozen=True)
class Searched:
    """An arm at its best, and its runs by seed."""

    arm: Arm
    best: Point
    n_tried: int
    runs: list[dict[str, Any]]


def metrics_of(bench: Bench, name: str, test: str | None, candidates: str | None = None) -> dict[str, Tensor]:
    """Metric -> (N,) of every pair of TEST by the export of a run, among its targets and those of CANDIDATES.

    Without TEST, of the validation part.
    """
    folder = bench.folder / "runs" / name
    if test is None and candidates is None:
        return query_metrics(load_file(folder / "val_ranks.safetensors")["rank"])
    test = test or f"{bench.folder}/data/val.parquet"
    return query_metrics(ranks_of(folder, test, candidates, bench.config, bench.fit))


def cut(given: argparse.Namespace, data: Path) -> None:
    """Write the part trained on, its vectors, and the validation part: whole blocks, as neighbours belong together."""
    if (data / "train.parquet").is_file():
        return
    data.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(given.train)
    block = np.arange(len(table)) // _BLOCK
    held = np.random.default_rng(0).permutation(block[-1] + 1)[: round(given.val_share * (block[-1] + 1))]
    is_val = np.isin(block, held)
    if given.vectors:
        vector = np.load(given.vectors, mmap_mode="r", allow_pickle=False)
        if vector.shape[:2] != (2, len(table)):
            raise SystemExit(f"{given.vectors} has shape {vector.shape}; {given.train} has {len(table)} rows")
        np.save(data / "train.npy", vector[:, ~is_val])
    pq.write_table(table.filter(pa.array(is_val)), data / "val.parquet")
    write_atomic(  # the last, since it says that all are there
        data / "train.parquet", lambda path: pq.write_table(table.filter(pa.array(~is_val)), path)
    )


def make_student(given: argparse.Namespace, folder: Path) -> None:
    """Copy the model, or build one of its word embeddings: of the word pieces that the part trained on holds."""
    if folder.is_dir():
        return
    if not given.static:
        shutil.copytree(given.student, folder)
        return
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from transformers import AutoModel

    weight_VD = AutoModel.from_pretrained(given.student).get_input_embeddings().weight.detach()
    described = json.loads(Tokenizer.from_file(str(Path(given.student) / "tokenizer.json")).to_str())
    described |= {"padding": None, "truncation": None, "post_processor": None}
    if described["model"]["type"] == "WordPiece":
        pairs = pq.read_table(folder.parent / "data" / "train.parquet").to_pydict()
        weight_VD = weight_VD[keep_used(described, [*pairs["qry"], *pairs["pos_text"]])]
    axis_DE = torch.linalg.eigh(weight_VD.T @ weight_VD).eigenvectors.flip(1)[:, : given.static]  # largest first
    tokenizer = Tokenizer.from_str(json.dumps(described))
    static = StaticEmbedding(tokenizer, embedding_weights=(weight_VD @ axis_DE).contiguous())
    SentenceTransformer(modules=[static, Normalize()], device="cpu").save_pretrained(str(folder))


def keep_used(described: dict[str, Any], texts: list[str]) -> list[int]:
    """Leave out word pieces that no text has, which would cost the optimiser time; ids of those that stay.

    Single characters stay, so that an unseen word falls into smaller pieces instead of none.
    """
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = described["model"]["vocab"]
    whole = Tokenizer.from_str(json.dumps(described))
    used = {token for one in whole.encode_batch(texts) for token in one.tokens}
    kept = [t for t in vocabulary if t in used or len(t.removeprefix("##")) == 1 or t in ("[PAD]", "[UNK]")]
    described["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    added = [one for one in described["added_tokens"] if one["content"] in kept]
    described["added_tokens"] = [one | {"id": kept.index(one["content"])} for one in added]
    return [vocabulary[token] for token in kept]


def mine_once(bench: Bench, settings: Sequence[str]) -> str:
    """The folder of a plan that all runs with these settings share."""
    key = hashlib.sha256(json.dumps([bench.mining, *settings]).encode()).hexdigest()[:8]
    plan, data = bench.folder / "plans" / key, bench.folder / "data"
    if not (plan / "plan.json").is_file():
        b3([
            "mine", *bench.config, f"--output={plan}", f"--data.train_pairs={data}/train.parquet",
            f"--data.cache={bench.folder}/cache/shared",
            f"--run.dir={bench.folder}", f"--data.mining={bench.mining}", "--trainer.accelerator=cpu", *settings,
        ])  # fmt: skip
    return str(plan)


def table(found: Sequence[Searched], values: Sequence[Sequence[dict[str, Tensor]]]) -> list[str]:
    """Markdown: MRR on the validation part, and what is scored; mean and deviation over seeds, in points."""
    head = ["arm", "rate", "temperature", "tried", "validation MRR", *METRICS, "s a run"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one, seeds in zip(found, values, strict=True):
        cells = [one.arm.name, f"{one.best.rate:.3g}", f"{one.best.temperature:g}", str(one.n_tried)]
        cells.append(_spread([run["mrr"] for run in one.runs]))
        cells += [_spread([float(seed[metric].mean()) for seed in seeds]) for metric in METRICS]
        cells.append(f"{mean(run['seconds'] for run in one.runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def differences(found: Sequence[Searched], values: Sequence[Sequence[dict[str, Tensor]]]) -> list[str]:
    """Markdown: mined against random batches, the mean of the seeds for each query, paired bootstrap over queries."""
    by_arm = {
        one.arm: {metric: torch.stack([seed[metric] for seed in seeds]).mean(dim=0) for metric in METRICS}
        for one, seeds in zip(found, values, strict=True)
    }
    lines = ["| mined | against | " + " | ".join(METRICS) + " |", "|---" * (2 + len(METRICS)) + "|"]
    for ours in (arm for arm in by_arm if arm.batches == "b3"):
        for other in (arm for arm in by_arm if arm.batches == "random"):
            cells = [_difference(by_arm[ours][metric], by_arm[other][metric]) for metric in METRICS]
            lines.append(f"| {ours.name} | {other.name} | " + " | ".join(cells) + " |")
    return lines


def _difference(ours_N: Tensor, other_N: Tensor) -> str:
    sure = paired_bootstrap(ours_N, other_N, generator=torch.Generator().manual_seed(0))
    return f"{100 * sure.mean:+.1f} [{100 * sure.low:+.1f}, {100 * sure.high:+.1f}]"


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("test", "candidates", "vectors", "student", "config"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--static", type=int, metavar="DIM", help="word embeddings alone, on their first so many axes")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--rate", type=float, default=4e-3, help="where the search begins at 64; by its fourth root elsewhere"
    )
    parser.add_argument("--temperature", type=float, default=0.1, help="where the search begins")
    parser.add_argument(
        "--search", nargs="*", choices=_SEARCHED, default=_SEARCHED, help="what is not named stays as given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mined", type=int, nargs="*", default=[16, 64, 256, 1024])
    parser.add_argument("--random", type=int, nargs="*", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--mining", default="{first_rank: 5, n_ranks: 100, cluster_size: 8}")
    parser.add_argument("--val-share", type=float, default=0.1)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME[@SIZE]=SETTING ...")
    parser.add_argument("--fit", action="append", default=[], metavar="SETTING", help="for every run")
    parser.add_argument("--search-fit", action="append", default=[], metavar="SETTING", help="for those of the search")
    parser.add_argument("--together", type=int, default=1, help="runs side by side")
    found = parser.parse_args(given)
    if bool(found.config) == bool(found.vectors and found.student):
        parser.error("give --vectors and --student, or --config")
    return found


def main() -> None:
    """Run what is missing, print the tables."""
    given = parse()
    bench = prepare(given)
    arms = list(arms_of(given, bench))
    with ProcessPoolExecutor(given.together, get_context("spawn")) as pool:
        found = list(pool.map(bench.arm, arms))
    values = [[metrics_of(bench, run["folder"], given.test, given.candidates) for run in one.runs] for one in found]
    print("\n".join([*table(found, values), "", *differences(found, values)]))


def prepare(given: argparse.Namespace) -> Bench:
    """Write the parts of the training file and the student, unless they are there."""
    folder = Path(given.output).resolve()
    refuse_other_settings(given, folder)
    cut(given, folder / "data")
    config: tuple[str, ...] = (f"--config={given.config}",)
    if not given.config:
        make_student(given, folder / "student")
        config = f"--model.embedder={folder}/student", f"--data.teacher={folder}/data/train.npy"
    searched = tuple(name for name in _SEARCHED if name in given.search)
    fits = tuple(given.fit), tuple(given.search_fit)
    start = Point(given.rate, given.temperature)
    return Bench(folder, config, given.epochs, start, tuple(given.seeds), searched, given.mining, *fits)


def refuse_other_settings(given: argparse.Namespace, folder: Path) -> None:
    """The runs of a folder share the parts of one file, one student and one teacher."""
    names = ("config", "train", "vectors", "student", "static", "val_share")
    settings = {name: getattr(given, name) for name in names} | {"sha256": sha256(Path(given.train))}
    told = folder / "settings.json"
    if (folder / "data").is_dir() and (not told.is_file() or json.loads(told.read_text()) != settings):
        raise SystemExit(f"{folder} was made with other settings ({told}); give --output another folder")
    write_text(told, json.dumps(settings, indent=1))


def arms_of(given: argparse.Namespace, bench: Bench) -> Iterator[Arm]:
    """Those asked for, small batches first, since they take longest; mined ones share the plan of their settings.

    With a config there is none to share: its runs mine as it says.
    """

    def plan(settings: Sequence[str]) -> tuple[str, ...]:
        return () if given.config else (f"--data.plan={mine_once(bench, settings)}",)

    default = plan([]) if given.mined else ()
    for size in sorted({*given.mined, *given.random}):
        if size in given.mined:
            yield Arm("b3", size, settings=default)
        if size in given.random:
            yield Arm("random", size)
    for variant in given.variant:
        named, given_settings = variant.split("=", 1)
        name, _, size = named.partition("@")
        settings = tuple(re.split(r" +(?=--)", given_settings))
        mining = [setting for setting in settings if setting.startswith(("--data.mining", "--data.teacher"))]
        yield Arm("b3", int(size or 64), name, (*settings, *(plan(mining) if mining else default)))


if __name__ == "__main__":
    main()
