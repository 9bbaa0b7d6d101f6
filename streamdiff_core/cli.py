"""The command ``streamdiff``: ``run`` a video, ``compare`` settings, open the ``demo``, ``bench``, ``doctor``.

Only progress and printing are here (arguments: ``cli_args``); the work is in ``restyle``, ``compare``, ``bench`` and
``doctor``, imported when needed so that ``--help`` is instant. Results go to stdout (``--json``: one object and
nothing else), progress and errors to stderr. Exit code 0 done, 1 failed, 2 wrong use, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamdiff_core.cli_args import build_parser
from streamdiff_core.config import PRESETS
from streamdiff_core.types import CheckpointError, StageLostError, VideoReadError

EXAMPLES = (
    "soft watercolour washes on white paper",
    "comic book panel, bold ink",
    "glowing neon outlines on black",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    commands = {
        "run": run_command,
        "compare": compare_command,
        "bench": bench_command,
        "demo": demo_command,
        "serve": serve_command,
        "doctor": doctor_command,
        "embed": embed_command,
        "presets": presets_command,
    }
    try:
        return commands[args.command](args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `streamdiff presets | head -1`
        sys.stderr.close()
        return 1
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (ValueError, OSError, CheckpointError, StageLostError, VideoReadError))
        name = "" if expected else f"{type(error).__name__}: "
        message = " ".join(describe(error).split()) or type(error).__name__
        hint = "" if expected else " (--debug shows where)"
        print(f"streamdiff: {name}{message}{hint}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def describe(error: Exception) -> str:
    """The error's text; where the system's own lacks the remedy, a sentence that has it."""
    if isinstance(error, OSError) and error.filename is not None:
        if isinstance(error, FileNotFoundError):
            return f"there is no {error.filename}; check the path"
        if isinstance(error, PermissionError):
            return f"no permission for {error.filename}; choose another place, or change its permissions"
        if isinstance(error, IsADirectoryError):
            return f"{error.filename} is a folder; name a file"
    return str(error)


def run_command(args: argparse.Namespace) -> int:
    """Restyle one video, as the options or a recipe say."""
    if args.recipe:
        return run_recipe(args)
    if not args.input:
        raise ValueError("name the INPUT to restyle, such as a video file or the word sample, or give a --recipe")
    if not (args.prompt or "").strip():
        tries = "\n".join(f'  streamdiff run {args.input} --prompt "{text}"' for text in EXAMPLES)
        print(f"streamdiff: say which style you want, for example\n{tries}", file=sys.stderr)
        return 2
    from streamdiff_core import restyle, video_io
    from streamdiff_core.option_names import parse_settings, start_with

    info = video_io.probe(args.input)
    output = Path(args.output) if args.output else restyle.default_output(args.input, args.prompt)
    for target in filter(None, (str(args.output or output), args.strip, args.save_recipe)):
        check_target(target, args.input, args.overwrite)
    check_strip(args.strip)
    settings = parse_settings([*args.settings, *([f"inputs={args.inputs}"] if args.inputs else [])])
    pipe = load(args)
    total = restyle.expected_frames(info, args.fps, args.max_seconds)
    cache = {"sink_frames": args.sinks, "window_frames": args.window}
    cache = {name: value for name, value in cache.items() if value is not None}
    options = {
        "seed": args.seed, "steps": args.steps, "noise_scale": args.noise_scale, "motion_adaptive": not args.no_motion,
        "schedule": args.schedule or ("sequential" if args.clean_pass else pipe.preset.schedule.kind),
        "policy": args.policy, "clean_pass": args.clean_pass, "cache": pipe.with_cache(**cache),
    }  # fmt: skip
    with ProgressBar(total, enabled=sys.stderr.isatty()) as progress:
        result = restyle.restyle_video(
            pipe, args.input, args.prompt, args.output or output,
            size=args.size, fps=args.fps, max_seconds=args.max_seconds, side_by_side_output=args.side_by_side,
            strip=args.strip, prompts=args.prompt_at, on_switch=args.on_switch, progress=progress,
            **start_with(options, settings, pipe.preset.cache),
        )  # fmt: skip
    return report_run(args, result)


RECIPE_LEAVES_OPEN = (
    "input", "recipe", "save_recipe", "output", "overwrite", "strip", "json", "debug", "command", "preset",
    "device", "dtype", "weights", "vae", "lora", "quantise", "compile", "cuda_graphs", "overlap_stages",
    "threads", "stages",
)  # fmt: skip
"""Options of ``run`` that may stand beside ``--recipe``; it sets all others."""


def run_recipe(args: argparse.Namespace) -> int:
    """Make an output again from its recipe."""
    usual = vars(build_parser().parse_args(["run"]))
    extra = [n for n, value in vars(args).items() if n not in RECIPE_LEAVES_OPEN and value != usual[n]]
    if extra:
        named = ", ".join("--" + name.replace("_", "-") for name in extra)
        raise ValueError(f"the recipe already sets what {named} would; leave that out, or edit the recipe's JSON")
    from streamdiff_core import recipe_files, restyle

    recipe = recipe_files.load_recipe(args.recipe)
    words = restyle.prompt_text(recipe.prompt)
    with contextlib.nullcontext(args.input) if args.input else recipe_files.recipe_input(recipe, args.recipe) as source:
        output = args.output or restyle.default_output(recipe.input, words)
        for target in filter(None, (str(output), args.strip, args.save_recipe)):
            for kept in (source, args.recipe):
                check_target(target, kept, args.overwrite)
        check_strip(args.strip)
        args.preset, args.prompt = recipe.preset, words
        pipe = load(args)
        with ProgressBar(recipe.num_frames, enabled=sys.stderr.isatty()) as progress:
            result = restyle.run_recipe(
                pipe, recipe, source, output, strip=args.strip, progress=progress,
                warn=lambda line: print(f"streamdiff: {line}", file=sys.stderr),
            )  # fmt: skip
    return report_run(args, result)


def report_run(args: argparse.Namespace, result: Any) -> int:
    """Say what was made; the exit code."""
    if args.save_recipe and result.output:
        Path(args.save_recipe).expanduser().write_text(result.recipe.to_json() + "\n", encoding="utf-8")
    if args.json:
        print_json({**result.summary(), "preset": args.preset, "prompt": args.prompt, "options": result.options})
    elif result.output and not result.interrupted:
        size = f"{result.num_frames} frames of {result.width}×{result.height}"
        speed = f"{result.fps:.1f} fps = {result.real_time_factor:.2f}× real time"
        print(f"{result.output}: {size} in {result.seconds:.1f} s, {speed}")
        if result.strip:
            print(result.strip)
    if result.interrupted:
        kept = (
            f"{result.num_frames} frames kept in {result.output}"
            if result.output
            else "no frame was ready, nothing kept"
        )
        print(f"stopped: {kept}", file=sys.stderr)
        return 130
    return 0


def compare_command(args: argparse.Namespace) -> int:
    """Several settings side by side."""
    from streamdiff_core.cli_compare import run_compare

    return run_compare(args)


def bench_command(args: argparse.Namespace) -> int:
    """Measure this machine."""
    from streamdiff_core import bench, bench_report

    if args.lora:
        raise ValueError("bench does not merge --lora, which changes no speed; leave it out")
    set_threads(args.threads)
    options = bench.BenchOptions(
        preset=args.preset, steps=args.steps, schedule=args.schedule, size=args.size, num_chunks=args.chunks,
        source=args.input, device=args.device, dtype=args.dtype, weights=args.weights,
        random_weights=args.random_weights, compare_eager=not args.no_eager, vae=args.vae, shrink=args.shrink,
        quantisation=quantisation_of(args), compile=args.compile, cuda_graphs=args.cuda_graphs,
        overlap_stages=args.overlap_stages,
    )  # fmt: skip
    result = bench.run_benchmark(options, progress=lambda what: print(f"measuring: {what}", file=sys.stderr))
    report = bench_report.save_report(result, args.report or None) if args.report is not None else None
    if args.json:
        print_json({**result, "report": str(report) if report else None})
    else:
        print("\n".join(bench_report.to_lines(result)), *([report] if report else []), sep="\n")
    return 0


def demo_command(args: argparse.Namespace) -> int:
    """Open the live app."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "demo" / "app.py").is_file():
        raise ValueError("the live app is not part of the installed package; clone the repository and run `make demo`")
    sys.path.insert(0, str(checkout))
    try:
        from demo import app
    except ModuleNotFoundError as error:
        needed = f"the live app needs {error.name}, which is not installed"
        raise ValueError(f"{needed}; run: pip install 'streamdiff[demo]'") from error
    limits = {"lifetime_s": 60 * args.max_minutes} if args.max_minutes else {}
    app.serve(
        host=args.host, port=args.port, open_browser=not args.no_browser, preset=args.preset, device=args.device,
        dtype=args.dtype, weights=args.weights, max_streams=args.max_streams, threads=args.threads, **limits,
    )  # fmt: skip
    return 0


