"""R-CFG: guidance away from the input, or from one unconditional look, without a second forward per step.

StreamDiffusion v1 (SEEDS §5) in flow form. With v_res = (xt - z) / sigma, the velocity that would lead back to z,

    v = delta * v_res + scale * (v_cond - delta * v_res)    or    x0 + (scale - 1) * (x0 - xt + delta * (xt - z)).

At delta = 1 that is z + scale * (x0 - z): the prediction, drawn further away from z. z is the clean input (``self``, no
extra forward), the prediction under the negative prompt at a chunk's first step (``one_time``), or that at every step,
which is plain classifier-free guidance (``full``). The negative forward runs first; the conditional one then overwrites
its keys and values, so the cache is the same as without guidance wherever the same xt is fed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from streamdiff_core.inputs._rule import InputRule, input_rule, stack_frames
from streamdiff_core.types import RowOp

KINDS = ("self", "one_time", "full")


@input_rule("rcfg")
class ResidualGuidance(InputRule):
    """Draws predictions away from the input or from a negative prompt.

    Paper: StreamDiffusion, residual classifier-free guidance (SEEDS §5).
    Training-free: runs, in a flow form that is ours; distilled weights have guidance baked in, so keep ``scale`` small.
    Cost: none for ``self``; one more forward per chunk for ``one_time``, one per step for ``full``.
    Look for: a stronger style, less of the input's colours; artefacts from about 1.3 on.
    Deviates: the paper guides noise predictions of Stable Diffusion. Candidates of one chunk share a ``one_time``
        prediction; a policy that looks at queries sees those of the negative prompt first.
    """

    kind: str
    """``self``, ``one_time`` or ``full``."""
    scale: float
    """1 leaves predictions as they are; at most 3."""
    delta: float
    """Strength of the residual, in [0, 1]."""
    negative_prompt: str
    """Prompt of the unconditional forward."""
    guides = True

    def __init__(
        self, *, kind: str = "self", scale: float = 1.2, delta: float = 1.0, negative_prompt: str = ""
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"rcfg kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not 1 <= scale <= 3 or not 0 <= delta <= 1:
            raise ValueError(f"rcfg needs scale in [1, 3] and delta in [0, 1], got {scale} and {delta}")
        self.kind, self.scale, self.delta, self.negative_prompt = kind, scale, delta, negative_prompt
        self.needs_frames = kind == "self"
        self._negative: Any = None
        self._points: dict[int, Tensor] = {}

    def begin(self, seed: int, encode_prompt: Callable[[str], Any]) -> None:
        """Encode the negative prompt, unless guidance is away from the input."""
        self._negative = None if self.kind == "self" else encode_prompt(self.negative_prompt)

    def predict(
        self, rows: Sequence[RowOp], sources: Mapping[int, Tensor], forward: Callable[[Sequence[RowOp]], list[Tensor]]
    ) -> list[Tensor]:
        """x0 of rows, [F, C, h, w] each; those of kind ``denoise`` are drawn away from z, clean ones are left alone."""
        guided = [row for row in rows if row.kind == "denoise"]
        away = iter(self._away_from(guided, sources, forward))
        x0s = forward(rows)
        return [
            x0 + (self.scale - 1) * (x0 - row.xt + self.delta * (row.xt - next(away))) if row.kind == "denoise" else x0
            for row, x0 in zip(rows, x0s, strict=True)
        ]

    def _away_from(
        self, rows: Sequence[RowOp], sources: Mapping[int, Tensor], forward: Callable[[Sequence[RowOp]], list[Tensor]]
    ) -> list[Tensor]:
        """z of each row, [F, C, h, w]."""
        if self.kind == "self":
            return [stack_frames(sources, row) for row in rows]
        if self.kind == "full":
            return self._under_negative(rows, forward)
        self._points = {frame: x0 for frame, x0 in self._points.items() if frame in sources}
        known, new = set(self._points), []
        for row in rows:
            if not known.issuperset(row.frame_ids):
                new.append(row)
                known.update(row.frame_ids)
        for row, x0 in zip(new, self._under_negative(new, forward), strict=True):
            for frame, point in zip(row.frame_ids, x0, strict=True):
                self._points.setdefault(frame, point.clone())
        return [stack_frames(self._points, row) for row in rows]

    def _under_negative(
        self, rows: Sequence[RowOp], forward: Callable[[Sequence[RowOp]], list[Tensor]]
    ) -> list[Tensor]:
        return forward([replace(row, prompt=self._negative) for row in rows]) if rows else []
