"""``compile_blocks``: the same stream up to rounding, and nothing is compiled again while it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, record_latents, stream
from torch._dynamo.utils import counters
from torch.testing import assert_close

from streamdiff_core import compiled
from streamdiff_core.bench import count_chunk_flops
from streamdiff_core.compiled import compile_blocks, has_compiler, is_compiled
from streamdiff_core.int8_blocks import has_int8
from streamdiff_core.metrics import psnr
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.video_io import read_video

needs_vnni = pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI instructions")
FRAMES = moving_frames(41)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(pipe, frames=FRAMES):
    session = pipe.start("pencil", steps=2)
    latents = record_latents(session)
    return latents, stream(session, frames)


def test_a_forward_is_compiled_once_per_shape_and_never_in_mid_stream():
    """The backend gets one graph per shape of a batch: the first chunk's, then the steady one's."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(tuple(inputs[0].shape))
        return graph.forward

    eager = run(random_pipeline(RANDOM_PRESET))
    pipe = random_pipeline(RANDOM_PRESET)
    compile_blocks(pipe.transformer, backend=backend)
    short = run(pipe, FRAMES[:13])
    assert len(short[0]) == 3 and graphs
    seen = len(graphs)
    got = run(pipe)
    assert len(graphs) == seen <= 3, "first chunk, two rows, and the last row alone"
    assert not counters["graph_break"]
    assert not vars(compiled._now), "a stream's memory is not held between forwards"
    for a, b in zip(got[0], eager[0], strict=True):
        assert_close(a, b, rtol=0, atol=1e-9)


def test_the_benchmark_counts_the_same_products():
    counted = []
    for compile in (False, True):
        pipe = random_pipeline(RANDOM_PRESET)
        if compile:
            compile_blocks(pipe.transformer, backend="aot_eager")
        session = pipe.start("pencil", steps=2)
        session.push(FRAMES[:13])
        counted.append(count_chunk_flops(session, FRAMES[13:17]))
    assert counted[0] == counted[1]


def test_without_a_cache_nothing_is_compiled():
    model = random_pipeline(RANDOM_PRESET).transformer
    prompt = model.encode_prompt(torch.randn(1, 4, 16))
    inputs = torch.randn(1, 2, model.config.in_channels, 8, 8), torch.full((1, 2), 300.0), prompt
    options = {"mask": torch.ones(32, 32, dtype=torch.bool).tril(), "frame_ids": torch.tensor([[3, 9]])}
    assert not is_compiled(model)
    with torch.inference_mode():
        before = model(*inputs, **options)
        assert is_compiled(compile_blocks(model, backend="eager"))
        assert torch.equal(model(*inputs, **options), before)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
def test_compiled_stream_equals_eager():
    eager = run(random_pipeline(RANDOM_PRESET))
    pipe = random_pipeline(RANDOM_PRESET)
    compile_blocks(pipe.transformer)
    got = run(pipe)
    for a, b in zip(got[0], eager[0], strict=True):
        assert_close(a, b, rtol=0, atol=1e-9)
    assert np.abs(got[1].astype(int) - eager[1]).max() <= 1


def test_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* or leave out --compile"):
        StreamPipeline.from_preset("tiny", device="cpu", compile=True)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("quantisation", [None, pytest.param("w8a8", marks=needs_vnni)])
def test_compiled_bundled_model_looks_the_same(quantisation):
    """Two roundings of one computation; 8-bit products themselves are 47 dB away from bfloat16."""
    clip = np.stack(list(read_video("sample", max_seconds=2)))[8:17]

    def restyled(compile: bool) -> np.ndarray:
        pipe = StreamPipeline.from_preset(
            "tiny", device="cpu", dtype="bfloat16", quantisation=quantisation, compile=compile
        )
        return stream(pipe.start("glowing neon outlines on black", seed=1, width=128, height=128), clip)

    assert 48 < psnr(restyled(True), restyled(False)) < 100
    assert counters["stats"]["unique_graphs"] <= 3, "nothing inside the reads is compiled as well"
