"""A plan's batches in files for other trainers, and the audit of somebody else's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk

from b3_lightning import MinedPlan, MiningSettings, mine
from b3_lightning.cli import main
from b3_lightning.data.ordered import add_batch_column, read_sources

N_ROWS = 70


@pytest.fixture
def plan(tmp_path: Path) -> MinedPlan:
    """A plan on disk and the two files of its pairs, of which the second lacks a column."""
    query_ND, target_ND = np.random.default_rng(0).normal(size=(2, N_ROWS, 16))
    mined = mine(query_ND, target_ND, settings=MiningSettings(first_rank=1, n_ranks=10, cluster_size=4))
    mined.save(tmp_path / "plan")
    text = {"qry": [f"q{row}" for row in range(N_ROWS)], "pos_text": [f"t{row}" for row in range(N_ROWS)]}
    table = pa.table({**text, "extra": list(range(N_ROWS))})
    pq.write_table(table[:30], tmp_path / "first.parquet")
    pq.write_table(table[30:].select(["qry", "pos_text"]), tmp_path / "second.parquet")
    return mined


def _batches(folder: Path, output: str, *more: str) -> None:
    pairs = [str(folder / name) for name in ("first.parquet", "second.parquet")]
    main(["batches", str(folder / "plan"), "--pairs", *pairs, f"--output={folder / output}", "--batch_size=16", *more])


def test_rows_in_batch_order(plan: MinedPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _batches(tmp_path, "out.parquet", "--epochs=3", "--seed=5")
    written = pq.read_table(tmp_path / "out.parquet").to_pydict()
    expected = [plan.batches(batch_size=16, seed=5).epoch(epoch) for epoch in range(3)]
    assert written["row"] == torch.cat(expected).flatten().tolist()
    assert written["batch"] == [batch for batch in range(13) for _ in range(16)], "4, 4 and 5 batches"
    assert written["epoch"] == [0] * 64 + [1] * 64 + [2] * 80
    assert written["qry"] == [f"q{row}" for row in written["row"]]
    assert written["extra"] == [row if row < 30 else None for row in written["row"]]
    cluster_N = plan.clusters.cluster_of_row()
    assert written["cluster"] == cluster_N[torch.tensor(written["row"])].tolist()
    said = capsys.readouterr().out
    assert "13 batches of 16 in 208 rows" in said
    assert "2 rows fill none" in said
    assert "only the number of pairs was checked" in said


def test_rows_in_their_own_order_with_a_column(plan: MinedPlan, tmp_path: Path) -> None:
    _batches(tmp_path, "folder", "--column")
    loaded = load_from_disk(str(tmp_path / "folder"))
    assert loaded["qry"][:] == [f"q{row}" for row in range(N_ROWS)]
    batch_N = torch.tensor(loaded["batch"][:])
    for batch, ids_B in enumerate(plan.batches(batch_size=16, seed=0).epoch(0)):
        assert torch.equal((batch_N == batch).nonzero().flatten(), ids_B.sort().values)
    assert int((batch_N == -1).sum()) == 6
    added = add_batch_column(Dataset.from_dict({"qry": loaded["qry"][:]}), plan, batch_size=16)
    assert added["batch"][:] == batch_N.tolist()
    assert added["cluster"][:] == loaded["cluster"][:] == plan.clusters.cluster_of_row().tolist()


def test_hard_negatives_of_a_plan_are_written_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, N_ROWS, 16))
    chosen = MiningSettings(first_rank=1, n_ranks=3, cluster_size=4, n_negatives=2, negatives_of="row")
    mined = mine(*vectors, settings=chosen, tasks=["a"] * 40 + ["b"] * 30)
    mined.save(tmp_path / "plan")
    pairs = pa.table({"anchor": [f"q{row}" for row in range(N_ROWS)], "positive": [f"t{r}" for r in range(N_ROWS)]})
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    for path, part in zip(paths, (pairs[:40], pairs[40:]), strict=True):
        pq.write_table(part, path)
    command = ["batches", str(tmp_path / "plan"), "--batch_size=16", "--pairs"]
    main([*command, *paths, f"--output={tmp_path / 'without.parquet'}"])
    assert "the plan's 2 hard negatives a row are left out: --negatives writes them" in capsys.readouterr().out
    main([*command, *paths, "--negatives", "--column", f"--output={tmp_path / 'with.parquet'}"])
    written = pq.read_table(tmp_path / "with.parquet").to_pydict()
    expected = [[f"t{other}" if other >= 0 else None for other in row] for row in mined.negative_NH.tolist()]
    assert list(zip(written["negative_1"], written["negative_2"], strict=True)) == list(map(tuple, expected))
    n_lacking = sum(other is None for row in expected for other in row)
    assert 0 < n_lacking < 2 * N_ROWS
    assert (
        f"{n_lacking} hard negatives are lacking, and null; sentence-transformers' trainer takes none"
        in capsys.readouterr().out
    )
    main([*command, *paths, "--negatives", "--fill", "--column", f"--output={tmp_path / 'full.parquet'}"])
    assert "are lacking" not in capsys.readouterr().out
    full = pq.read_table(tmp_path / "full.parquet").to_pydict()
    cluster = {f"t{row}": number for row, number in enumerate(mined.clusters.cluster_of_row().tolist())}
    for row, others in enumerate(expected):
        filled = [full[name][row] for name in ("negative_1", "negative_2")]
        there = [other for other in others if other is not None]
        assert [other for other in filled if other in there] == (there * 2)[:2]
        assert there or {cluster[other] for other in filled} == {cluster[f"t{row}"]}
        assert f"t{row}" not in filled
    with pytest.raises(SystemExit, match="--fill is of hard negatives: give --negatives too"):
        main([*command, *paths, "--fill", f"--output={tmp_path / 'no.parquet'}"])
    empty = [pq.read_table(path) for path in paths]
    for path, part in zip(paths, empty, strict=True):
        pq.write_table(part.append_column("pos_image_path", pa.array([""] * len(part))), path)
    main([*command, *paths, "--negatives", f"--output={tmp_path / 'empty.parquet'}"])  # no targets are pictures
    with pytest.raises(
        SystemExit, match=r"the files have \[30, 40\] rows, in this order; the plan's tasks are {'a': 40"
    ):
        main([*command, *reversed(paths), f"--output={tmp_path / 'turned.parquet'}"])


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("out.parquet", ["--negatives"], "the plan has no hard negatives: mine with data.mining.n_negatives"),
        ("out.parquet", ["--epochs=0"], "epochs=0 must be at least 1"),
        ("out.parquet", ["--column", "--epochs=2"], "the batches of one epoch, not of --epochs=2"),
        ("plan", [], "plan exists; name a new folder"),
    ],
)
def test_mistakes_with_batches(plan: MinedPlan, tmp_path: Path, output: str, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        _batches(tmp_path, output, *more)


def test_other_pairs_and_taken_names_are_refused(plan: MinedPlan) -> None:
    with pytest.raises(ValueError, match="epoch=-1 must not be negative"):
        add_batch_column(Dataset.from_dict({"qry": ["x"] * N_ROWS}), plan, batch_size=16, epoch=-1)
    with pytest.raises(ValueError, match="mined from 70 rows, the training pairs have 3"):
        add_batch_column(Dataset.from_dict({"qry": ["a", "b", "c"]}), plan, batch_size=16)
    whole = Dataset.from_dict({"qry": ["q"] * N_ROWS})
    with pytest.raises(ValueError, match=r"epoch 2 holds \d+ rows twice, .*: take epoch 0, or write the rows"):
        add_batch_column(whole, plan, batch_size=16, epoch=2)
    with pytest.raises(ValueError, match=r"a column \['batch'\] already"):
        add_batch_column(Dataset.from_dict({"batch": [0] * N_ROWS}), plan, batch_size=16)


def _audit(folder: Path, columns: dict[str, list[Any]], *more: str, status: int | None) -> set[tuple[str, int, bool]]:
    """(finding, row, exact) of an audit of these columns; checks the exit status."""
    pq.write_table(pa.table(columns), folder / "file.parquet")
    arguments = ["audit", str(folder / "file.parquet"), f"--output={folder / 'found.parquet'}", *more]
    if status is None:
        main(arguments)
    else:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
    found = pq.read_table(folder / "found.parquet").to_pylist()
    return {(one["finding"], one["row"], one["exact"]) for one in found}


def test_triplets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _audit(
        tmp_path,
        {
            "anchor": ["a", "b", "c", "A ", "e", ""],
            "positive": ["Ta", "tb", "tc", "td", "E", "tf"],
            "negative": ["ta", "tc", "C", "ta", "x", "y"],
            "key": ["1", "2", "2", "3", None, "4"],
        },
        status=3,
    )
    assert found == {
        ("empty_side", 5, True),
        ("negative_is_own_positive", 0, False),
        ("negative_is_positive_of_query", 3, False),
        ("negative_is_query", 2, False),
        ("query_is_target", 4, False),
        ("several_targets", 0, False),
        ("several_targets", 3, False),
        ("conflicting_key", 2, True),
    }
    kinds = pq.read_table(tmp_path / "found.parquet")["wrong"].to_pylist()
    assert kinds == sorted(kinds, reverse=True), "what is wrong comes first"
    said = capsys.readouterr().out
    assert "6 rows (counted from 0 in this file), 6 negatives, 0 batches" in said
    assert "qry = anchor" in said


def test_names_that_look_like_markup_and_numbers_that_pandas_made_fractions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns: dict[str, list[Any]] = {
        "text [en]": ["a", "b", "c"],
        "answer [/de]": ["x", "x", "z"],
        "batch": [0.0, 0.0, None],
    }
    names = ["--columns", "qry=text [en]", "pos_text=answer [/de]"]
    found = _audit(tmp_path, columns, *names, status=3)
    assert ("same_target_in_batch", 0, True) in found
    assert "columns: qry = text [en], pos_text = answer [/de], batch" in " ".join(capsys.readouterr().out.split())
    columns["batch"] = [0.0, 0.5, None]
    with pytest.raises(SystemExit, match=r"'batch' must hold whole numbers or texts; not so in row\(s\) 0, 1"):
        _audit(tmp_path, columns, *names, status=None)


def test_columns_of_other_types_are_brought_together_or_named(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{index}.parquet") for index in range(3)]
    for path, kind, number in zip(paths, (pa.string(), pa.large_string(), pa.string()), ("x", "y", 7), strict=True):
        pq.write_table(pa.table({"qry": pa.array(["a"], kind), "id": [number]}), path)
    assert read_sources(paths[:2])[0].to_pylist() == [{"qry": "a", "id": "x"}, {"qry": "a", "id": "y"}]
    with pytest.raises(ValueError, match=r"cannot stand in one table: .*id.*Give the column one type, or leave it out"):
        read_sources(paths)


def test_what_is_the_same_to_the_letter_in_any_row_is_exact(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "query": ["Q", "q", "q", "r", "s", "", ""],
        "positive": ["Cat", "cat", "cat", "cat", "Dog", "x", ""],
        "negative": [["Cow", "cow"], ["Cow", "Cow"], ["a"], ["cat"], ["b"], ["c"], ["d"]],
    }
    found = _audit(tmp_path, columns, status=3)
    assert {one for one in found if one[0] in ("duplicate_pair", "shared_target", "repeated_negative")} == {
        ("duplicate_pair", 1, False),
        ("duplicate_pair", 2, True),
        ("shared_target", 0, False),
        ("shared_target", 1, True),
        ("shared_target", 2, True),
        ("shared_target", 3, True),
        ("repeated_negative", 0, False),
        ("repeated_negative", 1, True),
    }
    assert not [one for one in found if one[0] == "several_targets"]  # of the two empty queries
    right: dict[str, list[Any]] = {
        "query": ["a", "a", "a"],
        "positive": ["Dog", "dog", "cow"],
        "negative": ["x", "y", "dog"],
    }
    assert ("negative_is_positive_of_query", 2, True) in _audit(tmp_path, right, status=3)
    batches: dict[str, list[Any]] = {
        "query": ["a", "b", "c", "d"],
        "positive": ["x", "X", "y", "y"],
        "batch": [0, 0, 1, 1],
    }
    found = _audit(tmp_path, batches, status=3)
    assert {one for one in found if one[0] == "one_label_batch"} == {
        ("one_label_batch", 0, False),
        ("one_label_batch", 2, True),
    }


def test_several_negatives_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {"qry": ["a", "b"], "pos_text": ["ta", "tb"]}
    assert _audit(tmp_path, {**pairs, "neg_text": [["x", "x"], ["tb"]]}, status=3) == {
        ("repeated_negative", 0, True),
        ("negative_is_own_positive", 1, True),
    }
    both = {"negative": ["x", "y"], "negative_2": ["ta", "y"]}
    assert _audit(tmp_path, {**pairs, **both}, status=3) == {
        ("negative_is_own_positive", 0, True),
        ("repeated_negative", 1, True),
    }
    assert "neg_text = negative, negative_2" in capsys.readouterr().out
    assert _audit(tmp_path, {**pairs, "negative": ["x", None]}, status=None) == {("no_negative", 1, True)}
    assert _audit(tmp_path, {**pairs, "negative": [None, None]}, status=None) == set()
    numbered = {"negative_1": ["x", "tb"], "negative_2": ["x", "z"]}
    assert _audit(tmp_path, {**pairs, **numbered}, status=3) == {
        ("repeated_negative", 0, True),
        ("negative_is_own_positive", 1, True),
    }


def test_batches_of_a_file(tmp_path: Path) -> None:
    found = _audit(
        tmp_path,
        {
            "title": ["a", "b", "a", "d", "d", "e", "f", "g"],
            "pos_text": ["t1", "T1", "t3", "t4", "t4", "t5", "t6", "t1"],
            "step": [0, 0, 0, 1, 1, 2, 2, -1],
            "group": [None, None, None, None, None, "g", "g", "g"],
        },
        "--columns", "qry=title", "batch=step",
        status=3,
    )  # fmt: skip
    in_batch = {one for one in found if "batch" in one[0]}
    assert in_batch == {
        ("same_target_in_batch", 0, False),
        ("same_target_in_batch", 1, False),
        ("same_query_in_batch", 0, True),
        ("same_query_in_batch", 2, True),
        ("positive_of_query_in_batch", 2, False),  # row 1 holds row 0's target, right for row 2 as well
        ("same_pair_in_batch", 4, True),
        ("one_label_batch", 3, True),
        ("same_group_in_batch", 5, True),
        ("same_group_in_batch", 6, True),
        ("uneven_batch", 0, True),
    }
    assert ("shared_target", 7, True) in found, "row 7 is in no batch but has row 0's target"


def test_right_answers_of_rows_elsewhere_and_empty_sides_in_a_batch(tmp_path: Path) -> None:
    found = _audit(
        tmp_path,
        {
            "qry": ["q0", "q1", "q0", "q2", "", "", "q3", "q4"],
            "pos_text": ["A", "B", "b", "C", "D", "E", "", ""],
            "batch": [0, 0, 1, 1, 2, 2, 2, 2],
        },
        status=3,
    )  # fmt: skip
    in_batch = {one for one in found if "batch" in one[0]}
    assert in_batch == {("positive_of_query_in_batch", 0, False), ("uneven_batch", 4, True)}  # q1's B is row 2's b
    assert {one for one in found if one[0] == "empty_side"} == {("empty_side", row, True) for row in range(4, 8)}


def test_a_positive_that_another_row_of_the_batch_has_as_a_negative_is_worth_a_look(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"qry": ["q0", "q1", "q2"], "pos_text": ["A", "B", "C"], "batch": [0, 0, 1]}
    found = _audit(tmp_path, columns | {"neg_text": ["b", "C", "z"]}, status=None)
    assert {one for one in found if "negatives" in one[0]} == {("positive_among_negatives_in_batch", 1, False)}


def test_a_batch_counts_all_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = ["t"] * 3 + ["u"] * 3 + [f"v{row}" for row in range(6)]
    batches = [row // 3 for row in range(12)]
    _audit(tmp_path, {"qry": [f"q{r}" for r in range(12)], "pos_text": targets, "batch": batches}, status=3)
    said = capsys.readouterr().out
    line = next(i for i, line in enumerate(said.splitlines()) if "one_label_batch" in line)
    assert "│ 6 " in said.splitlines()[line]
    assert "50.0%" in said.splitlines()[line + 1]


@pytest.mark.usefixtures("plan")
def test_our_own_batches_are_not_called_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _batches(tmp_path, "out.parquet", "--epochs=2")
    assert "in place of what was there" not in capsys.readouterr().out
    _batches(tmp_path, "out.parquet", "--epochs=3")
    assert "out.parquet (in place of what was there)" in capsys.readouterr().out
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(2, N_ROWS, 16)))
    np.save(tmp_path / "short.npy", np.random.default_rng(0).normal(size=(2, 9, 16)))
    main(["audit", str(tmp_path / "out.parquet")])
    said = capsys.readouterr().out
    assert "nothing found" in said
    assert "counted from 0 in this file; its column row names those of the pairs that were mined" in said
    main(["audit", str(tmp_path / "out.parquet"), f"--vectors={tmp_path / 'vectors.npy'}"])
    assert "suspected_false_negative" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="vectors of 9 rows, and the column 'row' names row"):
        main(["audit", str(tmp_path / "out.parquet"), f"--vectors={tmp_path / 'short.npy'}"])


@pytest.mark.usefixtures("plan")
def test_what_is_read_is_never_written_over(tmp_path: Path) -> None:
    before = (tmp_path / "first.parquet").read_bytes()
    with pytest.raises(SystemExit, match="is what is read here, and would be lost"):
        _batches(tmp_path, "first.parquet")
    with pytest.raises(SystemExit, match="is what is read here, and would be lost"):
        main(["audit", str(tmp_path / "first.parquet"), f"--output={tmp_path / 'first.parquet'}"])
    with pytest.raises(SystemExit, match=r"must end in .parquet or name a new folder"):
        _batches(tmp_path, "out.csv")
    assert (tmp_path / "first.parquet").read_bytes() == before


def test_plain_pairs_are_dealt_and_what_is_clean_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {"qry": list("abcdef"), "pos_text": ["t1", "t2", "t3", "t1", "t5", "t6"]}
    assert _audit(tmp_path, pairs, status=None) == {("shared_target", 0, True), ("shared_target", 3, True)}
    _audit(tmp_path, pairs, "--strict", status=3)
    found = _audit(tmp_path, pairs, "--batch_size=4", "--in_order", status=3)
    assert {one for one in found if one[0].startswith("same")} == {
        ("same_target_in_batch", 0, True),
        ("same_target_in_batch", 3, True),
    }
    assert _audit(tmp_path, pairs, "--batch_size=3", "--in_order", status=None) == {
        ("shared_target", 0, True),
        ("shared_target", 3, True),
    }
    alone = _audit(tmp_path, pairs, "--batch_size=5", "--in_order", status=3)
    assert not any(name == "one_label_batch" for name, _, _ in alone), (
        "a row that is left over is no batch of one label"
    )
    capsys.readouterr()
    assert _audit(tmp_path, {"qry": ["a", "b"], "pos_text": ["c", "d"]}, status=None) == set()
    assert "nothing found" in capsys.readouterr().out


def test_vectors_add_suspicions_and_easy_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 0 and 1 lie at one place, where 1's target is nearer to 0's query than its own; 2 and 3 are far from all."""
    query = torch.eye(4)[[0, 0, 1, 2]] + 0.0
    target = torch.eye(4)[[0, 0, 1, 2]] + 0.0
    target[0, 3] = 1.0
    np.save(tmp_path / "vectors.npy", torch.stack([query, target]).numpy())
    columns = {"qry": list("abcd"), "pos_text": ["ta", "tb", "tc", "td"], "neg_text": ["TB", "zz", "ta", "ta"]}
    vectors = f"--vectors={tmp_path / 'vectors.npy'}"
    assert _audit(tmp_path, columns, vectors, status=None) == {("suspected_false_negative", 0, True)}
    assert "1 negatives are no row's target" in capsys.readouterr().out
    assert _audit(tmp_path, columns, vectors, "--margin=0.5", status=None) == set()
    del columns["neg_text"]
    found = _audit(tmp_path, {**columns, "batch": ["x", "x", "y", "y"]}, vectors, status=None)
    assert ("suspected_false_negative", 0, True) in found


