"""Pages of documents for a question: the visual-document part of MMEB-V2 (ViDoRe, VisRAG), in BEIR's layout.

A set is a folder with ``queries`` (``query-id``, ``query``), ``corpus`` (``corpus-id``, ``image``) and ``qrels``
(``query-id``, ``corpus-id``, ``score``), each ``test-*.parquet`` in a folder of this name, or ``queries.parquet`` etc.
An image is a path, or the picture itself as the hub stores it; these are written once to ``IMAGE_ROOT/NAME``.
Every query is ranked against the whole corpus: sets that give each query a corpus of its own are not of this layout.
"""

from __future__ import annotations

import hashlib
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
    queries, where = read_files(settings.data, f"{name}/queries", ("query-id", "query"))
    corpus, _ = read_files(settings.data, f"{name}/corpus", ("corpus-id", "image"))
    qrels, _ = read_files(settings.data, f"{name}/qrels", ("query-id", "corpus-id", "score"))
    asked, given = (QUERY_TEXT, TARGET_TEXT) if settings.prompts else ("", "")
    query_text, page_text = settings.query_prompt + asked, settings.target_prompt + given
    texts = [Item(query_text + (text or "").strip(), "") for text in queries["query"]]
    paths = [_path(image, name, settings) for image in corpus["image"]]
    pages = [Item(page_text, path) for path in paths]
    table = ItemTable([*texts, *pages], settings, where)
    page_of = dict(zip(map(str, corpus["corpus-id"]), table.positions(pages), strict=True))
    right: dict[str, dict[int, float]] = {str(query): {} for query in queries["query-id"]}
    for row, (query, page, score) in enumerate(zip(*qrels.values(), strict=True)):
        if str(query) not in right or str(page) not in page_of:
            raise ValueError(f"{where}: qrels names query {query!r} and page {page!r} in row {row}, not both known")
        if score > 0:
            right[str(query)][page_of[str(page)]] = float(score)
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


def _path(image: Any, name: str, settings: ReadSettings) -> str:
    """Where a page's picture lies under the image root; a picture in the file itself is written there first."""
    if isinstance(image, str):
        return image
    content = (image or {}).get("bytes")
    if not content:
        raise ValueError(f"{name}: an image of the corpus is neither a path nor a picture; get the file again")
    path = f"{name}/{hashlib.sha256(content).hexdigest()}"
    if not (settings.root / path).is_file():
        write_bytes(settings.root / path, content)
    return path
