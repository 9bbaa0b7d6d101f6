"""What a newcomer relies on: one list of dependencies, commands that exist, small files, a light import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_FILE_BYTES = 9_500_000
LAZY_MODULES = ("gradio", "diffusers", "transformers", "av", "cv2", "PIL", "matplotlib")


def read(name: str) -> str:
    path = REPOSITORY / name
    if not path.exists():
        pytest.skip(f"{name} is not there yet")
    return path.read_text(encoding="utf-8")


def tracked_files() -> list[Path]:
    git = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, text=True)
    if git.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in git.stdout.split("\0") if name and (path := REPOSITORY / name).exists()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.M))


def test_dependencies_are_listed_once() -> None:
    entries = re.findall(r"^\s*- (.+)$", read("environment.yml").split("dependencies:")[1], flags=re.M)
    assert [re.split(r"[<>=]", entry)[0] for entry in entries[:2]] == ["python", "pip"]
    assert entries[2] == "pip:" and re.fullmatch(r"-e \.\[[a-z,]+\]", entries[3]) and len(entries) == 4
    for second_list in ("setup.py", "setup.cfg", "Pipfile"):
        assert not (REPOSITORY / second_list).exists(), f"{second_list} repeats pyproject.toml"


def test_extras_of_the_environment_exist() -> None:
    (extras,) = re.findall(r"-e \.\[([a-z,]+)\]", read("environment.yml"))
    declared = read("pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(extras.split(",")) <= set(re.findall(r"^([a-z]+) = \[", declared, flags=re.M))


def test_dependencies_are_ranges() -> None:
    assert "==" not in read("pyproject.toml")


def test_no_large_files() -> None:
    large = {str(p): p.stat().st_size for p in tracked_files() if p.stat().st_size > MAX_FILE_BYTES}
    assert not large


def test_changelog_has_this_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), flags=re.M)
    assert f"## [{version}]" in read("CHANGELOG.md")
    assert f'__version__ = "{version}"' in read("streamdiff_core/__init__.py")


def test_house_targets_exist() -> None:
    assert {"setup", "demo", "test", "check", "notebooks", "bench"} <= make_targets()


def test_readme_names_only_targets_that_exist() -> None:
    commands = re.findall(r"^(?:\$ )?make ([a-z]+)", read("README.md"), flags=re.M)
    commands += re.findall(r"`make ([a-z]+)", read("README.md"))
    assert commands and set(commands) <= make_targets()


def test_ci_runs_the_documented_commands() -> None:
    script = read(".ci/run")
    assert all(command in script for command in ("make test", "make check", ".venv/bin/streamdiff run sample"))


def test_bundled_media_carry_their_licence() -> None:
    assets = REPOSITORY / "streamdiff_core" / "assets"
    notice = (assets / "SAMPLE_LICENSE.md").read_text(encoding="utf-8")
    assert "Blender Foundation" in notice and "Creative Commons Attribution 3.0" in notice
    assert "Apache License" in read("LICENSE")


@pytest.mark.parametrize("statement", ["import streamdiff_core", "import streamdiff_core.video_io"])
def test_import_loads_no_optional_package(statement: str) -> None:
    script = f"{statement}\nimport sys\nprint(*[m for m in {LAZY_MODULES} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_a_stream_does_not_load_the_compiler_of_pytorch() -> None:
    """It takes two seconds, which every command would wait for; the meta device and ``torch.compiler`` bring it."""
    script = """
import sys, numpy as np
from streamdiff_core import StreamPipeline
StreamPipeline.from_preset("tiny", device="cpu").start("ink").push(np.zeros((5, 64, 64, 3), np.uint8))
print(*[m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
