"""Quantised transformers: smaller, close to the original, and the joint q/k/v product does not keep old weights."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch

from streamdiff_core.config import ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.quantise import quantise

CONFIG = ModelConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=2, in_channels=4, out_channels=4,
    text_dim=16, text_len=4, freq_dim=16,
)  # fmt: skip


@pytest.fixture
def model():
    model = CausalWanTransformer(CONFIG).bfloat16().requires_grad_(False)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.fuse()


def velocity(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 4, 8, 8, generator=generator).bfloat16()
    prompt = model.encode_prompt(torch.randn(1, 4, 16, generator=generator).bfloat16())
    return model(x, torch.full((1, 2), 300.0), prompt).float()


@pytest.mark.parametrize(("kind", "largest_error"), [("int8", 0.02), ("fp8", 0.1)])
def test_close_to_the_original_at_about_half_the_bytes(model, kind, largest_error):
    pytest.importorskip("torchao")
    before, layer = velocity(model), copy.deepcopy(model.blocks[0].ffn[0])
    quantise(model, kind)
    after = velocity(model)
    error = (after - before).norm() / before.norm()
    assert 0 < error < largest_error
    weight = model.blocks[0].ffn[0].weight
    stored = sum(t.numel() * t.element_size() for t in (weight.qdata, weight.scale))
    assert stored < 0.6 * layer.weight.numel() * layer.weight.element_size()
    assert type(model.head.head.weight) is torch.nn.Parameter, "small layers stay as they are"
    assert model.blocks[0].self_attn._fused is None


def test_unknown_kind_and_missing_package_are_said(model, monkeypatch):
    with pytest.raises(ValueError, match="unknown quantisation 'int3'; use one of int8, fp8"):
        quantise(model, "int3")
    real = builtins.__import__

    def without_torchao(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(ValueError, match="pip install"):
        quantise(model, "int8")
