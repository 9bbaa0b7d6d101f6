"""Pipeline stages measured: memory per rank, speed of N processes against one, and a trace that shows the bubbles.

    python benchmarks/parallel.py --stages 2 --chunks 40 --out results/parallel

A random model of about 200 M parameters streams synthetic video over N gloo processes pinned to one core each, then in
one process pinned to one core. With ``--unbalanced`` the run starts with all layers but one on rank 0, and the block
scheduler moves them in mid-stream. Written: ``NAME.json`` (figures), ``NAME.trace.json`` (open in ui.perfetto.dev or
chrome://tracing) and ``NAME.png``. Run it on a quiet machine: two busy processes per core measure the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from streamdiff_core import ModelConfig, get_preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.parallel.block_scheduler import even_split
from streamdiff_core.parallel.links import Links
from streamdiff_core.parallel.stage import StagePart
from streamdiff_core.parallel_pipeline import ParallelPipeline, join_modules, links_from_environment
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.vae import TinyVAE

MIB = 2**20
COLOURS = {"encode": "#4c78a8", "embed": "#72b7b2", "layers": "#f58518", "head": "#b279a2", "decode": "#54a24b"}


def preset_of(dim: int, num_layers: int) -> Any:
    """The bundled preset around a random transformer."""
    tiny = get_preset("tiny")
    model = ModelConfig(
        dim=dim, ffn_dim=4 * dim, num_heads=dim // 64, num_layers=num_layers, in_channels=48, out_channels=48,
        text_dim=128, text_len=16, prediction="x0",
    )  # fmt: skip
    return replace(tiny, name="random", model=model)


def random_part(preset: Any, part: StagePart) -> CausalWanTransformer:
    """One stage's weights, made in place: a rank never holds the whole model."""
    transformer = part.keep(empty_transformer(preset, torch.float32)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, p in transformer.named_parameters():
        p.data.normal_(0, 0.02 if p.ndim > 1 else 0.01, generator=generator)
        if "norm" in name and name.endswith("weight"):
            p.data.fill_(1.0)
    transformer.latent_std.fill_(1.0)
    transformer.latent_motion.fill_(0.0)
    return transformer


def rank_main(args: argparse.Namespace) -> None:
    """One rank, pinned to one core; rank 0 measures."""
    rank = int(os.environ["RANK"])
    cores = sorted(psutil.Process().cpu_affinity())
    psutil.Process().cpu_affinity([cores[rank % len(cores)]])
    torch.set_num_threads(1)
    preset = preset_of(args.dim, args.layers)
    split = even_split(args.layers, args.stages)
    if args.unbalanced and args.stages > 1:
        split = (args.layers - args.stages + 1, *[1] * (args.stages - 1))
    links: Links = links_from_environment("cpu")
    before = psutil.Process().memory_info().rss
    transformer = random_part(preset, StagePart.of(split, rank))
    modules = TinyVAE(preset.vae), TinyTextEncoder(preset.text)
    rss = {"before": before, "weights": psutil.Process().memory_info().rss}
    rules = {"balance_every": 16 if args.unbalanced else None}
    pipe = join_modules(preset, transformer, *modules, links, split=split, **rules)
    rss["end"] = psutil.Process().memory_info().rss
    Path(args.out + f".rank{rank}.json").write_text(json.dumps(rss))
    if pipe is not None:
        with pipe:
            measure(pipe, args)


def measure(pipe: ParallelPipeline, args: argparse.Namespace) -> None:
    """Stream, and write what was seen."""
    size = args.size
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (4, size, size, 3), dtype=np.uint8)
    splits, chunk_s = [pipe.split], []
    with pipe.start("oil painting", steps=args.steps, width=size, height=size) as session:
        session.push(np.concatenate([clip[:1], clip]))
        for _ in range(args.warmup):
            session.push(clip)
        for _ in range(args.chunks):
            start_s = time.perf_counter()
            session.push(clip)
            chunk_s.append(time.perf_counter() - start_s)
            if pipe.split != splits[-1]:
                splits.append(pipe.split)
        reports = pipe.engine.report()
        session.flush()
    figures = {
        "stages": args.stages, "steps": args.steps, "size": size, "chunks": args.chunks, "splits": splits,
        "weight_and_cache_mib": [r["nbytes"] / MIB for r in reports],
        "fps": 4 * args.chunks / sum(chunk_s), "median_chunk_ms": 1e3 * statistics.median(chunk_s),
        "ranks": [{k: r[k] for k in ("times", "layers", "nbytes")} for r in reports],
        "busy_share": [busy_share(r["trace"], rank == 0 < args.stages - 1) for rank, r in enumerate(reports)],
    }  # fmt: skip
    Path(args.out + ".json").write_text(json.dumps(figures, indent=2))
    Path(args.out + ".trace.json").write_text(json.dumps(chrome_trace(reports)))
    draw(reports, args.out + ".png")


