"""Arguments of the command ``streamdiff``: every option, its type and its help text; nothing is run here."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamdiff_core import __version__
from streamdiff_core.config import PRESETS

SWITCHES = ("keep", "recache", "flush", "reset", "cut", "fade")
POLICIES, SCHEDULES = (
    tuple(sorted(p.stem for p in (Path(__file__).parent / folder).glob("[a-z]*.py") if mark in p.read_text("utf-8")))
    for folder, mark in (("kv_policies", "@policy("), ("schedules", "@schedule("))
)
"""Read off the files, so that ``--help`` need not import them."""
DTYPES = ("auto", "float32", "bfloat16", "float64")
TINY = PRESETS["tiny"]
QUANTISATIONS = ("none", "int8", "fp8", "w8a8")


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(prog="streamdiff", description="Live video-to-video diffusion.")
    parser.add_argument("--version", action="version", version=f"streamdiff {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = argparse.ArgumentParser(add_help=False, parents=[running])
    common.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    model, shape = _model_options(), _shape_options()
    _add_run(commands.add_parser("run", parents=[common, model, shape], help="restyle a video", epilog=RUN_NOTES))
    _add_compare(
        commands.add_parser(
            "compare", parents=[common, model, shape], help="several settings side by side", epilog=COMPARE_NOTES
        )
    )
    _add_bench(commands.add_parser("bench", parents=[common, model, shape], help="measure speed, FLOPs and MFU here"))
    _add_demo(commands.add_parser("demo", parents=[running], help="open the live app in the browser"))
    _add_serve(
        commands.add_parser(
            "serve", parents=[running, model], help="serve streams to programs (WebSocket)", epilog=SERVE_NOTES
        )
    )
    doctor = commands.add_parser("doctor", parents=[common], help="check this installation and machine")
    doctor.set_defaults(command="doctor")
    _add_embed(
        commands.add_parser(
            "embed", parents=[common], help="compute prompts' embeddings ahead of time (umT5)", epilog=EMBED_NOTES
        )
    )
    presets = commands.add_parser("presets", parents=[common], help="list the presets")
    presets.set_defaults(command="presets")
    return parser


def _model_options() -> argparse.ArgumentParser:
    """What every command takes that loads a model."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--preset", default="tiny", help="see `streamdiff presets` (default %(default)s)")
    model.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    model.add_argument("--dtype", default="auto", choices=DTYPES, help="number type of the model (default auto)")
    model.add_argument(
        "--weights",
        metavar="PATH",
        help="folder of .safetensors for tiny; transformer checkpoint for full-size presets (default: the "
        "preset's own)",
    )
    model.add_argument(
        "--vae", default="wan", metavar="FILE", help="full-size presets: wan, or a TAEHV's file (default wan)"
    )
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora_strength,
        metavar="FILE[=STRENGTH]",
        help="merge a LoRA, with this strength (default 1); may be repeated",
    )
    model.add_argument(
        "--quantise",
        choices=QUANTISATIONS,
        default="auto",
        help="weights in int8 or fp8 (needs torchao), or weights and activations in 8 bits (w8a8: preset tiny, CPU "
        "with VNNI; the default there where g++ made the C++ kernels and no --dtype is given)",
    )
    model.add_argument("--compile", action="store_true", help="torch.compile the transformer: slow start")
    model.add_argument("--cuda-graphs", action="store_true", help="record and replay forwards (GPU; not measured)")
    model.add_argument("--threads", type=positive(int), help="CPU threads (default: PyTorch's choice)")
    return model


def _shape_options() -> argparse.ArgumentParser:
    """What a command takes that makes a stream itself."""
    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument("--schedule", choices=SCHEDULES, help="order of the denoising steps (default: the preset's)")
    shape.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="pixels, multiples of 16 from 64 on (default: run and compare keep the input's shape, bench takes the "
        "preset's)",
    )
    return shape


RUN_NOTES = (
    "Frame rate and number of frames stay as they are, and so does the shape of the picture unless --size "
    "says otherwise. Ctrl-C ends early and leaves a playable file."
)


