"""How much GPU memory a full-size preset takes, part by part, known before anything is downloaded.

Weights and caches are counted on the meta device from the classes that will be allocated. The VAE's memory and the room
it works in are bytes per pixel, counted in the same way for one steady chunk (``tests/test_memory_need.py`` counts them
again). umT5 is not in it: it stays in the computer's own memory (``umt5.py``). ``SPARE_BYTES`` is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import nn

from streamdiff_core.config import ModelConfig, Preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.kv_cache import KVCache
from streamdiff_core.kv_policies import POLICIES

VAES = {"wan": (253_785_062, 7537, 9354), "taehv": (22_631_078, 294, 1320)}
"""Bytes in bfloat16: weights; memory of a stream per pixel of the picture; most that encode or decode takes besides."""
PROMPT_BYTES = 1_000_000_000
"""Most that prompts' keys and values may hold on the GPU."""
SPARE_BYTES = 1_500_000_000
"""For CUDA itself, workspaces of its libraries and gaps between blocks; assumed, not measured."""
NUMBER_BYTES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes on the GPU while one stream runs."""

    weights_bytes: int
    """Transformer and VAE."""
    cache_bytes: int
    """Keys and values of all rows."""
    stream_bytes: int
    """Memory of the VAE, and the prompts."""
    work_bytes: int
    """The largest stage's room, and ``SPARE_BYTES``."""
    load_bytes: int
    """Weights before they are quantised."""

    @property
    def total_bytes(self) -> int:
        """Most at any time."""
        return max(self.load_bytes, self.weights_bytes + self.cache_bytes + self.stream_bytes + self.work_bytes)

    def __str__(self) -> str:
        parts = {
            "weights": self.weights_bytes, "KV cache": self.cache_bytes, "VAE and prompts": self.stream_bytes,
            "room to work": self.work_bytes,
        }  # fmt: skip
        said = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        if self.load_bytes > sum(parts.values()):
            said = f"loading {self.load_bytes / 1e9:.1f}, then {said}"
        return f"{self.total_bytes / 1e9:.0f} GB ({said})"


def memory_need(
    preset: Preset,
    *,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    quantisation: str | None = None,
    vae: str = "wan",
) -> MemoryNeed:
    """Count for one stream in bfloat16; what is not given comes from the preset.

    Args:
        preset: a full-size one.
        steps: denoising steps; each has rows of its own in a stream batch, all share one otherwise.
        size: (width, height).
        quantisation: ``int8`` or ``fp8``.
        vae: ``wan``, or anything else for a TAEHV.
    """
    model = preset.model
    width, height = size or (preset.width, preset.height)
    rows = (steps or preset.schedule.default_steps) if preset.schedule.kind == "stream_batch" else 1
    vae_weights, per_pixel, work_per_pixel = VAES["wan" if vae == "wan" else "taehv"]
    stride = preset.vae.spatial_stride
    tokens = model.tokens_per_frame(height // stride, width // stride)
    cache = KVCache(
        model, POLICIES["sink"](preset.cache), num_rows=rows, tokens_per_frame=tokens,
        dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    forward = NUMBER_BYTES * rows * preset.latent_frames_per_chunk * tokens * (2 * model.ffn_dim + 10 * model.dim)
    whole, quantised = transformer_bytes(model)
    prompt = 2 * NUMBER_BYTES * model.num_layers * model.text_len * model.dim
    return MemoryNeed(
        weights_bytes=vae_weights + (quantised if quantisation else whole),
        cache_bytes=cache.nbytes,
        stream_bytes=per_pixel * width * height + PROMPT_BYTES // prompt * prompt,
        work_bytes=max(forward, work_per_pixel * width * height) + SPARE_BYTES,
        load_bytes=vae_weights + whole,
    )


@cache
def transformer_bytes(model: ModelConfig) -> tuple[int, int]:
    """Bytes of the weights in bfloat16, and with the matrices of all blocks in 8 bits and a scale per row."""
    with torch.device("meta"):
        transformer = CausalWanTransformer(model)
    whole = NUMBER_BYTES * sum(p.numel() for p in transformer.parameters())
    matrices = [m.weight for m in transformer.blocks.modules() if isinstance(m, nn.Linear)]
    return whole, whole - sum((NUMBER_BYTES - 1) * w.numel() - 4 * len(w) for w in matrices)


SMALLER: dict[str, dict[str, Any]] = {
    "steps=1": {"steps": 1},
    "quantisation='int8' or 'fp8'": {"quantisation": "int8"},
    "a TAEHV as vae": {"vae": "taehv"},
    "size 512x512": {"size": (512, 512)},
}


def ways_to_fit(preset: Preset, free_bytes: float, **chosen: Any) -> list[str]:
    """The smallest sets of changes with which a preset fits, as text with what it then needs; may be empty.

    Args:
        chosen: options of ``memory_need`` that stay.
    """
    for count in range(1, len(SMALLER) + 1):
        fits = []
        for names in combinations(SMALLER, count):
            changes = {k: v for name in names for k, v in SMALLER[name].items()}
            need = memory_need(preset, **{**chosen, **changes}).total_bytes
            if need <= free_bytes:
                fits.append(f"{' with '.join(names)} ({need / 1e9:.0f} GB)")
        if fits:
            return fits
    return []
