"""Checkpoints in and out: recognise Wan-shaped weights by their keys, check all of them, then copy.

Three kinds fit ``CausalWanTransformer`` (SPEC §1.2-1.4): the original Wan names (Wan2.1, CausVid,
Self-Forcing, StreamDiffusionV2 ``model.pt``, often wrapped and prefixed), diffusers'
``WanTransformer3DModel``, and our own safetensors, which keep the Wan names. Nothing is copied until every
key, shape and number type has been checked; upstream falls back to a non-strict load and so accepts a wrong
file. Files are opened in ``weight_files.py``; this file builds no models and chooses no devices.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from streamdiff_core.types import CheckpointError
from streamdiff_core.wan_vae import WanVAE
from streamdiff_core.weight_files import find_file, listed, read_file

MAX_SHARD_BYTES = 9_500_000
"""Default size limit of one written file."""

# Wan name -> diffusers name (SPEC §1.4). diffusers' norm2 is Wan's norm3: the norm before cross-attention.
TOP_NAMES = {
    "patch_embedding.": "patch_embedding.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
}
BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    **{
        f"{wan}.{a}.": f"{diffusers}.{b}."
        for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
        + (("norm_q", "norm_q"), ("norm_k", "norm_k"))
    },
}

_BLOCK = re.compile(r"blocks\.\d+\.")
_WRAPPED = r"((_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.)+"
_PREFIX = re.compile(rf"^((model|module|diffusion_model)\.|{_WRAPPED})+|{_WRAPPED}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What ``load_checkpoint`` found."""

    path: Path
    """File (or shard index) that was read."""
    layout: str
    """``wan`` or ``diffusers`` names."""
    wrapper: str | None
    """Entry of the pickled dict that held the weights, if any."""
    num_tensors: int
    """Tensors copied."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Free text stored with our own files."""