def busy_share(trace: list, is_first: bool) -> float:
    """Share of the last half of the run in which the rank computed; the rest is pipeline bubble."""
    if not trace:
        return float("nan")
    end = trace[-1][2]
    half = [e for e in trace if e[1] > end / 2 and e[0] in COLOURS and not (is_first and e[0] == "decode")]
    return sum(e[2] - e[1] for e in half) / max(1e-9, end - half[0][1])


def chrome_trace(reports: list[dict]) -> dict:
    """Events of all ranks on one clock (that of one machine) in Chrome's trace format."""
    origin_s = min(r["origin_s"] for r in reports)
    events = []
    for rank, report in enumerate(reports):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"stage {rank}"}})
        for name, start_ms, end_ms, chunk_idx in report["trace"]:
            at_us = 1e6 * (report["origin_s"] - origin_s) + 1e3 * start_ms
            event = {"name": name, "ph": "X", "pid": rank, "tid": 0, "ts": at_us, "dur": 1e3 * (end_ms - start_ms)}
            events.append({**event, "args": {"chunk": chunk_idx}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw(reports: list[dict], path: str) -> None:
    """A Gantt chart of the ranks: what each one does when; white is waiting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    origin_s = min(r["origin_s"] for r in reports)
    fig, ax = plt.subplots(figsize=(12, 0.8 + 0.8 * len(reports)), layout="constrained")
    begin_s, end_s = np.inf, 0.0
    for rank, report in enumerate(reports):
        for name, colour in COLOURS.items():
            bars = [
                (report["origin_s"] - origin_s + e[1] / 1e3, (e[2] - e[1]) / 1e3)
                for e in report["trace"]
                if e[0] == name and not (name == "decode" and rank == 0 < len(reports) - 1)  # there it is waiting
            ]
            ax.broken_barh(bars, (rank - 0.4, 0.8), color=colour, label=name if bars else None)
            begin_s = min([begin_s, *(a for a, _ in bars)])
            end_s = max([end_s, *(a + b for a, b in bars)])
    ax.set(yticks=range(len(reports)), yticklabels=[f"stage {r}" for r in range(len(reports))], xlabel="seconds")
    for moved_ms in reports[0]["moved_ms"]:
        at_s = reports[0]["origin_s"] - origin_s + moved_ms / 1e3
        ax.axvline(at_s, color="black", linestyle="--")
        ax.annotate("layers move", (at_s, -0.45), xytext=(4, 0), textcoords="offset points", va="top", fontsize=8)
    ax.set_xlim(begin_s, end_s)
    ax.invert_yaxis()
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles.keys(), ncols=5, loc="upper left", bbox_to_anchor=(0, 1.25), frameon=False)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def start_ranks(args: argparse.Namespace, stages: int, out: str) -> dict:
    """Run ``stages`` ranks to their end; figures of rank 0 with the memory of every rank."""
    flags = ["--unbalanced"] if args.unbalanced and stages > 1 else []
    for name in ("dim", "layers", "steps", "size", "chunks", "warmup"):
        flags += [f"--{name}", str(getattr(args, name))]
    command = [sys.executable, __file__, "--rank", "--stages", str(stages), "--out", out, *flags]
    store = torch.distributed.TCPStore("127.0.0.1", 0, stages, is_master=True, wait_for_workers=False)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(stages)}
    here |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is ours
    ranks = [subprocess.Popen(command, env={**os.environ, **here, "RANK": str(r)}) for r in range(stages)]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit("a rank failed")
    figures = json.loads(Path(out + ".json").read_text())
    memory = [json.loads(Path(f"{out}.rank{r}.json").read_text()) for r in range(stages)]
    figures["rss_of_weights_mib"] = [(m["weights"] - m["before"]) / MIB for m in memory]
    for r in range(stages):
        Path(f"{out}.rank{r}.json").unlink()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dim", type=int, default=1024, help="width; 1024 x 11 layers are about 200 M parameters")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=192, help="px, both ways")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--unbalanced", action="store_true", help="start with all layers but one on rank 0")
    parser.add_argument("--out", default="parallel", help="path of the results, without ending")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args)
        return
    one = start_ranks(args, 1, args.out + ".one")
    several = start_ranks(args, args.stages, args.out)
    for ending in (".json", ".trace.json", ".png"):
        Path(args.out + ".one" + ending).unlink()
    result = {"one process": one, f"{args.stages} stages": several, "speed_up": several["fps"] / one["fps"]}
    Path(args.out + ".json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
