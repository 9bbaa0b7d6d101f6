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
from streamdiff_core.parallel.stage import StagePart
from streamdiff_core.taehv import TAEHV, published_weights
from streamdiff_core.types import CheckpointError
from streamdiff_core.umt5 import UMT5Encoder
from streamdiff_core.weights import load_checkpoint, load_wan_vae

logger = logging.getLogger(__name__)

EMBEDDINGS = Path.home() / ".cache" / "streamdiff" / "prompts"
TEXT_FOLDERS = ("tokenizer/", "text_encoder/")
VAE_FOLDER = "vae/"


def load_modules(
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    *,
    device_was_named: bool,
    weights: str | Path | None = None,
    vae: str | Path = "wan",
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
        part: one pipeline stage's part of the transformer; the rest is not loaded.

    Raises:
        CheckpointError: not enough memory or disk, no connection, or a file that does not fit; says what to do.
    """
    if part is None:
        check_memory(preset, device, device_was_named)
    source = preset.source
    checkpoint = Path(weights) if weights else _fetch(source.repo, [source.file])[source.file]
    transformer = empty_transformer(preset, dtype)
    load_checkpoint(
        transformer, checkpoint, wrapper=None if weights else source.wrapper, only=part.covers if part else None
    )
    if part is not None:
        part.keep(transformer)
    return transformer.to(device), load_vae(preset, vae, dtype).to(device), text_encoder(preset, device)


def check_memory(preset: Preset, device: torch.device, device_was_named: bool) -> None:
    """Say before the download that it will not run here.

    Raises:
        CheckpointError: no GPU, or too little free memory on it; names both and the ways out.
    """
    needs = preset.source.gpu_memory_gb
    if device.type == "cpu" and not device_was_named:
        raise CheckpointError(
            f"preset {preset.name!r} needs a GPU with {needs:.0f} GB and torch sees none; use 'tiny', which runs on a "
            "CPU, or name device='cpu' to run it minutes per frame"
        )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        if free < needs:
            raise CheckpointError(
                f"preset {preset.name!r} needs {needs:.0f} GB of GPU memory at 480p, {free:.1f} GB are free; try "
                "quantisation='int8', a TAEHV as vae, a smaller width and height, or preset 'tiny'"
            )


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
    """umT5; its 11 GB are downloaded when the first prompt is not on disk."""

    def load() -> tuple[Any, Any]:
        from transformers import AutoTokenizer, UMT5EncoderModel

        base = preset.source.base
        _fetch(base, TEXT_FOLDERS)
        tokenizer = AutoTokenizer.from_pretrained(base, subfolder="tokenizer")
        return tokenizer, UMT5EncoderModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.bfloat16)

    return UMT5Encoder(load, EMBEDDINGS, name=preset.source.base, text_len=preset.model.text_len, device=device)


def _fetch(repo: str, names: Sequence[str]) -> dict[str, Path]:
    files: list[RemoteFile] = look_up(repo, names)
    return download(files)
