"""Ranks of a test's pairs by the export of a run, among the test's own targets and more candidates; kept in its folder.

Shapes: N = pairs, Q = those of a tile, C = more candidates, D = dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from b3_lightning.cli import main as b3
from b3_lightning.data.pairs import Item, PairTable, load_pairs
from b3_lightning.mining.store import write_atomic
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.model.ranks import positive_ranks

_TILE = 256


def ranks_of(run: Path, test: str, candidates: str | None, config: Sequence[str], fit: Sequence[str]) -> Tensor:
    """(N,) from 0, in the order of the test's rows.

    Args:
        run: folder that holds ``export``.
        test: the pairs.
        candidates: pairs whose targets, texts, are ranked as well; those of a test's query are right for it.
        config: of the command line, the model's.
        fit: what the run was trained with; the candidates are encoded in its precision, the test in float32.
    """
    folder = run / f"test-{_short(test)}"
    ranks = folder / f"ranks-{_short(candidates)}.safetensors"
    if not ranks.is_file():
        rank_N = _rank(run / "export", folder, test, candidates, config, fit)
        write_atomic(ranks, lambda path: save_file({"rank": rank_N}, path))
    return load_file(ranks)["rank"]


def _short(path: str | None) -> str:
    return hashlib.sha256(str(path and Path(path).resolve()).encode()).hexdigest()[:8]


def _rank(
    export: Path, folder: Path, test: str, candidates: str | None, config: Sequence[str], fit: Sequence[str]
) -> Tensor:
    vectors = folder / "embeddings.safetensors"
    if not vectors.is_file():
        b3([
            "predict", *config, f"--model.embedder={export}", f"--data.test_pairs={test}",
            *fit, "--trainer.precision=32-true", f"--run.dir={folder}", "--run.wandb=disabled",
            "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
    found, pairs = load_file(vectors), load_pairs(test)
    query, target = ([pairs.items(side)[row] for row in found["row"].tolist()] for side in ("query", "target"))
    rank_N = positive_ranks(found["query"], found["target"], _keys(query), _keys(target))
    if candidates is None:
        return rank_N
    more = load_pairs(candidates)
    column = {item: index for index, item in enumerate(sorted(set(more.items("target")) - set(target)))}
    if any(item.image for item in column):
        raise SystemExit(f"{candidates} has pictures as targets; candidates are texts")
    with torch.autocast("cpu", torch.bfloat16, enabled="--trainer.precision=bf16-mixed" in fit):
        more_CD = load_embedder(str(export), LoadSettings(), None).encode(
            [item.text for item in column], batch_size=256, convert_to_tensor=True
        )
    right = [[column[item] for item in items if item in column] for items in _targets_of(query, more)]
    return rank_N + beaten_by(F.normalize(more_CD.float(), dim=1), found["query"], found["target"], right)


def beaten_by(more_CD: Tensor, query_ND: Tensor, target_ND: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """(N,) how many candidates score at least as high as a query's own target; ``right`` ones do not count."""
    counts = []
    for start in range(0, len(query_ND), _TILE):
        tile = slice(start, start + _TILE)
        score_QC = query_ND[tile] @ more_CD.T
        for score_C, columns in zip(score_QC, right[tile], strict=True):
            score_C[list(columns)] = -torch.inf
        own_Q = (query_ND[tile] * target_ND[tile]).sum(dim=1)
        counts.append((score_QC >= own_Q[:, None]).sum(dim=1))
    return torch.cat(counts)


def _targets_of(query: Sequence[Item], pairs: PairTable) -> list[list[Item]]:
    """For each of these queries, its targets among the pairs."""
    targets: dict[Item, list[Item]] = {item: [] for item in query}
    for own, target in zip(pairs.items("query"), pairs.items("target"), strict=True):
        if own in targets:
            targets[own].append(target)
    return [targets[item] for item in query]


def _keys(items: Sequence[Item]) -> Tensor:
    """(N,) equal where items are."""
    number = {item: index for index, item in enumerate(dict.fromkeys(items))}
    return torch.tensor([number[item] for item in items])
