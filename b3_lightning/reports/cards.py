"""Which clusters a page shows and what stands on their cards, within a bound of bytes and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from b3_lightning.data import PairTable
from b3_lightning.data.images import load_image
from b3_lightning.data.pairs import Item
from b3_lightning.mining import MinedPlan
from b3_lightning.reports.figures import PlanFigures
from b3_lightning.reports.page import embed
from b3_lightning.types import PADDING

THUMBNAIL_PIXELS = 96
MOST_CHARACTERS = 280
MOST_SUSPECTS = 6
"""Of one row's suspects, so many are listed; the card says how many there are."""
REASONS = ("suspects", "loose", "sample")
"""Why a cluster is shown: most suspects, least cohesive, or drawn evenly from all."""


@dataclass(frozen=True)
class CardLimits:
    """How much of a plan a page shows.

    Args:
        n_clusters: at most so many clusters.
        n_pictures: at most so many thumbnails.
        n_bytes: of all cards together.
    """

    n_clusters: int = 200
    n_pictures: int = 800
    n_bytes: int = 3_500_000


@dataclass(frozen=True)
class Cards:
    """What the page's script reads: ``clusters`` and the ``images`` that they refer to by position."""

    clusters: list[dict[str, Any]]
    images: list[str]


def choose_clusters(figures: PlanFigures) -> list[tuple[int, str]]:
    """(cluster, reason) in the order in which they should be shown while there is room: the three kinds take turns."""
    found = figures.clusters
    n_clusters = len(found.n_rows_C)
    worst_first = (found.n_suspects_C + found.n_masked_C * 1e-6).argsort(descending=True, stable=True)
    suspects = worst_first[found.n_suspects_C[worst_first] > 0].tolist()
    loose = found.cohesion_C.argsort(stable=True).tolist()
    # a step that shares no factor with the count visits every cluster once, and any first part of it is spread evenly
    step = next(step for step in range(int(n_clusters * 0.618) or 1, 2 * n_clusters + 2) if _coprime(step, n_clusters))
    sample = [index * step % n_clusters for index in range(n_clusters)]
    turns = zip_longest(
        *([(one, why) for one in listed] for listed, why in zip((suspects, loose, sample), REASONS, strict=True))
    )
    chosen: dict[int, str] = {}
    for turn in chain.from_iterable(turns):
        if turn is not None:
            chosen.setdefault(*turn)
    return list(chosen.items())


def _coprime(one: int, other: int) -> bool:
    while other:
        one, other = other, one % other
    return one == 1


def make_cards(mined: MinedPlan, figures: PlanFigures, pairs: PairTable, image_root: Path, limits: CardLimits) -> Cards:
    """Fill cards while the limits allow; the first cluster is always shown."""
    sides = pairs.items("query"), pairs.items("target")
    order = choose_clusters(figures)[: limits.n_clusters]
    suspects = _suspects_of({cluster for cluster, _ in order}, mined, figures)
    pictures = _Pictures(image_root)
    clusters: list[dict[str, Any]] = []
    n_bytes = 0
    for cluster, reason in order:
        rows = [row for row in mined.clusters.ids_CK[cluster].tolist() if row != PADDING]
        card = _card(cluster, reason, mined, figures) | _rows(rows, sides, figures, pictures)
        card["links"] = suspects.get(cluster, [])
        added, images = len(embed(card).encode()), pictures.encode_new()  # as the page holds it, "<" as six bytes
        n_bytes += added + sum(len(image) for image in images)
        if clusters and (n_bytes > limits.n_bytes or pictures.n_encoded + len(images) > limits.n_pictures):
            break
        pictures.keep(images)
        clusters.append(card)
    return Cards(clusters, pictures.encoded)


def _card(cluster: int, reason: str, mined: MinedPlan, figures: PlanFigures) -> dict[str, Any]:
    found = figures.clusters
    return {
        "id": cluster,
        "why": reason,
        "task": int(found.task_C[cluster]),
        "cohesion": round(float(found.cohesion_C[cluster]), 4),
        "suspects": int(found.n_suspects_C[cluster]),
        "masked": int(found.n_masked_C[cluster]),
        "fillers": int(found.n_fillers_C[cluster]),
    }


def _rows(
    rows: Sequence[int], sides: Sequence[Sequence[Item]], figures: PlanFigures, pictures: _Pictures
) -> dict[str, Any]:
    """Each row: its id, then text, characters cut, picture of either side, and 1 for a filler."""
    listed = []
    for row in rows:
        cells: list[Any] = [row]
        for side in sides:
            item = side[row]
            text = item.text.strip()
            cells += [text[:MOST_CHARACTERS], max(0, len(text) - MOST_CHARACTERS), pictures.place(item.image)]
        listed.append([*cells, int(figures.filler_N[row])])
    return {"rows": listed}


def _suspects_of(clusters: set[int], mined: MinedPlan, figures: PlanFigures) -> dict[int, list[list[float]]]:
    """Cluster -> [place of the row, place of the other, gap, masked, how many the row has], the worst first."""
    cluster_N, found = mined.clusters.cluster_of_row(), figures.suspects
    shown_N = cluster_N.new_zeros(len(mined.clusters)).bool()
    shown_N[list(clusters)] = True
    here = shown_N[cluster_N[found.row_P]]
    row_P, other_P = found.row_P[here], found.other_P[here]
    place: dict[int, int] = {}
    for cluster in clusters:
        place |= {row: position for position, row in enumerate(mined.clusters.ids_CK[cluster].tolist())}
    links: dict[int, list[list[float]]] = {}
    count: dict[int, int] = {}
    values = zip(
        row_P.tolist(), other_P.tolist(), found.gap_P[here].tolist(), found.masked_P[here].tolist(), strict=True
    )
    for row, other, gap, masked in values:
        count[row] = count.get(row, 0) + 1
        if count[row] <= MOST_SUSPECTS:
            link = [place[row], place[other], round(gap, 3), int(masked)]
            links.setdefault(int(cluster_N[row]), []).append(link)
    return links


class _Pictures:
    """Thumbnails, each once however many rows show it."""

    def __init__(self, image_root: Path) -> None:
        self.image_root = image_root
        self.encoded: list[str] = []
        self._place: dict[str, int] = {}

    @property
    def n_encoded(self) -> int:
        return len(self.encoded)

    def place(self, path: str) -> int:
        """The position that the picture has or will have in ``encoded``; -1 for none."""
        return self._place.setdefault(path, len(self._place)) if path else -1

    def encode_new(self) -> list[str]:
        """Data URIs of those asked for since the last ``keep``."""
        new = list(self._new())
        if not new:
            return []
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._encode, new))

    def keep(self, images: list[str]) -> None:
        self.encoded += images

    def _new(self) -> Iterator[str]:
        return (path for path, place in self._place.items() if place >= self.n_encoded)

    def _encode(self, path: str) -> str:
        image = load_image(path, self.image_root, at_least=THUMBNAIL_PIXELS)
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=70)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
