"""Comparing runs: the offline W&B file against metrics.csv, a server that is faked, intervals, the page."""

from __future__ import annotations

import csv
import math
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from browser import CHROMIUM, Browser
from conftest import Run as Fit
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from b3_lightning import MiningSettings, mine
from b3_lightning.cli import main
from b3_lightning.evaluation.bootstrap import PairedDifference, paired_bootstrap
from b3_lightning.model.metrics import RetrievalMetrics
from b3_lightning.model.ranks import rank_metrics
from b3_lightning.reports.compare import SHOWN, Comparison, _table, significance
from b3_lightning.reports.offline import is_number, read_offline_run
from b3_lightning.reports.record import keep_old_metrics
from b3_lightning.reports.runs import Ranks, Run, load_runs, read_csv_run

SMALL = "--model.embedder={hidden_sizes: [8, 16], image_size: 32}"


def test_an_offline_file_holds_what_metrics_csv_holds_and_the_plans_page(fit: Fit, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).standard_normal((2, 96, 8)))
    run = fit(
        "image-text", SMALL, f"--data.teacher={vectors}", "--run.wandb=offline", "--trainer.log_every_n_steps=2",
        "--hardness.every_n_steps=3", "--report.limits={n_clusters: 3}",
    )  # fmt: skip
    wandb.finish()
    wandb.teardown()  # else it is the end of the process that surely empties W&B's queue
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    (offline,), (local,) = load_runs([str(file)]), load_runs([str(run)])
    kept = [row for row in offline.rows if set(row) != {"step"}]  # the others hold a table, pictures, the page
    assert len(kept) == len(local.rows) > 8
    for theirs, ours in zip(kept, local.rows, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6)
    assert offline.config == local.config | {key: offline.config[key] for key in offline.config.keys() - local.config}
    assert "ckpt_path" not in offline.config, "of one start alone"
    assert offline.config["data.batch_size"] == local.config["data.batch_size"] == 16
    validations = [row for row in local.rows if "val/mrr" in row]
    assert [row["train/rows_seen"] for row in validations] == [96, 192]
    page = run / "plans" / "epoch-0000" / "report.html"
    assert "3 of 24 clusters" in page.read_text()
    (report,) = [row["mining/report"] for row in read_offline_run(file).history if "mining/report" in row]
    assert (file.parent / "files" / report["path"]).read_text() == page.read_text()
    _kept_ranks_are_those_of_the_best_epoch(run, validations)


def _kept_ranks_are_those_of_the_best_epoch(run: Path, validations: list[dict[str, float]]) -> None:
    with safe_open(run / "val_ranks.safetensors", "pt") as kept:
        values = rank_metrics(kept.get_tensor("rank"))
        assert kept.get_tensor("row").tolist() == list(range(96))
        step = kept.metadata()["step"]
    best = max(validations, key=lambda row: row["val/mrr"])
    assert int(step) == best["step"] + 1
    for name in ("hit@1", "mrr", "ndcg@10"):
        assert float(values[name]) == pytest.approx(best[f"val/{name}"], abs=1e-6)


def _block(*pieces: tuple[int, bytes]) -> bytes:
    return b"".join(
        struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
        for kind, piece in pieces
    )


def _history(**values: str) -> bytes:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    for key, value in values.items():
        item = record.history.item.add()
        item.nested_key.append(key)
        item.value_json = value
    return bytes(record.SerializeToString())


def test_records_over_blocks_a_cut_end_and_damage(tmp_path: Path) -> None:
    path, head = tmp_path / "run-x.wandb", b":W&B\xe1\xbe\x00"
    long = _history(a="1.5", text='"' + "x" * 40_000 + '"')
    room = 2**15 - len(head) - 7 - 3  # three bytes are left in the block: too few for a header, so they are padding
    first = head + _block((2, long[:room])) + b"\0\0\0" + _block((4, long[room:]))
    path.write_bytes(first + _block((1, _history(a='"NaN"', b="2"))) + _block((1, _history(a="9")))[:-1])
    run = read_offline_run(path)
    assert [row["a"] for row in run.history][:1] == [1.5]
    assert len(run.history) == 2
    assert math.isnan(run.history[1]["a"])
    assert not is_number(run.history[1]["a"])
    path.write_bytes(first[:100] + b"?" + first[101:])
    with pytest.raises(ValueError, match="is damaged at byte 7"):
        read_offline_run(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a file of W&B"):
        read_offline_run(path)


def _run(folder: Path, values: dict[str, list[float]], config: dict[str, Any], ranks: list[int] | None = None) -> Path:
    """A run's folder, as ``fit`` leaves it."""
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(values), *zip(*values.values(), strict=True)])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if ranks is not None:
        tensors = {"row": torch.arange(len(ranks)), "rank": torch.tensor(ranks)}
        save_file(tensors, folder / "val_ranks.safetensors", metadata={"pairs": "same", "step": "1"})
    return folder


