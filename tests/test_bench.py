"""The benchmark's own correctness: FLOPs against a hand formula, the eager yardstick against the real model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipeline import small_pipeline

from streamdiff_core import bench, bench_report
from streamdiff_core.bench_baseline import EagerTransformer, compare_with_eager
from streamdiff_core.bench_frames import FrameLoop, moving_frames
from streamdiff_core.compiled import is_compiled
from streamdiff_core.config import CacheConfig
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.pipeline import StreamPipeline


@pytest.fixture(scope="module")
def pipe() -> StreamPipeline:
    return small_pipeline()


def dit_flops(pipe: StreamPipeline, num_frames_seen: int) -> int:
    """One latent frame through the transformer, two per multiply-add, written out by hand.

    Per layer and token: q, k, v, o of self-attention and q, o of cross-attention (6 D²), two products of the
    feed-forward, and scores and weighted sum over the visible tokens and over the prompt's (2 D for each of them).
    Per chunk: the time embedding, patches in, and patches out twice (x0 and its gate).
    """
    c = pipe.preset.model
    p = (64 // 8 // 2) ** 2  # tokens of a latent frame
    d, patch = c.dim, math.prod(c.patch_size)
    per_token = 6 * d * d + 2 * d * c.ffn_dim + 2 * d * num_frames_seen * p + 2 * d * c.text_len
    patches = p * d * patch * (c.in_channels + 2 * c.out_channels)
    time = c.freq_dim * d + d * d + 6 * d * d
    return 2 * (c.num_layers * p * per_token + patches + time)


@pytest.mark.parametrize("schedule", ["stream_batch", "sequential"])
@pytest.mark.parametrize("steps", [1, 2])
def test_counted_flops_equal_the_formula(pipe: StreamPipeline, schedule: str, steps: int) -> None:
    """Fails when attention is not counted, which PyTorch's own table leaves out on the CPU."""
    session = pipe.start("pencil", steps=steps, schedule=schedule)
    feed = FrameLoop(moving_frames(16, 64, 64))
    session.push(feed.take(5 + 4 * 8))
    flops = bench.count_chunk_flops(session, feed.take(4))
    vae, cells, patch = pipe.preset.vae, 8 * 8, 3 * 4 * 8 * 8
    linear = 2 * cells * patch * vae.latent_channels
    block = 2 * cells * vae.width**2 * (9 + 1 + 9)
    decoder = 2 * cells * vae.width * (vae.latent_channels + patch) + block + linear
    assert flops["denoise"] == steps * dit_flops(pipe, num_frames_seen=4)
    assert flops["encode"] == linear
    assert flops["decode"] == decoder
    assert flops["total"] == flops["encode"] + flops["denoise"] + flops["decode"]


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_no_kernel_of_bfloat16_escapes_the_count(preset: str) -> None:
    """CPU kernels run in bfloat16 only, those in C++ on `tiny` only; what they compute is the same."""
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = small_pipeline() if preset == "small" else StreamPipeline.from_preset("tiny", dtype=str(dtype)[6:])
        pipe.transformer.to(dtype)
        session = pipe.start("pencil", steps=2, width=64, height=64)
        feed = FrameLoop(moving_frames(16, 64, 64))
        session.push(feed.take(5 + 4 * 8))
        counts.append(bench.count_chunk_flops(session, feed.take(4)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("positions", ["absolute", "packed"])
def test_eager_yardstick_computes_the_same(pipe: StreamPipeline, positions: str) -> None:
    """A yardstick that did other work would measure nothing."""
    cache = CacheConfig(sink_frames=1, window_frames=3, positions=positions)
    model = pipe.transformer
    eager = EagerTransformer(model, cache, "sink", 2, 16)
    kv = KVCache(model.config, POLICIES["sink"](cache), num_rows=2, tokens_per_frame=16)
    tokens = pipe.text_encoder.encode(["pencil"])
    prompt = model.encode_prompt(tokens)
    told = torch.tensor([[500.0], [250.0]])
    for frame in range(7):
        xt = torch.randn(2, 1, 8, 8, 8)
        views = [kv.begin(row, (frame,)) for row in range(2)]
        with torch.inference_mode():
            ours = model(xt, told, prompt, views)
        theirs = eager.forward(xt, told, tokens, [(frame,)] * 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_comparison_gives_figures(pipe: StreamPipeline) -> None:
    tokens = pipe.text_encoder.encode(["pencil"])
    result = compare_with_eager(pipe.transformer, pipe.preset.cache, tokens, latent_size=(8, 8), num_pairs=3)
    assert result.ours_ms > 0 and result.eager_ms > 0 and 0.05 < result.speedup < 50 and result.num_pairs == 3


def test_frame_loop_never_jumps() -> None:
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, 1, 1, 3), np.uint8)
    loop = FrameLoop(frames)
    taken = np.concatenate([loop.take(5), loop.take(5)])[:, 0, 0, 0].astype(int)
    assert taken.tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]


def test_moving_frames_move() -> None:
    frames = moving_frames(8, 64, 64).astype(int)
    assert frames.shape == (8, 64, 64, 3)
    assert np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)).min() > 5


