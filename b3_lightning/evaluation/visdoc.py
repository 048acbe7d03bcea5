"""Pages of documents for a question: the visual-document part of MMEB-V2 (ViDoRe, VisRAG), in BEIR's layout.

A set is a folder with ``queries`` (``query-id``, ``query``), ``corpus`` (``corpus-id``, ``image``) and ``qrels``
(``query-id``, ``corpus-id``, ``score``), each ``test-*.parquet`` in a folder of this name, or ``queries.parquet`` etc.
An image is a path, or the picture itself as the hub stores it; these are written once to ``IMAGE_ROOT/NAME``.
Every query is ranked against the whole corpus: sets that give each query a corpus of its own are not of this layout.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from b3_lightning.data.pairs import Item
from b3_lightning.evaluation.scoring import SharedCandidates
from b3_lightning.evaluation.sets import EvalSet, ItemTable, ReadSettings, read_files
from b3_lightning.mining import fingerprint
from b3_lightning.mining.store import write_bytes
from b3_lightning.types import name_rows

QUERY_TEXT = "Find a document image that matches the given query: "
TARGET_TEXT = "Understand the content of the provided document image."


def read_visdoc(name: str, settings: ReadSettings) -> EvalSet:
    """Read one set; with ``settings.prompts`` queries and pages carry the instructions of VLM2Vec-V2.

    Raises:
        FileNotFoundError: where a file or an image is not there.
        ValueError: where ids are not known or a query has no right page.
    """
    queries, where = _read(name, "queries", ("query-id", "query"), settings)
    corpus, of_corpus = _read(name, "corpus", ("corpus-id", "image"), settings)
    qrels, of_qrels = _read(name, "qrels", ("query-id", "corpus-id", "score"), settings)
    _refuse_repeated(where, queries["query-id"], "query-id")
    _refuse_repeated(of_corpus, corpus["corpus-id"], "corpus-id")
    empty = [row for row, text in enumerate(queries["query"]) if not isinstance(text, str) or not text.strip()]
    if empty:
        raise ValueError(f"{where}: a query needs text; not so in {name_rows(empty)}")
    asked, given = (QUERY_TEXT, TARGET_TEXT) if settings.prompts else ("", "")
    query_text, page_text = settings.query_prompt + asked, settings.target_prompt + given
    texts = [Item(query_text + text.strip(), "") for text in queries["query"]]
    paths = [_path(image, row, name, of_corpus, settings) for row, image in enumerate(corpus["image"])]
    pages = [Item(page_text, path) for path in paths]
    table = ItemTable([*texts, *pages], settings, where)
    page_of = dict(zip(map(str, corpus["corpus-id"]), table.positions(pages), strict=True))
    right = _right_pages(qrels, of_qrels, list(map(str, queries["query-id"])), page_of)
    lacking = [row for row, query in enumerate(queries["query-id"]) if not right[str(query)]]
    if lacking:
        raise ValueError(f"{where}: no page is right for the query in {name_rows(lacking)}; mend queries or qrels")
    scoring = SharedCandidates(
        table.positions(texts),
        list(dict.fromkeys(page_of.values())),
        [right[str(query)] for query in queries["query-id"]],
        "ndcg_linear@5",
    )
    rows = fingerprint(**queries, paths=paths, qrels=qrels)
    return EvalSet(name, table.items, table.contents, settings.root, {name: scoring}, rows, {"n_pages": len(pages)})


def _read(name: str, part: str, columns: Sequence[str], settings: ReadSettings) -> tuple[dict[str, list[Any]], str]:
    return read_files(settings.data, f"{name}/{part}", columns, probe="{}/" + part)


def _refuse_repeated(where: str, ids: list[Any], column: str) -> None:
    times = Counter(map(str, ids))
    repeated = [row for row, one in enumerate(ids) if times[str(one)] > 1]
    if repeated:
        raise ValueError(f"{where}: every {column} must be there once; not so in {name_rows(repeated)}")


def _right_pages(
    qrels: dict[str, list[Any]], where: str, queries: list[str], page_of: dict[str, int]
) -> dict[str, dict[int, float]]:
    """Query -> the positions of its right pages and how relevant they are."""
    right: dict[str, dict[int, float]] = {query: {} for query in queries}
    seen: dict[tuple[str, str], int] = {}
    for row, (query, page, score) in enumerate(zip(*qrels.values(), strict=True)):
        unknown = [] if str(query) in right else [f"query {query!r}, which queries has not"]
        unknown += [] if str(page) in page_of else [f"page {page!r}, which corpus has not"]
        if unknown:
            raise ValueError(f"{where}: row {row} names {' and '.join(unknown)}")
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{where}: the score {score!r} of row {row} is no number")
        if (first := seen.setdefault((str(query), str(page)), row)) != row:
            raise ValueError(f"{where}: rows {first} and {row} are both of query {query!r} and page {page!r}")
        if score > 0:
            right[str(query)][page_of[str(page)]] = float(score)
    return right


def _path(image: Any, row: int, name: str, where: str, settings: ReadSettings) -> str:
    """Where a page's picture lies under the image root; a picture in the file itself is written there first."""
    stored = image if isinstance(image, dict) else {"bytes" if isinstance(image, bytes) else "path": image}
    content, path = stored.get("bytes"), stored.get("path")
    if not content and isinstance(path, str) and path:
        return path
    if not isinstance(content, bytes) or not content:
        raise ValueError(f"{where}: the image of row {row} is neither a path nor a picture; get the file again")
    path = f"{name}/{hashlib.sha256(content).hexdigest()}"
    if not (settings.root / path).is_file():
        write_bytes(settings.root / path, content)
    return path
