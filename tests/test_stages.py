"""Nothing is lost: finished parts outlive a kill, are checked when read, and are shared out over processes."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stages_worker import SETTINGS, mine_in, vectors
from torch import Tensor

from b3_lightning.data.splits import Split
from b3_lightning.data.teacher import PairEncoder, encoder_fingerprint, map_rows
from b3_lightning.mining import MinedPlan, MiningSettings, Processes, Stages, fingerprint, mine, neighbors
from b3_lightning.mining.stages import Stage
from b3_lightning.model.embedder import LoadSettings, load_embedder
from b3_lightning.types import Embeddings


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "TILE_ROWS", 20)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts that were computed and kept."""
    parts: list[int] = []
    put = Stage.put

    def count(stage: Stage, part: int, tensors: dict[str, Tensor]) -> None:
        parts.append(part)
        put(stage, part, tensors)

    monkeypatch.setattr(Stage, "put", count)
    return parts


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
sys.path.insert(0, sys.argv[2])
import stages_worker
from b3_lightning.mining import neighbors
from b3_lightning.mining.stages import Stage
neighbors.TILE_ROWS = 20
put = Stage.put
def dying(stage, part, tensors):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    put(stage, part, tensors)
Stage.put = dying
for left in map(int, sys.argv[3:]):  # a process each, which need not import everything again
    child = os.fork()
    if child == 0:
        stages_worker.mine_in(Path(sys.argv[1]))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.mark.usefixtures("small_tiles")
def test_a_killed_run_goes_on_and_computes_no_finished_tile_twice(tmp_path: Path, computed: list[int]) -> None:
    expected = mine(vectors(200), vectors(200, seed=1), settings=SETTINGS, target_keys=range(200))
    computed.clear()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), "3", "0", "4"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = mine_in(tmp_path)
    assert computed == [7, 8, 9]
    assert torch.equal(found.clusters.ids_CK, expected.clusters.ids_CK)
    assert torch.equal(found.neighbors.scores_NW, expected.neighbors.scores_NW)


SHARED = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
import stages_worker
from b3_lightning.mining import Processes, Stages, help_mine, mine, neighbors
from b3_lightning.mining.stages import Stage
neighbors.TILE_ROWS = 20
dist.init_process_group("gloo")
rank, put = dist.get_rank(), Stage.put
def told(stage, part, tensors):
    os.write(1, f"process {rank} computed {part}\\n".encode())  # at once: processes share the output
    put(stage, part, tensors)
Stage.put = told
def all_true(mine):
    told = torch.tensor(int(mine))
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)
folder = Path(sys.argv[1])
about = {"settings": stages_worker.SETTINGS, "target_keys": range(200), "tasks": ["a", "b"] * 100}
about["stages"] = Stages(folder / "stages", Processes(rank, dist.get_world_size(), all_true))
vectors = stages_worker.vectors(200), stages_worker.vectors(200, seed=1)
if rank == 0:
    mine(*vectors, **about).save(folder / "plan")
else:
    help_mine(*vectors, **about)
