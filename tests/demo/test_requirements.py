"""What a Space installs and reads before the repository is there, against the one list of dependencies."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def declared(field):
    """Entries of a list in pyproject.toml."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^{field} = \[(.*?)\]$", text, flags=re.M | re.S)
    return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", body))


def front_matter():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    lines = text.split("---\n")[1].splitlines()
    return dict(re.match(r"(\w+): (.*)", line).groups() for line in lines)


def test_requirements_are_the_base_and_the_demo():
    """A Space installs the list before it copies the code, so it cannot say ``-e .[demo]``."""
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert listed == [*declared("dependencies"), *declared("demo")]
    assert len(listed) > 8 and all(re.match(r"^[a-z0-9-]+>=", entry) for entry in listed)


def test_front_matter_of_the_space():
    fields = front_matter()
    assert fields["sdk"] == "gradio" and (REPOSITORY / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60, "Spaces refuse a longer one"
    (gradio,) = [entry for entry in declared("demo") if entry.startswith("gradio")]
    low, high = re.fullmatch(r"gradio>=([\d.]+),<(\d+)", gradio).groups()
    version = tuple(map(int, fields["sdk_version"].split(".")))
    assert tuple(map(int, low.split("."))) <= version < (int(high),)
