"""Figures of one cell of a comparison, frame by frame beside its input; units in the names, NaN where undefined.

Each figure is a function of `metrics` or `drift` applied to the latest pair of frames, so that a video of any length
needs the memory of two. Optical flow is OpenCV's DIS on the *input* (`metrics.estimate_flow`), once for all cells; only
``motion_kept`` also looks at the flow of the output. None of this is a perceptual judge; the optional CLIP score is the
only learned figure, and is there only where its weights are on this machine already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from streamdiff_core.drift import DriftMeter
from streamdiff_core.metrics import FlowPair, estimate_flow, estimate_forward_flow, flicker, sharpness, warp_error
from streamdiff_core.recipe import Recipe
from streamdiff_core.stream_options import Prompt
from streamdiff_core.training.prompts import DEFAULT_PROMPTS, WORDS, normalise
from streamdiff_core.training.styles import apply_style

MOVING_PX = 0.5
"""Input flow from which on a pixel counts as moving."""
REFERENCE_S = 1.0
"""First seconds that drift is measured against."""
Judge = Callable[[np.ndarray, str], float]
"""(uint8 [H, W, 3], prompt) → score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One column of the scores."""

    name: str
    """Column name, with the unit."""
    title: str
    """For headings."""
    unit: str
    """For axes."""
    better: str
    """``low``, ``high``, ``one`` or ``none``: what is good where everything else is equal."""
    meaning: str
    """One sentence."""


FIGURES = (
    Figure(name="flicker_levels", title="Flicker", unit="grey levels of 255", better="low",
           meaning="Mean change from frame to frame where the input stands still."),
    Figure(name="warp_error_levels", title="Warp error", unit="grey levels of 255", better="low",
           meaning="Mean difference to the frame before, moved along the input's optical flow (OpenCV DIS, medium)."),
    Figure(name="drift_lab", title="Colour drift", unit="Lab units", better="low",
           meaning="How far the mean colour of a span (1 s unless said) left the first's, beyond the input's own."),
    Figure(name="sharpness_levels2", title="Sharpness", unit="squared grey levels", better="none",
           meaning="Variance of the Laplacian of luma; noise raises it, and a style has its own."),
    Figure(name="motion_kept", title="Motion kept", unit="share of the input's flow", better="one",
           meaning="Flow of the output along the input's, over it, where the input moves: 1 as it does, 0 not at all."),
    Figure(name="style_distance_levels", title="Distance to the style", unit="grey levels of 255, RMS", better="low",
           meaning="To the filter of the prompt's style that the bundled model was trained on."),
    Figure(name="clip_score", title="CLIP score", unit="100 × cosine", better="high",
           meaning="Cosine of the CLIP features of the frame and the prompt."),
)  # fmt: skip


class InputMotion:
    """The input's frames and flow; feed every frame once, then hand it to the cells' scorers."""

    def __init__(self) -> None:
        self.now: np.ndarray | None = None
        """Latest frame, uint8 [H, W, 3]."""
        self.before: np.ndarray | None = None
        """The one before; None at the first."""
        self._flow: FlowPair | None = None
        self._meant: dict[str, np.ndarray] = {}

    def update(self, frame: np.ndarray) -> None:
        """Take in the next frame."""
        self.before, self.now, self._flow, self._meant = self.now, frame, None, {}

    @property
    def flow(self) -> FlowPair:
        """Between the two; estimated when the first cell asks."""
        if self._flow is None:
            (self._flow,) = estimate_flow(np.stack([self.before, self.now]))
        return self._flow

    def meant(self, style: str) -> np.ndarray:
        """What a style's filter makes of the latest frame, float32 [H, W, 3] in grey levels; once for all cells."""
        if style not in self._meant:
            self._meant[style] = apply_style(style, self.now[None])[0].astype(np.float32)
        return self._meant[style]