def serve_command(args: argparse.Namespace) -> int:
    """Serve streams to programs."""
    try:
        from streamdiff_core import serving
    except ModuleNotFoundError as error:
        needed = f"the service needs {error.name}, which is not installed"
        raise ValueError(f"{needed}; run: pip install 'streamdiff[serve]'") from error
    token = Path(args.token_file).expanduser().read_text("utf-8").strip() if args.token_file else None
    serving.check_exposure(args.host, token)
    options = serving.ServiceOptions(
        token=token, max_streams=args.max_streams, max_waiting=args.max_waiting, max_connections=args.max_connections,
        idle_s=args.idle_seconds, lifetime_s=60 * args.max_minutes if args.max_minutes else None,
    )  # fmt: skip
    if args.ray is None and args.replicas is None:
        serving.serve(lambda: load(args), host=args.host, port=args.port, options=options)
        return 0
    if args.ray is None:
        raise ValueError("--replicas is for --ray; add it, or leave both out for one engine")
    if find_spec("ray") is None:
        raise ValueError("--ray needs Ray Serve, which is not installed; run: pip install 'streamdiff[ray]'")
    from streamdiff_core import ray_service

    fewest, most = args.replicas or (1, 1)
    has_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch_sees_cuda())
    ray_options = ray_service.RayOptions(
        address=args.ray, min_replicas=fewest, max_replicas=most, cpus=args.threads or 1, gpus=int(has_gpu),
        **{"leave_s": 60 * args.max_minutes} if args.max_minutes else {},
    )  # fmt: skip
    ray_service.serve(lambda: load(args), host=args.host, port=args.port, options=options, ray_options=ray_options)
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    """Check this installation."""
    from streamdiff_core import doctor

    report = doctor.examine()
    if args.json:
        print_json(report)
    else:
        print("\n".join(doctor.to_lines(report)))
    return 0 if report["ok"] else 1


