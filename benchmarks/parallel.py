"""Pipeline stages measured: memory per rank, speed of N processes against one, and a trace that shows the bubbles.

    python benchmarks/parallel.py --stages 2 --chunks 24 --out benchmarks/results

A random model of about 200 M parameters streams synthetic video: in one process pinned to one core, over N gloo
processes pinned to one core each, and again from a bad start (all layers but one on rank 0), from where the block
scheduler moves layers in mid-stream. Then 1-4 processes say how much memory each one needs. Written: a dated table and
the trace of the last run as a picture. Run it on a quiet machine: two busy processes per core measure the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from streamdiff_core import ModelConfig, get_preset
from streamdiff_core.bench_frames import FrameLoop, moving_frames
from streamdiff_core.bench_report import report_path
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.machine import machine_facts, peak_memory_bytes, source_commit
from streamdiff_core.parallel.block_scheduler import even_split
from streamdiff_core.parallel.stage import StagePart
from streamdiff_core.parallel_pipeline import ParallelPipeline, join_modules, links_from_environment
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.timeline import busy_share, rank_events
from streamdiff_core.vae import TinyVAE

MIB = 2**20
BALANCE_EVERY = 16
"""Micro-batches between two looks at the balance, in the run that starts badly."""


def preset_of(dim: int, num_layers: int) -> Any:
    """The bundled preset around a random transformer."""
    model = ModelConfig(
        dim=dim, ffn_dim=4 * dim, num_heads=dim // 64, num_layers=num_layers, in_channels=48, out_channels=48,
        text_dim=128, text_len=16, prediction="x0",
    )  # fmt: skip
    return replace(get_preset("tiny"), name="random", model=model)


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
    process = psutil.Process()
    cores = sorted(process.cpu_affinity())
    process.cpu_affinity([cores[rank % len(cores)]])
    torch.set_num_threads(1)
    preset = preset_of(args.dim, args.layers)
    split = even_split(args.layers, args.stages)
    if args.unbalanced:
        split = (args.layers - args.stages + 1, *[1] * (args.stages - 1))
    links = links_from_environment("cpu")
    before = process.memory_info().rss
    transformer = random_part(preset, StagePart.of(split, rank))
    memory = {"weights": process.memory_info().rss - before}
    modules = TinyVAE(preset.vae), TinyTextEncoder(preset.text)
    rules = {"balance_every": BALANCE_EVERY if args.unbalanced else None}
    pipe = join_modules(preset, transformer, *modules, links, split=split, **rules)
    if pipe is not None:
        with pipe:
            figures = measure(pipe, args)
        (args.out / "figures.json").write_text(json.dumps(figures))
    (args.out / f"rank{rank}.json").write_text(json.dumps({**memory, "peak": peak_memory_bytes()}))


def measure(pipe: ParallelPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Stream, and say what was seen."""
    feed = FrameLoop(moving_frames(64, args.size, args.size))
    splits, chunk_s = [pipe.split], []
    with pipe.start("oil painting", steps=args.steps, width=args.size, height=args.size) as session:
        session.push(feed.take(5 + 4 * args.warmup))
        for _ in range(args.chunks):
            start_s = time.perf_counter()
            session.push(feed.take(4))
            chunk_s.append(time.perf_counter() - start_s)
            if pipe.split != splits[-1]:
                splits.append(pipe.split)
        reports = pipe.engine.report()
    rest = chunk_s[len(chunk_s) // 2 :]
    return {
        "splits": splits, "reports": reports, "fps": 4 * len(rest) / sum(rest),
        "slowest_chunk_ms": 1e3 * max(chunk_s), "chunk_ms": 1e3 * statistics.median(rest),
    }  # fmt: skip


def start_ranks(args: argparse.Namespace, stages: int, chunks: int, unbalanced: bool = False) -> dict[str, Any]:
    """Run ``stages`` ranks to their end; figures of rank 0 with the memory of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={getattr(args, name)}" for name in ("dim", "layers", "steps", "size", "warmup")]
        flags += ["--rank", f"--stages={stages}", f"--chunks={chunks}", f"--out={folder}"]
        command = [sys.executable, __file__, *flags, *["--unbalanced"] * unbalanced]
        store = torch.distributed.TCPStore("127.0.0.1", 0, stages, is_master=True, wait_for_workers=False)
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(stages)}
        here |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is ours
        ranks = [subprocess.Popen(command, env={**os.environ, **here, "RANK": str(r)}) for r in range(stages)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed")
        figures = json.loads((Path(folder) / "figures.json").read_text())
        return figures | {"memory": [json.loads((Path(folder) / f"rank{r}.json").read_text()) for r in range(stages)]}


def busy(figures: dict[str, Any]) -> list[float]:
    """Share of the second half of a run in which each rank computed."""
    events = rank_events(figures["reports"])
    end_ms = min(max(e.end_ms for e in events if e.stage == lane) for lane in {e.stage for e in events})
    begin_ms = end_ms - (end_ms - events[0].start_ms) / 3
    return [busy_share(events, f"stage {rank}", (begin_ms, end_ms)) for rank in range(len(figures["reports"]))]


def draw(figures: dict[str, Any], path: Path) -> None:
    """What each rank does when; white is waiting, a dashed line is where layers moved."""
    from streamdiff_core import viz

    reports = figures["reports"]
    events = rank_events(reports)
    shift_ms = 1e3 * (reports[0]["origin_s"] - min(r["origin_s"] for r in reports))
    moved_ms = [shift_ms + ms for ms in reports[0]["moved_ms"]]
    chunk_ms = figures["chunk_ms"]
    span_ms = (moved_ms[0] - 7 * chunk_ms, moved_ms[-1] + 7 * chunk_ms) if moved_ms else (0.0, events[-1].end_ms)
    lanes = [f"stage {rank}" for rank in range(len(reports))]
    title = "Layers per stage: " + ", then ".join(map(str, map(tuple, figures["splits"])))
    figure = viz.draw_gantt(events, lanes=lanes, span_ms=span_ms, title=title)
    for at_ms in moved_ms:
        figure.axes[0].axvline(at_ms - span_ms[0], color="black", linestyle="--")
    figure.savefig(path, dpi=100)


def to_markdown(args: argparse.Namespace, runs: dict[str, dict], memory: dict[int, dict], picture: str) -> str:
    """The report."""
    machine = machine_facts()
    one = runs["1 process"]
    model = empty_transformer(preset_of(args.dim, args.layers), torch.float32)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
    rows = {
        "frames per second": lambda r: f"{r['fps']:.2f}",
        "against one process on one core": lambda r: f"{r['fps'] / one['fps']:.2f}×",
        "chunk of 4 frames, median": lambda r: f"{r['chunk_ms']:.0f} ms",
        "slowest chunk": lambda r: f"{r['slowest_chunk_ms']:.0f} ms",
        "at work, per rank": lambda r: ", ".join(f"{share:.0%}" for share in busy(r)),
        "layers per rank": lambda r: " → ".join("+".join(map(str, split)) for split in r["splits"]),
        "one layer, per rank": lambda r: ", ".join(f"{x['times']['layer_ms']:.0f} ms" for x in r["reports"]),
    }
    lines = [
        f"# Pipeline stages on {machine['hardware']}",
        "",
        f"Measured {time.strftime('%Y-%m-%d')}, commit {source_commit()}, PyTorch {machine['torch']}.",
        f"Random transformer, {size} ({args.layers} layers of width {args.dim}), float32,",
        f"{args.size}×{args.size}, {args.steps} steps, stream batch; gloo, every process pinned to one core.",
        f"{args.warmup} + {args.chunks} chunks; figures are of the second half, the slowest chunk of all.",
        "",
        "| | " + " | ".join(runs) + " |",
        "| --- |" + " ---: |" * len(runs),
        *(f"| {label} | " + " | ".join(cell(r) for r in runs.values()) + " |" for label, cell in rows.items()),
        "",
        f"![What each rank does when]({picture})",
        "",
        "The run that starts badly, around the moves (dashed line). A number is the newest chunk of a micro-step;",
        "white is bubble.",
        "",
        "## Memory per rank",
        "",
        "| processes | weights and KV cache, counted | growth of resident memory by weights | peak of the process |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {n} | {mib([x['nbytes'] for x in r['reports']])} | {mib([m['weights'] for m in r['memory']])} | "
            f"{mib([m['peak'] for m in r['memory']])} |"
            for n, r in memory.items()
        ),
        "",
        "MiB, rank by rank. The last column has Python, PyTorch, VAE and working room in it.",
    ]
    return "\n".join(lines) + "\n"


def mib(sizes: list[int]) -> str:
    """Bytes of each rank."""
    return ", ".join(f"{size / MIB:.0f}" for size in sizes)


def main() -> None:
    """Run all ranks and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dim", type=int, default=1024, help="width; 1024 x 11 layers are about 200 M parameters")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=192, help="px, both ways")
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--most", type=int, default=4, help="processes of the largest ring whose memory is measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--unbalanced", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args)
        return
    n = args.stages
    runs = {
        "1 process": start_ranks(args, 1, args.chunks),
        f"{n} processes": start_ranks(args, n, args.chunks),
        f"{n} processes, bad start": start_ranks(args, n, args.chunks, unbalanced=True),
    }
    memory = {1: runs["1 process"], n: runs[f"{n} processes"]}
    memory |= {more: start_ranks(args, more, 2) for more in range(2, args.most + 1) if more not in memory}
    named = {"preset": "parallel", "machine": machine_facts(), "date": time.strftime("%Y-%m-%d")}
    path = report_path(named, args.out)
    draw(runs[f"{n} processes, bad start"], path.with_suffix(".png"))
    path.write_text(to_markdown(args, runs, dict(sorted(memory.items())), path.with_suffix(".png").name), "utf-8")
    print(path)


if __name__ == "__main__":
    main()
