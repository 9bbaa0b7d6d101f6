"""Soak test: synthetic moving video through one session for minutes; memory has to stay where it is.

    python benchmarks/soak.py --minutes 10 --json soak.json

Samples resident memory and ``session.nbytes`` every few seconds, changes the prompt now and then, and exits 1
when either grew by more than its bound after warm-up (the first fifth, at most a minute): 0 bytes for the
session, ``--max-growth-mb`` (default 16 MB) for the process, which also holds the allocator's odds and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from streamdiff_core import CheckpointError, StreamPipeline

MIB = 2**20
PROMPTS = ("oil painting", "graphite pencil sketch", "neon outlines on black", "watercolour on rough paper")


def moving_video(width: int, height: int, num_frames: int = 4) -> Iterator[np.ndarray]:
    """Endless uint8 [num_frames, height, width, 3]: drifting colour waves, a ball going over them."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(width, height)
    tick = 0
    while True:
        clip = np.empty((num_frames, height, width, 3), np.uint8)
        for frame in clip:
            t = tick / 16
            waves = [np.sin(9 * x + t + c) + np.cos(7 * y - 0.7 * t + 2 * c) for c in range(3)]
            centre_x, centre_y = 0.5 + 0.4 * np.sin(1.3 * t), 0.5 + 0.4 * np.sin(1.9 * t + 1)
            ball = (x - centre_x) ** 2 + (y - centre_y) ** 2 < 0.01
            frame[:] = np.where(ball[..., None], 240, 127.5 + 55 * np.stack(waves, axis=-1)).clip(0, 255)
            tick += 1
        yield clip


def soak(pipe: StreamPipeline, args: argparse.Namespace) -> dict:
    """Run one stream for ``args.minutes``; samples of memory and the stream's figures."""
    rss, started = psutil.Process(), time.perf_counter()
    end_s, samples, num_switches = 60 * args.minutes, [], 0
    with pipe.start(PROMPTS[0], steps=args.steps) as session:
        video = moving_video(session.options.width, session.options.height)
        next_sample_s = next_switch_s = args.every_s
        while (now_s := time.perf_counter() - started) < end_s:
            session.push(next(video))
            if now_s >= next_switch_s:
                num_switches += 1
                on_switch = ("keep", "recache", "flush", "reset")[num_switches % 4]
                session.set_prompt(f"{PROMPTS[num_switches % 4]}, take {num_switches}", on_switch)
                next_switch_s += 6 * args.every_s
            # Right after a reset the cache refills; the session's size counts again when it is full.
            if now_s >= next_sample_s and len(session.stats.cache_slots) == session.options.cache.cache_frames:
                samples.append({"at_s": now_s, "rss_bytes": rss.memory_info().rss, "session_bytes": session.nbytes})
                next_sample_s = now_s + args.every_s
                mib = {name: samples[-1][f"{name}_bytes"] / MIB for name in ("rss", "session")}
                show(
                    f"{now_s:6.0f} s  RSS {mib['rss']:7.1f} MiB  session {mib['session']:6.2f} MiB  "
                    f"{session.stats.fps:5.1f} fps"
                )
        session.flush()
        stats = session.stats
    return {
        "minutes": args.minutes,
        "preset": args.preset,
        "device": str(pipe.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "num_frames_in": stats.num_frames_in,
        "num_frames_out": stats.num_frames_out,
        "num_prompt_switches": num_switches,
        "fps": stats.fps,
        "ttff_ms": stats.ttff_ms,
        "latency_ms": {"p50": stats.latency_p50_ms, "p95": stats.latency_p95_ms, "p99": stats.latency_p99_ms},
        "stage_ms": stats.stage_ms,
        "samples": samples,
        **growth(samples, end_s),
    }


def growth(samples: list[dict], end_s: float) -> dict:
    """Growth after warm-up: mean RSS of the last third against the first third, the session's spread."""
    warm = [s for s in samples if s["at_s"] > min(60.0, end_s / 5)]
    if len(warm) < 6:
        raise SystemExit("too few samples after warm-up: run longer, or sample more often with --every-s")
    third = len(warm) // 3
    rss = [s["rss_bytes"] for s in warm]
    session = [s["session_bytes"] for s in warm]
    return {
        "rss_growth_bytes": int(np.mean(rss[-third:]) - np.mean(rss[:third])),
        "rss_peak_bytes": max(rss),
        "session_growth_bytes": max(session) - min(session),
    }


def show(line: str) -> None:
    """Progress goes to stderr, so that ``--json -`` leaves stdout clean."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Exit code 0: memory stayed; 1: it grew, frames were lost, or the weights cannot be loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--preset", default="tiny", help="preset to run (default tiny)")
    parser.add_argument("--weights", type=Path, help="folder of weights instead of the bundled ones")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between samples (default 5)")
    parser.add_argument("--max-growth-mb", type=float, default=16.0, help="bound for the process (default 16 MB)")
    parser.add_argument("--json", help="write figures and samples to this file, - for stdout")
    args = parser.parse_args()
    try:
        pipe = StreamPipeline.from_preset(args.preset, device=args.device, dtype=args.dtype, weights=args.weights)
    except (ValueError, CheckpointError) as error:
        parser.exit(1, f"soak: {error}\n")
    result = soak(pipe, args)
    failures = []
    if result["rss_growth_bytes"] > 1e6 * args.max_growth_mb:
        failures.append(f"memory of the process grew by more than {args.max_growth_mb} MB")
    if result["session_growth_bytes"]:
        failures.append("memory of the session is not constant")
    if result["num_frames_in"] != result["num_frames_out"]:
        failures.append("frames were lost")
    result["passed"] = not failures
    if args.json:
        text = json.dumps(result, indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
    latency = result["latency_ms"]
    show(
        f"{result['num_frames_out']} frames of {result['num_frames_in']}, {result['fps']:.1f} fps, latency "
        f"p50 {latency['p50']:.0f} p95 {latency['p95']:.0f} p99 {latency['p99']:.0f} ms\n"
        f"growth after warm-up: process {result['rss_growth_bytes'] / 1e6:+.2f} MB, "
        f"session {result['session_growth_bytes']} bytes"
    )
    for failure in failures:
        show(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
