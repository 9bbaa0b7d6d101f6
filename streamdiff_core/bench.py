"""Measures a preset on this machine, for ``streamdiff bench``: frames per second, stages, counted FLOPs, MFU.

FLOPs are counted on the real modules while one chunk of a warm stream goes through them (products and
convolutions, attention included; not norms or other element-wise work). MFU = FLOP per second / peak of a
matrix product measured in the same run, for the number type the transformer ran in. On CUDA stages are timed
by events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamdiff_core import native_kernels
from streamdiff_core.bench_baseline import compare_with_eager, synchronize
from streamdiff_core.bench_frames import FrameLoop, source_frames
from streamdiff_core.config import PRESETS
from streamdiff_core.forecast import CHUNK_FRAMES, SIZES, forecast, machine_of, predictions, work_of
from streamdiff_core.machine import machine_facts, peak_memory_bytes, source_commit
from streamdiff_core.memory_need import memory_need
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.quantise import quantise
from streamdiff_core.random_weights import random_pipeline
from streamdiff_core.scaling import PAPER_H100_FPS
from streamdiff_core.session import StreamSession
from streamdiff_core.timing import measure_gemm_peak_flops

PROMPT = "thick oil painting, cobalt and yellow brush dabs"
STAGES = ("border", "encode", "denoise", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What to measure."""

    preset: str = "tiny"
    """Name of the preset."""
    steps: tuple[int, ...] = (2,)
    """Denoising steps; one measurement each."""
    schedule: str | None = None
    """Denoise schedule; None: the preset's."""
    size: tuple[int, int] | None = None
    """(width, height); None: the preset's."""
    num_chunks: int = 40
    """Chunks of 4 frames timed per measurement, after warm-up."""
    source: str | None = None
    """Video to use in place of synthetic moving frames; it is decoded and resized beforehand."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``."""
    dtype: str = "auto"
    """``auto``, ``float32``, ``bfloat16``."""
    quantisation: str | None = "auto"
    """As for ``StreamPipeline.from_preset``."""
    weights: str | None = None
    """Folder of weights in place of the bundled ones."""
    random_weights: bool = False
    """Untrained weights of the same shapes: the same speed, no picture."""
    compare_eager: bool = True
    """Also run the float32 eager yardstick (bundled preset; a full-size one is held against the paper instead)."""
    vae: str = "wan"
    """Full-size presets: ``wan``, or the file of a TAEHV (with random weights: any other word)."""
    compile: bool = False
    """Whether the transformer's blocks go through ``torch.compile``."""
    cuda_graphs: bool = False
    """Whether forwards that repeat are recorded and replayed."""
    overlap_stages: bool = False
    """Whether sessions encode and decode on CUDA streams of their own."""
    shrink: int = 1
    """Full-size presets with random weights: divisor of all sizes, for a machine without a GPU."""


