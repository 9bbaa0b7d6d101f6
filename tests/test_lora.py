"""LoRA: each key style gives the same weights as the formula written out; what does not fit changes nothing."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from streamdiff_core.config import ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.lora import merge_lora
from streamdiff_core.types import CheckpointError

CONFIG = ModelConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4,
    text_dim=8, text_len=5, freq_dim=16,
)  # fmt: skip
# Wan name, diffusers name, (out, in)
PLACES = [
    ("blocks.0.self_attn.q", "blocks.0.attn1.to_q", (24, 24)),
    ("blocks.1.cross_attn.o", "blocks.1.attn2.to_out.0", (24, 24)),
    ("blocks.1.ffn.0", "blocks.1.ffn.net.0.proj", (32, 24)),
]
RANK, ALPHA = 3, 6.0


@pytest.fixture
def model():
    return CausalWanTransformer(CONFIG).requires_grad_(False).fuse()


@pytest.fixture
def factors():
    return {wan: (torch.randn(RANK, i), torch.randn(o, RANK)) for wan, _, (o, i) in PLACES}


def write(path, factors, style):
    """One file per key style in circulation."""
    state = {}
    for wan, diffusers, _ in PLACES:
        down, up = (x.contiguous() for x in factors[wan])
        if style == "diffusers":
            state |= {f"transformer.{diffusers}.lora_A.weight": down * ALPHA / RANK,
                      f"transformer.{diffusers}.lora_B.weight": up}  # fmt: skip
        elif style == "peft":
            state |= {f"base_model.model.{diffusers}.lora_A.default.weight": down * ALPHA / RANK,
                      f"base_model.model.{diffusers}.lora_B.default.weight": up}  # fmt: skip
        else:
            name = f"diffusion_model.{wan}" if style == "wan" else "lora_unet_" + wan.replace(".", "_")
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
                      f"{name}.alpha": torch.tensor(ALPHA)}  # fmt: skip
    save_file(state, path)
    return path


@pytest.mark.parametrize("style", ["diffusers", "peft", "wan", "kohya"])
def test_every_key_style_gives_the_formula(tmp_path, model, factors, style):
    before = copy.deepcopy(model.state_dict())
    report = merge_lora(model, write(tmp_path / "lora.safetensors", factors, style), strength=0.5)
    assert report.num_merged == 3
    for name, value in model.state_dict().items():
        wanted = before[name]
        if name.removesuffix(".weight") in factors:
            down, up = factors[name.removesuffix(".weight")]
            wanted = wanted + 0.5 * (ALPHA / RANK) * up @ down
        assert_close(value, wanted)


def test_fused_projection_uses_the_merged_weights(tmp_path, model, factors):
    """Merged into a copy that attention does not read, a LoRA would silently have no effect."""
    x, layer = torch.randn(1, 4, 24), model.blocks[0].self_attn
    before = torch.nn.functional.linear(x, *layer._fused)[..., :24]
    merge_lora(model, write(tmp_path / "lora.safetensors", factors, "wan"))
    down, up = factors["blocks.0.self_attn.q"]
    after = torch.nn.functional.linear(x, *layer._fused)[..., :24]
    assert_close(after - before, x @ (ALPHA / RANK * up @ down).T, rtol=1e-4, atol=1e-4)


def test_negative_strength_takes_it_out_again(tmp_path, model, factors):
    before, path = copy.deepcopy(model.state_dict()), write(tmp_path / "lora.safetensors", factors, "wan")
    merge_lora(model, path)
    merge_lora(model, path, strength=-1)
    assert_close(model.state_dict(), before, rtol=1e-5, atol=1e-5)


def test_whole_differences_of_weights_and_biases(tmp_path, model):
    before = copy.deepcopy(model.state_dict())
    changes = {
        "diffusion_model.blocks.0.norm3.diff": torch.randn(24),
        "diffusion_model.head.head.diff_b": torch.randn(16),
    }
    save_file(changes, tmp_path / "lora.safetensors")
    merge_lora(model, tmp_path / "lora.safetensors")
    for name, change in zip(("blocks.0.norm3.weight", "head.head.bias"), changes.values(), strict=True):
        assert_close(model.state_dict()[name], before[name] + change)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda s: s | {"diffusion_model.blocks.7.ffn.0.lora_up.weight": torch.zeros(32, 3)},
            "1 entries have no place",
        ),
        (lambda s: {k: v for k, v in s.items() if "ffn.0.lora_up" not in k}, "blocks.1.ffn.0.weight has only one half"),
        (lambda s: s | {"diffusion_model.blocks.1.ffn.0.lora_up.weight": torch.zeros(40, 3)}, "model of another size"),
        (lambda s: {"something.else": torch.zeros(2)}, "holds no LoRA for this model"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, model, factors, spoil, says):
    from safetensors.torch import load_file

    path = write(tmp_path / "lora.safetensors", factors, "wan")
    save_file(spoil(load_file(path)), path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=re.escape(says)):
        merge_lora(model, path)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
