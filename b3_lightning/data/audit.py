"""What is wrong with somebody's pairs, triplets or batches: a list of findings, each with its row.

Texts are compared as they are (``exact``) and with case, spaces and Unicode form evened out (``normalised``).

Shapes: B = rows of a batch, D = dimensions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from b3_lightning.data.foreign import ForeignPairs, normal
from b3_lightning.data.pairs import Item
from b3_lightning.mining import Alike
from b3_lightning.types import Embeddings

MEANING = {
    "empty_side": "query or target is empty",
    "negative_is_own_positive": "a negative of the row is its own positive",
    "negative_is_positive_of_query": "a negative of the row is the positive of another row with the same query",
    "negative_is_query": "a negative of the row is its query",
    "no_negative": "the row has no negative, others have: an empty text may be trained on as one",
    "repeated_negative": "the row has the same negative twice",
    "query_is_target": "query and target are the same",
    "duplicate_pair": "query and target of an earlier row, again",
    "conflicting_key": "rows with this key hold another query or target",
    "shared_target": "other queries have this target too: they are each other's wrong negatives where they meet",
    "several_targets": "the query has other targets in other rows: wrong negatives where they meet",
    "same_pair_in_batch": "the batch holds the same query and target twice",
    "same_target_in_batch": "another query of the batch has this target, so it counts as its negative",
    "same_query_in_batch": "the batch holds another target of this query, which counts as a negative",
    "positive_of_query_in_batch": "the batch holds a positive that this query has in another row, as another query's",
    "positive_among_negatives_in_batch": "another row of the batch has this row's positive as a negative, which losses "
    "that share negatives contrast with it",
    "same_group_in_batch": "the batch holds another row of this group, whose target counts as a negative",
    "one_label_batch": "all targets of the batch are the same: no negative is right",
    "uneven_batch": "the batch has another number of rows than most",
    "suspected_false_negative": "a negative scores above the row's own positive",
    "easier_than_random": "a random batch holds something harder than all of this (so in half of rows by chance)",
}
WORTH_A_LOOK = {
    "query_is_target", "no_negative", "repeated_negative", "shared_target", "several_targets", "duplicate_pair",
    "uneven_batch", "positive_among_negatives_in_batch", "suspected_false_negative", "easier_than_random",
}  # fmt: skip
"""Findings that may be as they should; all others are wrong."""
OF_BATCH = {"one_label_batch", "uneven_batch"}
"""Findings of a whole batch: ``row`` is its first, ``n_others`` the number of its other rows."""

_TIE = 1e-5
"""Cosines nearer than this are equal: products of other shapes round otherwise."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A row and what is wrong with it; ``other`` is a row that it meets, the first of ``n_others``."""

    name: str
    row: int
    exact: bool = True
    batch: object = None
    other: int | None = None
    n_others: int = 0
    text: str = ""

    @property
    def wrong(self) -> bool:
        return self.name not in WORTH_A_LOOK


def audit(pairs: ForeignPairs) -> list[Finding]:
    """All findings that need no vectors."""
    found = [Finding("empty_side", row) for row in sorted(pairs.empty)]
    found += _rows(pairs)
    positives = _Positives(pairs)
    found += _negatives(pairs, positives)
    found += _conflicts(pairs)
    for batch, rows in pairs.batches.items():
        filled = [row for row in rows if row not in pairs.empty]
        found += _in_batch(pairs, batch, filled, positives)
        found += _among_negatives(pairs, batch, filled)
    return found


def uneven(pairs: ForeignPairs) -> list[Finding]:
    """Batches of another size than most."""
    sizes = Counter(len(rows) for rows in pairs.batches.values())
    usual = max(sizes, key=lambda size: (sizes[size], size), default=0)
    others = {batch: rows for batch, rows in pairs.batches.items() if len(rows) != usual}
    return [Finding("uneven_batch", rows[0], batch=batch, n_others=len(rows) - 1) for batch, rows in others.items()]


def _rows(pairs: ForeignPairs) -> Iterator[Finding]:
    first, seen = dict[tuple[Item, Item], int](), set[tuple[Item, Item]]()
    filled = [row for row in range(len(pairs)) if row not in pairs.empty]  # an empty side is a finding of its own
    queries_of, targets_of = _Others(pairs.target, pairs.query, filled), _Others(pairs.query, pairs.target, filled)
    for row, (query, target) in enumerate(zip(pairs.query, pairs.target, strict=True)):
        if row in pairs.again or row in pairs.empty:
            continue
        if normal(query) == normal(target):
            yield Finding("query_is_target", row, exact=query == target)
        earlier = first.setdefault((normal(query), normal(target)), row)
        if earlier != row:
            yield Finding("duplicate_pair", row, exact=(query, target) in seen, other=earlier, n_others=1)
        seen.add((query, target))
        yield from queries_of.of(row, "shared_target")
        yield from targets_of.of(row, "several_targets")


