"""8-bit products: near the block they stand for, rows independent, and the bundled model looks the same with them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from streamdiff_core import StreamPipeline, int8_blocks, pipeline
from streamdiff_core.bench import count_chunk_flops
from streamdiff_core.compiled import compile_blocks
from streamdiff_core.config import CacheConfig, ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.int8_blocks import (
    RANGES_FILE,
    Int8Linear,
    Int8Ranges,
    has_int8,
    load_ranges,
    measure_ranges,
    use_int8,
)
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.metrics import psnr
from streamdiff_core.pipeline import ASSETS
from streamdiff_core.training import cli, prompts
from streamdiff_core.types import CheckpointError
from streamdiff_core.video_io import read_video

needs_vnni = pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI instructions")
CONFIG = ModelConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, text_len=4, freq_dim=16
)
CPU = torch.device("cpu")
RANGES = [[[-8.0, 8.0]] * 5 + [[-0.2, 8.0]], [[-6.0, 7.0]] * 5 + [[-0.3, 5.0]]]


@pytest.fixture
def model() -> CausalWanTransformer:
    torch.manual_seed(0)
    model = CausalWanTransformer(CONFIG).bfloat16().eval().requires_grad_(False)
    for norm in [m for m in model.modules() if type(m).__name__ == "RMSNorm"]:
        norm.weight.data = 1 + 0.3 * torch.randn_like(norm.weight)
    for block in model.blocks:
        block.norm3.weight.data, block.norm3.bias.data = (
            (1 + 0.3 * torch.randn(64)).bfloat16(),
            torch.randn(64).bfloat16(),
        )
    nn.init.normal_(model.head.head.weight, std=0.2)
    return model.fuse()


@pytest.fixture
def rounded(model) -> CausalWanTransformer:
    use_int8(model, Int8Ranges(torch.tensor(RANGES)))
    return model


def ranges_file(folder, ranges=RANGES):
    (folder / "int8_ranges.json").write_text(json.dumps(ranges))
    return folder / "int8_ranges.json"


def stream(model: CausalWanTransformer, rows: list[int]) -> list[torch.Tensor]:
    """Blocks' output of each row over six chunks; a row has inputs, noise levels and positions of its own."""
    with torch.inference_mode():
        prompt = model.encode_prompt(torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(9)))
        policy = POLICIES["sink"](CacheConfig(sink_frames=1, window_frames=2, positions="packed"))
        cache = KVCache(CONFIG, policy, num_rows=3, tokens_per_frame=16, dtype=model.dtype)
        out = {row: [] for row in rows}
        for frame in range(6):
            xt = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(10 * frame + r)) for r in rows]
            views = [cache.begin(row, (frame + row,)) for row in rows]
            velocity = model(torch.stack(xt), torch.tensor([[300.0 + 200 * r] for r in rows]), prompt, views)
            for row, v in zip(rows, velocity, strict=True):
                out[row].append(v)
    return [torch.cat(out[row]) for row in rows]


@needs_vnni
def test_linear_rounds_and_clips():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.rand(2, 5, 64) * 6 - 2
    linear = Int8Linear(weight, bias, (-2.0, 4.0))
    exact = F.linear(x, weight, bias)
    assert (linear(linear.round(x)) - exact).norm() / exact.norm() < 0.01
    assert torch.equal(linear.round(torch.tensor([-99.0, 0.0, 99.0])), torch.tensor([0, linear.zero, 255]).byte())
    assert_close((linear.round(x).float() - linear.zero) * linear.step, x, rtol=0, atol=linear.step)
    consumer = Int8Linear(torch.eye(48), torch.zeros(48), (-0.2, float(F.gelu(exact).max())))
    both = consumer(linear.gelu_for(linear.round(x), consumer))
    want = F.gelu(exact, approximate="tanh")
    assert (both - want).norm() / want.norm() < 0.01


@needs_vnni
def test_block_stays_near_the_block_it_stands_for(model, tmp_path):
    """A forgotten modulation, norm weight, bias or gate would be an error of tens of percent."""
    (before,) = stream(model, [0])
    use_int8(model, load_ranges(ranges_file(tmp_path), CPU))
    (after,) = stream(model, [0])
    assert 0 < (after - before).norm() / before.norm() < 0.03


@needs_vnni
def test_rows_of_a_batch_do_not_touch_each_other(rounded):
    """One range for the whole batch, taken from what is in it, would make a recording depend on the other viewers."""
    together = stream(rounded, [0, 1, 2])
    for row, mine in enumerate(together):
        assert_close(mine, stream(rounded, [row])[0], rtol=0, atol=2e-2 * float(mine.abs().max()))
    block, x = rounded.blocks[0].int8, torch.randn(3, 16, 64)
    whole = block.up(block.up.round(x))
    assert all(torch.equal(whole[i], block.up(block.up.round(x[i : i + 1]))[0]) for i in range(3))