def _two_runs(root: Path) -> list[str]:
    steps: dict[str, list[float]] = {"step": [10, 20, 30], "val/hit@1": [0.1, 0.3, 0.2]}
    known = {"train/rows_seen": [160.0, 320, 480], "train/seconds": [1.0, 2, 3]}
    one = _run(root / "one" / "run", steps | known | {"val/mrr": [0.2, 0.5, 0.4]},
               {"data": {"batch_size": 16, "batches": "random"}}, [3] * 150 + [1] * 50)  # fmt: skip
    other = _run(root / "other" / "run", steps | {"val/mrr": [0.3, 0.6, 0.7]},
                 {"data": {"batch_size": 8, "batches": "b3", "note": "<b>&"},
                  "trainer": {"accumulate_grad_batches": 2}}, [0] * 150 + [1] * 50)  # fmt: skip
    return [str(one), str(other)]


def test_runs_of_one_name_are_told_apart_also_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _two_runs(tmp_path)
    monkeypatch.chdir(tmp_path / "one" / "run")
    assert [run.name for run in load_runs([".", "../../other/run"])] == ["one/run", "other/run"]


def test_two_runs_are_printed_with_interval_settings_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    runs = _two_runs(tmp_path)
    main(["compare", *runs, "--output", str(tmp_path / "page.html")])
    said = " ".join(capsys.readouterr().out.split())
    assert "one/run" in said
    assert "other/run" in said
    assert "│ val/mrr │ 0.5000 │ 0.7000 │" in said
    assert "│ steps │ 21 │ 31 │" in said  # at the best MRR; logged steps count from 0
    assert "data.batches" in said
    assert "points above one/run, both at their best val/mrr; 95% over 200 queries" in said
    assert "+56.25 [" in said  # MRR: 150 of 200 queries go from 1/4 to 1
    assert "better" in said
    page = (tmp_path / "page.html").read_text()
    assert "<h1>2 runs compared</h1>" in page
    assert page.count("<svg") == 6  # two metrics against steps, rows and seconds
    assert page.count("Not logged by other/run.") == 4  # rows and seconds
    assert "&lt;b&gt;&amp;" in page
    assert "<script" not in page


def test_a_loss_is_best_where_it_is_lowest_and_many_runs_stand_below_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    values: dict[str, list[float]] = {"step": [1, 2, 3], "val/loss": [3.0, 1.5, 2.0]}
    runs = [str(_run(tmp_path / f"run-{index}", values, {"seed": index})) for index in range(8)]
    main(["compare", *runs, "--metric=val/loss"])
    said = capsys.readouterr().out
    assert sum("run-" in line and "1.5000" in line for line in said.splitlines()) == 8
    assert "no interval for run-7: no val_ranks.safetensors of run-0 and run-7" in " ".join(said.split())


def test_a_run_that_has_not_validated_yet_is_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = _two_runs(tmp_path)
    going = _run(tmp_path / "going[1]", {"step": [1, 2], "train/loss": [3.0, 2.0]}, {})
    main(["compare", str(going), one, other])
    said = " ".join(capsys.readouterr().out.split())
    assert "left out, 1 of 3 runs hold no val/mrr: going[1]" in said
    assert "points above one/run" in said
    with pytest.raises(SystemExit, match=r"holds no val/mrr: it has not validated yet, or has no data.val_pairs"):
        main(["compare", str(going)])


def test_a_metric_that_all_runs_hold_is_named(tmp_path: Path) -> None:
    runs = [str(_run(tmp_path / name, {"step": [1], "val/mrr": [0.5]}, {})) for name in ("a", "b")]
    with pytest.raises(SystemExit, match=r"no run holds val/ndcg@10; all hold val/mrr: --metric=val/mrr"):
        main(["compare", *runs, "--metric=val/ndcg@10"])


def test_what_the_plans_were_mined_with_that_runs_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, runs = torch.Generator().manual_seed(0), []
    for n_ranks in (4, 6):
        plan = tmp_path / f"plan-{n_ranks}"
        vectors = (torch.randn(20, 8, generator=generator) for _ in range(2))
        mine(*vectors, settings=MiningSettings(first_rank=1, n_ranks=n_ranks, cluster_size=4)).save(plan)
        config = {"data": {"plan": str(plan)}}
        runs.append(str(_run(tmp_path / f"run-{n_ranks}", {"step": [1], "val/mrr": [0.5]}, config)))
    differing = Comparison.of(load_runs(runs), "val/mrr").differing
    assert differing["n_ranks of data.plan"] == ["4", "6"]
    assert set(differing) == {"data.plan", "n_ranks of data.plan"}


