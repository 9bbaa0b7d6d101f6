"""Planner against fixed batching on simulated machines: frames per second, missed frames, rows, over offered load.

    python benchmarks/plot_slo.py --output slo.png --json slo.json

Nothing is measured here: machines are the rooflines of ``streamdiff_core.roofline``, the clock is virtual, the
planner is the real one. Load 1 is what the machine can do at full quality with full batches. "Late or lost" does not
count frames that a degraded quality leaves out evenly; the first column shows those. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamdiff_core.planner import plan, plan_fifo
from streamdiff_core.roofline import MACHINES, WORKLOADS, seed_model
from streamdiff_core.scenarios import Network, viewers_at_load
from streamdiff_core.simulator import World, simulate
from streamdiff_core.slo import PlannerOptions


@dataclass(frozen=True)
class Case:
    """One row of the figure."""

    machine: str
    workload: str
    num_streams: int
    deadline_ms: float


CASES = (
    Case("2-core CPU", "tiny 256", 4, 1000),
    Case("RTX 4090", "wan-1.3b 512", 1, 2000),
    Case("H100", "wan-1.3b 480p", 2, 1500),
    Case("4xH100", "wan-1.3b 480p", 8, 1500),
    Case("4xH100", "wan-14b 512", 4, 1500),
)
POLICIES = {
    "planner": {"policy": plan},
    "planner, quality fixed": {"policy": plan, "options": PlannerOptions(degrade=())},
    "fixed batches, newest wins": {"policy": plan_fifo, "options": PlannerOptions(mode="sequential")},
    "fixed stream batches, unbounded queue": {"policy": plan_fifo, "inbox_chunks": math.inf},
}
PANELS = (("fps", "frames per second out"), ("missed", "frames late or lost"), ("mean_rows", "rows per forward"))


def sweep(case: Case, loads: list[float], duration_s: float, num_seeds: int) -> list[dict[str, Any]]:
    """Figures of every policy at every load, as means over seeds; nobody is refused."""
    machine = MACHINES[case.machine]
    model = seed_model(WORKLOADS[case.workload], machine)
    found = []
    for name, choices in POLICIES.items():
        full, rows = PlannerOptions(max_rows=machine.max_rows), {"max_rows": machine.max_rows}
        choices = choices | {"options": replace(choices.get("options", full), **rows)}
        world = World(true_model=model, admission=None, num_replicas=machine.num_replicas, **choices)
        for offered in loads:
            times = offered * machine.num_replicas
            viewers = viewers_at_load(times, case.num_streams, model, full, deadline_ms=case.deadline_ms)
            reports = [simulate(viewers, world, duration_s, network=Network(), seed=s) for s in range(num_seeds)]
            means = {
                key: sum(getattr(r, source) for r in reports) / num_seeds
                for key, source in (("fps", "fps"), ("missed", "miss_rate"), ("mean_rows", "mean_rows"))
            }
            found.append({"policy": name, "load": offered, "offered_fps": case.num_streams * viewers[0].fps, **means})
    return found


def draw(results: dict[Case, list[dict[str, Any]]], output: Path) -> None:
    """One row per case, one column per figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 3, figsize=(13, 3 * len(results)), squeeze=False, sharex=True)
    for row, (case, points) in zip(axes, results.items(), strict=True):
        for axis, (key, label) in zip(row, PANELS, strict=True):
            for name, colour, style in zip(POLICIES, ("C0", "C2", "C1", "C3"), ("-", "--", "-.", ":"), strict=True):
                line = [p for p in points if p["policy"] == name]
                axis.plot([p["load"] for p in line], [p[key] for p in line], style, color=colour, label=name)
            if key == "fps":
                offered = sorted({(p["load"], p["offered_fps"]) for p in points})
                axis.plot(*zip(*offered, strict=True), color="0.8", zorder=0, label="offered")
            axis.axvline(1, color="0.8", linewidth=0.8)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
        streams = f"{case.num_streams} stream{'s' if case.num_streams > 1 else ''}"
        row[0].set_title(f"{case.workload} on {case.machine}: {streams}, {case.deadline_ms / 1e3:g} s", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("offered load")
    axes[0][0].legend(fontsize=7)
    figure.suptitle("Simulated (roofline machines, virtual clock)")
    figure.tight_layout()
    figure.savefig(output, dpi=90)


def main() -> None:
    """Simulate and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("slo.png"), help="figure (default slo.png)")
    parser.add_argument("--json", type=Path, help="also write the figures")
    parser.add_argument("--seconds", type=float, default=60, help="virtual seconds per point (default 60)")
    parser.add_argument("--seeds", type=int, default=3, help="simulations per point (default 3)")
    args = parser.parse_args()
    loads = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0]
    results = {case: sweep(case, loads, args.seconds, args.seeds) for case in CASES}
    draw(results, args.output)
    if args.json:
        args.json.write_text(
            json.dumps([{**vars(case), "points": points} for case, points in results.items()], indent=1)
        )


if __name__ == "__main__":
    main()
