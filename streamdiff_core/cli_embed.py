"""``streamdiff embed``: runs prompts through umT5 once, so that full-size presets need not load its 11 GB for them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from streamdiff_core import full_size
from streamdiff_core.config import get_preset


def run_embed(args: argparse.Namespace) -> int:
    """Keep the embeddings of all prompts on disk, and in one file if asked; the exit code."""
    preset = get_preset(args.preset)
    if preset.source is None:
        raise ValueError(
            f"preset {preset.name!r} has a text encoder of its own; name a full-size one, such as wan-1.3b"
        )
    prompts = [*args.prompts, *(read_prompts(Path(args.file)) if args.file else ())]
    if not prompts:
        raise ValueError("name at least one prompt, or a --file of them")
    text = full_size.text_encoder(preset, torch.device("cpu"))
    try:
        found = text.embed(prompts)
        if args.output:
            text.export(prompts, Path(args.output).expanduser())
    except ModuleNotFoundError as error:
        raise ValueError(
            f"umT5 needs {error.name}, which is not installed; run: pip install 'streamdiff[wan]'"
        ) from error
    if args.json:
        tokens = {prompt: len(rows) for prompt, rows in found.items()}
        print(json.dumps({"tokens": tokens, "folder": str(text.folder), "output": args.output}, ensure_ascii=False))
    else:
        print(f"{len(found)} prompts embedded, in {args.output or text.folder}")
    return 0


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line, or of a JSON list of objects with a ``prompt``.

    Raises:
        ValueError: no such file, or JSON of another form.
    """
    if not path.is_file():
        raise ValueError(f"there is no file of prompts at {path}; name one, a prompt a line")
    text = path.read_text("utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return [entry["prompt"] for entry in json.loads(text)]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f'{path} is no list of {{"prompt": ...}} objects, as the gallery\'s styles.json is') from error
