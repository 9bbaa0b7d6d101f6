"""Frames per second of one stream on N accelerators in a row, predicted, beside the paper's table.

A stage's time is its share of the layers plus what cannot move: encode on the first, decode on the last rank. The
slowest stage sets the pace (`timeline.arrange` shows why), so more ranks help until one stage cannot be cut any
further: the VAE's. Costs are the roofline's, whose two constants come from figures on one GPU; nothing was fitted to
figures on several. Messages between ranks are not counted (the paper: a few ms).
Source: paper figs. 9 and 11 (SPEC §9.2); the splits are those of `parallel.block_scheduler`.
"""

from __future__ import annotations

from streamdiff_core.config import WAN_1_3B, WAN_14B
from streamdiff_core.parallel.block_scheduler import RankTimes, Split, even_split, optimal_split, stage_ms
from streamdiff_core.roofline import MACHINES, WORKLOADS, Machine, Workload, chunk_ms, seed_model

PAPER_H100_FPS: dict[str, dict[int, tuple[float, float, float, float]]] = {
    "wan-1.3b 480p": {
        1: (20.47, 17.97, 15.68, 13.95), 2: (39.77, 34.67, 30.69, 27.06),
        3: (43.88, 43.79, 41.13, 38.09), 4: (44.38, 43.41, 43.08, 42.26),
    },
    "wan-1.3b 512": {
        1: (26.21, 24.02, 21.51, 19.43), 2: (51.76, 46.92, 41.09, 37.49),
        3: (63.45, 62.76, 56.75, 54.09), 4: (64.52, 63.99, 62.43, 61.57),
    },
    "wan-14b 480p": {
        1: (12.68, 8.64, 6.49, 5.28), 2: (25.39, 17.31, 13.23, 10.69),
        3: (37.55, 25.02, 19.12, 15.42), 4: (39.24, 33.36, 25.02, 20.05),
    },
    "wan-14b 512": {
        1: (18.71, 13.01, 10.09, 8.26), 2: (37.12, 25.72, 20.11, 16.65),
        3: (53.84, 37.47, 29.34, 24.35), 4: (58.28, 51.09, 38.41, 31.62),
    },
}  # fmt: skip
"""{workload: {GPUs: frames per second at 1, 2, 3, 4 steps}} on H100, with stream batch."""


def num_layers_of(workload: str) -> int:
    """Layers of a full-size workload's transformer."""
    return (WAN_14B if workload.startswith("wan-14b") else WAN_1_3B).num_layers


def rank_times(workload: Workload, machine: Machine, num_ranks: int, steps: int, num_layers: int) -> list[RankTimes]:
    """What a chunk costs on each rank: a layer (one forward of ``steps`` rows if they fit), and what stays put."""
    model = seed_model(workload, machine)
    encode_ms, decode_ms = model.ms("encode", 1, 1), model.ms("decode", 1, 1)
    denoise_ms = chunk_ms(model, steps, batched=steps <= machine.max_rows) - encode_ms - decode_ms
    fixed_ms = [0.0] * num_ranks
    fixed_ms[0] += encode_ms
    fixed_ms[-1] += decode_ms
    return [RankTimes(layer_ms=denoise_ms / num_layers, fixed_ms=ms) for ms in fixed_ms]


def pipeline_fps(workload: str, num_ranks: int, steps: int, *, machine: str = "H100", balanced: bool = True) -> float:
    """Frames per second of one stream in chunks of 4 frames.

    Args:
        workload: a key of ``WORKLOADS`` of a full-size model.
        num_ranks: accelerators in a row.
        steps: denoising steps, one row each.
        machine: a key of ``MACHINES``.
        balanced: split the layers so that the slowest stage is as fast as it can be; else into equal shares.
    """
    num_layers = num_layers_of(workload)
    times = rank_times(WORKLOADS[workload], MACHINES[machine], num_ranks, steps, num_layers)
    split: Split = optimal_split(times, num_layers) if balanced else even_split(num_layers, num_ranks)
    return 4e3 / max(stage_ms(split, times))
