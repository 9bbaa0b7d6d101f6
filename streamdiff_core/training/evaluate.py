"""Every figure of the model card, measured on the validation clips through ``StreamSession``.

Per style: reconstruction of the VAE, PSNR of the stream's output to the filter's output beside that of the
unchanged input, share of chunks nearest to their own prompt's filter, flicker beside the filter's.
Then the curve over the noise scale and the drift over a minute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamdiff_core.metrics import colour_drift, flicker, psnr, sharpness
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.training.data import STYLE_NAMES, iter_clips
from streamdiff_core.training.prompts import DEFAULT_PROMPTS, HELD_OUT_PROMPTS
from streamdiff_core.training.styles import apply_style
from streamdiff_core.training.vae_stage import reconstruction_psnr

CHUNK_FRAMES = 4
STILL_THRESHOLD = 2.0
NOISE_SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class StyleScore:
    """Figures of one style, means over the validation clips."""

    style: str
    vae_psnr: float
    """Encode + decode of the filter's output, dB."""
    psnr: float
    """Stream output against the filter's output, dB."""
    unchanged_psnr: float
    """Unchanged input against the filter's output, dB; infinite where the filter changes nothing."""
    own_style_share: float
    """Share of chunks nearest to their own filter, canonical prompt."""
    own_style_share_held_out: float
    """The same with prompts never seen in training."""
    flicker: float
    """Frame-to-frame change of the output where the input is still, grey levels."""
    filter_flicker: float
    """The same of the filter's output."""


def restyle(pipe: StreamPipeline, frames: np.ndarray, prompt: str, **options: Any) -> np.ndarray:
    """One clip through a fresh session."""
    with pipe.start(prompt, **options) as session:
        return np.concatenate([session.push(frames), session.flush()])


def nearest_share(output: np.ndarray, targets: dict[str, np.ndarray], own: str) -> tuple[int, int]:
    """(chunks nearest to their own style's target, chunks) of one clip."""
    starts = range(0, len(output) - CHUNK_FRAMES + 1, CHUNK_FRAMES)
    hits = 0
    for at in starts:
        cut = slice(at, at + CHUNK_FRAMES)
        errors = {
            style: float(np.square(output[cut].astype(np.float32) - target[cut]).mean())
            for style, target in targets.items()
        }
        hits += min(errors, key=errors.__getitem__) == own
    return hits, len(starts)


def score_styles(pipe: StreamPipeline, clips: Path, styles: Sequence[str] = STYLE_NAMES) -> list[StyleScore]:
    """Scores of every style; clip i uses held-out prompt i of the style."""
    from tqdm import tqdm

    vae = reconstruction_psnr(pipe.vae, clips, tuple(styles))
    raw: dict[str, list[tuple[float, ...]]] = {style: [] for style in styles}
    bar = tqdm(total=len(list(clips.glob("*.mp4"))) * len(styles), desc="evaluate")
    for i, (_, frames) in enumerate(iter_clips(clips)):
        targets = {style: apply_style(style, frames) for style in STYLE_NAMES}
        for style in styles:
            output = restyle(pipe, frames, DEFAULT_PROMPTS[style])
            unseen = restyle(pipe, frames, HELD_OUT_PROMPTS[style][i % len(HELD_OUT_PROMPTS[style])])
            raw[style].append(
                (
                    psnr(output, targets[style]),
                    psnr(frames, targets[style]),
                    *nearest_share(output, targets, style),
                    *nearest_share(unseen, targets, style),
                    flicker(output, frames, STILL_THRESHOLD),
                    flicker(targets[style], frames, STILL_THRESHOLD),
                )
            )
            bar.update()
    scores = []
    for style in styles:
        columns = np.array(raw[style]).T
        ours, unchanged, hits, chunks, unseen_hits, unseen_chunks, shake, filter_shake = columns
        scores.append(
            StyleScore(
                style=style,
                vae_psnr=vae[style],
                psnr=float(ours.mean()),
                unchanged_psnr=float(unchanged.mean()),
                own_style_share=float(hits.sum() / chunks.sum()),
                own_style_share_held_out=float(unseen_hits.sum() / unseen_chunks.sum()),
                flicker=float(np.nanmean(shake)),
                filter_flicker=float(np.nanmean(filter_shake)),
            )
        )
    return scores


def noise_curve(pipe: StreamPipeline, clips: Path, style: str = "oil", num_frames: int = 33) -> list[dict[str, float]]:
    """Per noise scale: PSNR (dB) to the filter's output and to the input, and sharpness."""
    rows = []
    for noise_scale in NOISE_SCALES:
        values = []
        for _, frames in iter_clips(clips):
            frames = frames[:num_frames]
            output = restyle(pipe, frames, DEFAULT_PROMPTS[style], noise_scale=noise_scale)
            to_filter = psnr(output, apply_style(style, frames))
            values.append((to_filter, psnr(output, frames), sharpness(output)))
        to_filter, to_input, sharp = np.mean(values, axis=0)
        rows.append(
            {
                "noise_scale": noise_scale,
                "psnr_to_filter": float(to_filter),
                "psnr_to_input": float(to_input),
                "sharpness": float(sharp),
            }
        )
    return rows


def drift_over_a_minute(
    pipe: StreamPipeline, clips: Path, style: str = "oil", seconds: float = 60.0
) -> dict[str, float]:
    """A clip played forwards and backwards for a minute: largest colour, contrast and sharpness change."""
    fps = pipe.preset.fps
    _, frames = next(iter_clips(clips))
    loop = np.concatenate([frames, frames[::-1]])
    total = round(seconds * fps)
    source = np.concatenate([loop] * (total // len(loop) + 1))[:total]
    output = restyle(pipe, source, DEFAULT_PROMPTS[style])
    drift = colour_drift(output, fps, len(loop) / fps)  # windows of one loop: the input has no drift
    return {
        "seconds": seconds,
        "max_delta_e": float(np.max(np.abs(drift.delta_e))),
        "max_contrast_change": float(np.max(np.abs(np.asarray(drift.contrast_ratio) - 1))),
        "max_sharpness_change": float(np.max(np.abs(np.asarray(drift.sharpness_ratio) - 1))),
    }


def evaluate(pipe: StreamPipeline, clips: Path, report: Path) -> dict[str, Any]:
    """All figures, written to ``report`` (JSON; null where a figure is infinite or undefined)."""
    scores = score_styles(pipe, clips)
    result = {
        "styles": [asdict(s) for s in scores],
        "mean_psnr": float(np.mean([s.psnr for s in scores])),
        "own_style_share": float(np.mean([s.own_style_share for s in scores])),
        "own_style_share_held_out": float(np.mean([s.own_style_share_held_out for s in scores])),
        "noise_curve": noise_curve(pipe, clips),
        "drift": drift_over_a_minute(pipe, clips),
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
    return result


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
