"""A model ready to stream: transformer, VAE and text encoder of one preset, shared by all its sessions.

Nothing here belongs to a stream: sessions made by ``start`` own their state, so two of them never mix and one after
another equals two fresh processes.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamdiff_core import native_kernels
from streamdiff_core.attention import PromptContext
from streamdiff_core.attention_choice import rank_backends
from streamdiff_core.compiled import compile_blocks
from streamdiff_core.config import CacheConfig, Preset, get_preset
from streamdiff_core.cuda_graphs import record_forwards
from streamdiff_core.device_streams import check_overlap
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.engine import Engine
from streamdiff_core.full_size import load_modules
from streamdiff_core.host_memory import keep_freed_memory
from streamdiff_core.int8_blocks import RANGES_FILE, Int8Ranges, has_int8, load_ranges, use_int8
from streamdiff_core.lora import merge_lora
from streamdiff_core.memory_need import PROMPT_BYTES
from streamdiff_core.parallel.stage import StagePart
from streamdiff_core.quantise import check_kind, quantise
from streamdiff_core.session import StreamSession
from streamdiff_core.stream_options import Prompt, StreamOptions, check_options
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.types import StreamingVAE, TextEncoder
from streamdiff_core.vae import TinyVAE
from streamdiff_core.wan_vae import WanVAE
from streamdiff_core.weight_files import find_file
from streamdiff_core.weights import hash_weights, load_checkpoint

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
NUM_CACHED_PROMPTS = 64


class StreamPipeline:
    """Weights of one preset on one device; ``start`` makes streams."""

    session_type: type[StreamSession] = StreamSession
    overlap_stages: bool = False
    """Whether sessions encode and decode on CUDA streams of their own (``device_streams``)."""
    int8_ranges: Int8Ranges | None = None
    """What activations are rounded with under ``quantisation="w8a8"``."""
    quantisation: str | None = None
    """How numbers are rounded: ``int8``, ``fp8``, ``w8a8`` or not."""

    def __init__(
        self, preset: Preset, transformer: CausalWanTransformer, vae: StreamingVAE, text_encoder: TextEncoder
    ) -> None:
        self.preset, self.transformer = preset, transformer
        self.vae, self.text_encoder = vae, text_encoder
        self.device = transformer.device
        self.engine = Engine(transformer)
        self._has_chosen_layout = False
        self._prompts: OrderedDict[tuple[tuple[str, float], ...], PromptContext] = OrderedDict()
        self._prompts_lock = threading.Lock()
        if self.device.type == "cpu":
            keep_freed_memory()
            if transformer.dtype == torch.bfloat16:
                native_kernels.is_ready()  # compiles them when they are first needed on a machine

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        weights: str | Path | None = None,
        vae: str | Path = "wan",
        lora: Mapping[str, float] | None = None,
        quantisation: str | None = "auto",
        compile: bool = False,
        cuda_graphs: bool = False,
        overlap_stages: bool = False,
    ) -> StreamPipeline:
        """Load a preset.

        Args:
            name: one of ``list_presets()``; ``tiny`` is bundled and needs no download.
            device: ``auto`` (cuda, else cpu) or a torch device.
            dtype: ``auto`` (bfloat16 where the device multiplies it faster, else float32), ``float32``, ``bfloat16``.
            weights: folder to load instead of the bundled one (same file names); for a full-size preset the
                transformer's checkpoint.
            vae: full-size presets: ``wan``, or the file of a TAEHV.
            lora: {file or hub repository: strength}, merged into the transformer in this order.
            quantisation: ``int8`` or ``fp8`` weights through torchao; ``w8a8`` for weights and activations in 8 bits
                on a CPU with VNNI instructions (``tiny``, or ``weights`` with their ranges); None: neither. ``auto``:
                ``w8a8`` for the bundled weights where this machine has all that makes it fast, unless ``dtype`` is
                given; the pictures differ by 55 dB.
            compile: run the transformer's blocks through ``torch.compile``; the first chunks then take minutes.
            cuda_graphs: record forwards that repeat and replay them; needs a GPU, and was not measured on one.
            overlap_stages: decode a chunk while the next one is denoised; ``push`` then returns the frames of the chunk
                before. Needs a GPU, and was not measured on one.

        Raises:
            ValueError: unknown preset, device, dtype or quantisation; CUDA graphs or overlap without a GPU.
            CheckpointError: weights missing, not fitting, or too large for this machine.
        """
        preset, ranges = get_preset(name), None
        if quantisation == "auto":
            is_own = preset.bundled and weights is None and not lora and dtype == "auto"
            quantisation = "w8a8" if is_own and has_fast_int8(pick_device(device)) else None
        if quantisation == "w8a8":  # what cannot be done is said before a download
            if not preset.bundled:
                raise ValueError("quantisation 'w8a8' is for `tiny`; full-size presets take int8 or fp8")
            ranges = load_ranges(_folder(preset, weights) / RANGES_FILE, pick_device(device))
        elif quantisation:
            check_kind(quantisation)
        loras = [(find_file(source), strength) for source, strength in (lora or {}).items()]
        modules = load_preset(preset, device=device, dtype=dtype, weights=weights, vae=vae, quantisation=quantisation)
        for file, strength in loras:
            logger.info("%s", merge_lora(modules[0], file, strength))
        pipe = cls.from_modules(preset, *modules)
        if ranges is not None:
            use_int8(pipe.transformer, ranges)
            pipe.int8_ranges = ranges
        elif quantisation:
            quantise(pipe.transformer, quantisation)
        pipe.quantisation = quantisation
        return pipe.speed_up(compile=compile, cuda_graphs=cuda_graphs, overlap_stages=overlap_stages)

    @classmethod
    def from_modules(
        cls, preset: Preset, transformer: CausalWanTransformer, vae: nn.Module, text_encoder: TextEncoder
    ) -> StreamPipeline:
        """A pipeline from modules made elsewhere (tests, training); switches them to evaluation."""
        for module in (transformer, vae, text_encoder):
            if isinstance(module, nn.Module):
                module.eval().requires_grad_(False)
        return cls(preset, transformer.fuse(), vae, text_encoder)

    def speed_up(
        self, *, compile: bool = False, cuda_graphs: bool = False, overlap_stages: bool = False
    ) -> StreamPipeline:
        """Run the same weights faster, in the ways that ``from_preset`` explains; before the first stream.

        Returns:
            This pipeline.

        Raises:
            ValueError: no compiler, or CUDA graphs or overlap without a GPU.
        """
        if compile:
            compile_blocks(self.transformer)
        if cuda_graphs:
            record_forwards(self.transformer)
        if overlap_stages:
            check_overlap(self.device)
        self.overlap_stages = overlap_stages
        return self

    def start(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        steps: int | None = None,
        noise_scale: float | None = None,
        motion_adaptive: bool = True,
        schedule: str | None = None,
        schedule_options: Mapping[str, Any] | None = None,
        clean_pass: bool | None = None,
        policy: str = "sink",
        policy_options: Mapping[str, Any] | None = None,
        cache: CacheConfig | None = None,
        width: int | None = None,
        height: int | None = None,
        latent_frames_per_chunk: int | None = None,
        input_options: Mapping[str, Any] | None = None,
        steady: bool | None = None,
        guided: bool | None = None,
        mode: str = "v2v",
        deadline_ms: float | None = None,
    ) -> StreamSession:
        """Start a stream; what is not given comes from the preset. See ``StreamOptions`` for each option.

        Args:
            prompt: text, or {text: weight} to mix prompts.

        Raises:
            ValueError: an option out of range; the text names it and the remedy.
        """
        p = self.preset
        options = StreamOptions(
            seed=seed,
            steps=p.schedule.default_steps if steps is None else steps,
            noise_scale=p.noise_scale if noise_scale is None else noise_scale,
            motion_adaptive=motion_adaptive,
            schedule=p.schedule.kind if schedule is None else schedule,
            schedule_options=deepcopy(schedule_options or {}),
            clean_pass=p.schedule.clean_pass if clean_pass is None else clean_pass,
            policy=policy,
            policy_options=deepcopy(policy_options or {}),
            cache=p.cache if cache is None else cache,
            width=p.width if width is None else width,
            height=p.height if height is None else height,
            latent_frames_per_chunk=p.latent_frames_per_chunk
            if latent_frames_per_chunk is None
            else latent_frames_per_chunk,
            input_options=deepcopy(input_options or {}),
            steady=p.steady is not None if steady is None else steady,
            guided=p.vae.guide_width > 0 if guided is None else guided,
            mode=mode,
            deadline_ms=deadline_ms,
        )
        check_options(options, p)
        self._choose_attention(options)
        self._choose_layout(options)
        return self.session_type(self, prompt, options)

    def _choose_attention(self, options: StreamOptions) -> None:
        """On a GPU, for the shape of the first stream: see which attention kernel is fastest."""
        if self.device.type == "cuda" and self.engine.attention is None:
            model, stride = self.preset.model, self.preset.vae.spatial_stride
            tokens = model.tokens_per_frame(options.height // stride, options.width // stride)
            self.engine.attention = rank_backends(
                model.num_heads, model.head_dim, options.latent_frames_per_chunk * tokens,
                options.cache.cache_frames * tokens, self.transformer.dtype, self.device,
            )  # fmt: skip

    def _choose_layout(self, options: StreamOptions) -> None:
        """The same for the order of Wan's VAE in memory."""
        if self.device.type == "cuda" and isinstance(self.vae, WanVAE) and not self._has_chosen_layout:
            self.vae.choose_layout(options.height, options.width)
            self._has_chosen_layout = True

    @torch.inference_mode()
    def encode_prompt(self, prompt: Prompt) -> PromptContext:
        """Cross-attention keys and values of a prompt or a weighted mix; the latest are kept (64, or 1 GB).

        Raises:
            ValueError: an empty mix or weights that do not add up to something positive.
        """
        weights = {prompt: 1.0} if isinstance(prompt, str) else dict(sorted(prompt.items()))
        total = sum(weights.values())
        if not weights or not 0 < total < float("inf") or min(weights.values()) < 0:
            raise ValueError(f"prompt weights must be >= 0 and not all zero, got {weights}")
        key = tuple(weights.items())
        with self._prompts_lock:  # streams may run side by side
            if key in self._prompts:
                self._prompts.move_to_end(key)
            else:
                tokens = self.text_encoder.encode(list(weights))
                shares = torch.tensor([w / total for w in weights.values()], device=tokens.device, dtype=tokens.dtype)
                mixed = (tokens * shares[:, None, None]).sum(0, keepdim=True)
                self._prompts[key] = self.engine.encode_prompt(mixed)
                while len(self._prompts) > self._num_prompts_kept(self._prompts[key]):
                    self._prompts.popitem(last=False)
            return self._prompts[key]

    def _num_prompts_kept(self, prompt: Any) -> int:
        """A prompt of the 14B model holds 0.4 GB on the GPU, so there is room for few of them."""
        return max(1, min(NUM_CACHED_PROMPTS, PROMPT_BYTES // max(1, prompt.nbytes)))

    @cached_property
    def model_sha256(self) -> str:
        """Hash of all weights as loaded (number type, LoRA and quantisation count); computed once, when first asked."""
        return hash_weights((self.transformer, self.vae, self.text_encoder, self.int8_ranges))

    def with_cache(self, **changes: object) -> CacheConfig:
        """The preset's cache configuration with some fields changed."""
        return replace(self.preset.cache, **changes)


def load_preset(
    preset: Preset,
    *,
    device: str,
    dtype: str,
    weights: str | Path | None = None,
    vae: str | Path = "wan",
    quantisation: str | None = None,
    part: StagePart | None = None,
) -> tuple[CausalWanTransformer, nn.Module, Any]:
    """Transformer (or one pipeline stage's part of it), VAE and text encoder; arguments as for ``from_preset``."""
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    if not preset.bundled:
        return load_modules(
            preset, place, number, device_was_named=device != "auto", weights=weights, vae=vae,
            quantisation=quantisation, part=part,
        )  # fmt: skip
    if str(vae) != "wan":
        raise ValueError(f"preset {preset.name!r} has a VAE of its own; leave out vae={str(vae)!r}")
    folder = _folder(preset, weights)
    with torch.random.fork_rng(devices=()):  # small; the meta device would import PyTorch's compiler, two seconds
        transformer, small_vae, text = (
            CausalWanTransformer(preset.model), TinyVAE(preset.vae), TinyTextEncoder(preset.text),
        )  # fmt: skip
    load_checkpoint(transformer, folder / "transformer.safetensors", only=part.covers if part else None)
    load_checkpoint(small_vae, folder / "vae.safetensors")
    load_checkpoint(text, folder / "text_encoder.safetensors")
    if part is not None:
        part.keep(transformer)
    return transformer.to(place, number), cast_vae(small_vae, place, number), text.to(place)


def _folder(preset: Preset, weights: str | Path | None) -> Path:
    """Where a bundled preset's files lie."""
    return Path(weights) if weights else ASSETS / preset.name


def pick_device(device: str) -> torch.device:
    """``auto`` -> cuda if there is one, else cpu; anything else is a torch device.

    Raises:
        ValueError: unknown device, or CUDA asked for and absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for but torch sees no GPU; use device='cpu'")
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` -> bfloat16 on CUDA and on CPUs with bf16 instructions, else float32."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype == "auto":
        fast = device.type == "cuda" or cpu_has_bf16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(known)}")
    return known[dtype]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def has_fast_int8(device: torch.device) -> bool:
    """Whether 8-bit products beat bfloat16 ones here: a CPU with both in hardware, and kernels between the products."""
    return device.type == "cpu" and cpu_has_bf16() and has_int8() and native_kernels.is_ready()


def cast_vae(vae: TinyVAE, device: torch.device, dtype: torch.dtype) -> TinyVAE:
    """Convolutions in ``dtype``; the linear map stays in float32, where it is exact and cheap."""
    for module in (vae.stem, vae.blocks, vae.detail, vae.guide):
        if module is not None:
            module.to(dtype=dtype, memory_format=torch.channels_last)
    return vae.to(device)