class CellScorer:
    """Figures of one output.

    Args:
        fps: frames per second.
        style: filter that shows how the prompt is meant (``style_of``); None leaves that figure out.
        judge: scores a picture against the prompt; None leaves that figure out.
        prompt: what ``judge`` is told.
        reference_s: span that drift is taken over; a loop's length where the input repeats, so that the input has no
            drift of its own which would hide the output's.
    """

    def __init__(
        self,
        *,
        fps: float,
        style: str | None = None,
        judge: Judge | None = None,
        prompt: str = "",
        reference_s: float = REFERENCE_S,
    ) -> None:
        self._style, self._judge, self._prompt = style, judge, prompt
        self._drift = DriftMeter(fps=fps, reference_s=reference_s)
        self._before: np.ndarray | None = None

    def update(self, motion: InputMotion, output: np.ndarray, in_full: bool = True) -> dict[str, float]:
        """Figures of the next frame, uint8 [H, W, 3], made from ``motion.now``; unless ``in_full`` its drift only."""
        values = {"drift_lab": self._drift.update(motion.now[None], output[None]).colour}
        before, self._before = self._before, output
        if not in_full:
            return values
        values["sharpness_levels2"] = sharpness(output[None])
        if before is not None:
            outputs, inputs = np.stack([before, output]), np.stack([motion.before, motion.now])
            values["flicker_levels"] = flicker(outputs, inputs)
            values["warp_error_levels"] = warp_error(outputs, inputs, [motion.flow])
            values["motion_kept"] = motion_kept(outputs, motion.flow)
        if self._style:
            values["style_distance_levels"] = float(np.sqrt(np.square(output - motion.meant(self._style)).mean()))
        if self._judge:
            values["clip_score"] = self._judge(output, self._prompt)
        return values


def motion_kept(outputs: np.ndarray, flow: FlowPair) -> float:
    """How much of the input's motion two consecutive output frames [2, H, W, 3] show; NaN where nothing moves.

    The output's flow projected on the input's, as a share of it, over all pixels that move by at least ``MOVING_PX``.

    Source: ours; a texture that does not follow the object lowers it, as does a frozen output.
    """
    meant, (shown,) = flow[0], estimate_forward_flow(outputs)
    moves = np.linalg.norm(meant, axis=-1) >= MOVING_PX
    if not moves.any():
        return float("nan")
    meant, shown = meant[moves], shown[moves]
    return float((meant * shown).sum(dtype=np.float64) / np.square(meant).sum(dtype=np.float64))


def style_of(prompt: Prompt) -> str | None:
    """The bundled model's style that a prompt asks for; None when it names none or several.

    Known are the canonical prompts and the nouns of the training prompts; of two nouns one inside the other, the
    longer counts.
    """
    if not isinstance(prompt, str):
        return None
    text = f" {normalise(prompt)} "
    known = {normalise(words): style for style, words in DEFAULT_PROMPTS.items()}
    if (whole := known.get(text.strip())) is not None:
        return whole
    nouns = {normalise(noun): style for style, words in WORDS.items() for noun in words.nouns}
    found = [noun for noun in nouns if f" {noun} " in text]
    found = [noun for noun in found if not any(noun in other and noun != other for other in found)]
    styles = {nouns[noun] for noun in found}
    return styles.pop() if len(styles) == 1 else None


def style_for(recipe: Recipe, bundled: bool) -> str | None:
    """``style_of`` the recipe's only prompt, for models that were trained on the filters."""
    return style_of(recipe.prompt) if bundled and not recipe.events else None


def summarise(rows: list[Mapping[str, float]], fps: float) -> dict[str, float]:
    """One number per figure: the mean over frames; of the drift, the mean over the last second."""
    last = rows[-max(1, round(fps)) :]
    found = {}
    for figure in FIGURES:
        values = np.array([row.get(figure.name, np.nan) for row in (last if figure.name == "drift_lab" else rows)])
        if any(figure.name in row for row in rows):
            found[figure.name] = float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else np.nan
    return found
