"""``streamdiff embed``: a small random umT5; prompts end up on disk and in the file to ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamdiff_core import full_size
from streamdiff_core.cli import main
from streamdiff_core.cli_embed import read_prompts
from streamdiff_core.config import get_preset
from streamdiff_core.types import CheckpointError

transformers = pytest.importorskip("transformers", reason="umT5 comes through transformers (extra wan)")
pytest.importorskip("ftfy", reason="umT5 prompts are cleaned with ftfy (extra wan)")
from tests.test_umt5 import WordTokenizer  # noqa: E402

GALLERY = Path(__file__).parent.parent / "demo" / "static" / "gallery" / "styles.json"


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """How often the encoder was loaded; the hub gives a small one."""
    config = transformers.UMT5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model, asked = transformers.UMT5EncoderModel(config).eval(), []
    monkeypatch.setattr(full_size, "EMBEDDINGS", tmp_path / "cache")
    monkeypatch.setattr(full_size, "_fetch", lambda repo, names: asked.append(repo))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: WordTokenizer())
    monkeypatch.setattr(transformers.UMT5EncoderModel, "from_pretrained", lambda *_, **__: model)
    return asked


def test_gallery_prompts_are_shipped_and_used_without_the_encoder(loads, tmp_path, monkeypatch, capsys):
    file = tmp_path / "assets" / "prompts.safetensors"
    assert main(["embed", "a red boat", "--file", str(GALLERY), "-o", str(file)]) == 0
    prompts = [style["prompt"] for style in json.loads(GALLERY.read_text("utf-8"))]
    assert f"{len(prompts) + 1} prompts embedded, in {file}" in capsys.readouterr().out
    assert len(loads) == 1 and len(list((tmp_path / "cache").iterdir())) == len(prompts) + 1
    monkeypatch.setattr(full_size, "EMBEDDINGS", tmp_path / "elsewhere")
    monkeypatch.setattr(full_size, "SHIPPED", file)
    for preset in ("wan-1.3b", "wan-14b", "self-forcing-1.3b"):
        out = full_size.text_encoder(get_preset(preset), torch.device("cpu")).encode(prompts)
        assert out.shape == (len(prompts), 512, 16) and out.any(dim=(1, 2)).all()
    assert len(loads) == 1, "11 GB were loaded for a prompt that came with the package"


def test_json_and_second_call(loads, capsys):
    for _ in range(2):
        assert main(["embed", "a red boat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == {"a red boat": 4}
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--preset", "tiny"], "'tiny' has a text encoder of its own"),
        ([], "name at least one prompt"),
        (["--file", "pyproject.json"], "no list of"),
        (["--file", "prompts.txt"], "there is no file of prompts at prompts.txt"),
    ],
)
def test_wrong_use_is_said(loads, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("pyproject.json").write_text('["a", "b"]')
    assert main(["embed", *arguments]) == 2
    assert says in capsys.readouterr().err and loads == []


def test_prompts_from_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  two words \n", "utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two words"]


def test_help_says_where_embeddings_are_looked_up(capsys):
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert full_size.SHIPPED.relative_to(Path(full_size.__file__).parent.parent).as_posix() in text
    assert "~/" + full_size.EMBEDDINGS.relative_to(Path.home()).as_posix() in text


def test_without_embedding_and_hub_both_places_and_the_command_are_named(loads, tmp_path, monkeypatch, capsys):
    def refuse(repo, names):
        raise CheckpointError("the hub did not give it")

    monkeypatch.setattr(full_size, "_fetch", refuse)
    assert main(["embed", "a red boat"]) == 1
    said = capsys.readouterr().err
    for part in (full_size.SHIPPED, full_size.EMBEDDINGS, "the hub did not give it", "streamdiff embed PROMPT -o"):
        assert str(part) in said
    assert len(said.splitlines()) == 1
