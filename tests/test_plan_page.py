"""The page of a mined plan: its figures by hand, its bounds, its escaping, and itself in headless Chromium."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser

from b3_lightning.data import PairTable
from b3_lightning.data.pairs import load_pairs
from b3_lightning.mining import MinedPlan, MiningSettings, mine
from b3_lightning.mining.ranks import RankChoice
from b3_lightning.reports.cards import CardLimits, choose_clusters
from b3_lightning.reports.figures import PlanFigures
from b3_lightning.reports.plan_page import _findings, write_plan_page
from b3_lightning.reports.svg import Axes, Bar, Line, Span, bars, histogram, line_chart, short
from b3_lightning.types import Clusters, Communities, Edges, Neighbors, Window

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"


def _six_rows() -> MinedPlan:
    """Clusters 0 1 2 and 3 4 5, where nothing is hard for row 5.

    Row 0 prefers row 1's target (masked) and row 2's; row 3 prefers row 0's, far away.
    """
    ids = torch.tensor([[1, 2], [0, 2], [1, 0], [0, 4], [5, 3], [4, 0]])
    scores = torch.tensor([[0.9, 0.8], [0.4, 0.3], [0.4, 0.3], [0.9, 0.2], [0.4, 0.3], [0.5, 0.3]])
    masked = torch.zeros(6, 2, dtype=torch.bool)
    masked[:, 0] = True
    return MinedPlan(
        neighbors=Neighbors(ids, scores, torch.tensor([0.7, 0.5, 0.5, 0.8, 0.5, 0.5])),
        window=Window(~masked, masked),
        edges=Edges(torch.tensor([0, 0, 3]), torch.tensor([1, 3, 4]), torch.ones(3), 6),
        communities=Communities(torch.tensor([0, 0, 0, 0, 0, 1])),
        clusters=Clusters(torch.tensor([[0, 1, 2], [3, 4, 5]])),
        negative_NH=torch.empty(6, 0, dtype=torch.int64),
        task_N=torch.zeros(6, dtype=torch.int64),
        task_names=("faq",),
        settings=MiningSettings(first_rank=1, n_ranks=1, cluster_size=3),
        ranks={"faq": RankChoice(False, 1, 1, "as set")},
        hardness={"random": 0.5, "mined": 1.0, "best": 2.5, "batch_size": 6},
        seconds={"edges": 1.0},
    )


def test_figures_by_hand() -> None:
    found = PlanFigures.measure(_six_rows())
    suspects = [found.suspects.row_P, found.suspects.other_P, found.suspects.masked_P]
    assert [part.tolist() for part in suspects] == [[0, 0], [1, 2], [True, False]]
    assert found.suspects.gap_P.tolist() == pytest.approx([0.2, 0.1])
    clusters = found.clusters
    assert clusters.n_suspects_C.tolist() == [1, 0]
    assert clusters.n_masked_C.tolist() == [1, 0]
    assert clusters.n_fillers_C.tolist() == [0, 1]
    assert clusters.cohesion_C.tolist() == pytest.approx([1 / 3, 1 / 3])
    (task,) = found.tasks
    assert task.beaten_R == pytest.approx([2 / 6, 1 / 6])
    assert task.leads == pytest.approx(4 / 6)
    assert task.kept_frac == pytest.approx(2 / 3)
    assert (task.n_suspected_rows, task.n_masked) == (1, 6)
    assert task.median_R == pytest.approx([0.45, 0.3])
    assert found.community_sizes.tolist() == [5, 1]
    assert choose_clusters(found)[0] == (0, "suspects")


@pytest.mark.parametrize(
    ("kinds", "either"),
    [
        ({"edges": "mutual"}, ", edges: either,"),
        ({"edges": "either"}, ""),
        ({"edges": "either", "per_task": {"faq": {"edges": "mutual"}}}, ", edges: either,"),
        ({"edges": "mutual", "per_task": {"faq": {"edges": "either"}}}, ""),
    ],
)
def test_what_the_page_advises_is_not_there_already(kinds: dict[str, Any], either: str) -> None:
    six = _six_rows()
    mined = replace(
        six,
        window=Window(torch.zeros(6, 2, dtype=torch.bool), six.window.masked_NW),
        settings=replace(six.settings, **kinds),
        hardness={**six.hardness, "random_masked": 0.5},
    )
    found = _findings(mined, PlanFigures.measure(mined), 0)
    assert f"nothing hard in their cluster: a larger n_ranks{either} or smaller clusters" in found


def test_every_cluster_is_chosen_once_and_any_first_part_is_spread() -> None:
    found = PlanFigures.measure(_six_rows())
    figures = replace(found.clusters, n_rows_C=torch.full((50,), 3), n_suspects_C=torch.zeros(50, dtype=torch.int64),
                      n_masked_C=torch.zeros(50), cohesion_C=torch.arange(50) / 50)  # fmt: skip
    chosen = choose_clusters(replace(found, clusters=figures))
    assert sorted(cluster for cluster, _ in chosen) == list(range(50))
    assert [cluster for cluster, why in chosen if why == "loose"][:4] == [0, 1, 2, 3]
    spread = sorted(cluster for cluster, why in chosen[:20] if why == "sample")
    assert max(b - a for a, b in itertools.pairwise(spread)) <= 10


def _plan(pairs: PairTable, **settings: Any) -> MinedPlan:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 16, generator=generator)[torch.arange(len(pairs)) % 12]
    query, target = (base + 0.7 * torch.randn(len(pairs), 16, generator=generator) for _ in range(2))
    values: dict[str, Any] = {"first_rank": 2, "n_ranks": 20, "cluster_size": 4} | settings
    return mine(query, target, settings=MiningSettings(**values), tasks=pairs.tasks, batch_size=16)


@pytest.fixture(scope="module")
def written(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MinedPlan, Path]:
    """A page of 96 pairs with pictures and texts, one text of them hostile, one long."""
    pairs = load_pairs(str(shapes / "both-image.parquet"))
    pairs.columns["qry"][0] = EVIL
    pairs.columns["qry"][1] = "long " * 100
    mined, path = _plan(pairs), tmp_path_factory.mktemp("page") / "report.html"
    write_plan_page(mined, pairs, shapes, path, title=f"Plan {EVIL}")
    return mined, path


def _data(page: str) -> Any:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_the_page_holds_the_plan_and_nothing_of_the_network(written: tuple[MinedPlan, Path]) -> None:
    mined, path = written
    page = path.read_text()
    assert "24 of 24 clusters are on this page" in page
    assert f"{mined.summary()['kept_frac']:.1%}" in page
    for title in ("Scores by rank", "Likely false negatives", "Sizes of communities", "Hardness of batches of 16"):
        assert f'aria-label="{title}. ' in page
    markup = page.split('<script type="application/json"')[0]
    assert not re.search(r"<[^>]*\s(src|href|action)\s*=|url\(|@import|https?:", markup)
    data = _data(page)
    assert sorted(row[0] for card in data["clusters"] for row in card["rows"]) == list(range(96))
    assert len(data["images"]) == 96  # each picture once, though every row shows two
    assert all(image.startswith("data:image/webp;base64,") for image in data["images"])
    rows = {row[0]: row for card in data["clusters"] for row in card["rows"]}
    assert rows[0][1] == EVIL
    assert (len(rows[1][1]), rows[1][2]) == (280, 499 - 280)
    assert sum(card["fillers"] for card in data["clusters"]) == mined.summary()["n_fillers"]


def test_hostile_words_stay_words(written: tuple[MinedPlan, Path]) -> None:
    page = written[1].read_text()
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "<title>Plan &lt;/script&gt;" in page


@pytest.mark.parametrize(
    ("limits", "n_shown"),
    [
        (CardLimits(n_clusters=5), 5),
        (CardLimits(n_pictures=16), 4),
        (CardLimits(n_bytes=1), 1),
    ],
)
def test_what_is_not_shown_is_counted(limits: CardLimits, n_shown: int, shapes: Path, tmp_path: Path) -> None:
    pairs = load_pairs(str(shapes / "image-text.parquet"))
    write_plan_page(_plan(pairs), pairs, shapes, tmp_path / "page.html", limits=limits)
    page = (tmp_path / "page.html").read_text()
    data = _data(page)
    assert len(data["clusters"]) == n_shown
    assert len(data["images"]) <= limits.n_pictures
    assert f"{n_shown} of 24 clusters are on this page" in page
    assert "A page holds at most" in page


def test_a_page_of_long_markup_in_large_clusters_stays_under_5_MB(tmp_path: Path) -> None:
    lines = (json.dumps({"qry": f"{row} {'<&>' * 100}", "pos_text": f"{'<&>' * 100} {row}"}) for row in range(3200))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = load_pairs(str(tmp_path / "pairs.jsonl"))
    write_plan_page(_plan(pairs, cluster_size=16, n_ranks=30), pairs, tmp_path, tmp_path / "page.html")
    size = (tmp_path / "page.html").stat().st_size
    assert 3_500_000 < size < 5_000_000  # as much as the bound lets in, and not six times that


def test_tasks_have_charts_of_their_own_and_labels_are_named(shapes: Path, tmp_path: Path) -> None:
    pairs = load_pairs([str(shapes / "image-text.parquet"), str(shapes / "text-text.parquet")])
    mined = _plan(pairs, per_task={"text-text": {"first_rank": "auto"}})
    write_plan_page(mined, pairs, shapes, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "image-text: scores by rank" in page
    assert "likely right too (estimate)" in page
    assert ">own target first</th>" in page
    assert '<select id="task">' in page


def test_charts_say_their_numbers_and_bear_flat_or_missing_ones() -> None:
    axes = Axes("Loss & more", "rank <1>", "y", "It falls.")
    drawn = line_chart(axes, [Line("a", [0, 1, 2], [1.0, float("nan"), 3.0], 1)], (), [Span("s", 0, 1, "hard")])
    assert 'aria-label="Loss &amp; more. It falls."' in drawn
    assert "rank &lt;1&gt; 2\na: 3" in drawn
    assert drawn.count("M") > drawn.count("nan") == 0
    assert "<svg" in line_chart(axes, [Line("flat", [0, 1], [0.0, 0.0], 1)])
    assert line_chart(axes, [Line("none", [], [], 1)]) == ""
    assert "4-7: 12" in histogram(axes, [Bar("4-7", 12, "12")])
    assert histogram(axes, [Bar("0", 0, "0")]) == ""
    assert re.findall(r'class="tick right"[^>]*>([^<]*)<', histogram(axes, [Bar("0", 1, "1")])) == ["0", "1"]
    whole = line_chart(replace(axes, percent=True), [Line("a", [0, 1], [0.0, 1.0], 1)])
    assert {"0%", "100%", "20%"} <= {*re.findall(r'class="tick right"[^>]*>([^<]*)<', whole)}
    short = bars(axes, [Bar("a", 0.001, "0.001"), Bar("b", 6.0, "6")])
    assert "--" not in short
    assert 'h0.0q2.0 0 2.0 4v8q0 4 -2.0 4h-0.0z"' in short


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH (Debian: apt-get install chromium)")
def test_in_a_browser(written: tuple[MinedPlan, Path], tmp_path: Path) -> None:
    with Browser(tmp_path / "profile", "--window-size=1200,900") as browser:
        browser.open(written[1])
        assert browser.ask("document.title").startswith("Plan </script>")
        count = "document.querySelectorAll('.card').length"
        assert browser.ask(count) == 12  # the others as the reader scrolls
        browser.ask("scrollTo(0, document.body.scrollHeight)")
        browser.wait_for(f"{count} == 24")
        assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        cards = _data(written[1].read_text())["clusters"]
        texts = [" ".join(f"{row[1]} {row[4]}" for row in card["rows"]) for card in cards]
        n_held = sum(all(word in text for word in ("large", "red", "circle")) for text in texts)
        assert 0 < n_held < 24
        browser.ask("document.getElementById('search').focus()")
        browser.call("Input.insertText", text="Large RED circle")
        browser.wait_for(f"document.getElementById('count').textContent == '{n_held} of 24 clusters'")
        shown = browser.ask("[...document.querySelectorAll('.card')].map(card => card.textContent)")
        assert len(shown) == min(12, n_held)
        assert all("large" in text and "red" in text and "circle" in text for text in shown)
        assert browser.ask("document.querySelector('mark').textContent") == "large"
        row, card = cards[5]["rows"][0][0], cards[5]["id"]
        for words in (f"#{row}", f"Row  {row}", f"Cluster  {card}", f"#{row} cluster {card}"):
            browser.ask(f"(document.getElementById('search').value = '{words}', update())")
            assert browser.ask(
                "[...document.querySelectorAll('h3')].map(title => title.textContent.split(' ')[1])"
            ) == [str(card)]
        # a letter whose lower case is longer does not take the marks from a text
        browser.ask("words = ['izmir'], void marked(document.body, 'İ and IZMIR')")
        assert browser.ask("[...document.querySelectorAll('mark')].at(-1).textContent") == "IZMIR"
        browser.ask("document.getElementById('search').value = ''")
        worst = "(document.getElementById('order').value = 'loose', update(), document.querySelector('h3').textContent)"
        cohesion = {card["id"]: card["cohesion"] for card in cards}
        assert cohesion[int(browser.ask(worst).split()[1])] == min(cohesion.values())
        browser.call("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.ask("document.documentElement.scrollWidth") <= 375
        assert browser.errors == []
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.25, "0.25"), (1024, "1024"), (12_000, "12k"), (16_384, "16,384"), (1_234_567, "1.235M"), (2.5e9, "2.5G")],
)
def test_numbers_of_axes_are_short(value: float, shown: str) -> None:
    assert short(value) == shown
