"""Options of every command: spelt with dashes or underscores, and named where a misspelt one comes near."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

COMMAND = "python -m b3_lightning"


class OptionParser(argparse.ArgumentParser):
    """Takes ``--batch_size`` and ``--batch-size`` alike; tells a mistake in a line, with the options that come near."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known = list(self._option_string_actions)
        given = as_known(sys.argv[1:] if args is None else args, known)
        for name in _options(given):
            if name not in known:
                self.error(f"there is no option {name}{nearest(name, known)}")
        return super().parse_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message}\n{self.prog} --help lists all\n")
        sys.exit(2)


def as_known(given: Sequence[str], known: Iterable[str]) -> list[str]:
    """The arguments with every option as it is known, where it differs in dashes and underscores alone."""
    listed = set(known)
    spelt = {_plain(name): name for name in listed}
    end = _end(given)
    found = []
    for word in given[:end]:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in listed:
            word = f"{_respelt(name, spelt)}{equals}{value}"
        found.append(word)
    return [*found, *given[end:]]


def _respelt(name: str, spelt: Mapping[str, str]) -> str:
    """Only as far as the option is known: what follows may be a key, such as a task's name, which keeps its dashes."""
    parts = name.split(".")
    for n_parts in range(len(parts), 0, -1):
        known = spelt.get(_plain(".".join(parts[:n_parts])))
        if known is not None:
            return ".".join([known, *parts[n_parts:]])
    return name


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that come near: as a whole, or in their last part."""
    known = [other for other in known if "." in other] or list(known)
    last = {other: other.rpartition(".")[2] for other in known}
    near = difflib.get_close_matches(name, known, n=2)
    own = name.rpartition(".")[2]
    near += [other for other in known if last[other] in difflib.get_close_matches(own, set(last.values()), n=1)]
    listed = list(dict.fromkeys(near))[:3]
    return f"; did you mean {' or '.join(listed)}?" if listed else ""


def _options(given: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in given[: _end(given)] if word.startswith("--")]


def _end(given: Sequence[str]) -> int:
    """Where options end: at ``--``, if it is there."""
    return given.index("--") if "--" in given else len(given)


def _plain(name: str) -> str:
    return name.replace("-", "_")
