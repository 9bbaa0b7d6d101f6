"""The README's Python snippet runs as printed and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from streamdiff_core.cli_args import build_parser
from streamdiff_core.video_io import probe

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_snippet_runs_as_printed(tmp_path, monkeypatch, capsys):
    """The output video has as many frames as went in: two seconds at 16 fps."""
    (snippet,) = blocks("python")
    assert len(snippet.strip().splitlines()) <= 14
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert probe(tmp_path / "watercolour.mp4").num_frames == 32
    assert "num_frames_out=32" in capsys.readouterr().out


def test_commands_parse():
    lines = [line for block in blocks("bash") for line in block.splitlines() if "bin/streamdiff " in line]
    assert len(lines) >= 4
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README.read_text(encoding="utf-8")))
def test_local_links_and_pictures_exist(link):
    assert (README.parent / link).exists()
