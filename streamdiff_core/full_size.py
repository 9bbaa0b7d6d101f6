"""Loads the full-size presets: transformer, VAE and text encoder from the hub, or a sentence that says why not.

Before anything is downloaded the machine is asked: is there a GPU with room, is there disk. Tensors go from the
memory-mapped file to the model in its own number type, one by one, so loading needs little more than the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamdiff_core.config import Preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.hub import RemoteFile, download, look_up
from streamdiff_core.memory_need import memory_need, ways_to_fit
from streamdiff_core.parallel.stage import StagePart
from streamdiff_core.taehv import TAEHV, published_weights
from streamdiff_core.types import CheckpointError
from streamdiff_core.umt5 import UMT5Encoder
from streamdiff_core.weight_files import find_file
from streamdiff_core.weights import load_checkpoint, load_wan_vae

logger = logging.getLogger(__name__)

EMBEDDINGS = Path.home() / ".cache" / "streamdiff" / "prompts"
SHIPPED = Path(__file__).parent / "assets" / "umt5" / "prompts.safetensors"
"""Embeddings that come with the package, made by ``streamdiff embed --output``; not made yet: that takes umT5."""
TEXT_FOLDERS = ("tokenizer/", "text_encoder/")
VAE_FOLDER = "vae/"
SMALLEST_SIZE = (256, 256)
"""Picture for which a preset is refused when not even that fits."""


def load_modules(
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    *,
    device_was_named: bool,
    weights: str | Path | None = None,
    vae: str | Path = "wan",
    quantisation: str | None = None,
    part: StagePart | None = None,
) -> tuple[CausalWanTransformer, nn.Module, UMT5Encoder]:
    """Transformer, VAE and text encoder of a full-size preset.

    Args:
        preset: one with a ``source``.
        device: where they run.
        dtype: of transformer and VAE.
        device_was_named: a CPU is taken only when the caller asked for it.
        weights: checkpoint of the transformer to load instead of the published one.
        vae: ``wan``, or the file of a TAEHV (``taew2_1.pth``): faster, a little softer.
        quantisation: what the caller will do to the weights, so that memory is judged rightly.
        part: one pipeline stage's part of the transformer; the rest is not loaded.

    Raises:
        CheckpointError: not enough memory or disk, no connection, or a file that does not fit; says what to do.
    """
    if part is None:
        check_memory(preset, device, device_was_named, quantisation=quantisation, vae=str(vae))
    if str(vae) != "wan":
        find_file(vae)  # a missing one is told before the download
    source = preset.source
    checkpoint = Path(weights) if weights else _fetch(source.repo, [source.file])[source.file]
    transformer = empty_transformer(preset, dtype)
    load_checkpoint(
        transformer, checkpoint, wrapper=None if weights else source.wrapper, only=part.covers if part else None
    )
    if part is not None:
        part.keep(transformer)
    return transformer.to(device), load_vae(preset, vae, dtype).to(device), text_encoder(preset, device)


def check_memory(preset: Preset, device: torch.device, device_was_named: bool, **chosen: Any) -> None:
    """Say before the download that it will not run here, or with which settings it will.

    Args:
        chosen: ``quantisation`` and ``vae``; steps and size are chosen later, by ``start``.

    Raises:
        CheckpointError: no GPU, or too little free memory for even one step of a small picture; names the ways out.
    """
    usual = memory_need(preset, **chosen)
    if device.type == "cpu" and not device_was_named:
        raise CheckpointError(
            f"preset {preset.name!r} needs a GPU with {usual.total_bytes / 1e9:.0f} GB and torch sees none; use "
            "'tiny', which runs on a CPU, or name device='cpu' to run it minutes per frame"
        )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        least = memory_need(preset, steps=1, size=SMALLEST_SIZE, **chosen)
        ways = ways_to_fit(preset, free, **chosen)
        if least.total_bytes > free:
            raise CheckpointError(
                f"preset {preset.name!r} needs {least} of GPU memory even for one step at "
                f"{'x'.join(map(str, SMALLEST_SIZE))}, {free / 1e9:.1f} GB are free; use "
                f"{', or '.join([*ways, 'preset tiny'])}"
            )
        if usual.total_bytes > free:
            logger.warning(
                "preset %r with %d steps at %dx%d needs %s of GPU memory, %.1f GB are free; what fits: %s",
                preset.name, preset.schedule.default_steps, preset.width, preset.height, usual, free / 1e9,
                ", or ".join(ways) or "a smaller size",
            )  # fmt: skip


def empty_transformer(preset: Preset, dtype: torch.dtype) -> CausalWanTransformer:
    """The architecture on the meta device, in the number type it will run in."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            return CausalWanTransformer(preset.model)
    finally:
        torch.set_default_dtype(before)


def load_vae(preset: Preset, vae: str | Path, dtype: torch.dtype) -> nn.Module:
    """Wan's VAE from the hub, or a TAEHV from a file."""
    if str(vae) == "wan":
        folder = next(iter(_fetch(preset.source.base, [VAE_FOLDER]).values())).parent
        return load_wan_vae(folder, raw_latents=preset.source.raw_latents).to(dtype)
    small = TAEHV()
    load_checkpoint(small, vae, convert=published_weights)
    return small.eval().requires_grad_(False).to(dtype)


def text_encoder(preset: Preset, device: torch.device) -> UMT5Encoder:
    """umT5; its 11 GB are downloaded when a prompt is neither shipped nor on disk."""

    def load() -> tuple[Any, Any]:
        from transformers import AutoTokenizer, UMT5EncoderModel

        base = preset.source.base
        try:
            _fetch(base, TEXT_FOLDERS)
        except CheckpointError as error:
            raise CheckpointError(
                f"this prompt's embedding is neither in {SHIPPED} nor in {EMBEDDINGS}, and umT5 is not to be had: "
                f"{error}. Elsewhere `streamdiff embed PROMPT -o prompts.safetensors` makes the first of these files"
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(base, subfolder="tokenizer")
        return tokenizer, UMT5EncoderModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.bfloat16)

    return UMT5Encoder(
        load, EMBEDDINGS, name=preset.source.base, text_len=preset.model.text_len, device=device, shipped=SHIPPED
    )


def _fetch(repo: str, names: Sequence[str]) -> dict[str, Path]:
    files: list[RemoteFile] = look_up(repo, names)
    return download(files)
