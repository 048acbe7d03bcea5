"""The loss against references: ten lines of numpy, sentence-transformers, and one process for two."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from b3_lightning.model.loss import gather_rows, info_nce, same_key


def unit(n_rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n_rows, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def reference(query: Tensor, target: Tensor, temperature: float, ignore: Tensor) -> float:
    total = 0.0
    for row in range(len(query)):
        terms = [
            torch.exp(query[row] @ target[other] / temperature)
            for other in range(len(target))
            if other == row or not ignore[row, other]
        ]
        total -= float(torch.log(torch.exp(query[row] @ target[row] / temperature) / torch.stack(terms).sum()))
    return total / len(query)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_values_with_and_without_masks(temperature: float) -> None:
    query, target = unit(5, 0), unit(5, 1)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    some = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)) < 0.4
    for ignore in (nothing, some, ~nothing):
        found = info_nce(query, target, temperature=temperature, ignore_BG=ignore)
        assert float(found) == pytest.approx(reference(query, target, temperature, ignore), rel=1e-9, abs=1e-12)


def test_everything_but_the_positive_masked_costs_nothing() -> None:
    query, target = unit(4, 0), unit(4, 1)
    assert float(info_nce(query, target, temperature=0.1, ignore_BG=torch.ones(4, 4, dtype=torch.bool))) == 0


def test_equal_to_sentence_transformers(models: dict[str, str]) -> None:
    model = SentenceTransformer(models["bert"], device="cpu").eval()
    texts = [["a red circle", "the blue bar", "0123"], ["circle", "bar", "digits"]]
    with torch.no_grad():
        theirs = MultipleNegativesRankingLoss(model, scale=20.0)([model.preprocess(side) for side in texts], None)
        query, target = (F.normalize(model(model.preprocess(side))["sentence_embedding"], dim=1) for side in texts)
    assert float(info_nce(query, target, temperature=0.05)) == pytest.approx(float(theirs), rel=1e-5)


def test_keys_mark_equal_targets_and_other_positives_of_a_query() -> None:
    query_key, target_key = torch.tensor([0, 1, 0]), torch.tensor([5, 5, 6])
    found = same_key(query_key, query_key, target_key, target_key)
    assert found.tolist() == [[True, True, True], [True, True, False], [True, False, True]]


def _loss(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, rank: int) -> Tensor:
    query, target = F.normalize(model(x), dim=1), F.normalize(model(y), dim=1)
    key_G = gather_rows(keys)
    ignore = same_key(torch.arange(len(x)) + rank * len(x), torch.arange(len(key_G)), keys, key_G)
    return info_nce(query, gather_rows(target), temperature=0.1, first_row=rank * len(x), ignore_BG=ignore)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def _worker(rank: int, world_size: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    model = nn.parallel.DistributedDataParallel(_model())
    x, y, keys = (part.chunk(world_size)[rank] for part in (unit(12, 0), unit(12, 1), torch.arange(12) // 2))
    _loss(model, x, y, keys, rank).backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in model.parameters()], Path(folder) / "gradient.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_over_processes_equal_those_of_the_whole_batch(world_size: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, (world_size, port, str(tmp_path)), nprocs=world_size)
    model = _model()
    _loss(model, unit(12, 0), unit(12, 1), torch.arange(12) // 2, 0).backward()
    found = torch.load(tmp_path / "gradient.pt", weights_only=True)
    for expected, gradient in zip(model.parameters(), found, strict=True):
        assert expected.grad is not None
        assert torch.allclose(expected.grad, gradient, atol=1e-10, rtol=0)