@pytest.mark.parametrize(("n_labels", "least", "most"), [(64, 20, 44), (8, 0, 0)])
def test_half_of_what_stands_in_random_batches_is_easier_than_random_unless_these_hold_all(
    n_labels: int, least: int, most: int, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(0)
    target = torch.randn(n_labels, 8, generator=random)[torch.arange(64) % n_labels]
    np.save(tmp_path / "vectors.npy", torch.stack([torch.randn(64, 8, generator=random), target]).numpy())
    columns: dict[str, list[Any]] = {
        "qry": [f"q{row}" for row in range(64)],
        "pos_text": [f"t{row % n_labels}" for row in range(64)],
        "batch": [row // 32 for row in range(64)],
    }
    found = _audit(tmp_path, columns, f"--vectors={tmp_path / 'vectors.npy'}", status=None if n_labels == 64 else 3)
    assert least <= sum(name == "easier_than_random" for name, _, _ in found) <= most


@pytest.mark.parametrize("by_topic", [True, False])
def test_batches_of_a_topic_hold_few_easy_rows_and_batches_across_topics_many(by_topic: bool, tmp_path: Path) -> None:
    topic = torch.arange(256) % 16
    query = torch.eye(16)[topic] + 0.01 * torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "vectors.npy", torch.stack([query, query]).numpy())
    columns: dict[str, list[Any]] = {
        "qry": [f"q{row}" for row in range(256)],
        "pos_text": [f"t{row}" for row in range(256)],
        "batch": (topic if by_topic else torch.arange(256) // 16).tolist(),
    }
    found = _audit(tmp_path, columns, f"--vectors={tmp_path / 'vectors.npy'}", status=None)
    n_easy = sum(name == "easier_than_random" for name, _, _ in found)
    assert n_easy < 30 if by_topic else n_easy > 100  # six random rows in ten meet one of their topic


def test_a_csv_file_of_several_epochs_counts_a_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 0 and 1 hold one key for two pairs and a negative above the positive; each stands there twice."""
    lines = ["qry,pos_text,negative,key,row,epoch,batch,cluster"]
    for epoch in range(2):
        lines += [f"q{row},t{row},t{1 - row},k,{row},{epoch},{epoch},0" for row in range(2)]
    (tmp_path / "file.csv").write_text("\n".join([*lines, "q2,t2,x,,2,1,-1,0", "q3,t3,x,,3,1,,0"]))
    np.save(tmp_path / "vectors.npy", np.stack([np.eye(4), np.eye(4)[[1, 0, 2, 3]]]))
    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path / "file.csv"), f"--vectors={tmp_path / 'vectors.npy'}"])
    said = capsys.readouterr().out
    assert "2 batches" in said, "-1 and an empty cell are no batch"
    lines_said = [line.replace(" ", "") for line in said.splitlines()]
    at = next(place for place, line in enumerate(lines_said) if "conflicting_key" in line)
    assert lines_said[at].startswith("│wrong│1│1│")
    assert lines_said[at + 1].startswith("││25.0%│"), "of four rows, two of them there twice"
    (tmp_path / "file.csv").write_text(lines[0] + "\nq,t,n,k,first,0,0,0\n")
    with pytest.raises(SystemExit, match=r"the column 'row' must hold rows of the mined pairs; not so in row\(s\) 0"):
        main(["audit", str(tmp_path / "file.csv")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--columns", "qry"], "--columns qry: write OURS=THEIRS"),
        (["--columns", "query=a"], r"columns maps \['query'\]; what can be mapped is"),
        (["--columns", "qry=b"], r"no column \['b'\]; it has \['a', 'pos_text'\]"),
        ([], "no column for the query.*--columns qry=YOUR_COLUMN"),
        (["--columns", "qry=a", "--in_order"], "give --batch_size too"),
        (["--columns", "qry=a", "--batch_size=9"], "batch_size=9 must lie between 2 and the 2 rows"),
        (["--columns", "qry=a", "--vectors=absent.npy"], "absent.npy"),
        (["--columns", "qry=a", "--margin=0.1"], "give --vectors too"),
    ],
)
def test_mistakes_with_audit(more: list[str], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x", "y"], "pos_text": ["t", "u"]}), tmp_path / "file.parquet")
    with pytest.raises(SystemExit, match=message):
        main(["audit", str(tmp_path / "file.parquet"), *more])
