"""The transformer: timesteps per frame, patches, x0 prediction, fused and float64 paths, error texts."""

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.dit import CausalWanTransformer, motion_presence, timestep_embedding
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies.sink import SinkPolicy

SHAPE = {
    "dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "in_channels": 3, "out_channels": 3,
    "text_dim": 8, "text_len": 5, "freq_dim": 16,
}  # fmt: skip


def random_model(**changes):
    model = CausalWanTransformer(ModelConfig(**{**SHAPE, **changes})).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture
def model():
    return random_model()


def inputs(batch=2, frames=3):
    x = torch.randn(batch, frames, 3, 4, 6)
    return x, torch.rand(batch, frames) * 1000, torch.randn(batch, 5, 8)


def frame_by_frame(frames, tokens=6):
    """Mask under which every latent frame sees itself only."""
    frame = torch.arange(frames).repeat_interleave(tokens)
    return frame[:, None] == frame[None, :]


def test_each_frame_has_its_own_timestep(model):
    """With frames cut off from each other, each is the single-frame forward at its own timestep."""
    x, t, context = inputs()
    prompt = model.encode_prompt(context)
    out = model(x, t, prompt, mask=frame_by_frame(3))
    for f in range(3):
        alone = model(x[:, f : f + 1], t[:, f : f + 1], prompt, frame_ids=torch.full((2, 1), f))
        assert_close(out[:, f : f + 1], alone, atol=2e-6, rtol=1e-5)
    changed = t.clone()
    changed[0, 1] = 1000 - t[0, 1]
    moved = (model(x, changed, prompt, mask=frame_by_frame(3)) - out).abs().amax((2, 3, 4)) > 1e-3
    assert moved.tolist() == [[False, True, False], [False, False, False]]


def test_only_differences_of_positions_matter(model):
    x, t, context = inputs()
    prompt = model.encode_prompt(context)
    out = model(x, t, prompt)
    assert_close(model(x, t, prompt, frame_ids=torch.arange(3).expand(2, 3) + 5000), out, atol=2e-5, rtol=1e-4)
    spread = model(x, t, prompt, frame_ids=torch.tensor([[0, 7, 30]]).expand(2, 3))
    assert (spread - out).abs().max() > 1e-3