def convert_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan names for a state dict with Wan or diffusers names; prefixes (``model.``, FSDP's …) are dropped.

    Names that are in neither table stay as they are. Values are not touched: shapes and the order of the RoPE
    pairs are the same in both (SPEC §1.4).

    Raises:
        CheckpointError: two names become one.
    """
    names = {name: _PREFIX.sub("", name) for name in state}
    if _is_diffusers(names.values()):
        names = {name: _rename(clean, inverse=True) for name, clean in names.items()}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"several keys name the same tensor: {listed(_repeated(names.values()))}")
    return {names[name]: value for name, value in state.items()}


def to_diffusers_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' ``WanTransformer3DModel`` names for a state dict with Wan names."""
    return {_rename(name, inverse=False): value for name, value in state.items()}


def load_checkpoint(
    model: nn.Module,
    source: str | Path,
    *,
    subfolder: str | None = None,
    wrapper: str | None = None,
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    only: Callable[[str], bool] | None = None,
) -> LoadReport:
    """Load weights strictly, in place and in the model's own number type, or raise and change nothing.

    Args:
        model: any module; parameters on the meta device are replaced, all others are copied into, so tensors
            that share their memory (fused q/k/v) stay shared.
        source: a file, a folder, a shard index, or a Hugging Face hub repository ``org/name`` when nothing
            local has that name.
        subfolder: folder inside ``source``, e.g. ``transformer``.
        wrapper: take this entry of a pickled dict, e.g. ``generator_ema``; default: first of ``WRAPPERS``.
        convert: renames the keys of models other than the Wan transformer.
        only: which tensors of the model to load, by name, after all have been checked; the others stay as they are.

    Raises:
        CheckpointError: unreadable, truncated or foreign file; keys, shapes or number types do not fit.
    """
    path = find_file(source, subfolder)
    state, wrapper, metadata = read_file(path, wrapper)
    own = model.state_dict()
    layout = "diffusers" if _is_diffusers(_PREFIX.sub("", name) for name in state) else "wan"
    if set(state) != set(own):
        try:
            state = (convert or convert_keys)(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    problems = _misfits(own, state)
    if problems:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. Nothing was loaded.")
    own = {name: target for name, target in own.items() if only is None or only(name)}
    with torch.no_grad():
        for name, target in own.items():
            if not target.is_meta:
                target.copy_(state[name])
        on_meta = {name: state[name].to(target.dtype) for name, target in own.items() if target.is_meta}
        model.load_state_dict(on_meta, strict=False, assign=True)
    return LoadReport(path=path, layout=layout, wrapper=wrapper, num_tensors=len(own), metadata=metadata)


def load_wan_vae(source: str | Path, *, raw_latents: bool = True, **config: object) -> WanVAE:
    """Wan2.1's VAE from ``Wan2.1_VAE.pth`` (original names) or a diffusers file or folder, strictly.

    Args:
        source: as in ``load_checkpoint``; a diffusers folder's ``config.json`` is followed.
        raw_latents: whether ``encode`` leaves out the normalisation.
        config: arguments of diffusers' ``AutoencoderKLWan`` that differ from Wan2.1's.

    Raises:
        CheckpointError: as in ``load_checkpoint``.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return convert_wan_vae_to_diffusers(dict(state)) if "encoder.conv1.weight" in state else dict(state)

    if (Path(source) / "config.json").is_file():
        config = {**AutoencoderKLWan.load_config(source), **config}
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan.from_config(config)
    load_checkpoint(autoencoder, source, convert=convert)
    return WanVAE(autoencoder, raw_latents=raw_latents).eval().requires_grad_(False)


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write safetensors under a temporary name and move them in place.

    Args:
        path: ``name.safetensors``. Larger models become ``name-00001-of-00002.safetensors`` … and
            ``name.safetensors.index.json``; ``load_checkpoint`` takes ``path`` in both cases.
        dtype: number type of floating-point tensors in the file; default: as they are.
        metadata: text stored in every file.
        max_shard_bytes: limit per file, header included.

    Returns:
        Files written. Files of an earlier save under the same name are removed.

    Raises:
        ValueError: one tensor alone is larger than ``max_shard_bytes``.
    """
    path = Path(path)
    metadata = {"format": "pt", **{key: str(value) for key, value in (metadata or {}).items()}}
    state = {name: value.detach() for name, value in model.state_dict().items()}
    shards = _split(state, dtype, max_shard_bytes, overhead=4096 + 2 * len(json.dumps(metadata)))
    total = len(shards)
    files = [path] if total == 1 else [
        path.with_name(f"{path.stem}-{i:05d}-of-{total:05d}{path.suffix}") for i in range(1, total + 1)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    index = path.with_name(path.name + ".index.json")
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    files += [index] if total > 1 else []
    partial = [file.with_name(file.name + ".tmp") for file in files]
    try:
        for file, shard in zip(partial, shards, strict=False):
            tensors = {name: _cast(value, dtype).cpu().contiguous().clone() for name, value in shard.items()}
            save_file(tensors, file, metadata)
        if total > 1:
            text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1)
            partial[-1].write_text(text, encoding="utf-8")
        for temporary, file in zip(partial, files, strict=True):
            os.replace(temporary, file)
    finally:
        for temporary in partial:
            temporary.unlink(missing_ok=True)
    old_shard = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    for file in path.parent.iterdir():
        if file not in files and (file in (path, index) or old_shard.fullmatch(file.name)):
            file.unlink()
    return files


def _split(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int, overhead: int
) -> list[dict[str, Tensor]]:
    """State dicts in their order, each as large as a file with so many bytes of its own may hold."""
    shards, room = [{}], max_shard_bytes - overhead
    for name, value in state.items():
        itemsize = (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
        num_bytes = value.numel() * itemsize + 2 * len(name) + 160  # and its line in the header
        if num_bytes > max_shard_bytes - overhead:
            raise ValueError(f"{name} alone takes {num_bytes} bytes; raise max_shard_bytes {max_shard_bytes}")
        if num_bytes > room:
            shards.append({})
            room = max_shard_bytes - overhead
        shards[-1][name] = value
        room -= num_bytes
    return shards


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype and value.is_floating_point() else value


def _rename(name: str, *, inverse: bool) -> str:
    block = _BLOCK.match(name)
    head, tail = (block.group(), name[block.end() :]) if block else ("", name)
    for wan, diffusers in (BLOCK_NAMES if block else TOP_NAMES).items():
        old, new = (diffusers, wan) if inverse else (wan, diffusers)
        if tail.startswith(old):
            return head + new + tail[len(old) :]
    return name


def _is_diffusers(names: Iterable[str]) -> bool:
    return any(name.startswith("condition_embedder.") for name in names)


def _repeated(names: Iterable[str]) -> list[str]:
    names = list(names)
    return sorted({name for name in names if names.count(name) > 1})


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line per kind of problem, empty when the state dict fits."""
    shared = [name for name in own if name in state]
    kinds = {
        "missing keys": [name for name in own if name not in state],
        "unexpected keys": [name for name in state if name not in own],
        "wrong shapes": [
            f"{name} expected {tuple(own[name].shape)} found {tuple(state[name].shape)}"
            for name in shared
            if own[name].shape != state[name].shape
        ],
        "wrong number types": [
            f"{name} expected {own[name].dtype} found {state[name].dtype} ({state[name].layout})"
            for name in shared
            if own[name].is_floating_point() != state[name].is_floating_point()
            or state[name].layout != torch.strided
            or state[name].is_meta
        ],
    }
    lines = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]
    return lines if shared else ["no key in common, another kind of model", *lines]


def hash_weights(modules: Iterable[Any]) -> str:
    """sha256 over names, shapes, number types and bits of all weights as held; what is no module is left out."""
    digest = hashlib.sha256()
    for module in modules:
        for name, x in module.state_dict().items() if isinstance(module, nn.Module) else ():
            x = x.detach() if type(x) in (Tensor, nn.Parameter) else x.dequantize()  # torchao's own tensor classes
            digest.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode())
            digest.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
