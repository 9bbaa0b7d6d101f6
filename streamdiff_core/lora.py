"""LoRA files merged into a transformer when it is loaded: ``W += strength * alpha / rank * up @ down``.

Read are the key styles in circulation for Wan: diffusers / PEFT (``transformer.blocks.0.attn1.to_q.lora_A.weight``),
original Wan names (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``) and kohya's with underscores
(``lora_unet_blocks_0_self_attn_q``); besides, whole differences (``.diff``, ``.diff_b``). Every entry must find its
place, else nothing is changed: a style file that only half applies is worse than an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from streamdiff_core.types import CheckpointError
from streamdiff_core.weight_files import find_file, listed, read_file
from streamdiff_core.weights import to_diffusers_keys

_PREFIX = re.compile(r"^(base_model\.model\.|(transformer|diffusion_model|model)\.|lora_(unet|transformer)_)+")
_ENTRY = re.compile(
    r"(?P<target>.+?)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|diff_b|diff|alpha)(\.default)?(\.weight)?$"
)
_KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "diff_b": "diff"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """What ``merge_lora`` did."""

    path: Path
    """File that was read."""
    num_merged: int
    """Parameters changed."""
    ranks: tuple[int, ...]
    """Ranks found, ascending."""


def merge_lora(model: nn.Module, source: str | Path, strength: float = 1.0) -> LoraReport:
    """Add a LoRA to a model's weights, in place, or raise and change nothing.

    Args:
        model: a transformer with Wan's parameter names.
        source: file, folder or hub repository, as ``load_checkpoint`` takes it.
        strength: factor on the whole LoRA; merging again with ``-strength`` takes it out (up to rounding).

    Raises:
        CheckpointError: no LoRA in the file, entries without a place in the model, halves missing, wrong shapes.
    """
    path = find_file(source)
    state, _, _ = read_file(path)
    own = dict(model.named_parameters())
    parts = _parts(path, state, own)
    ranks = {len(part["down"]) for name, part in parts.items() if _check(path, name, part, own[name])}
    with torch.no_grad():
        for name, part in parts.items():  # one at a time: all differences of a 14B model are 57 GB
            own[name].copy_(_merged(own[name], part, strength))
    return LoraReport(path=path, num_merged=len(parts), ranks=tuple(sorted(ranks)))


def _check(path: Path, name: str, part: dict[str, Tensor], target: Tensor) -> bool:
    """Whether a part is a product of two halves (else a whole difference); raises when it does not fit."""
    is_product = "diff" not in part
    if is_product and not {"up", "down"} <= set(part):
        raise CheckpointError(f"{path}: {name} has only one half of its LoRA. Nothing was merged.")
    if is_product and part["up"][0].numel() != len(part["down"]):
        raise CheckpointError(f"{path}: the halves of {name} differ in rank. Nothing was merged.")
    found = (len(part["up"]), part["down"][0].numel()) if is_product else tuple(part["diff"].shape)
    if found[0] != target.shape[0] or math.prod(found) != target.numel():
        raise CheckpointError(
            f"{path}: {name} is {tuple(target.shape)} here, the LoRA is for {found}; "
            "it was made for a model of another size. Nothing was merged."
        )
    return is_product


def _merged(target: Tensor, part: dict[str, Tensor], strength: float) -> Tensor:
    """A parameter with its part added, float32 or better; one temporary copy of it."""
    number = torch.promote_types(target.dtype, torch.float32)
    wide = target.detach().to(number, copy=True)
    pieces = {kind: value.to(target.device, number) for kind, value in part.items() if kind != "alpha"}
    if "diff" in pieces:
        return wide.add_(pieces["diff"].view(target.shape), alpha=strength)
    down, up = pieces["down"].flatten(1), pieces["up"].flatten(1)
    scale = strength * float(part.get("alpha", len(down))) / len(down)
    return wide.flatten(1).addmm_(up, down, alpha=scale).view(target.shape)


def _parts(path: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> its pieces."""
    places = _spellings(own)
    parts: dict[str, dict[str, Tensor]] = {}
    lost = []
    for key, value in state.items():
        entry = _ENTRY.match(_PREFIX.sub("", key))
        name = entry and places.get(f"{entry['target']}.{'bias' if entry['kind'] == 'diff_b' else 'weight'}")
        if name is None:
            lost.append(key)
        else:
            parts.setdefault(name, {})[_KINDS.get(entry["kind"], entry["kind"])] = value
    if not parts:
        raise CheckpointError(f"{path} holds no LoRA for this model; its keys look like {listed(sorted(state)[:3])}")
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} entries have no place in this model ({listed(sorted(lost))}). Nothing was merged."
        )
    return parts


def _spellings(own: dict[str, Tensor]) -> dict[str, str]:
    """Every way a parameter is called -> its name here: Wan's, diffusers', and both with underscores."""
    places = {name: name for name in own} | to_diffusers_keys({name: name for name in own})
    for spelling, name in list(places.items()):
        module, ending = spelling.rsplit(".", 1) if "." in spelling else (spelling, "")
        places[f"{module.replace('.', '_')}.{ending}"] = name
    return places