@pytest.fixture(scope="module")
def result() -> dict:
    """One whole benchmark on the small pipeline, with a known peak."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bench, "load_pipeline", lambda options: small_pipeline())
    patch.setattr(bench, "measure_gemm_peak_flops", lambda dtype, device: 1e12 if dtype == torch.float32 else 4e12)
    try:
        return bench.run_benchmark(bench.BenchOptions(steps=(1, 2), num_chunks=3))
    finally:
        patch.undo()


def test_figures_agree_with_each_other(result: dict) -> None:
    assert [run["steps"] for run in result["runs"]] == [1, 2]
    for run in result["runs"]:
        assert run["num_frames"] == 12
        assert run["fps"] == pytest.approx(12 / run["seconds"])
        assert run["real_time_factor"] == pytest.approx(run["fps"] / 16)
        assert run["mfu"] == pytest.approx(run["chunk_flops"]["total"] * 3 / run["seconds"] / 1e12)
        assert run["mfu_by_peak"]["bfloat16"] == pytest.approx(run["mfu"] / 4)
        assert run["mfu_dtype"] == "float32"
        assert sum(run["stage_ms_per_chunk"].values()) <= 1.01 * run["chunk_ms"]
    assert result["peak_memory_bytes"] > 1e7 and result["load_s"] >= 0


def test_report_is_named_by_hardware_and_date(result: dict, tmp_path: Path) -> None:
    fixed = {**result, "date": "2031-02-03", "machine": {**result["machine"], "hardware": "ACME (R) CPU, 2 cores"}}
    path = bench_report.save_report(fixed, tmp_path / "results")
    assert path == tmp_path / "results" / "tiny_acme-r-cpu-2-cores_203102.md"
    text = path.read_text(encoding="utf-8")
    assert "ACME (R) CPU" in text and "| frames per second |" in text and "1 step, stream_batch" in text
    named = bench_report.save_report(fixed, tmp_path / "mine.md")
    assert named.read_text(encoding="utf-8") == text
    assert any("MFU" in line for line in bench_report.to_lines(fixed))


@pytest.mark.parametrize(
    ("hardware", "size", "predicted"),
    [
        ("NVIDIA H100 80GB HBM3", (832, 480), 18.2),
        ("AMD EPYC, 2 cores", (832, 480), None),
        ("NVIDIA H100", (640, 352), None),
    ],
)
def test_full_size_runs_are_held_against_paper_and_roofline(result: dict, hardware, size, predicted) -> None:
    run = {**result["runs"][1]}
    bench.add_expectations(run, "self-forcing-1.3b", size, hardware)
    assert run.get("paper_fps") == ({"1 H100": 17.97, "4 H100": 43.41} if size == (832, 480) else None)
    assert run.get("predicted_fps") == (pytest.approx(predicted, abs=0.1) if predicted else None)
    text = bench_report.to_markdown({**result, "runs": [run]})
    assert ("18.0 fps on 1 H100, 43.4 fps on 4 H100" in text) == (size == (832, 480))


def test_shrunken_full_size_preset_runs_to_a_report() -> None:
    """The same benchmark a GPU runs, on a CPU; what it is must be said, and nothing compared with the full size."""
    pytest.importorskip("diffusers")
    options = bench.BenchOptions(
        preset="wan-1.3b", random_weights=True, shrink=12, steps=(1,), num_chunks=2, device="cpu", dtype="float32"
    )
    result = bench.run_benchmark(options)
    (run,) = result["runs"]
    assert run["num_frames"] == 8 and run["chunk_flops"]["encode"] > 0 and "paper_fps" not in run
    text = bench_report.to_markdown(result)
    assert text.startswith("# wan-1.3b shrunken by 12: not the full size on ")
    assert bench_report.report_path(result).name.startswith("wan-1.3b-shrunken-12_")
    predicted = text.split("## wan-1.3b in full size: predictions, not measurements")[1]
    assert "| 1 × H100, 480p | 20.5 (20.5) |" in predicted and "| 4 × H100, 512 | 69.7 (64.5) |" in predicted
    assert "| 1 × RTX 4090, 512 | " in predicted and "| 1 × B200, 480p | " in predicted
    assert "(counted, 1.5 GB assumed) | 14 GB |" in predicted
    with pytest.raises(ValueError, match="trained weights have one size"):
        bench.load_pipeline(replace(options, random_weights=False))


def test_random_weights_are_rounded_as_asked_or_not_at_all() -> None:
    """Else the report would name a number type that nothing was computed in."""
    pytest.importorskip("torchao")
    options = bench.BenchOptions(random_weights=True, device="cpu", dtype="bfloat16", quantisation="int8")
    pipe = bench.load_pipeline(options)
    assert "Int8" in type(pipe.transformer.blocks[0].ffn[0].weight).__name__
    with pytest.raises(ValueError, match="no ranges"):
        bench.load_pipeline(replace(options, quantisation="w8a8"))


def test_ways_to_run_faster_reach_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report names them whether or not they were on, so a lost one would go unnoticed."""
    options = bench.BenchOptions(random_weights=True, device="cpu")
    for way in ("cuda_graphs", "overlap_stages"):
        with pytest.raises(ValueError, match=f"leave out --{way.replace('_', '-')}"):
            bench.load_pipeline(replace(options, **{way: True}))
    monkeypatch.setattr("streamdiff_core.compiled.has_compiler", lambda: True)
    assert is_compiled(bench.load_pipeline(replace(options, compile=True)).transformer)
    assert not is_compiled(bench.load_pipeline(options).transformer)


def test_bad_number_of_chunks() -> None:
    with pytest.raises(ValueError, match="chunks must be at least 2"):
        bench.run_benchmark(replace(bench.BenchOptions(), num_chunks=1))
