"""Ranks of a test's pairs by the export of a run, among the test's own targets and more candidates; kept in its folder.

Shapes: N = pairs, M = these and the candidates', U = distinct texts, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from b3_lightning.cli import main as b3
from b3_lightning.data.pairs import Item, load_pairs
from b3_lightning.mining.store import sha256, write_atomic
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.model.ranks import positive_ranks


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
    """By content: a file may be written anew under its name."""
    return "alone" if path is None else sha256(Path(path))[:8]


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
    target_MD = found["target"]
    if candidates is not None:
        more = load_pairs(candidates)
        query, target = query + more.items("query"), target + more.items("target")
        half = "--trainer.precision=bf16-mixed" in fit
        target_MD = torch.cat([target_MD, _encode(export, more.items("target"), half=half)])
    return positive_ranks(found["query"], target_MD, _keys(query), _keys(target))


def _encode(export: Path, items: Sequence[Item], *, half: bool) -> Tensor:
    """(N, D) unit vectors of texts; each distinct one is encoded once."""
    texts = sorted({item.text for item in items})
    if any(item.image for item in items):
        raise SystemExit("the candidates' targets are pictures; texts are needed")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        vector_UD = load_embedder(str(export), LoadSettings(), None).encode(
            texts, batch_size=256, convert_to_tensor=True
        )
    number = {text: index for index, text in enumerate(texts)}
    return F.normalize(vector_UD.float(), dim=1)[[number[item.text] for item in items]]


def _keys(items: Sequence[Item]) -> Tensor:
    """(N,) equal where items are."""
    number = {item: index for index, item in enumerate(dict.fromkeys(items))}
    return torch.tensor([number[item] for item in items])
