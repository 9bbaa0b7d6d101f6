"""Cost of every KV policy relative to the plain sink: time per chunk of the denoiser, bytes, slots read.

All policies take turns on the same clip, round after round, so that a slow moment of the machine hits all of them; the
figure is the median over rounds of (policy's time / sink's time in the same round). Run on a quiet machine:

    python benchmarks/policies.py --rounds 7 > benchmarks/results/policies_<hardware>_<yyyymm>.md
"""

from __future__ import annotations

import argparse
import platform
import statistics
from itertools import islice

import numpy as np
import torch

from streamdiff_core import CacheConfig, StreamPipeline, StreamSession
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.video_io import read_video

KNOBS = {"forcing_kv": {"dynamic_heads": [[], [0], [1], [2], [3], [0]]}}
"""Settings where the defaults would leave a mechanism idle; heads of ``tiny``, for the cost only."""


def open_stream(pipe: StreamPipeline, name: str, args: argparse.Namespace, frames: np.ndarray) -> StreamSession:
    """A stream whose memories are full."""
    cache = CacheConfig(sink_frames=args.sink, window_frames=args.window, positions="packed")
    session = pipe.start(
        "oil painting", policy=name, policy_options=KNOBS.get(name, {}), cache=cache,
        schedule=args.schedule, steps=args.steps, motion_adaptive=False,
    )  # fmt: skip
    warm_up = 1 + 4 * (session.cache.policy.num_slots + 4)
    session.push(take(frames, 0, warm_up))
    return session


def take(frames: np.ndarray, start: int, count: int) -> np.ndarray:
    """``count`` frames from ``start``, the clip repeated as often as needed."""
    return frames[[i % len(frames) for i in range(start, start + count)]]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often every policy takes its turn")
    parser.add_argument("--chunks", type=int, default=6, help="chunks per turn")
    parser.add_argument("--sink", type=int, default=3, help="sink frames of the cache")
    parser.add_argument("--window", type=int, default=6, help="window frames of the cache")
    parser.add_argument("--frames", type=int, default=96, help="frames of the sample clip, repeated as needed")
    parser.add_argument("--schedule", default="stream_batch")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--policies", nargs="*", default=sorted(POLICIES), help="default: all")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    pipe = StreamPipeline.from_preset("tiny", device=args.device)
    frames = np.stack(list(islice(read_video("sample"), args.frames)))
    names = ["sink", *(n for n in args.policies if n != "sink")]
    sessions = {name: open_stream(pipe, name, args, frames) for name in names}
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds):
        for name, session in sessions.items():
            session.timer.reset()
            session.push(take(frames, turn * 4 * args.chunks, 4 * args.chunks))
            times_ms[name].append(session.timer.summary()["denoise"].mean_ms)
    print_table(sessions, times_ms, args, pipe)


def print_table(
    sessions: dict[str, StreamSession], times_ms: dict[str, list[float]], args: argparse.Namespace, pipe: StreamPipeline
) -> None:
    """Relative time, bytes and slots of each policy."""
    device = torch.cuda.get_device_name() if pipe.device.type == "cuda" else platform.processor() or platform.machine()
    lines = [
        "# Cost of KV policies",
        "",
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, `tiny`,",
        f"{args.schedule}, {args.steps} steps, sink {args.sink} + window {args.window};",
        f"medians over {args.rounds} turns of {args.chunks} chunks.",
        "Time is that of the denoise stage, relative to the sink in the same turn; cache is bytes relative to",
        "the sink; slots are those in use at the end.",
        "",
        "| policy | time | ms per chunk | cache | slots |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    base = sessions["sink"].cache.nbytes
    for name, session in sessions.items():
        ratio = statistics.median(a / b for a, b in zip(times_ms[name], times_ms["sink"], strict=True))
        per_chunk, slots = statistics.median(times_ms[name]), len(session.stats.cache_slots)
        print(f"| {name} | {ratio:.2f} | {per_chunk:.1f} | {session.cache.nbytes / base:.2f} | {slots} |")


if __name__ == "__main__":
    main()