@needs_vnni
def test_compiled_gives_the_same(rounded):
    """A number that a graph took from the first block, a step or a layer, would be an error of tens of percent."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    before = stream(rounded, [0, 1])
    after = stream(compile_blocks(rounded, backend=backend), [0, 1])
    assert len(graphs) == 1
    for got, want in zip(after, before, strict=True):
        assert_close(got, want, rtol=0, atol=1e-2 * float(want.abs().max()))


@needs_vnni
def test_without_a_cache_the_weights_themselves_are_used(rounded):
    x, timestep = torch.randn(1, 2, 4, 8, 8), torch.full((1, 2), 300.0)
    prompt = rounded.encode_prompt(torch.randn(1, 4, 16))
    with torch.inference_mode():
        got = rounded(x, timestep, prompt)
        for block in rounded.blocks:
            block.int8 = None
        assert torch.equal(got, rounded(x, timestep, prompt))


def test_ranges_are_what_went_in(model):
    model.float()
    seen = []
    model.blocks[1].cross_attn.o.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with measure_ranges(model) as ranges:
        stream(model, [0, 1])
    assert ranges[1][3] == [min(x.min().item() for x in seen), max(x.max().item() for x in seen)]
    assert all(low < 0 < high for block in ranges for low, high in block)
    kept = [[list(span) for span in block] for block in ranges]
    stream(model, [2])
    assert ranges == kept, "nobody watches any more"


def test_what_cannot_work_is_said(model, tmp_path, monkeypatch):
    monkeypatch.setattr(int8_blocks, "has_int8", lambda: True)
    with pytest.raises(CheckpointError, match="no activation ranges .* streamdiff-train ranges"):
        load_ranges(tmp_path / "int8_ranges.json", CPU)
    with pytest.raises(CheckpointError, match=r"\(1, 6, 2\), this transformer needs \(2, 6, 2\)"):
        use_int8(model, load_ranges(ranges_file(tmp_path, RANGES[:1]), CPU))
    with pytest.raises(ValueError, match="device='cpu'"):
        load_ranges(ranges_file(tmp_path), torch.device("meta"))
    monkeypatch.setattr(int8_blocks, "has_int8", lambda: False)
    with pytest.raises(ValueError, match="VNNI"):
        load_ranges(ranges_file(tmp_path), CPU)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.stack(list(read_video("sample", max_seconds=2)))[8:25]


def restyled(pipe: StreamPipeline, clip: np.ndarray, **options) -> np.ndarray:
    with pipe.start("glowing neon outlines on black", seed=1, **options) as session:
        return np.concatenate([session.push(clip), session.flush()])


@needs_vnni
def test_bundled_model_looks_the_same(clip):
    plain = StreamPipeline.from_preset("tiny", device="cpu", dtype="bfloat16")
    small = StreamPipeline.from_preset("tiny", device="cpu", dtype="bfloat16", quantisation="w8a8")
    before, after = restyled(plain, clip), restyled(small, clip)
    assert 40 < psnr(after, before) < 100
    assert np.array_equal(after, restyled(small, clip)), "same seed, same frames"
    assert small.model_sha256 != plain.model_sha256, "a recipe tells them apart"
    counted = []
    for pipe in (plain, small):
        session = pipe.start("pencil", width=64, height=64)
        session.push(clip[:, :64, :64].copy())
        counted.append(count_chunk_flops(session, clip[:4, :64, :64].copy()))
    assert counted[0] == counted[1], "the benchmark counts these products"


@needs_vnni
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_runs(policy, clip):
    pipe = StreamPipeline.from_preset("tiny", device="cpu", dtype="bfloat16", quantisation="w8a8")
    out = restyled(pipe, np.repeat(clip[:, :128, :128], 2, axis=0), policy=policy, width=64, height=64)
    assert len(out) == 2 * len(clip) and out.std() > 5


def test_the_bundled_ranges_come_from_the_command(tmp_path, monkeypatch):
    """A shorter look at the same streams sees no more than the file says."""
    out = shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    bundled = torch.tensor(json.loads((out / RANGES_FILE).read_text()))
    (out / RANGES_FILE).unlink()
    monkeypatch.setattr(cli, "RANGE_FRAMES", 5)
    monkeypatch.setattr(prompts, "DEFAULT_PROMPTS", {"neon": prompts.DEFAULT_PROMPTS["neon"]})
    assert cli.main(["ranges", "--out", str(out), "--threads", "1"]) == 0
    seen = torch.tensor(json.loads((out / RANGES_FILE).read_text()))
    slack = 1e-3 * bundled.abs()
    assert (seen[..., 0] >= bundled[..., 0] - slack[..., 0]).all() and (
        seen[..., 1] <= bundled[..., 1] + slack[..., 1]
    ).all()
    assert (seen.abs() > 0.2 * bundled.abs()).all()


@needs_vnni
def test_the_bundled_model_takes_8_bit_products_where_they_are_fast(monkeypatch, tmp_path):
    """Not where the user names a number type, brings weights that the ranges were not measured on, or says no."""
    monkeypatch.setattr(pipeline, "has_fast_int8", lambda device: device.type == "cpu")
    own = StreamPipeline.from_preset("tiny", device="cpu")
    assert own.quantisation == "w8a8" and own.transformer.blocks[0].int8 is not None
    shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    for choice in ({"quantisation": None}, {"dtype": "bfloat16"}, {"weights": tmp_path / "tiny"}):
        pipe = StreamPipeline.from_preset("tiny", device="cpu", **choice)
        assert pipe.quantisation is None and pipe.transformer.blocks[0].int8 is None
    monkeypatch.setattr(pipeline, "has_fast_int8", lambda device: False)
    assert StreamPipeline.from_preset("tiny", device="cpu").quantisation is None


def test_8_bit_products_are_no_default_without_the_kernels(monkeypatch):
    monkeypatch.setattr(pipeline, "has_int8", lambda: True)
    monkeypatch.setattr(pipeline, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(pipeline.native_kernels, "is_ready", lambda: False)
    assert not pipeline.has_fast_int8(CPU)
    monkeypatch.setattr(pipeline.native_kernels, "is_ready", lambda: True)
    assert pipeline.has_fast_int8(CPU) and not pipeline.has_fast_int8(torch.device("cuda"))
