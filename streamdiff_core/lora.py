"""LoRA files merged into a transformer when it is loaded: ``W += strength * alpha / rank * up @ down``.

Read are the key styles in circulation for Wan: diffusers / PEFT (``transformer.blocks.0.attn1.to_q.lora_A.weight``),
original Wan names (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``) and kohya's with underscores
(``lora_unet_blocks_0_self_attn_q``); besides, whole differences (``.diff``, ``.diff_b``). Every entry must find its
place, else nothing is changed: a style file that only half applies is worse than an error.
"""

from __future__ import annotations

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
    changes, ranks = {}, set()
    for name, part in parts.items():
        change = part.get("diff")
        if change is None:
            if not {"up", "down"} <= set(part):
                raise CheckpointError(f"{path}: {name} has only one half of its LoRA. Nothing was merged.")
            down, up = part["down"].float().flatten(1), part["up"].float().flatten(1)
            if up.shape[1] != len(down):
                raise CheckpointError(f"{path}: the halves of {name} differ in rank. Nothing was merged.")
            ranks.add(len(down))
            change = up @ down * (float(part.get("alpha", len(down))) / len(down))
        if change.numel() != own[name].numel() or change.shape[0] != own[name].shape[0]:
            raise CheckpointError(
                f"{path}: {name} is {tuple(own[name].shape)} here, the LoRA is for {tuple(change.shape)}; "
                "it was made for a model of another size. Nothing was merged."
            )
        changes[name] = change
    with torch.no_grad():
        for name, change in changes.items():
            target = own[name]
            merged = target.float() + strength * change.float().view(target.shape).to(target.device)
            target.copy_(merged)
    return LoraReport(path=path, num_merged=len(changes), ranks=tuple(sorted(ranks)))


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