def run_benchmark(options: BenchOptions, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All figures as plain values (see ``bench_report.to_markdown`` for what each is).

    Raises:
        ValueError: an option out of range.
        CheckpointError: weights missing.
    """
    if options.num_chunks < 2:
        raise ValueError(f"chunks must be at least 2, got {options.num_chunks}")
    progress("loading")
    start_s = time.perf_counter()
    pipe = load_pipeline(options)
    synchronize(pipe.device)
    load_s = time.perf_counter() - start_s
    width, height = options.size or (pipe.preset.width, pipe.preset.height)
    frames = source_frames(options.source, width, height)
    progress("peak of matrix products")
    peaks = gemm_peaks(pipe.device, with_int8=pipe.quantisation == "w8a8")
    runs = []
    for steps in options.steps:
        progress(f"{steps} step{'s' if steps > 1 else ''}")
        runs.append(measure_stream(pipe, frames, options, steps, width, height))
    again = gemm_peaks(pipe.device, with_int8="int8" in peaks)  # the machine may be slower at one of the two moments
    peaks = {name: max(peaks[name], again[name]) for name in peaks}
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    for run in runs:
        add_mfu(run, peaks, dtype if dtype in peaks else "float32")
    machine = machine_facts(pipe.device)
    if work_of(options.preset) and options.shrink == 1 and options.vae == "wan":
        for run in runs:
            add_expectations(run, options.preset, (width, height), machine["hardware"])
    on_cuda = pipe.device.type == "cuda"
    return {
        "machine": machine,
        "commit": source_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "preset": options.preset,
        "shrink": options.shrink,
        "compiled": options.compile,
        "cuda_graphs": options.cuda_graphs,
        "overlap_stages": options.overlap_stages,
        "vae": options.vae,
        "device": str(pipe.device),
        "dtype": dtype,
        "quantisation": pipe.quantisation,
        "weights": "random" if options.random_weights else "of the caller" if options.weights else "bundled",
        "source": options.source or "synthetic",
        "width": width,
        "height": height,
        "load_s": load_s,
        "gemm_peak_flops_per_s": peaks,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_cuda_memory_bytes": torch.cuda.max_memory_allocated(pipe.device) if on_cuda else None,
        "runs": runs,
        "predictions": predictions(options.preset, options.steps),
        "memory_needed_bytes": [
            memory_need(PRESETS[options.preset], steps=s, vae=options.vae).total_bytes for s in options.steps
        ] if work_of(options.preset) else None,
    }  # fmt: skip


def measure_stream(
    pipe: StreamPipeline, frames: np.ndarray, options: BenchOptions, steps: int, width: int, height: int
) -> dict[str, Any]:
    """Speed, stages, FLOPs and the comparison with eager, for one number of steps."""
    start_s = time.perf_counter()
    session = pipe.start(PROMPT, steps=steps, schedule=options.schedule, width=width, height=height)
    feed = FrameLoop(frames)
    group = pipe.preset.vae.temporal_stride
    session.push(feed.take(group + 1))
    ttff_ms = 1e3 * (time.perf_counter() - start_s)
    session.push(feed.take(group * (session.options.cache.cache_frames + steps + 1)))  # fill cache and pipeline
    flops = count_chunk_flops(session, feed.take(group))
    session.timer.reset()
    synchronize(pipe.device)
    start_s = time.perf_counter()
    num_frames = sum(len(session.push(feed.take(group))) for _ in range(options.num_chunks))
    synchronize(pipe.device)
    seconds = time.perf_counter() - start_s
    stages = session.timer.summary()
    run = {
        "steps": steps,
        "schedule": session.options.schedule,
        "num_frames": num_frames,
        "seconds": seconds,
        "fps": num_frames / seconds,
        "real_time_factor": num_frames / seconds / pipe.preset.fps,
        "ttff_ms": ttff_ms,
        "chunk_ms": 1e3 * seconds / options.num_chunks,
        "stage_ms_per_chunk": {
            name: stages[name].mean_ms * stages[name].num_calls / options.num_chunks
            for name in STAGES
            if name in stages
        },
        "chunk_flops": flops,
        "session_bytes": session.nbytes,
    }
    if options.compare_eager and pipe.preset.bundled:
        stride = pipe.preset.vae.spatial_stride
        comparison = compare_with_eager(
            pipe.transformer, session.options.cache, pipe.text_encoder.encode([PROMPT]),
            latent_size=(height // stride, width // stride), policy=session.options.policy,
            num_rows=session.schedule.num_cache_rows,
        )  # fmt: skip
        run["eager_float32"] = asdict(comparison)
    session.close()
    return run


def count_chunk_flops(session: StreamSession, frames: np.ndarray) -> dict[str, int]:
    """FLOPs of one chunk through a warm stream, counted while it runs: encode, denoise (all steps), decode.

    Two per multiply-add. The CPU's own kernels (``UNCOUNTED``) are added to PyTorch's table, which lacks them.
    """
    found = {getattr(getattr(torch.ops, group), name, None): flops for (group, name), flops in UNCOUNTED.items()}
    extra = {kernel: flops for kernel, flops in found.items() if kernel is not None}

    def counted(run: Callable[..., Any], *args: Any) -> tuple[Any, int]:
        with (
            torch.compiler.set_stance("force_eager"),  # compiled code hides the products it calls,
            native_kernels.switched_off(),  # and so do kernels of our own
            FlopCounterMode(display=False, custom_mapping=extra) as counter,
        ):
            result = run(*args)
        return result, counter.get_total_flops()

    encoded, encode = counted(session.encode_chunk, frames)
    done, denoise = counted(session.denoise_chunk, encoded)
    decode = sum(counted(session.decode_chunk, d)[1] for d in done)
    return {"encode": encode, "denoise": denoise, "decode": decode, "total": encode + denoise + decode}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes [B, n, L, d], [B, n, N, d], [B, n, N, d] -> two products of 2·L·N·d per head."""
    b, heads, length, dim = query
    return 2 * b * heads * length * key[2] * (dim + value[3])


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Shapes [..., D], [D', D] -> 2·D·D' per row."""
    return 2 * math.prod(x) * weight[0]


def _int8_linear_flops(x: Sequence[int], _step: float, _zero: int, weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The same with the weight packed as [D, D']."""
    return 2 * math.prod(x) * weight[1]


UNCOUNTED = {
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"): _attention_flops,
    ("mkldnn", "_linear_pointwise"): _linear_flops,
    ("onednn", "qlinear_pointwise"): _int8_linear_flops,
}


def add_mfu(run: dict[str, Any], peaks: dict[str, float], dtype: str) -> None:
    """Share of the matrix-product peak, of the whole loop and of the transformer alone, for each peak."""
    flops, ms = run["chunk_flops"], run["stage_ms_per_chunk"]
    whole = flops["total"] / (run["chunk_ms"] / 1e3)
    dit = flops["denoise"] / (ms["denoise"] / 1e3)
    run["flops_per_s"], run["dit_flops_per_s"] = whole, dit
    run["mfu"], run["dit_mfu"], run["mfu_dtype"] = whole / peaks[dtype], dit / peaks[dtype], dtype
    run["mfu_by_peak"] = {name: whole / peak for name, peak in peaks.items()}
    run["dit_mfu_by_peak"] = {name: dit / peak for name, peak in peaks.items()}


def add_expectations(run: dict[str, Any], preset: str, size: tuple[int, int], hardware: str) -> None:
    """What the paper measured for this work, and what the roofline predicts for this machine where it is known."""
    work, name, steps = work_of(preset), SIZES.get(size), run["steps"]
    rows = PAPER_H100_FPS.get(f"{work} {name}")
    if rows and steps <= len(rows[1]):
        run["paper_fps"] = {f"{n} H100": rows[n][steps - 1] for n in (1, 4)}
    machine = machine_of(hardware)
    if machine and name:
        expected = forecast(work, name, machine.name, steps=steps)
        run["predicted_fps"], run["predicted_chunk_ms"] = expected.fps, 1e3 * CHUNK_FRAMES / expected.fps


def gemm_peaks(device: torch.device, with_int8: bool = False) -> dict[str, float]:
    """FLOP/s of square matrix products in both number types, and in int8 where that is used, now."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16} | ({"int8": torch.int8} if with_int8 else {})
    return {name: measure_gemm_peak_flops(dtype, device) for name, dtype in dtypes.items()}


def load_pipeline(options: BenchOptions) -> StreamPipeline:
    """The preset, with its own, other or random weights."""
    if options.random_weights:
        if options.quantisation == "w8a8":
            raise ValueError("random weights have no ranges, which w8a8 rounds with; leave out either")
        pipe = random_pipeline(options.preset, options.device, options.dtype, vae=options.vae, shrink=options.shrink)
        if options.quantisation not in (None, "auto"):
            quantise(pipe.transformer, options.quantisation)
            pipe.quantisation = options.quantisation
    elif options.shrink > 1:
        raise ValueError("trained weights have one size; shrink goes with random weights only")
    else:
        pipe = StreamPipeline.from_preset(
            options.preset, device=options.device, dtype=options.dtype, weights=options.weights, vae=options.vae,
            quantisation=options.quantisation,
        )  # fmt: skip
    return pipe.speed_up(
        compile=options.compile, cuda_graphs=options.cuda_graphs, overlap_stages=options.overlap_stages
    )
