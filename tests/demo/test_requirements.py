"""What a Space installs and reads before the repository is there, against the one list of dependencies."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
HARDWARE = {"cpu-basic", "cpu-upgrade", "t4-small", "t4-medium", "l4x1", "a10g-small", "a100-large", "zero-a10g"}
REPOSITORY = Path(__file__).resolve().parents[2]


def declared(field):
    """Entries of a list in pyproject.toml."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^{field} = \[(.*?)\]$", text, flags=re.M | re.S)
    return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", body))


def front_matter():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def project(field):
    """A text of pyproject.toml."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{field} = "(.+)"', text, flags=re.M)[1]


def test_requirements_are_the_base_and_the_demo():
    """A Space installs the list before it copies the code, so it cannot say ``-e .[demo]``."""
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert listed == [*declared("dependencies"), *declared("demo")]
    assert len(listed) > 8 and all(re.match(r"^[a-z0-9-]+>=", entry) for entry in listed)


def test_front_matter_of_the_space():
    """Fields and limits as the platform reads them."""
    fields = front_matter()
    assert fields["sdk"] == "gradio" and (REPOSITORY / fields["app_file"]).is_file()
    assert fields["title"] and re.fullmatch(r"[^\w\s]{1,2}", fields["emoji"])
    assert {fields["colorFrom"], fields["colorTo"]} <= COLOURS
    assert len(fields["short_description"]) <= 60, "Spaces refuse a longer one"
    assert fields["suggested_hardware"] in HARDWARE
    assert fields["license"] == project("license").lower()
    assert len(fields["tags"]) >= 3 and all(re.fullmatch(r"[a-z-]+", tag) for tag in fields["tags"])
    assert "models" not in fields, "the bundled model is in the repository: nothing is taken from the hub"


def test_the_space_runs_versions_that_the_project_allows():
    fields = front_matter()
    (gradio,) = [Requirement(entry) for entry in declared("demo") if entry.startswith("gradio")]
    assert isinstance(fields["sdk_version"], str) and fields["sdk_version"] in gradio.specifier
    assert isinstance(fields["python_version"], str), "3.10 without quotes would be 3.1"
    assert fields["python_version"] in SpecifierSet(project("requires-python"))
