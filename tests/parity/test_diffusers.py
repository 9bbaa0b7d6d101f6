"""diffusers' `WanTransformer3DModel` and ours on the same random weights, both ways."""

import json

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.config import ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.weights import convert_keys, load_checkpoint, to_diffusers_keys

diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra 'dev'")

CONFIG = ModelConfig(
    dim=48, ffn_dim=64, num_heads=3, num_layers=2, in_channels=4, out_channels=4,
    text_dim=12, text_len=6, freq_dim=32,
)  # fmt: skip
# diffusers computes the timestep sinusoid in float32 (3e-5 off at timestep 1000); a wrong key shows at 1e-2.
TOLERANCE = {"atol": 5e-5, "rtol": 0}


@pytest.fixture
def theirs():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=32,
        ffn_dim=64, num_layers=2,
    ).requires_grad_(False)  # fmt: skip
    for parameter in model.parameters():  # norms and biases too, so that no two can be swapped unnoticed
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def ours():
    return CausalWanTransformer(CONFIG).requires_grad_(False)


def inputs():
    return torch.randn(2, 3, 4, 6, 4), torch.tensor([900.0, 130.0]), torch.randn(2, 6, 12)


def assert_same_velocity(ours, theirs):
    x, t, context = inputs()
    wanted = theirs(x.transpose(1, 2), t, context, return_dict=False)[0].transpose(1, 2)
    out = ours(x, t[:, None].expand(2, 3), ours.encode_prompt(context))
    assert wanted.std() > 0.1
    assert_close(out, wanted, **TOLERANCE)


@pytest.mark.parametrize("max_shard_size", ["10GB", "60KB"], ids=["one file", "shards"])
def test_folder_written_by_save_pretrained(ours, theirs, tmp_path, max_shard_size):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*/*.safetensors"))) >= (1 if max_shard_size == "10GB" else 3)
    report = load_checkpoint(ours, tmp_path, subfolder="transformer")
    assert (report.layout, report.num_tensors) == ("diffusers", len(ours.state_dict()))
    assert_same_velocity(ours, theirs)


def test_pickled_state_dict(ours, theirs, tmp_path):
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "wan.bin")
    assert load_checkpoint(ours, tmp_path / "wan.bin").layout == "diffusers"
    assert_same_velocity(ours, theirs)


def test_our_weights_in_diffusers(ours, theirs):
    theirs.load_state_dict(to_diffusers_keys(ours.state_dict()), strict=True)
    assert_same_velocity(ours, theirs)


def test_timestep_per_frame(ours, theirs):
    """diffusers takes one timestep per token; all tokens of a latent frame get the same."""
    ours.load_state_dict(convert_keys(theirs.state_dict()))
    x, _, context = inputs()
    t = torch.tensor([[900.0, 500.0, 20.0], [130.0, 700.0, 0.0]])
    wanted = theirs(x.transpose(1, 2), t.repeat_interleave(6, dim=1), context, return_dict=False)[0]
    assert_close(ours(x, t, ours.encode_prompt(context)).transpose(1, 2), wanted, **TOLERANCE)


def test_names_are_those_of_the_recorded_map(golden_dir):
    pairs = json.loads((golden_dir / "a_tiny_wan.json").read_text())["diffusers_keymap"]
    state = {name: torch.tensor(i) for i, name in enumerate(pairs)}
    assert list(to_diffusers_keys(state)) == list(pairs.values())
    assert list(convert_keys(to_diffusers_keys(state))) == list(pairs)
