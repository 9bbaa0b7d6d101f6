"""Long-run study: minutes of video through the KV policies of one model; what drifts, and what a sink is for.

The input is the sample clip back and forth under a slow pan, so that it never repeats exactly and has no drift of its
own; every study is a `streamdiff_core.compare` (same frames, same noise), resumable, with its own report. Per minute
the mean of each figure goes into one Markdown file, curves and sheets into ``docs/``. Takes about
``seconds × fps / speed`` per cell and half of that to measure; run it on a quiet machine:

    python benchmarks/long_run.py OUT/ --seconds 300
    python benchmarks/long_run.py OUT/ --seconds 300 --studies policies --policies sink sliding_window ema_sink
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from streamdiff_core import StreamPipeline
from streamdiff_core.cli_compare import follow
from streamdiff_core.compare import CURVES_NAME, SCORES_NAME, SHEET_NAME, CompareResult, compare
from streamdiff_core.compare_plan import plan
from streamdiff_core.compare_scores import FIGURES
from streamdiff_core.machine import machine_facts, source_commit
from streamdiff_core.video_io import VideoWriter, read_video

REPOSITORY = Path(__file__).resolve().parent.parent
POLICIES = ("sink", "sliding_window", "ema_sink", "deep_forcing", "rolling_sink")
PLAIN = {"guided": False}
"""What the model itself paints is what drifts."""
STUDIES = {
    "policies": ({"policy": list(POLICIES)}, PLAIN),
    "positions": ({"positions": ["packed", "absolute", "wrap"]}, {"policy": "sink"} | PLAIN),
    "adaptive": ({"adaptive_sink": ["off", "released", "paper"]}, {"policy": "sink"} | PLAIN),
}
"""What varies, and what all cells share."""
SIZE_PX, CROP_PX, PAN_S = 256, 224, (37.0, 53.0)


def make_loop() -> list[np.ndarray]:
    """The sample clip forwards and backwards."""
    clip = list(read_video("sample"))
    return [*clip, *clip[-2:0:-1]]


def panned_frames(seconds: float, fps: float) -> Iterator[np.ndarray]:
    """The sample clip forwards and backwards, seen through a window that wanders; uint8 [H, W, 3]."""
    loop = make_loop()
    room = SIZE_PX - CROP_PX
    for index in range(round(seconds * fps)):
        left, top = (room / 2 * (1 + math.sin(2 * math.pi * index / fps / period)) for period in PAN_S)
        centre = (left + (CROP_PX - 1) / 2, top + (CROP_PX - 1) / 2)
        window = cv2.getRectSubPix(loop[index % len(loop)], (CROP_PX, CROP_PX), centre)
        yield cv2.resize(window, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_CUBIC)


def make_input(path: Path, seconds: float, fps: float) -> Path:
    """Write the input once."""
    if not path.is_file():
        with VideoWriter(path, fps, lossless=True) as writer:
            for frame in tqdm(panned_frames(seconds, fps), total=round(seconds * fps), desc="input"):
                writer.write(frame[None])
    return path


def run_study(pipe: StreamPipeline, name: str, source: Path, args: argparse.Namespace) -> CompareResult:
    """All cells of a study under one progress bar; finished ones are taken again."""
    vary, settings = STUDIES[name]
    if name == "policies":
        vary = {"policy": args.policies}
    settings = {"steps": args.steps, "sink_frames": args.sink, "window_frames": args.window, **settings}
    size = (pipe.preset.width, pipe.preset.height)
    planned = plan(pipe, source, args.prompt, vary, settings=settings, size=size)
    loop_s = len(make_loop()) / planned.base.fps
    steps = compare(
        pipe,
        planned,
        source,
        args.out / name,
        drift_reference_s=min(loop_s, args.seconds / 3),
        figures_every=args.figures_every,
    )
    return follow(steps, enabled=sys.stderr.isatty(), title=f"{name}: ")


def means_by_span(scores: Path, span_s: float) -> dict[str, dict[int, dict[str, float]]]:
    """{cell: {span: {figure: mean}}} of a scores.csv; what is empty there is left out."""
    values: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(scores, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for figure in FIGURES:
                if row[figure.name]:
                    span = values[row["cell"]][int(float(row["time_s"]) // span_s)]
                    span[figure.name].append(float(row[figure.name]))
    return {
        cell: {span: {name: float(np.mean(v)) for name, v in figures.items()} for span, figures in spans.items()}
        for cell, spans in values.items()
    }


def to_markdown(results: dict[str, CompareResult], args: argparse.Namespace, hardware: str, pictures: Path) -> str:
    """Tables of all studies: one per figure, a row per cell, a column per span.

    Args:
        hardware: what it ran on, in words.
        pictures: folder of the pictures, seen from the report.
    """
    lines = [
        f"# {args.seconds:g} seconds of video through KV policies",
        "",
        f"`tiny`, {args.steps} steps, {args.sink} sink + {args.window} window frames, “{args.prompt}”; {hardware}, "
        f"torch {torch.__version__}, {date.today():%Y-%m-%d}, commit {source_commit() or 'unknown'}. Input: the sample "
        "clip back and forth under a slow pan. Means over the span; same frames and noise in all cells of a study. "
        f"Drift is taken over whole loops of the clip, other figures on one frame of {args.figures_every}. "
        "Made by `python benchmarks/long_run.py`.",
    ]
    for name, result in results.items():
        means = means_by_span(result.folder / SCORES_NAME, args.span)
        spans = sorted({span for cell in means.values() for span in cell})
        heads = " | ".join(f"{span * args.span:g}–{min((span + 1) * args.span, args.seconds):g} s" for span in spans)
        lines += ["", f"## {name}", ""]
        lines += [f"{cell.label} failed: {cell.error}" for cell in result.failed]
        lines += [f"![curves]({pictures / picture_name(name, CURVES_NAME)})", ""]
        lines += [f"![moments]({pictures / picture_name(name, SHEET_NAME)})"]
        for figure in FIGURES:
            if not any(figure.name in span for cell in means.values() for span in cell.values()):
                continue
            lines += ["", f"### {figure.title}, {figure.unit}", "", figure.meaning, ""]
            lines += [f"| cell | {heads} |", "|---" * (len(spans) + 1) + "|"]
            for cell, by_span in means.items():
                numbers = (by_span.get(span, {}).get(figure.name, math.nan) for span in spans)
                lines.append(f"| {cell} | " + " | ".join(f"{n:.3g}" for n in numbers) + " |")
    return "\n".join(lines) + "\n"


def picture_name(study: str, file_name: str) -> str:
    """Name of a study's picture in ``docs/``."""
    return f"long_run_{study}_{Path(file_name).name}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the studies and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for input, cells and reports; the same again goes on")
    parser.add_argument("--seconds", type=float, default=300.0, help="length of the input")
    parser.add_argument("--span", type=float, default=60.0, help="seconds that one column of the tables averages")
    parser.add_argument(
        "--figures-every",
        type=int,
        default=1,
        help="measure one frame of so many, best an odd number, which meets every place in a chunk; drift: all",
    )
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), help="cells of the study `policies`")
    parser.add_argument("--prompt", default="thick oil painting, cobalt and yellow brush dabs")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sink", type=int, default=3, help="sink frames of the cache")
    parser.add_argument("--window", type=int, default=6, help="window frames of the cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--report", type=Path, default=None, help="Markdown; pictures then in docs/; default OUT/report.md"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = StreamPipeline.from_preset("tiny", device=args.device)
    source = make_input(args.out / f"input_{args.seconds:g}s.mkv", args.seconds, pipe.preset.fps)
    results = {name: run_study(pipe, name, source, args) for name in args.studies}
    report = args.report or args.out / "report.md"
    pictures = REPOSITORY / "docs" if args.report else args.out
    seen_from = Path(os.path.relpath(pictures, report.parent))
    hardware = machine_facts(pipe.device)["hardware"]
    report.write_text(to_markdown(results, args, hardware, seen_from), encoding="utf-8")
    for name, result in results.items():
        for file_name in (CURVES_NAME, SHEET_NAME):
            shutil.copyfile(result.folder / file_name, pictures / picture_name(name, file_name))
    print(report)


if __name__ == "__main__":
    main()
