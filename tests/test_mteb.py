"""mteb's runner on a model and a task of this machine; skipped where mteb is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from b3_lightning.cli import main
from b3_lightning.model.embedder import LoadSettings, load_embedder


def _local_task() -> Any:
    from datasets import Dataset, DatasetDict
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskSTS

    class LocalSTS(AbsTaskSTS):
        metadata = TaskMetadata(
            name="LocalSTS", description="sentences of a test", reference=None, type="STS", category="t2t",
            modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
            dataset={"path": "none", "revision": "1"}, date=None, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, **kwargs: Any) -> None:
            rows = {
                name: [f"{name} {row * step % 7}" for row in range(20)]
                for name, step in (("sentence1", 1), ("sentence2", 3))
            }
            self.dataset = DatasetDict(test=Dataset.from_dict({**rows, "score": [float(row % 5) for row in range(20)]}))
            self.data_loaded = True

    return LocalSTS()


# mteb calls old names, its own and sentence-transformers'
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mteb", "ignore:.*method has been renamed:FutureWarning")
def test_mtebs_runner_on_a_local_task(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mteb")
    task = _local_task()
    monkeypatch.setattr("b3_lightning.verbs.mteb.named_tasks", lambda names: [task])
    main(["mteb", "--model", models["bert"], "--tasks", "LocalSTS", "--output", str(tmp_path), "--device", "cpu"])
    task.load_data()
    rows = task.dataset["test"].to_dict()
    model = load_embedder(models["bert"], LoadSettings(), None)
    first, second = (model.encode(rows[name], normalize_embeddings=True) for name in ("sentence1", "sentence2"))
    expected = spearmanr((first * second).sum(axis=1), rows["score"]).statistic
    (path,) = tmp_path.glob("*/scores.json")
    found = json.loads(path.read_text())
    assert found["scores"] == {"LocalSTS": pytest.approx(expected, abs=1e-6)}
    said = capsys.readouterr().out
    assert f"{100 * expected:.2f}" in said
    assert f"scores  {path}" in said
    assert path.parent.name == f"model-{found['model_sha256'][:16]}"
    assert list(path.parent.rglob("LocalSTS.json"))


def test_mistakes_with_mteb(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mteb = pytest.importorskip("mteb")
    monkeypatch.setattr("b3_lightning.verbs.mteb.named_tasks", lambda names: names)
    command = ["mteb", "--model", models["bert"], "--tasks", "NFCorpus", "--device", "cpu", "--output"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file is a file, so nothing can be written into"):
        main([*command, str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="--batch_size 0 must be above 0"):
        main([*command, str(tmp_path / "out"), "--batch_size=0"])

    def refuse(*given: Any, **about: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(mteb, "evaluate", refuse)
    with pytest.raises(SystemExit, match=r"mteb cannot get the data .Couldn't reach the hub.: it needs a network"):
        main([*command, str(tmp_path / "out")])


def test_without_mteb_the_verb_says_what_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'b3_lightning\[mteb\]'"):
        main(["mteb", "--model", "x", "--tasks", "NFCorpus", "--output", str(tmp_path)])