def _add_run(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command="run")
    p.add_argument("input", metavar="INPUT", nargs="?", help="video, folder of images, image, or the word sample")
    p.add_argument(
        "--recipe", metavar="FILE", help="make this again: recipe .json, recording .zip, or a video made here"
    )
    p.add_argument("--save-recipe", metavar="JSON", help="also write the recipe (every .mp4 carries it anyway)")
    p.add_argument("-p", "--prompt", help="the style in your own words")
    p.add_argument("--prompt-at", type=parse_prompt_at, action="append", default=[], metavar="SECONDS=PROMPT",
                   help="change the prompt so many seconds into the clip; may be repeated")  # fmt: skip
    p.add_argument("--on-switch", default="keep", choices=SWITCHES, help="the cache at such a change (default keep)")
    p.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=".mp4 .mov .mkv .webm .gif or folder/ (default: named after both)",
    )
    p.add_argument("-y", "--overwrite", action="store_true", help="replace an existing output")
    p.add_argument("--steps", type=positive(int), help="denoising steps: more is closer to the style, and slower "
                   f"(default: the preset's; tiny {TINY.schedule.default_steps})")  # fmt: skip
    p.add_argument("--noise-scale", type=float, help="freedom from the input, above 0 up to 1 (default: the preset's; "
                   f"tiny {TINY.noise_scale})")  # fmt: skip
    p.add_argument("--no-motion", action="store_true", help="same noise in fast scenes as in still ones")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    p.add_argument("--policy", default="sink", choices=POLICIES, help="what the cache keeps (default sink)")
    p.add_argument("--sinks", type=int, help="first latent frames kept for good (1 latent frame = 4 frames; default: "
                   f"the preset's; tiny {TINY.cache.sink_frames})")  # fmt: skip
    window = f"latest latent frames kept (default: the preset's; tiny {TINY.cache.window_frames})"
    p.add_argument("--window", type=int, help=window)
    p.add_argument(
        "--inputs", metavar="RULE[+RULE…]", help="rules of the input side, such as freeze+rcfg (default none)"
    )
    _add_set(p)
    _add_overlap(p)
    p.add_argument("--clean-pass", action="store_true", help="rewrite the cache with clean frames (sequential only)")
    p.add_argument("--side-by-side", action="store_true", help="write the input beside the result")
    p.add_argument("--strip", metavar="PNG", help="also draw six moments before and after")
    p.add_argument("--max-seconds", type=positive(float), help="seconds of the input to use (default: all)")
    p.add_argument("--fps", type=positive(float), help="frames per second to resample the input to (default: its own)")
    p.add_argument("--stages", type=positive(int), metavar="N",
                   help="processes (or GPUs) that share the model (default 1; under torchrun: its ranks)")  # fmt: skip


COMPARE_NOTES = (
    "NAME is an option of a stream (steps, noise_scale, policy, schedule, seed, …), a field of the cache (sink_frames, "
    "window_frames, positions, …), inputs, or a knob as in ema_sink.decay; docs/MECHANISMS.md lists all. Finished "
    "cells are kept: the same command again goes on where it stopped."
)


def _add_compare(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command="compare")
    p.add_argument("input", metavar="INPUT", nargs="?", help="video, folder of images, or the word sample")
    p.add_argument("--vary", action="append", default=[], metavar="NAME=A,B,…",
                   help="a setting and its values; repeated: every combination")  # fmt: skip
    _add_set(p)
    p.add_argument("-p", "--prompt", help="the style in your own words")
    p.add_argument("--prompt-at", type=parse_prompt_at, action="append", default=[], metavar="SECONDS=PROMPT",
                   help="change the prompt so many seconds into the clip; may be repeated")  # fmt: skip
    p.add_argument("--on-switch", default="keep", choices=SWITCHES, help="the cache at such a change (default keep)")
    p.add_argument("--recipe", metavar="JSON", help="make this comparison again: the recipe.json in its folder")
    p.add_argument("-o", "--output", metavar="FOLDER", required=True, help="where everything goes")
    p.add_argument("--max-seconds", type=positive(float), help="seconds of the input to use (default: all)")
    p.add_argument("--fps", type=positive(float), help="frames per second to resample the input to (default: its own)")
    p.add_argument("--clip", metavar="FOLDER", help="also score against the prompt with a CLIP model in this folder")


def _add_set(p: argparse.ArgumentParser) -> None:
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
                   help="any other setting, as positions=ahead or ema_sink.decay=0.9; may be repeated")  # fmt: skip


def _add_overlap(p: argparse.ArgumentParser) -> None:
    p.add_argument("--overlap-stages", action="store_true", help="decode while denoising goes on (GPU; not measured)")


def _add_bench(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command="bench")
    _add_overlap(p)
    p.add_argument("--steps", type=parse_counts, default=(2,), metavar="N[,N…]", help="denoising steps (default 2)")
    p.add_argument("--chunks", type=positive(int), default=40, help="chunks of 4 frames to time (default 40)")
    p.add_argument("--input", help="video to use in place of synthetic moving frames")
    p.add_argument("--random-weights", action="store_true", help="untrained weights: same speed, no files needed")
    p.add_argument("--shrink", type=positive(int), default=1, metavar="K",
                   help="full-size preset with random weights: divide layers, heads, widths, VAE channels and picture "
                   "side by K, to run on a CPU (default 1: as it is)")  # fmt: skip
    p.add_argument("--no-eager", action="store_true", help="leave out the comparison with float32 eager")
    p.add_argument("--report", nargs="?", const="", metavar="PATH",
                   help="write Markdown (default benchmarks/results/PRESET_HARDWARE_YYYYMM.md)")  # fmt: skip