def test_timestep_embedding_by_hand():
    """Cosines first; frequencies 1 and 1/100 for width 4; float64, so that 100 radians are exact."""
    out = timestep_embedding(torch.tensor([[0.0, 100.0]]), 4)
    assert out.dtype == torch.float64
    wanted = [[[1, 1, 0, 0], [0.862318872287684, 0.540302305868140, -0.506365641109759, 0.841470984807897]]]
    assert_close(out, torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def test_patches_in_are_the_convolution(model):
    x = torch.randn(2, 3, 3, 4, 6)
    wanted = model.patch_embedding(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # [B, F, P, D]
    assert_close(model._patchify(x), wanted, atol=1e-6, rtol=1e-5)


def test_patches_out_by_hand(model):
    """Head entry (py * 2 + px) * C + c belongs to pixel (py, px) of the patch, channel c."""
    model.head.head.weight.zero_()
    model.head.head.bias.copy_(torch.arange(12.0))
    x, t, context = inputs()
    out = model(x, t, model.encode_prompt(context))
    assert out.shape == x.shape
    tile = torch.tensor([[[0.0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]])  # [C, py, px]
    assert_close(out, tile.repeat(1, 2, 3).expand_as(out), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(5, 6), (4, 3)])
def test_latent_size_that_is_no_multiple_of_the_patch(model, size):
    _, t, context = inputs()
    with pytest.raises(ValueError, match=f"latent size {size[0]}x{size[1]} must be a multiple of the patch 2x2"):
        model(torch.randn(2, 3, 3, *size), t, model.encode_prompt(context))


def test_prompt_per_row(model):
    """One context for all rows, one per row, and rows that share one object."""
    x, t, context = inputs()
    prompts = [model.encode_prompt(c[None]) for c in context]
    out = model(x, t, prompts)
    assert_close(out, model(x, t, model.encode_prompt(context)), atol=2e-6, rtol=1e-5)
    for row in range(2):
        alone = model(x[row : row + 1], t[row : row + 1], prompts[row])
        assert_close(out[row : row + 1], alone, atol=2e-6, rtol=1e-5)
    assert_close(model(x, t, [prompts[0]] * 2), model(x, t, prompts[0]), rtol=0, atol=0)
    assert (out[1] - model(x, t, prompts[0])[1]).abs().max() > 1e-4


# --- x0 prediction ---


def x0_model(std, **changes):
    model = random_model(prediction="x0", **changes)
    model.latent_std.copy_(torch.tensor(std))
    return model


def test_silent_network_gives_the_wiener_estimate():
    """Zero head: x0 is the best guess from xt and the channel's spread alone.

    sigma 1/2, spread 1/2: x0 = 0.125 / 0.3125 xt = 0.4 xt, velocity = (xt - x0) / sigma = 1.2 xt;
    spread 2: x0 = 2 / 1.25 xt = 1.6 xt, velocity -1.2 xt; spread 1: x0 = xt, velocity 0.
    sigma 1: x0 = 0, velocity = xt. sigma 0: x0 = xt, velocity 0 and not 0 / 0.
    """
    model = x0_model([0.5, 2.0, 1.0])
    model.head.head.weight.zero_()
    model.head.head.bias.zero_()
    x, _, context = inputs()
    t = torch.tensor([[500.0, 1000.0, 0.0]]).expand(2, 3)
    out = model(x, t, model.encode_prompt(context))
    factor = torch.tensor([[1.2, -1.2, 0], [1, 1, 1], [0, 0, 0]])[None, :, :, None, None]
    assert_close(out, x * factor, atol=1e-5, rtol=1e-5)


def test_x0_is_gated_wiener_plus_scaled_value():
    """A velocity model of twice the channels, same weights, fed at unit variance, gives value and gate."""
    std = torch.tensor([0.5, 2.0, 1.0])
    model = x0_model(std.tolist())
    raw = random_model(out_channels=6)
    raw.load_state_dict({name: v for name, v in model.state_dict().items() if not name.startswith("latent_")})
    x, t, context = inputs()
    prompt = model.encode_prompt(context)
    sigma, s = (t / 1000)[:, :, None, None, None], std[:, None, None]
    variance = (s * (1 - sigma)) ** 2 + sigma**2
    value, gate = raw(x / variance.sqrt(), t, prompt).chunk(2, dim=2)
    x0 = (1 + gate) * (1 - sigma) * s**2 / variance * x + s * value
    velocity = model(x, t, prompt)
    assert_close(x - sigma * velocity, x0, atol=1e-5, rtol=1e-5)
    assert min(value.std(), gate.std()) > 0.1, "neither may be lost in the tolerance"


def test_motion_presence_by_hand():
    """Noise alone gives 0 after the margin, 13 times its energy gives 0.9; other channels do not count."""
    motion = torch.tensor([0.0, 1.0])[:, None, None]
    sigma = torch.full((1, 1, 1, 1, 1), 0.5)
    xt = torch.zeros(1, 1, 2, 5, 5)
    xt[:, :, 0] = 100.0
    xt[:, :, 1] = 0.5  # energy = sigma²
    assert torch.equal(motion_presence(xt, motion, sigma), torch.zeros(1, 1, 1, 5, 5))
    xt[:, :, 1] = 0.5 * 13**0.5
    assert_close(motion_presence(xt, motion, sigma), torch.full((1, 1, 1, 5, 5), 0.9), atol=1e-5, rtol=0)


def test_still_input_has_no_motion_in_the_prediction():
    model = x0_model([1.0, 1.0, 1.0])
    model.latent_motion[2] = 1
    x, t, context = inputs()
    x[:, :, 2] = 0.01
    sigma = (t / 1000)[:, :, None, None, None]
    x0 = x - sigma * model(x, t, model.encode_prompt(context))
    assert x0[:, :, 2].abs().max() < 1e-5 < 0.1 < x0[:, :, :2].abs().max()


def test_spread_is_saved_with_the_weights():
    assert "latent_std" in x0_model([1.0, 1.0, 1.0]).state_dict()
    assert "latent_std" not in random_model().state_dict()


# --- other paths through the same weights ---


def stream(model, x, t, context):
    """Frames one by one through a cache of one sink and two rolling frames."""
    policy = SinkPolicy(CacheConfig(sink_frames=1, window_frames=2, positions="packed"))
    cache = KVCache(model.config, policy, num_rows=1, tokens_per_frame=6, dtype=model.dtype)
    prompt = model.encode_prompt(context)
    frames = range(x.shape[1])
    return torch.cat([model(x[:, [f]], t[:, [f]], prompt, [cache.begin(0, [f])]) for f in frames], dim=1)


def test_fuse_changes_nothing(model):
    """Same sums in a wider product: equal to float32 rounding. Parameter names stay."""
    x, t, context = inputs(batch=1, frames=5)
    before, streamed = model(x, t, model.encode_prompt(context)), stream(model, x, t, context)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.fuse() is model
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert_close(model(x, t, model.encode_prompt(context)), before, atol=1e-6, rtol=1e-6)
    assert_close(stream(model, x, t, context), streamed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_float64_model(prediction):
    """Nothing on the way is rounded to float32: a change of 1e-12 of the input arrives at the output."""
    model = random_model(prediction=prediction)
    x, t, context = inputs(batch=1)
    narrow = stream(model, x, t, context)
    model.double()
    x, t, context = x.double(), t.double(), context.double()
    wide = stream(model, x, t, context)
    assert wide.dtype == torch.float64
    assert_close(narrow.double(), wide, atol=1e-4, rtol=1e-4)
    nudge = torch.randn_like(x)
    slope = (stream(model, x + 1e-6 * nudge, t, context) - wide) / 1e-6
    tiny = (stream(model, x + 1e-9 * nudge, t, context) - wide) / 1e-9
    assert slope.abs().max() > 0.1
    assert_close(tiny, slope, atol=1e-4, rtol=1e-3)


def test_bfloat16_model_returns_float32(model):
    """Weights and activations are bfloat16; velocities leave in float32, within the 3 digits of the type."""
    x, t, context = inputs(batch=1)
    wanted = stream(model, x, t, context)
    out = stream(model.bfloat16(), x, t, context)
    assert out.dtype == torch.float32
    assert (out - wanted).norm() / wanted.norm() < 0.03


def test_no_state_is_left_in_the_model(model):
    """A second stream on the same model equals the first."""
    x, t, context = inputs(batch=1, frames=5)
    first = stream(model, x, t, context)
    assert_close(stream(model, x, t, context), first, rtol=0, atol=0)
    assert not list(model.buffers())
