"""What the columns of pairs are called: our names, those that others use, and what may be mapped to which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

ALIASES = {
    "qry": ("qry", "anchor", "query", "question", "sentence1"),
    "pos_text": ("pos_text", "positive", "pos", "answer", "document", "sentence2"),
    "neg_text": ("neg_text", "negative", "neg", "negatives", "hard_negative", "hard_negatives"),
    "qry_image_path": ("qry_image_path",),
    "pos_image_path": ("pos_image_path",),
    "neg_image_path": ("neg_image_path",),
    "batch": ("batch",),
    "group": ("group",),
    "key": ("key",),
}
"""What each column may be called where it is not said; the first that is there counts."""
_SCORES = {"score", "label", "similarity_score"}
"""What sentence-transformers calls the degree to which a pair is right."""
_NUMBERED = re.compile(r"negative_\d+")


def columns_of(path: str, found: Sequence[str], given: Mapping[str, str], ours: Sequence[str]) -> dict[str, str]:
    """Our names -> the file's, of the columns that it has: as given, or else by its own or a common name.

    Args:
        ours: what is read.

    Raises:
        ValueError: where ``given`` maps anything else, or names a column that is not there; on pairs with scores.
    """
    unknown = sorted(set(given) - set(ours))
    if unknown:
        raise ValueError(f"columns maps {unknown}; {_what_maps(given, ours)}")
    absent = sorted(set(given.values()) - set(found))
    if absent:
        raise ValueError(f"{path} has no column {absent}; it has {list(found)}")
    scored = {"sentence1", "sentence2"} <= set(found) and _SCORES & set(found)
    if scored and not {"qry", "pos_text"} & set(given):
        raise ValueError(
            f"{path} has sentence1 and sentence2 with a {min(scored)}: such pairs are not all positives. Keep those "
            "that are, and name the columns: qry is sentence1, pos_text is sentence2"
        )
    taken = set(given.values())
    known = {name: next((one for one in ALIASES[name] if one in found and one not in taken), None) for name in ours}
    return {ours: name for ours, name in {**known, **given}.items() if name is not None}


def numbered_negatives(found: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """``negative_1``, ``negative_2``, ..., sentence-transformers' names, but for what ``columns`` maps already."""
    return [name for name in found if _NUMBERED.fullmatch(name) and name not in columns.values()]


def _what_maps(given: Mapping[str, str], ours: Sequence[str]) -> str:
    """What can be mapped, where something else was named."""
    turned = {theirs: name for name, theirs in given.items()}
    if set(turned) <= set(ours):
        return f"write it the other way round, ours first: {turned}"
    return f"what can be mapped is {list(ours)}"