EMBED_NOTES = (
    "Needs the extra wan and, once, 11 GB of downloads and memory. Each prompt is kept in ~/.cache/streamdiff/prompts. "
    "For a machine without umT5 write all into one file with -o and put it there as "
    "streamdiff_core/assets/umt5/prompts.safetensors, which is looked up first. Prompts found in neither go through "
    "umT5 when they are used."
)


def _add_embed(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command="embed")
    p.add_argument("prompts", metavar="PROMPT", nargs="*", help="a prompt that a full-size preset will be given")
    p.add_argument(
        "--preset", default="wan-1.3b", help="full-size preset (default %(default)s; all Wan sizes share one)"
    )
    p.add_argument("--file", metavar="FILE", help="more prompts: one a line, or the gallery's styles.json")
    p.add_argument("-o", "--output", metavar="FILE", help="also write all of them into one .safetensors to ship")


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command="demo")
    p.add_argument("--preset", default="tiny", help="see `streamdiff presets` (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="number type of the model (default auto)")
    p.add_argument("--weights", metavar="FOLDER", help="transformer, vae and text_encoder .safetensors to use")
    p.add_argument("--threads", type=positive(int), help="CPU threads (default: all cores but one, for the browser)")
    p.add_argument("--host", help="address to listen on (default this computer only; 0.0.0.0 for all)")
    p.add_argument("--port", type=port, help="port to listen on (default: the first free one from 7860 on)")
    p.add_argument("--no-browser", action="store_true", help="only print the address")
    p.add_argument("--max-streams", type=positive(int), default=4,
                   help="viewers at a time, others wait in line (default %(default)s)")  # fmt: skip
    p.add_argument("--max-minutes", type=positive(float), help="end a viewer's stream after so many minutes "
                   "(default: never)")  # fmt: skip


SERVE_NOTES = (
    "Each client chooses prompt, size, steps, schedule and all other settings of its stream in its start message: "
    "docs/live_protocol.md."
)


def _add_serve(p: argparse.ArgumentParser) -> None:
    p.set_defaults(command="serve")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default this computer only)")
    p.add_argument("--port", type=port, default=8000, help="port to listen on (default %(default)s)")
    p.add_argument("--token-file", metavar="FILE", help="clients must show what is in it; needed for other computers")
    p.add_argument("--max-streams", type=positive(int), default=16, help="streams at a time (default %(default)s)")
    p.add_argument("--max-waiting", type=positive(int), default=16, help="streams in line (default %(default)s)")
    p.add_argument("--max-connections", type=positive(int), default=64, help="open sockets (default %(default)s)")
    p.add_argument(
        "--idle-seconds",
        type=positive(float),
        default=60.0,
        help="close a socket that sends nothing for so many seconds (default 60)",
    )
    p.add_argument("--max-minutes", type=positive(float), help="end a stream after so many minutes (default: never)")
    p.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="engine replicas under Ray Serve: on this computer, or of a cluster (auto, HOST:PORT); default: one "
        "engine without Ray",
    )
    p.add_argument(
        "--replicas",
        type=parse_replicas,
        metavar="N[-M]",
        help="how many under --ray, or a range to scale in by load; limits are for each (default 1)",
    )


def parse_replicas(text: str) -> tuple[int, int]:
    """``2`` -> (2, 2); ``1-4`` -> (1, 4)."""
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if fewest > most:
        raise argparse.ArgumentTypeError(f"{text!r}: write one number or two in order, as in 2 or 1-4")
    return fewest, most


def parse_size(text: str) -> tuple[int, int]:
    """``WxH`` -> (width, height)."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 384x256 (width x height)")
    return int(width), int(height)


def parse_prompt_at(text: str) -> tuple[float, str]:
    """``SECONDS=PROMPT`` -> (seconds, prompt)."""
    seconds, _, prompt = text.partition("=")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", seconds.strip()) or not prompt.strip():
        raise argparse.ArgumentTypeError(f'{text!r}: write for example 2.5="pencil sketch"')
    return float(seconds), prompt.strip()


def parse_counts(text: str) -> tuple[int, ...]:
    """``1,2,4`` -> (1, 2, 4)."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write one number above 0 or several, as in 1,2,4")
    return tuple(int(part) for part in parts)


def lora_strength(text: str) -> tuple[str, float]:
    """``style.safetensors=0.8`` -> ("style.safetensors", 0.8); the strength is 1 when it is not given."""
    path, found, strength = text.rpartition("=")
    if not found:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the strength in {text!r} is no number; write e.g. {path}=0.8") from None


def port(text: str) -> int:
    """A TCP port."""
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; write a number from 1 to 65535")
    return int(text)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument type that accepts only finite numbers above 0."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            number = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {number} above 0, got {text!r}")
        return value

    return parse
