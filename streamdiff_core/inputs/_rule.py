"""What an input-side rule may do, the names of the rules, and a stream's rules as one stage.

A file that decorates its class with ``@input_rule("name")`` is all a new rule takes. Its knobs are its keyword-only
arguments, plain JSON values. An object is made per stream and may keep what it has seen.
Shapes: T pixel frames, F latent frames, C channels, h x w latent size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamdiff_core.types import RowOp

INPUTS: dict[str, type[InputRule]] = {}


class InputRule:
    """Changes nothing; a rule overrides what it needs."""

    needs_frames = False
    """Whether it makes no sense without an input video."""
    guides = False
    """Whether it overrides ``predict``."""
    first_chunk_latent_frames = 0
    """Latent frames of the first chunk; 0: no opinion."""

    def begin(self, seed: int, encode_prompt: Callable[[str], Any]) -> None:
        """A stream with this seed starts."""

    def holds(self, frames: np.ndarray) -> bool:
        """Whether to hold back a chunk, uint8 [T, H, W, 3]; asked once for every chunk, in order."""
        return False

    def takes(self, frames: np.ndarray) -> None:
        """The chunk it was just asked about is processed after all."""

    def predict(
        self, rows: Sequence[RowOp], sources: Mapping[int, Tensor], forward: Callable[[Sequence[RowOp]], list[Tensor]]
    ) -> list[Tensor]:
        """x0 of rows; ``sources`` is the clean input [C, h, w] of every latent frame in flight."""
        return forward(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps."""
        held = [x for value in vars(self).values() for x in (value.values() if isinstance(value, dict) else [value])]
        return sum(x.nbytes for x in held if isinstance(x, (np.ndarray, Tensor)))


class InputStage:
    """The rules of one stream."""

    def __init__(self, rules: Sequence[InputRule]) -> None:
        self.rules = tuple(rules)
        self.guide: InputRule | None = next((rule for rule in rules if rule.guides), None)

    def first_chunk_frames(self, latent_frames_per_chunk: int) -> int:
        """Latent frames of the first chunk: one more than later ones have, unless a rule says otherwise."""
        return max((r.first_chunk_latent_frames for r in self.rules), default=0) or latent_frames_per_chunk + 1

    def holds(self, frames: np.ndarray, must_run: bool) -> bool:
        """Whether a chunk is held back; never when something else than the input changed (``must_run``)."""
        wanted = [rule.holds(frames) for rule in self.rules]
        if any(wanted) and not must_run:
            return True
        for rule in self.rules:
            rule.takes(frames)
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of what the rules keep."""
        return sum(rule.nbytes for rule in self.rules)


def input_rule(name: str) -> Callable[[type[InputRule]], type[InputRule]]:
    """Class decorator: register a rule."""

    def register(cls: type[InputRule]) -> type[InputRule]:
        if name in INPUTS and INPUTS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"there is an input rule {name!r} already: {INPUTS[name].__qualname__}")
        INPUTS[name] = cls
        return cls

    return register


def make_inputs(options: Mapping[str, Mapping[str, Any]], *, has_frames: bool = True) -> InputStage:
    """Fresh rules by name, each with its knobs.

    Args:
        options: {rule: {knob: value}}; an empty mapping of knobs takes the defaults.
        has_frames: whether the stream has an input video.

    Raises:
        ValueError: unknown rule or knob, a value that does not fit, two rules that guide, or a rule without use.
    """
    rules = []
    for name, knobs in options.items():
        if name not in INPUTS:
            raise ValueError(f"unknown input rule {name!r}; known: {', '.join(sorted(INPUTS))}")
        if not isinstance(knobs, Mapping):
            raise ValueError(f"input_options[{name!r}] must map knobs to values, got {knobs!r}; {{}} means defaults")
        known = {p.name: p.default for p in inspect.signature(INPUTS[name]).parameters.values()}
        for knob, value in knobs.items():
            if knob not in known:
                raise ValueError(f"input rule {name!r} has no knob {knob!r}; it has: {', '.join(known) or 'none'}")
            kinds = (int, float) if isinstance(known[knob], float) else type(known[knob])
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{name} knob {knob!r} takes values like {known[knob]!r}, got {value!r}")
        rules.append(INPUTS[name](**knobs))
        if rules[-1].needs_frames and not has_frames:
            raise ValueError(f"input rule {name!r} works on an input video; a text-to-video stream has none")
    if sum(rule.guides for rule in rules) > 1:
        raise ValueError(f"only one input rule can guide predictions, got {', '.join(options)}")
    return InputStage(rules)


def stack_frames(by_frame: Mapping[int, Tensor], row: RowOp) -> Tensor:
    """What is known of each latent frame of a row, [F, C, h, w]."""
    return torch.stack([by_frame[frame] for frame in row.frame_ids])
