"""Which files a set is read from."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from b3_lightning.evaluation.sets import ReadSettings
from b3_lightning.evaluation.sts import read_sts


def test_a_set_that_is_there_twice_is_refused_and_a_name_is_taken_whole(tmp_path: Path) -> None:
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 2.0]}
    for name in ("STSb.parquet", "STSb.old.parquet"):
        pq.write_table(pa.table(rows), tmp_path / name)
    assert len(read_sts("STSb", ReadSettings(tmp_path)).items) == 4
    (tmp_path / "STSb.csv").write_text("sentence1,sentence2,score\na,c,1\n")
    with pytest.raises(ValueError, match=r"'STSb' in several kinds of file \(STSb.csv, STSb.parquet\); leave one"):
        read_sts("STSb", ReadSettings(tmp_path))


def test_a_set_is_read_whole_and_without_other_splits(tmp_path: Path) -> None:
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 2.0]}
    more = {"sentence1": ["e", "f"], "sentence2": ["g", "h"], "score": [1.0, 2.0]}
    for name in ("STSb/test-00000-of-00002", "STS12/test-00000-of-00001", "STS12/testmini-00000-of-00001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(more if "mini" in name else rows), tmp_path / f"{name}.parquet")
    assert len(read_sts("STS12", ReadSettings(tmp_path)).items) == 4
    with pytest.raises(ValueError, match=r"STSb holds 1 of the 2 files of split 'test'"):
        read_sts("STSb", ReadSettings(tmp_path))