def test_what_a_full_disk_or_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = _run(tmp_path / "cut", {"step": [1, 2], "val/mrr": [0.25, 0.75]}, {})
    path = folder / "metrics.csv"
    path.write_text(path.read_text().rstrip()[:-1])
    (folder / "config.yaml").write_text("")
    run = read_csv_run(folder)
    assert [row["val/mrr"] for row in run.rows] == [0.25]
    keep_old_metrics(folder)
    assert [part.name for part in folder.glob("*.csv")] == ["metrics-until-00000001-0.csv"]
    assert load_runs([str(folder)])[0].rows == run.rows  # resumed, and nothing logged since


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"data: {batch_size: [1"),
        ("config.yaml", b"- a list\n"),
        ("metrics.csv", b"step,val/mrr\n1,half\n"),
        ("metrics.csv", b"step,val/mrr\n1,0.5,0.7\n"),
        ("val_ranks.safetensors", b"cut off"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    one, other = _two_runs(tmp_path)
    (Path(one) / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name} is (damaged|no config)"):
        main(["compare", str(one), str(other)])


def test_steps_are_counted_alike_in_table_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _run(tmp_path / "run", {"step": [0, 1], "val/mrr": [0.25, 0.5]}, {})
    assert load_runs([str(folder)])[0].points("val/mrr", "step") == [(1, 0.25), (2, 0.5)]
    main(["compare", str(folder)])
    assert re.search(r"steps\D+2\b", capsys.readouterr().out)


def test_steps_that_were_made_anew_count_as_they_came_then(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", {"step": [1, 3, 5], "val/mrr": [0.25, 0.5, 0.75]}, {})
    again: list[dict[str, list[float]]] = [{"step": [4], "val/mrr": [0.3]}, {"step": [3, 4], "val/mrr": [0.4, 0.2]}]
    for start, values in enumerate(again):
        keep_old_metrics(folder)
        made = _run(tmp_path / str(start), values, {})
        (made / "metrics.csv").rename(folder / "metrics.csv")
    assert len(list(folder.glob("metrics-until-*.csv"))) == 2
    assert [(row["step"], row["val/mrr"]) for row in read_csv_run(folder).rows] == [(1, 0.25), (3, 0.4), (4, 0.2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}", "--output=page.png"], "must end in .html"),
        (["{one}", "--metric=val/absent"], "holds no val/absent: it has val/hit@1, val/mrr"),
        (["nowhere"], "nowhere is not there .looked from .*name the folder of a run"),
        (["."], "holds neither metrics.csv nor a .wandb file"),
        (["wandb:project"], "wandb:ENTITY/PROJECT"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    one, _ = _two_runs(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["compare", *(argument.format(one=one) for argument in arguments)])


class FakeApi:
    """What ``wandb.Api`` is asked for."""

    def __init__(self) -> None:
        rows = [
            {
                "trainer/global_step": 10,
                "val/mrr": 0.5,
                "train/seconds": 4.0,
                "_runtime": 5.0,
                "_step": 0,
                "train/loss": None,
            },
            {"trainer/global_step": 20, "val/mrr": 0.4, "_runtime": 9.0, "_step": 1, "picture": {"_type": "image"}},
        ]
        self.found = [
            SimpleNamespace(
                name=name, id=name, config={"data": {"batch_size": size}, "_wandb": {"x": 1}},
                url=f"https://wandb.example/me/shop/runs/{name}", scan_history=lambda: iter(rows),
            )
            for name, size in (("first", 16), ("second", 64))
        ]  # fmt: skip
        crashed = SimpleNamespace(name="crashed", id="crashed", config={}, url="https://wandb.example/me/shop/runs/x",
                                  scan_history=lambda: iter([]))  # fmt: skip
        self.found.append(crashed)

    def runs(self, path: str) -> list[Any]:
        assert path == "me/shop"
        return self.found

    def run(self, path: str) -> Any:
        return next(run for run in self.found if path == f"me/shop/{run.id}")


def test_runs_of_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("wandb.Api", FakeApi)
    one, other, _ = load_runs(["wandb:me/shop"])
    assert one.rows == [{"step": 10, "val/mrr": 0.5, "train/seconds": 4.0}, {"step": 20, "val/mrr": 0.4}]
    assert other.config == {"data.batch_size": 64}
    assert [run.name for run in load_runs(["wandb:me/shop/second"])] == ["second"]
    main(["compare", "wandb:me/shop", "--output", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert "left out, 1 of 3 runs hold no val/mrr: crashed" in said
    assert "left out, 1 of 3 runs hold no val/mrr: crashed" in (tmp_path / "page.html").read_text()
    assert "W&B workspace: https://wandb.example/me/shop/workspace" in said
    assert "data.batch_size" in said
    assert 'href="https://wandb.example/me/shop/workspace"' in (tmp_path / "page.html").read_text()


def test_a_server_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr("wandb.Api", refuse)
    with pytest.raises(SystemExit, match="W&B does not give wandb:me/shop: api_key not configured"):
        main(["compare", "wandb:me/shop"])


def test_ranks_of_other_pairs_are_not_compared() -> None:
    ranks = Ranks(torch.arange(3), torch.tensor([0, 1, 2]), "a")
    one = Run("one", "one", {}, [], ranks)
    assert "different pairs" in significance(one, Run("b", "b", {}, [], Ranks(ranks.row_N, ranks.rank_N, "c"))).why_not
    fewer = Ranks(ranks.row_N[:2], ranks.rank_N[:2], "a")
    assert "different pairs" in significance(one, Run("b", "b", {}, [], fewer)).why_not
    same = significance(one, Run("b", "b", {}, [], ranks))
    assert [tuple(one) for one in same.differences.values()] == [(0, 0, 0), (0, 0, 0)]
    with pytest.raises(ValueError, match="holds no val/mrr"):
        Comparison.of([one], "val/mrr")


def test_the_bootstrap_by_hand_and_against_the_normal_approximation() -> None:
    def bootstrap(a: torch.Tensor, b: torch.Tensor) -> PairedDifference:
        return paired_bootstrap(a, b, n_draws=4000, generator=torch.Generator().manual_seed(1))

    assert bootstrap(torch.full((9,), 0.75), torch.full((9,), 0.5)) == (0.25, 0.25, 0.25)
    generator = torch.Generator().manual_seed(0)
    b = torch.rand(3000, generator=generator)
    a = b + 0.02 + 0.3 * torch.randn(3000, generator=generator)
    mean, low, high = bootstrap(a, b)
    spread = 1.96 * float((a - b).std()) / 3000**0.5
    assert mean == pytest.approx(float((a - b).mean()), abs=1e-6)
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.1 * spread)
    assert bootstrap(b, a) == pytest.approx((-mean, -high, -low), abs=1e-6)
    with pytest.raises(ValueError, match="the same ones"):
        bootstrap(a, b[:5])


def test_ranks_are_those_of_the_rows_in_order() -> None:
    metrics = RetrievalMetrics()
    query, target = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    for rows in ([2, 1], [0, 2]):  # row 2 comes twice
        index = torch.tensor(rows)
        keys = {f"{name}_B": index for name in ("row", "query_key", "target_key")}
        metrics.update(query[index], target[index], **keys, group_key_B=torch.full_like(index, -1))
    metrics.compute()
    assert metrics.rank_of_row_N2.tolist() == [[0, 0], [1, 2], [2, 2]]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    main(["compare", *_two_runs(tmp_path), "--output", str(tmp_path / "page.html")])
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        browser.call("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.ask("document.documentElement.scrollWidth") <= 375
        assert browser.ask("document.querySelectorAll('svg .line').length") >= 8
        assert browser.errors == []
        assert {url.split(":")[0] for url in browser.requests} == {"file"}


def test_nothing_is_cut_off_on_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"a-run-with-a-long-name-{index}" for index in range(6)]
    keys = [f"remine.a_long_name_{index}" for index in range(5)]
    values: dict[str, list[float]] = {"step": [1, 2], **{name: [0.5, 0.75] for name in (*SHOWN, "val/mrr")}}
    runs = [str(_run(tmp_path / name, values, dict.fromkeys(keys, index))) for index, name in enumerate(names)]
    main(["compare", *runs])
    said = capsys.readouterr().out
    assert "…" not in said
    for word in (*names, *keys, *SHOWN):
        assert word in said
    assert max(map(len, said.splitlines())) <= 80


def test_what_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for names in (["[red] run"], ["[red] run"] * 9):
        console = Console()
        console.print(_table(console, "t", "setting", names, {"model.lora.target_modules": ["[q_proj]"] * len(names)}))
        said = capsys.readouterr().out
        assert "[red] run" in said
        assert "[q_proj]" in said