def embed_command(args: argparse.Namespace) -> int:
    """Prompts through umT5, ahead of time."""
    from streamdiff_core.cli_embed import run_embed

    return run_embed(args)


def presets_command(args: argparse.Namespace) -> int:
    """List the presets."""
    if args.json:
        print_json({name: preset.summary for name, preset in PRESETS.items()})
    else:
        print("\n".join(f"{name:<20} {preset.summary}" for name, preset in PRESETS.items()))
    return 0


def quantisation_of(args: argparse.Namespace) -> str | None:
    """``--quantise`` as ``from_preset`` takes it."""
    return None if args.quantise == "none" else args.quantise


def load(args: argparse.Namespace) -> Any:
    """The pipeline that the model options ask for."""
    from streamdiff_core.pipeline import StreamPipeline

    set_threads(args.threads)
    if getattr(args, "stages", None) or (hasattr(args, "stages") and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return load_stages(args)
    return StreamPipeline.from_preset(
        args.preset, device=args.device, dtype=args.dtype, weights=args.weights,
        vae=args.vae, lora=dict(args.lora), quantisation=quantisation_of(args), compile=args.compile,
        cuda_graphs=args.cuda_graphs, overlap_stages=getattr(args, "overlap_stages", False),
    )  # fmt: skip


def load_stages(args: argparse.Namespace) -> Any:
    """Rank 0 of a pipeline over several processes; any other rank that torchrun started works here, then exits."""
    import atexit

    from streamdiff_core.parallel_pipeline import join, launch

    if args.lora or args.quantise not in ("auto", "none") or args.compile or args.cuda_graphs or args.overlap_stages:
        raise ValueError(
            "--lora, --quantise, --compile, --cuda-graphs and --overlap-stages do not go with several stages; "
            "leave out either"
        )
    options = {"device": args.device, "dtype": args.dtype, "weights": args.weights, "vae": args.vae}
    pipe = launch(args.preset, args.stages, **options) if args.stages else join(args.preset, **options)
    if pipe is None:
        raise SystemExit(0)
    atexit.register(pipe.close)
    return pipe


def torch_sees_cuda() -> bool:
    """Whether PyTorch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def set_threads(count: int | None) -> None:
    """CPU threads of PyTorch, if the caller chose."""
    if count:
        import torch

        torch.set_num_threads(count)


def check_target(target: str, source: str, overwrite: bool) -> None:
    """Refuse to write over the input, or over another file unasked."""
    path = Path(target)
    if path.is_file():
        if Path(source).exists() and path.samefile(source):
            raise ValueError(f"{path} is the input; name another output")
        if not overwrite:
            raise ValueError(f"{path} exists; add --overwrite to replace it")
    elif not path.expanduser().parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it or write elsewhere")
    if not os.access(path.expanduser().parent, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write into the folder {path.parent}; write elsewhere")


def check_strip(target: str | None) -> None:
    """Refuse a strip that is no picture before any work is done."""
    from streamdiff_core.video_io import IMAGE_SUFFIXES

    if target and Path(target).suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"cannot draw the strip '{Path(target).name}': use one of {' '.join(IMAGE_SUFFIXES)}")


class ProgressBar:
    """Frames written so far with fps, time to first frame and p95 latency; silent when not on a terminal."""

    def __init__(self, total: int | None, enabled: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit=" frames", disable=not enabled, file=sys.stderr, dynamic_ncols=True)
        self._shown_s = -math.inf

    def __call__(self, num_frames: int, session: Any) -> None:
        self._bar.update(num_frames)
        if not self._bar.disable and time.monotonic() - self._shown_s > 0.5:
            self._shown_s, stats = time.monotonic(), session.stats
            figures = (
                ("fps", stats.fps, ""),
                ("TTFF", stats.ttff_ms, " ms"),
                ("p95", stats.latency_p95_ms, " ms"),
            )
            self._bar.set_postfix_str("  ".join(f"{n} {v:.0f}{u}" for n, v, u in figures if not math.isnan(v)))

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def print_json(value: Any) -> None:
    """One JSON object; what could not be measured (NaN) is null."""
    print(json.dumps(_without_nan(value), indent=2, ensure_ascii=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