class _Others:
    """Rows with the same ``key`` item and another ``value``."""

    def __init__(self, key: Sequence[Item], value: Sequence[Item], rows: Sequence[int]) -> None:
        self._key, self._value = key, value
        self._rows: dict[Item, dict[Item, int]] = {}
        self._exact: dict[Item, dict[Item, int]] = {}
        for row in rows:
            self._rows.setdefault(normal(key[row]), {}).setdefault(normal(value[row]), row)
            self._exact.setdefault(key[row], {}).setdefault(normal(value[row]), row)

    def of(self, row: int, name: str, batch: object = None) -> Iterator[Finding]:
        others, own = self._rows[normal(self._key[row])], normal(self._value[row])
        if len(others) > 1:
            exact = [there for value, there in self._exact[self._key[row]].items() if value != own]
            other = exact[0] if exact else next(there for value, there in others.items() if value != own)
            yield Finding(name, row, bool(exact), batch, other, len(others) - 1)


class _Positives:
    """The targets of every query, and the first row of each; rows with an empty side apart."""

    def __init__(self, pairs: ForeignPairs) -> None:
        self._rows, self._as_written = dict[Item, dict[Item, int]](), set[tuple[Item, Item]]()
        for row, (query, target) in enumerate(zip(pairs.query, pairs.target, strict=True)):
            if row not in pairs.empty:
                self._rows.setdefault(normal(query), {}).setdefault(normal(target), row)
                self._as_written.add((normal(query), target))

    def of(self, query: Item) -> dict[Item, int]:
        """Each target of the query, evened out, and the first row that says so."""
        return self._rows.get(normal(query), {})

    def is_exact(self, query: Item, target: Item) -> bool:
        """Does a row hold the target as it is written here?"""
        return (normal(query), target) in self._as_written


def _negatives(pairs: ForeignPairs, positives: _Positives) -> Iterator[Finding]:
    for row, items in enumerate(pairs.negatives if pairs.n_negatives else []):
        if row in pairs.again:
            continue
        if not items:
            yield Finding("no_negative", row)
        query, target = pairs.query[row], pairs.target[row]
        seen, seen_as_written = set[Item](), set[Item]()
        for item in items:
            key = normal(item)
            right = positives.of(query).get(key)
            if key == normal(target):
                yield Finding("negative_is_own_positive", row, item == target, text=item.text)
            elif right is not None:
                exact = positives.is_exact(query, item)
                yield Finding("negative_is_positive_of_query", row, exact, other=right, n_others=1, text=item.text)
            elif key == normal(query):
                yield Finding("negative_is_query", row, item == query, text=item.text)
            if key in seen:
                yield Finding("repeated_negative", row, item in seen_as_written, text=item.text)
            seen.add(key)
            seen_as_written.add(item)


def _conflicts(pairs: ForeignPairs) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for row, key in enumerate(pairs.key):
        if key and row not in pairs.again:
            other = first.setdefault(key, row)
            if any(normal(side[row]) != normal(side[other]) for side in (pairs.query, pairs.target)):
                yield Finding("conflicting_key", row, other=other, n_others=1, text=key)


def _in_batch(pairs: ForeignPairs, batch: object, rows: Sequence[int], positives: _Positives) -> Iterator[Finding]:
    if len(rows) > 1 and len({normal(pairs.target[row]) for row in rows}) < 2:
        exact = len({pairs.target[row] for row in rows}) < 2
        yield Finding("one_label_batch", rows[0], exact, batch=batch, n_others=len(rows) - 1)
    queries_of = _Others(pairs.target, pairs.query, rows)
    targets_of = _Others(pairs.query, pairs.target, rows)
    first, seen = dict[tuple[Item, Item], int](), set[tuple[Item, Item]]()
    groups: dict[str, list[int]] = {}
    held: dict[Item, list[int]] = {}
    for row in rows:
        held.setdefault(normal(pairs.target[row]), []).append(row)
    for row in rows:
        other = first.setdefault((normal(pairs.query[row]), normal(pairs.target[row])), row)
        if other != row:
            exact = (pairs.query[row], pairs.target[row]) in seen
            yield Finding("same_pair_in_batch", row, exact, batch, other, 1)
        seen.add((pairs.query[row], pairs.target[row]))
        yield from queries_of.of(row, "same_target_in_batch", batch)
        yield from targets_of.of(row, "same_query_in_batch", batch)
        yield from _positives_elsewhere(pairs, batch, row, held, positives)
        if pairs.group[row]:
            groups.setdefault(pairs.group[row], []).append(row)
    for group, members in groups.items():
        for place, row in enumerate(members if len(members) > 1 else []):
            other = members[0] if place else members[1]
            yield Finding("same_group_in_batch", row, True, batch, other, len(members) - 1, group)


