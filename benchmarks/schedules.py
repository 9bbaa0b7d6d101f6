"""Cost of each denoise schedule next to sequential sampling, in one run on this machine.

    python benchmarks/schedules.py --steps 2 --chunks 24 --rounds 5 --json schedules.json

Every variant streams the same chunks of the sample clip; variants take turns in each round, so that a machine that
slows down slows all of them. Reported per variant: median milliseconds of the denoise stage per chunk once it runs
evenly, the same relative to sequential, forwards per chunk as counted and as stated, latency, cache rows, bytes.
The rolling window needs steps * chunk latent frames in the window, so all variants get that window.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from streamdiff_core import StreamPipeline
from streamdiff_core.frames import resize_and_crop
from streamdiff_core.video_io import read_video

PROMPT = "oil painting"


def variants(steps: int) -> dict[str, dict]:
    """Options of each row of the table; sequential comes first."""
    found = {
        "sequential": dict(schedule="sequential"),
        "sequential, clean pass": dict(schedule="sequential", clean_pass=True),
        "stream batch": dict(schedule="stream_batch"),
        "timestep-parallel, one device": dict(schedule="timestep_parallel"),
        "rolling window": dict(schedule="rolling_window"),
        "knot overlap": dict(schedule="knot_overlap"),
        "best of 2": dict(schedule="best_of", schedule_options=dict(candidates=2)),
        "best of 4": dict(schedule="best_of", schedule_options=dict(candidates=4)),
    }
    if steps > 1:
        found |= {
            "speculative, all accepted": dict(schedule="speculative", schedule_options=dict(threshold=-1e9)),
            "speculative, all rejected": dict(schedule="speculative", schedule_options=dict(threshold=1e9)),
        }
    rules = {"rcfg, self": dict(kind="self"), "rcfg, one time": dict(kind="one_time"), "rcfg, full": dict(kind="full")}
    return found | {f"sequential, {name}": dict(input_options=dict(rcfg=knobs)) for name, knobs in rules.items()}


def measure(pipe: StreamPipeline, frames: np.ndarray, steps: int, warm_chunks: int, options: dict) -> dict:
    """One stream: denoise time and forwards per chunk after the warm-up."""
    cache = pipe.with_cache(window_frames=max(pipe.preset.cache.window_frames, steps + 2))
    session = pipe.start(PROMPT, steps=steps, cache=cache, **({"schedule": "sequential"} | options))
    forward, num_forwards = pipe.engine.forward, 0

    def counting(rows: list) -> list:
        nonlocal num_forwards
        num_forwards += 1
        return forward(rows)

    pipe.engine.forward = counting
    try:
        times_ms, forwards = [], []
        for start in range(1, len(frames) - 3, 4):
            first = start == 1
            encoded = session.encode_chunk(frames[0:5] if first else frames[start : start + 4])
            before, begun = num_forwards, time.perf_counter()
            session.denoise_chunk(encoded)
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            times_ms.append(1e3 * (time.perf_counter() - begun))
            forwards.append(num_forwards - before)
    finally:
        pipe.engine.forward = forward
    cost = session.schedule.cost
    return {
        "ms": statistics.median(times_ms[warm_chunks:]),
        "forwards": statistics.mean(forwards[warm_chunks:]),
        "stated_forwards": list(cost.forwards_per_chunk),
        "latency_chunks": cost.latency_chunks,
        "cache_rows": session.schedule.num_cache_rows,
        "session_mb": session.nbytes / 2**20,
    }


def table(results: dict[str, dict]) -> str:
    """Markdown."""
    base = results["sequential"]["ms"]
    lines = ["| schedule | ms per chunk | relative | forwards per chunk | latency, chunks | cache rows | state, MB |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['ms']:.1f} | {r['ms'] / base:.2f} | {r['forwards']:.1f} | {r['latency_chunks']} | "
            f"{r['cache_rows']} | {r['session_mb']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every schedule, print a Markdown table and keep the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--warm-chunks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.chunks <= args.warm_chunks:
        parser.error(f"--chunks {args.chunks} must exceed --warm-chunks {args.warm_chunks}")
    pipe = StreamPipeline.from_preset(args.preset, device=args.device, dtype=args.dtype)
    clip = resize_and_crop(np.stack(list(read_video("sample"))), pipe.preset.width, pipe.preset.height)
    frames = np.concatenate([clip] * (1 + (4 * args.chunks + 1) // len(clip)))[: 4 * args.chunks + 1]
    rounds: dict[str, list[dict]] = {name: [] for name in variants(args.steps)}
    for _ in range(args.rounds):
        for name, options in variants(args.steps).items():
            rounds[name].append(measure(pipe, frames, args.steps, args.warm_chunks, options))
    results = {name: runs[0] | {"ms": statistics.median(r["ms"] for r in runs)} for name, runs in rounds.items()}
    print(table(results))
    if args.json:
        facts = {"machine": platform.processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps(facts | {"settings": settings, "schedules": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
