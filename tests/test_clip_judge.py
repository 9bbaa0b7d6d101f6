"""CLIP as a judge, with a small random model: the cosine as transformers computes it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from streamdiff_core.clip_judge import load_judge

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLIP of 16 features whose vocabulary is the letters."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(small, vocab_size=len(vocabulary), max_position_embeddings=16, bos_token_id=52, eos_token_id=53)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(small, image_size=32, patch_size=16),
                                     projection_dim=16)  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_score_is_the_cosine_of_the_projected_features(folder: Path) -> None:
    judge = load_judge(folder)
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(["ink on paper", "oil"], padding=True,
                                                                return_tensors="pt")  # fmt: skip
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)(images=list(frames), return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
    found = [[judge(frame, prompt) for prompt in ("ink on paper", "oil")] for frame in frames]
    torch.testing.assert_close(torch.tensor(found), 100 * logits, rtol=1e-3, atol=1e-2)
    assert abs(found[0][0] - found[0][1]) > 0.1 and abs(found[0][0] - found[1][0]) > 1e-3


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no CLIP model; name the folder"):
        load_judge(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no readable CLIP model"):
        load_judge(tmp_path)
