"""Where commands print: folded to a terminal's width, and whole in a file or a pipe."""

from __future__ import annotations

import pytest

from b3_lightning.console import open_console


def test_a_pipe_gets_whole_lines_unless_a_width_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(["word"] * 100)
    monkeypatch.delenv("COLUMNS", raising=False)
    open_console().print(words)
    assert capsys.readouterr().out == words + "\n"
    monkeypatch.setenv("COLUMNS", "60")
    open_console().print(words)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
    monkeypatch.delenv("COLUMNS")
    assert open_console(force_terminal=True).width < 1_000
