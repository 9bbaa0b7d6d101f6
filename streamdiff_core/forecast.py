"""What a preset should reach on the GPU that a driver names, or on N of a kind: ``scaling`` for users.

The doctor, the benchmark and the table in ``benchmarks/results`` ask here. Everything is a prediction and says so; the
paper's figures (SPEC §9.2) stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from streamdiff_core.config import PRESETS
from streamdiff_core.parallel.block_scheduler import optimal_split, stage_ms
from streamdiff_core.roofline import MACHINES, WORKLOADS, Machine
from streamdiff_core.scaling import PAPER_H100_FPS, num_layers_of, rank_times

CHUNK_FRAMES = 4
SIZES = {(832, 480): "480p", (512, 512): "512"}
"""(width, height) -> name in ``WORKLOADS``."""

PAPER_4090_FPS: dict[str, dict[int, tuple[float, float, float, float]]] = {
    "wan-1.3b 480p": {
        1: (8.58, 7.37, 6.27, 5.59), 2: (16.59, 14.75, 13.06, 7.76),
        3: (16.66, 16.49, 16.17, 15.74), 4: (16.64, 16.42, 15.97, 15.73),
    },
    "wan-1.3b 512": {
        1: (12.87, 11.76, 10.42, 7.87), 2: (24.68, 22.13, 19.33, 17.98),
        3: (25.64, 25.03, 24.58, 24.22), 4: (25.04, 24.77, 24.30, 23.97),
    },
}  # fmt: skip
PAPER_FPS = {"H100": PAPER_H100_FPS, "RTX 4090": PAPER_4090_FPS}
"""{machine: {workload: {GPUs: frames per second at 1, 2, 3, 4 steps}}}; 4090 without stream batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A prediction for one preset, size, machine, number of GPUs and of steps."""

    fps: float
    """Frames per second of one stream."""
    stage_ms: tuple[float, ...]
    """Per rank, for one chunk of 4 frames."""
    split: tuple[int, ...]
    """Layers per rank."""
    paper_fps: float | None
    """What the paper measured there."""


def forecast(preset: str, size: str, machine: str, *, steps: int, num_gpus: int = 1) -> Forecast:
    """Predict the speed of one stream.

    Args:
        preset: ``wan-1.3b`` or ``wan-14b``; other 1.3B presets are the same work.
        size: ``480p`` or ``512``.
        machine: a name in ``roofline.MACHINES``.
        steps: denoising steps; one batched forward where the machine has room for as many rows.
        num_gpus: pipeline stages.

    Raises:
        ValueError: a preset, size or machine without counts, or no GPU or step at all.
    """
    name = f"{preset} {size}"
    if name not in WORKLOADS or machine not in MACHINES or preset not in PRESETS:
        known = f"{', '.join(WORKLOADS)}; {', '.join(MACHINES)}"
        raise ValueError(f"no counts for {name!r} on {machine!r}; there are {known}")
    if steps < 1 or num_gpus < 1:
        raise ValueError(f"steps and num_gpus must be at least 1, got {steps} and {num_gpus}")
    layers = num_layers_of(name)
    times = rank_times(WORKLOADS[name], MACHINES[machine], num_gpus, steps, layers)
    split = optimal_split(times, layers)
    stages = tuple(stage_ms(split, times))
    row = PAPER_FPS.get(machine, {}).get(name, {}).get(num_gpus, ())
    paper = row[steps - 1] if steps <= len(row) else None
    return Forecast(fps=1e3 * CHUNK_FRAMES / max(stages), stage_ms=stages, split=split, paper_fps=paper)


def predictions(preset: str, steps: Sequence[int], num_gpus: Sequence[int] = (1, 4)) -> list[dict[str, Any]]:
    """What the full size should reach, and what the paper measured there, as plain values; empty without counts.

    Args:
        preset: any name of a preset.
        steps: denoising steps, one column each.
        num_gpus: pipeline stages, one row each per machine and size.
    """
    work = work_of(preset)
    rows = []
    for machine, size, gpus in product(TABLE_MACHINES, SIZES.values(), num_gpus) if work else ():
        if (machine, work) in NO_ROOM:
            continue
        found = [forecast(work, size, machine, steps=s, num_gpus=gpus) for s in steps]
        rows.append({"machine": machine, "size": size, "num_gpus": gpus, "fps": [f.fps for f in found],
                     "paper_fps": [f.paper_fps for f in found]})  # fmt: skip
    return rows


def machine_of(gpu_name: str) -> Machine | None:
    """The machine a driver's name means, as in ``NVIDIA H100 80GB HBM3``; None where no constants are known.

    Slower siblings (``H100 PCIe``, ``RTX 4090 Laptop``) are not the machine the constants are for.
    """
    if any(word in gpu_name for word in ("PCIe", "NVL", "Laptop", "4090 D")):
        return None
    return next((m for name, m in MACHINES.items() if m.num_replicas == 1 and name in gpu_name), None)


def work_of(preset: str) -> str | None:
    """The preset whose counts hold for this one; None where none do (the bundled preset)."""
    model = PRESETS[preset].model
    return next((name for name in ("wan-1.3b", "wan-14b") if PRESETS[name].model == model), None)


TABLE_MACHINES = ("H100", "RTX 4090", "B200")
NO_ROOM = {("RTX 4090", "wan-14b")}
"""28.6 GB of weights; the card has 24."""


def to_markdown(machines: tuple[str, ...] = TABLE_MACHINES, max_gpus: int = 8) -> str:
    """Tables of predictions, each followed by the paper's figure in brackets where there is one."""
    lines = [
        "# Full-size presets on N GPUs: predictions, not measurements", "",
        "Frames per second of one stream at 1, 2, 3, 4 steps; in brackets what the paper measured (SPEC §9.2).", "",
    ]  # fmt: skip
    for machine in machines:
        for preset in ("wan-1.3b", "wan-14b"):
            if (machine, preset) in NO_ROOM:
                continue
            for size in SIZES.values():
                lines += [f"## {preset}, {size}, {machine}", "", "| GPUs | 1 step | 2 steps | 3 steps | 4 steps |"]
                lines += ["| ---: " * 5 + "|"]
                for num_gpus in range(1, max_gpus + 1):
                    cells = [forecast(preset, size, machine, steps=s, num_gpus=num_gpus) for s in (1, 2, 3, 4)]
                    lines.append(f"| {num_gpus} | {' | '.join(map(_cell, cells))} |")
                lines.append("")
    return "\n".join([*lines, *NOTES, ""])


NOTES = (
    "- Model: FLOPs and bytes per stage (SPEC §0), the maker's dense peak and bandwidth, one efficiency per machine",
    "  fitted to the paper's single figure for 1.3B, 480p, one step on one GPU (`roofline.py`).",
    "- B200 has no published figure to fit: its efficiency is H100's, an assumption.",
    "- N GPUs: layers split exactly (`block_scheduler.optimal_split`), encode on the first rank, decode on the last.",
    "  Where more GPUs no longer help, decode on the last rank is the wall. Messages between ranks are left out.",
    "- RTX 4090: one row per forward, no stream batch, as in the paper.",
)


def _cell(found: Forecast) -> str:
    return f"{found.fps:.1f}" + (f" ({found.paper_fps:.1f})" if found.paper_fps else "")