dist.destroy_process_group()
"""


@pytest.mark.usefixtures("small_tiles")
def test_two_processes_under_torchrun_make_the_plan_of_one(tmp_path: Path) -> None:
    expected = mine(
        vectors(200), vectors(200, seed=1), settings=SETTINGS, target_keys=range(200), tasks=["a", "b"] * 100
    )
    (tmp_path / "shared.py").write_text(SHARED)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(tmp_path / "shared.py"), str(tmp_path), str(Path(__file__).parent),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank, parts in ((0, (0, 2, 4)), (1, (1, 3))):
        for part in parts:
            assert done.stdout.count(f"process {rank} computed {part}\n") == 2  # once for each task
    assert done.stdout.count("computed") == 10
    found = MinedPlan.load(tmp_path / "plan")
    assert torch.equal(found.clusters.ids_CK, expected.clusters.ids_CK)
    assert torch.equal(found.neighbors.ids_NW, expected.neighbors.ids_NW)
    assert torch.equal(found.neighbors.scores_NW, expected.neighbors.scores_NW)


@pytest.mark.usefixtures("small_tiles")
def test_a_second_run_reuses_what_is_valid_and_says_so(
    tmp_path: Path, computed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    mine_in(tmp_path)
    computed.clear()
    with caplog.at_level(logging.INFO):
        mine_in(tmp_path, settings=MiningSettings(first_rank=2, n_ranks=5, cluster_size=8, communities="leiden"))
    assert computed == []  # the same seven ranks are needed
    assert "neighbours: 10 of 10 parts are finished" in caplog.text
    for change in ({"settings": MiningSettings(first_rank=1, n_ranks=7, cluster_size=4)}, {"query_keys": [0] * 200}):
        computed.clear()
        mine_in(tmp_path, **change)
        assert len(computed) == 10
    computed.clear()
    query = vectors(200)
    query[17, 3] += 1e-3
    mine(query, vectors(200, seed=1), settings=SETTINGS, target_keys=range(200), stages=Stages(tmp_path))
    assert len(computed) == 10


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another stage"])
def test_a_damaged_part_is_named_and_computed_again(
    tmp_path: Path, computed: list[int], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = mine_in(tmp_path)
    paths = sorted(tmp_path.glob("neighbours-*/part-*.safetensors"))
    content = bytearray(paths[4].read_bytes())
    if damage == "truncated":
        paths[4].write_bytes(content[:-5])
    elif damage == "flipped":
        content[-3] ^= 1
        paths[4].write_bytes(content)
    else:
        other = Stages(tmp_path).stage("neighbours", "another")
        other.put(4, {"ids_QW": torch.zeros(20, 7, dtype=torch.int64), "scores_QW": torch.zeros(20, 7)})
        paths[4].write_bytes((tmp_path / "neighbours-another" / paths[4].name).read_bytes())
    computed.clear()
    again = mine_in(tmp_path)
    assert computed == [4]
    assert f"{paths[4]} is truncated, changed or of another version" in caplog.text
    assert torch.equal(again.neighbors.ids_NW, expected.neighbors.ids_NW)


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, payload: bytes) -> None:
        with path.open("wb") as file:
            file.write(payload[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*part-000000.*No space left.*is kept: mend this and run again"):
        mine_in(tmp_path)
    assert [path.name for path in tmp_path.rglob("*part*")] == []


def test_a_second_run_waits_for_the_lock_and_says_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = []

    def second() -> None:
        with Stages(tmp_path).locked():
            order.append("second")

    with Stages(tmp_path).locked():
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 10
        while "is in use by" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"waiting: {tmp_path} is in use by process {os.getpid()} on" in caplog.text


def test_every_process_takes_its_share_and_a_missing_share_is_an_error(tmp_path: Path) -> None:
    shares = [Stages(tmp_path, Processes(rank, 2)).stage("s", "f") for rank in (0, 1)]
    assert [share.missing(5) for share in shares] == [[0, 2, 4], [1, 3]]
    for part in shares[0].missing(5):
        shares[0].put(part, {"x": torch.tensor([part])})
    with pytest.raises(FileNotFoundError, match="all processes must see one folder"):
        list(shares[0].collect(5))
    for part in shares[1].missing(5):
        shares[1].put(part, {"x": torch.tensor([part])})
    assert [int(tensors["x"]) for tensors in shares[1].collect(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="give a folder"):
        Stages(None, Processes(0, 2))


def test_a_fingerprint_tells_contents_apart() -> None:
    base = fingerprint(x=torch.zeros(2, 3), n=1)
    others = [
        fingerprint(x=torch.zeros(3, 2), n=1),
        fingerprint(x=torch.zeros(2, 3, dtype=torch.float64), n=1),
        fingerprint(x=torch.zeros(2, 3), n=2),
        fingerprint(y=torch.zeros(2, 3), n=1),
    ]
    assert len({base, *others}) == 5
    assert fingerprint(n=1, x=torch.zeros(2, 3)) == base


def test_an_encoder_s_fingerprint_follows_weights_lengths_and_image_settings(models: dict[str, str]) -> None:
    def of(name: str, **load: object) -> str:
        return encoder_fingerprint(load_embedder(models[name], LoadSettings(**load), None))  # type: ignore[arg-type]

    assert of("bert") == of("bert") != of("bert", max_seq_length=7)
    assert of("bert") != of("bert", attn_implementation="eager")
    changed = load_embedder(models["bert"], LoadSettings(), None)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    assert encoder_fingerprint(changed) != of("bert")
    pixels = [
        of("qwen2_vl", pooling="lasttoken", min_pixels=4 * 784, max_pixels=n * 784) for n in (8, 16)
    ]  # fmt: skip
    assert pixels[0] != pixels[1]


def test_the_vectors_of_all_rows_are_one_file_that_every_process_maps(tmp_path: Path) -> None:
    item_UD = torch.from_numpy(vectors(5))
    position_2N = torch.tensor([[4, 0, 0, 2], [1, 3, 2, 0]])
    stage = Stages(tmp_path).stage("vectors", "f" * 16)
    for part, vector_PD in enumerate(item_UD.split(3)):
        stage.put(part, {"vector_UD": vector_PD})
    found = map_rows(stage, 2, position_2N)
    expected = Embeddings.from_arrays(item_UD[position_2N[0]], item_UD[position_2N[1]])
    assert torch.equal(found.query_ND, expected.query_ND)
    assert torch.equal(found.target_ND, expected.target_ND)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("rows.npy")]
    assert mapped, "a copy of its own costs every process the memory of all vectors"


def test_rows_whose_vector_cannot_be_scaled_are_named(tmp_path: Path) -> None:
    stage = Stages(tmp_path).stage("vectors", "f" * 16)
    stage.put(0, {"vector_UD": torch.tensor([[1.0, 0.0], [0.0, 0.0]])})
    with pytest.raises(ValueError, match=r"target vectors hold NaN, infinity or only zeros in row\(s\) 1, 2; embed"):
        map_rows(stage, 1, torch.tensor([[0, 0, 0], [0, 1, 1]]))


def test_a_model_s_fingerprint_holds_one_weight_whole_and_tells_dtypes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    class Cut:
        """Stands for a weight that lies in pieces on several processes."""

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

        def full_tensor(self) -> torch.Tensor:
            assert not [one for one in made if one() is not None], "another weight is still whole"
            whole = self.weight.clone()
            made.append(weakref.ref(whole))
            return whole

    def of(weights: dict[str, Any]) -> str:
        return encoder_fingerprint(
            SimpleNamespace(named_modules=list, state_dict=lambda: weights, prompts={}, max_seq_length=None)
        )

    monkeypatch.setattr("b3_lightning.data.teacher.DTensor", Cut)
    weights = {name: torch.zeros(4, 3) for name in "abc"}
    assert of({name: Cut(weight) for name, weight in weights.items()}) == of(weights)
    assert len(made) == 3
    assert of({**weights, "a": torch.zeros(3, 4).T}) == of(weights), "strides are no content"
    others = [
        of({**weights, "a": torch.zeros(4, 3, dtype=torch.bfloat16)}),
        of({**weights, "a": torch.zeros(3, 4)}),
        of({**weights, "a": torch.ones(4, 3)}),
        of({"b": weights["a"], "c": weights["b"], "d": weights["c"]}),
    ]
    assert len({of(weights), *others}) == 5


def test_pictures_under_other_names_keep_their_vectors(tmp_path: Path) -> None:
    class Mean:
        def preprocess(self, inputs: list[Any]) -> dict[str, torch.Tensor]:
            texts = [isinstance(one, str) for one in inputs]
            values = [
                [1.0, 2.0, float(ord(one[-1]))] if is_text else np.asarray(one).reshape(-1, 3).mean(axis=0).tolist()
                for one, is_text in zip(inputs, texts, strict=True)
            ]
            return {"mean": torch.tensor(values)}

    def embed(features: list[Any]) -> torch.Tensor:
        vector_PD = torch.cat([tensors["mean"] for _, tensors in features])
        return vector_PD[torch.cat([position_P for position_P, _ in features]).argsort()]

    def encode(names: str, cache: str) -> torch.Tensor:
        folder = tmp_path / names
        folder.mkdir(exist_ok=True)
        for index, name in enumerate(names):
            Image.new("RGB", (4, 4), (40 * index + 10, 255 - 40 * index, 5)).save(folder / f"{name}.png")
        columns = {"qry_image_path": [f"{name}.png" for name in names], "pos_text": ["t1", "t2", "t3", "t4"]}
        pq.write_table(pa.table(columns), folder / "pairs.parquet")
        split = Split.read(str(folder / "pairs.parquet"), folder, "decode")
        encoder = PairEncoder(split.pairs, folder, split.contents, "32", 8, 0, Stages(tmp_path / cache))
        return encoder.encode(Mean(), embed, "model").query_ND.clone()

    assert torch.equal(encode("abcd", "kept"), encode("dcba", "kept"))
    assert torch.equal(encode("dcba", "kept"), encode("dcba", "fresh"))
