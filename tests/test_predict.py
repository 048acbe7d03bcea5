"""What is embedded for a user, over processes that share the rows, and what needs no training pairs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from b3_lightning.callbacks import EmbeddingWriter
from b3_lightning.data import PairsDataModule


def _trainer(
    rank: int, world_size: int, folder: Path, gate: threading.Barrier | None = None, device: str = "cpu"
) -> Any:
    """One of several processes, of which each is a thread."""

    def all_true(own: bool) -> bool:
        if gate is not None:
            gate.wait(timeout=10)
        return own

    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        default_root_dir=str(folder),
        strategy=SimpleNamespace(reduce_boolean_decision=all_true, root_device=torch.device(device)),
        lightning_module=SimpleNamespace(preprocess=lambda inputs: {"inputs": inputs}),
    )


@pytest.mark.parametrize(("n_rows", "world_size"), [(11, 1), (11, 3), (2, 3)])
def test_processes_share_the_rows_and_leave_one_file_of_them(
    n_rows: int, world_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "b3_lightning")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("qry,pos_text\n" + "".join(f"question {row},answer {row}\n" for row in range(n_rows)))
    gate = threading.Barrier(world_size)

    def predict(rank: int) -> list[int]:
        data = PairsDataModule(test_pairs=str(pairs), eval_batch_size=2)
        trainer: Any = _trainer(rank, world_size, tmp_path, gate)
        data.trainer = trainer
        data.setup("predict")
        rows = [batch["row_B"] for batch in data.predict_dataloader()]
        vectors = [{"row": row_B, "query": row_B[:, None] * 2.0, "target": row_B[:, None] * 3.0} for row_B in rows]
        EmbeddingWriter().write_on_epoch_end(trainer, trainer.lightning_module, vectors, [])
        return torch.cat(rows).tolist()

    with ThreadPoolExecutor(world_size) as pool:
        shares = list(pool.map(predict, range(world_size)))
    if n_rows >= world_size:
        assert sorted(row for share in shares for row in share) == list(range(n_rows))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["embeddings.safetensors"]
    path = tmp_path / "embeddings.safetensors"
    found = load_file(path)
    assert found["row"].tolist() == list(range(n_rows))
    assert f"embeddings: {path} (row, query and target of {n_rows} rows, 1 dimensions)" in caplog.text
    pairs.touch()
    assert path.stat().st_mode == pairs.stat().st_mode, "others may read it who may read other files"
    assert torch.equal(found["query"], torch.arange(n_rows)[:, None] * 2.0)
    assert torch.equal(found["target"], torch.arange(n_rows)[:, None] * 3.0)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_what_only_training_needs_is_not_read(stage: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("qry,pos_text\nquestion,answer\n")
    given: Any = {"train_pairs": "absent.csv", "teacher": "absent.npy", "plan": "absent", "n_file_negatives": 3}
    nothing: dict[str, Any] = {}
    for own in (nothing, given):
        data = PairsDataModule(val_pairs=str(pairs), test_pairs=str(pairs), batch_size=3, **own)
        data.setup(stage)
        assert data.modalities() == {"text"}
        assert data.n_tasks == 1


def test_batches_are_pinned_where_there_is_a_gpu_and_prefetched_as_set(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("qry,pos_text\nquestion,answer\n")

    def loader(device: str, **settings: Any) -> Any:
        data = PairsDataModule(val_pairs=str(pairs), **settings)
        data.trainer = _trainer(0, 1, tmp_path, device=device)
        data.setup("validate")
        return data.val_dataloader()

    assert loader("cuda").pin_memory
    assert not loader("cuda", pin_memory=False).pin_memory
    assert not loader("cpu").pin_memory
    assert loader("cpu", num_workers=2, prefetch_factor=5).prefetch_factor == 5
    with pytest.raises(ValueError, match=r"data.prefetch_factor=5 .* set data.num_workers=0 above 0"):
        PairsDataModule(prefetch_factor=5)