def _positives_elsewhere(
    pairs: ForeignPairs, batch: object, row: int, held: dict[Item, list[int]], positives: _Positives
) -> Iterator[Finding]:
    """Right answers of the row that the batch holds as targets of other queries, but for its own."""
    query, own = normal(pairs.query[row]), normal(pairs.target[row])
    keys = [key for key in positives.of(pairs.query[row]) if key != own]
    met = [other for key in keys for other in held.get(key, ()) if normal(pairs.query[other]) != query]
    if met:
        exact = [other for other in met if positives.is_exact(pairs.query[row], pairs.target[other])]
        yield Finding("positive_of_query_in_batch", row, bool(exact), batch, (exact or met)[0], len(met))


def _among_negatives(pairs: ForeignPairs, batch: object, rows: Sequence[int]) -> Iterator[Finding]:
    """Rows whose positive stands among the negatives of other rows of the batch."""
    holders: dict[Item, list[int]] = {}
    for row in rows if pairs.n_negatives else []:
        for key in {normal(item) for item in pairs.negatives[row]}:
            holders.setdefault(key, []).append(row)
    for row in rows if holders else []:
        others = [other for other in holders.get(normal(pairs.target[row]), ()) if other != row]
        if others:
            exact = [other for other in others if pairs.target[row] in pairs.negatives[other]]
            first = (exact or others)[0]
            yield Finding("positive_among_negatives_in_batch", row, bool(exact), batch, first, len(others))


def suspect(pairs: ForeignPairs, vectors: Embeddings, *, margin: float, easy: bool) -> tuple[list[Finding], int]:
    """What a teacher's vectors add: suspected false negatives and easy rows; and how many negatives had no vector.

    Args:
        margin: a negative is suspected above the positive's cosine plus this.
        easy: look for rows whose batch is easier for them than a random one too; only where batches are the file's own.

    A row's own negatives have vectors where their text is the target of some row.
    """
    row_of: dict[Item, int] = {}
    for row, target in enumerate(pairs.target):
        row_of.setdefault(normal(target), row)
    positive_N = (vectors.query_ND * vectors.target_ND).sum(dim=1)
    found, n_unknown = [], 0
    for row, items in enumerate(pairs.negatives):
        if row in pairs.again:
            continue
        keys = {normal(item): item for item in items}
        known = [row_of[key] for key in keys if key in row_of and key != normal(pairs.target[row])]
        n_unknown += sum(key not in row_of for key in keys)
        score = vectors.target_ND[known] @ vectors.query_ND[row]
        found += _worst(row, known, score - positive_N[row] - margin)
    scores = _Scores(vectors, Alike([_codes(pairs.target), _codes(pairs.query)]))
    chance = random.Random(0)
    for batch, rows in pairs.batches.items():
        ids_B = torch.tensor(rows)
        score_BB = scores.of_negatives(ids_B, ids_B)
        over_BB = score_BB - positive_N[ids_B][:, None] - margin
        for place in (over_BB > 0).any(dim=1).nonzero().flatten().tolist():
            found += _worst(rows[place], rows, over_BB[place], batch)
        if easy and len(rows) > 1:
            other_B = torch.tensor(chance.sample(range(len(pairs)), min(len(rows), len(pairs))))
            random_B = scores.hardest_by_chance(ids_B, other_B)
            easy_B = score_BB.amax(dim=1) < random_B - _TIE
            found += [
                Finding("easier_than_random", rows[place], batch=batch) for place in easy_B.nonzero().flatten().tolist()
            ]
    return found, n_unknown


class _Scores:
    """Cosines of rows' queries with other rows' targets, -inf for what is no negative: an equal target or query."""

    def __init__(self, vectors: Embeddings, alike: Alike) -> None:
        self._vectors, self._alike = vectors, alike

    def of_negatives(self, ids_B: Tensor, ids_C: Tensor) -> Tensor:
        score_BC = self._vectors.query_ND[ids_B] @ self._vectors.target_ND[ids_C].T
        return score_BC.masked_fill_(self._alike.left_out(ids_B, ids_C), -torch.inf)

    def hardest_by_chance(self, ids_B: Tensor, drawn_B: Tensor) -> Tensor:
        """(B,) each row's hardest negative among as many others as its own batch holds."""
        score_BB = self.of_negatives(ids_B, drawn_B)
        whole_B = torch.isfinite(score_BB).all(dim=1)  # one more than the others of a batch
        score_BB[:, -1] = score_BB[:, -1].masked_fill(whole_B, -torch.inf)
        return score_BB.amax(dim=1)


def _worst(row: int, others: Sequence[int], over: Tensor, batch: object = None) -> list[Finding]:
    n_over = int((over > 0).sum())
    if not n_over:
        return []
    worst = int(over.argmax())
    text = f"{float(over[worst]):.3f} above"
    return [Finding("suspected_false_negative", row, True, batch, others[worst], n_over, text)]


def _codes(items: Sequence[Item]) -> Tensor:
    codes: dict[Item, int] = {}
    return torch.tensor([codes.setdefault(normal(item), len(codes)) for item in items])
