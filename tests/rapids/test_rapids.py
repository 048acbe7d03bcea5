"""Against the real RAPIDS packages without a device (make test-rapids): signatures, calls up to the first CUDA one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pylibcugraph")
pytest.importorskip("cugraph")

import signatures

from b3_lightning.mining import MiningSettings, gpu
from b3_lightning.mining.selftest import Planted
from b3_lightning.types import Edges

NO_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="here the calls would go through: see tests/gpu")


class OnDevice:
    """A host array that says it lies on a device: all checks pass until it is read there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._array = tensor.numpy()
        self.dtype, self.size, self.shape = self._array.dtype, self._array.size, self._array.shape
        self.__cuda_array_interface__ = {**self._array.__array_interface__, "version": 3}

    def __len__(self) -> int:
        return len(self._array)


def libraries(**tables: Any) -> gpu.Libraries:
    import pylibcugraph

    return gpu.Libraries(SimpleNamespace(from_dlpack=OnDevice), pylibcugraph, **tables)


def run(found: gpu.Libraries, algorithm: Any = "louvain") -> None:
    ids = torch.arange(9)
    edges = Edges(ids[:-1], ids[1:], torch.ones(8), 10)
    gpu.communities(edges, found, MiningSettings(communities=algorithm))


def test_the_committed_signatures_are_the_installed_ones() -> None:
    with open(signatures.PATH, encoding="utf-8") as file:
        assert json.load(file) == signatures.collect()


@NO_DEVICE
def test_pylibcugraph_takes_the_graph_up_to_the_first_cuda_call() -> None:
    with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|CUDA driver version is insufficient"):
        run(libraries())


@NO_DEVICE
def test_a_wrong_argument_does_not_get_that_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "arc_dtype", lambda *_: torch.int16)
    with pytest.raises((RuntimeError, ValueError, TypeError, KeyError)) as error:
        run(libraries())
    assert "InsufficientDriver" not in str(error.value)


@NO_DEVICE
def test_cudf_takes_the_columns_up_to_the_first_cuda_call() -> None:
    import cudf
    import cugraph

    with pytest.raises(Exception, match=r"(?i)cuda|driver|lib") as error:  # which one depends on the first call
        run(libraries(cudf=cudf, cugraph=cugraph))
    assert not isinstance(error.value, TypeError | KeyError | AttributeError)


@NO_DEVICE
def test_cuvs_takes_vectors_up_to_the_first_cuda_call(monkeypatch: pytest.MonkeyPatch) -> None:
    target_MD: Any = OnDevice(Planted.draw(64, 8).embeddings.target_ND)
    target_MD.is_cuda, target_MD.device = False, torch.device("cpu")
    with pytest.raises(Exception, match=r"(?i)cuda|driver") as error:
        gpu.CuvsTargets(target_MD)
    assert not isinstance(error.value, TypeError | KeyError | AttributeError)
