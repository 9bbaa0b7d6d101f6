"""``streamdiff compare``: arguments to a comparison, a progress bar, and what is printed at the end."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamdiff_core import cli, compare, compare_pictures
from streamdiff_core.clip_judge import load_judge
from streamdiff_core.compare_plan import Comparison, plan
from streamdiff_core.option_names import parse_settings, parse_variation
from streamdiff_core.recipe_files import recipe_input
from streamdiff_core.restyle import stream_size
from streamdiff_core.video_io import probe

GIVEN_BY_RECIPE = ("vary", "settings", "prompt", "prompt_at", "max_seconds", "fps", "size", "schedule")


def run_compare(args: argparse.Namespace) -> int:
    """Make a comparison; 1 when a cell failed."""
    compare_pictures.require_matplotlib()
    judge = load_judge(args.clip) if args.clip else None
    with contextlib.ExitStack() as stack:
        if args.recipe:
            comparison, pipe, source = _from_recipe(args, stack)
        else:
            comparison, pipe, source = _from_options(args)
        steps = compare.compare(pipe, comparison, source, args.output, judge=judge)
        result = follow(steps, enabled=sys.stderr.isatty())
    for cell in result.failed:
        print(f"streamdiff: {cell.label} failed: {cell.error}", file=sys.stderr)
    if args.json:
        cli.print_json(result.summary())
    else:
        made = f"{len(result.cells) - len(result.failed)} of {len(result.cells)} cells"
        print(f"{result.folder / compare.REPORT_NAME}: {made}, {result.num_frames} frames each")
    return 1 if result.failed else 0


def follow(steps: Any, enabled: bool, title: str = "") -> compare.CompareResult:
    """Go through the steps of a comparison under a progress bar; ``title`` goes before what is being made."""
    with tqdm(unit=" frames", disable=not enabled, file=sys.stderr, dynamic_ncols=True) as bar:
        while True:
            try:
                progress = next(steps)
            except StopIteration as end:
                return end.value
            bar.total = progress.total
            bar.set_description_str(title + progress.what, refresh=False)
            bar.update(progress.done - bar.n)


def _from_options(args: argparse.Namespace) -> tuple[Comparison, Any, str]:
    if not args.input:
        raise ValueError("name the INPUT to compare on, such as a video file or the word sample, or give a --recipe")
    if not (args.prompt or "").strip():
        raise ValueError('say which style you want, for example --prompt "comic book panel, bold ink"')
    variations = [(name, list(values)) for name, values in map(parse_variation, args.vary)]
    if len({name for name, _ in variations}) < len(variations):
        raise ValueError("a setting is varied twice; write its values in one --vary, as in steps=1,2")
    settings = parse_settings(args.settings)
    if args.schedule:
        settings.setdefault("schedule", args.schedule)
    info = probe(args.input)
    pipe = cli.load(args)
    comparison = plan(
        pipe, args.input, args.prompt, dict(variations), settings=settings,
        size=args.size or stream_size(info, pipe.preset), fps=args.fps, max_seconds=args.max_seconds,
        prompts=args.prompt_at, on_switch=args.on_switch,
    )  # fmt: skip
    return comparison, pipe, args.input


def _from_recipe(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Comparison, Any, str | Path]:
    if extra := [name for name in GIVEN_BY_RECIPE if getattr(args, name)]:
        named = ", ".join("--" + name.replace("settings", "set").replace("_", "-") for name in extra)
        raise ValueError(f"the recipe already sets what {named} would; leave that out, or edit the recipe's JSON")
    comparison = Comparison.from_json(Path(args.recipe).expanduser().read_bytes())
    source = args.input or stack.enter_context(recipe_input(comparison.base, args.recipe))
    args.preset = comparison.base.preset
    pipe = cli.load(args)
    if line := comparison.base.differences(pipe):
        print(f"streamdiff: {line}", file=sys.stderr)
    return comparison, pipe, source
