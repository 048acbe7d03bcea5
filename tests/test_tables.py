"""Tables and vectors on disk that are missing, cut off, empty or of another shape: what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from b3_lightning.data.tables import check_output, read_file, read_files, read_table
from b3_lightning.data.vectors import check_vectors, load_vectors

TABLE = pa.table({"id": ["007", "null", "3"], "score": ["0.5", "1", "2"]})


def _jsonl(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "parquet": pq.write_table,
    "csv": pyarrow.csv.write_csv,
    "jsonl": _jsonl,
}


def test_rows_of_several_kinds_in_a_json_column_are_told(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"qry": "a", "pos_text": "x"}\n{"qry": "b", "pos_text": 42}\n')
    with pytest.raises(ValueError, match=r"pos_text.* in row 1\): a column holds one kind of values in some rows"):
        read_file(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_read_or_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"table.{kind}"
    WRITERS[kind](TABLE, path)
    assert read_file(path).equals(TABLE)
    assert read_file(path, ["score"]).column_names == ["score"]
    with pytest.raises(ValueError, match=rf"table.{kind} lacks the column\(s\) \['name'\]; it has \['id', 'score'\]"):
        read_file(path, ["id", "name"])
    whole = path.read_bytes()
    path.write_bytes(b"\xff" + whole[: len(whole) - 3] + b'{"')
    how = "save it as UTF-8" if kind == "csv" else "it is truncated, changed"
    with pytest.raises(ValueError, match=rf"table.{kind} cannot be read as .{kind} \(.*\): {how}"):
        read_file(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"table.{kind} is empty"):
        read_file(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file .*table.{kind} \(looked from"):
        read_file(path)


def test_of_a_csv_all_is_text_unless_types_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("id,score\n007,0.5\n", encoding="utf-8-sig")
    assert read_file(path).to_pylist() == [{"id": "007", "score": "0.5"}]
    assert read_file(path, typed=True).to_pylist() == [{"id": 7, "score": 0.5}]


def test_names_with_commas_and_spaces_are_texts_too(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('"Question, English","say ""id""",key \r\n2020-01-01,007,1\r\n')
    assert read_file(path).to_pylist() == [{"Question, English": "2020-01-01", 'say "id"': "007", "key ": "1"}]


def test_what_looks_like_a_date_is_a_text(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "text": "2024-01-05", "negatives": ["2024-01-06", "x"]},
        {"id": 2, "text": "2024-01-07", "negatives": ["2023-01-01 10:00:00"]},
    ]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_file(path).to_pylist() == rows
    assert read_file(path).column_names == ["id", "text", "negatives"]
    rows[0]["negatives"] = ["2024-01-06"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_file(path).to_pylist() == rows


def test_a_column_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.csv").write_text("qry,qry,pos_text\na,b,c\n")
    with pytest.raises(ValueError, match=r"twice.csv has more than one column \['qry'\]; rename or leave out all but"):
        read_file(tmp_path / "twice.csv")


def test_parts_of_one_table_have_the_same_columns(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(TABLE.select(["id"]), tmp_path / "train-00001-of-00002.parquet")
    assert read_files([tmp_path / "train-00000-of-00002.parquet"] * 2).num_rows == 6
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet has the columns .*; make them alike"):
        read_table(str(tmp_path))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other is a folder without a dataset"):
        read_table(str(tmp_path / "other"))


VECTORS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


def _write_vectors(path: Path, query: Any, target: Any) -> None:
    if path.suffix == ".npy":
        np.save(path, np.stack([query, target]))
    elif path.suffix == ".safetensors":
        save_file({"query": torch.as_tensor(query).contiguous(), "target": torch.as_tensor(target).contiguous()}, path)
    else:
        pq.write_table(pa.table({"query": np.asarray(query).tolist(), "target": np.asarray(target).tolist()}), path)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_vectors_of_every_kind_are_read_or_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"v.{kind}"
    _write_vectors(path, *VECTORS)
    found = check_vectors(str(path), 5)
    assert torch.allclose(found.target_ND, torch.nn.functional.normalize(VECTORS[1], dim=1), atol=1e-6)
    with pytest.raises(
        ValueError, match=rf"v.{kind} holds vectors of 5 rows, the pairs have 6: needed is one for each"
    ):
        check_vectors(str(path), 6)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no vectors at all"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"v.{kind} (cannot be read as .{kind} \(.*\): it is truncated|is empty)"):
            load_vectors(path)
    _write_vectors(path, torch.zeros(5, 3), VECTORS[1])
    with pytest.raises(ValueError, match=rf"v.{kind}: query vectors hold NaN, infinity or only zeros in row"):
        load_vectors(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file of vectors .*v.{kind}"):
        load_vectors(path)


def test_what_is_no_vector_a_row_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.ones((5, 3)))
    np.save(tmp_path / "texts.npy", np.full((2, 5, 3), "x"))
    pq.write_table(pa.table({"query": [1.0], "target": [2.0]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"query": [[1.0], [1.0, 2.0], None], "target": [[1.0]] * 3}), tmp_path / "odd.parquet")
    save_file({"query": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    for name, message in {
        "flat.npy": r"has shape \(5, 3\); \(2, rows, dimensions\) is needed.*numpy.stack\(\[query, target\]\)",
        "texts.npy": "holds <U1; numbers are needed",
        "numbers.parquet": "column 'query' holds double; a list of numbers a row is needed",
        "odd.parquet": r"column 'query' has vectors of 1 dimensions and of others, or none, in row\(s\) 1, 2",
        "half.safetensors": r"lacks \['target'\]; it needs 'query' and 'target', each of shape",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}:? {message}"):
            load_vectors(tmp_path / name)


def test_a_csv_of_another_encoding_or_separator_is_told_how_to_save_it(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes("qry,pos_text\nOù,là\n".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_file(path)
    for separator in (";", "\t"):
        path.write_text(f"qry{separator}pos_text\na{separator}b\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"separates its columns by .*; save it with commas"):
            read_file(path)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("found.csv", False, "must end in .parquet"),
        ("found", False, "must end in .parquet"),
        ("found.csv", True, "must end in .parquet or name a new folder"),
        ("pairs.parquet", True, "is what is read here"),
        ("link.parquet", False, "is what is read here"),
    ],
)
def test_an_output_must_not_be_an_input(name: str, folder: bool, message: str, tmp_path: Path) -> None:
    source = tmp_path / "pairs.parquet"
    source.touch()
    (tmp_path / "link.parquet").symlink_to(source)
    check_output(tmp_path / "new.parquet", [str(source)])
    check_output(tmp_path / "run.5", [str(source), "user/hub-name"], folder=True)
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / name, [str(source)], folder=folder)
