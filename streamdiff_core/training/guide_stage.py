"""Stage 6: the guided filter, from what the exported model makes of the training clips.

First every clip is restyled a few times by ``StreamSession`` (random style, window, noise scale and steps; without
guide and without holding still pixels) and kept beside its input and the filter's output. Then the filter learns to
turn the first of these three into the third, with the second in hand.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamdiff_core.frames import tensor_to_frames
from streamdiff_core.guided_filter import PERIOD_PX, GuidedFilter
from streamdiff_core.metrics import psnr
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.training.data import STYLE_NAMES, STYLE_SHARES, augment, iter_clips, whole_latent_frames
from streamdiff_core.training.prompts import DEFAULT_PROMPTS
from streamdiff_core.training.runs import Trainee, fit
from streamdiff_core.training.styles import apply_style
from streamdiff_core.training.vae_stage import detail_loss
from streamdiff_core.types import GREY_LEVELS_PER_UNIT

NUM_FRAMES = 25
CROP_PX = 128
NUM_CROPS = 16
PEAK_LR = 2e-3
FLAT_WEIGHT = 0.1
SCORED_FRAMES = 3
"""Of each validation pair."""


def make_pairs(pipe: StreamPipeline, clips: Path, folder: Path, per_clip: int, *, seed: int) -> None:
    """Restyle every clip ``per_clip`` times: uint8 [3, T, 256, 256, 3], decoded, input and target, a file each.

    Resumable; a pair depends on the clip's name, its number and the seed alone.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    for stem, frames in tqdm(iter_clips(clips), total=len(list(clips.glob("*.mp4"))), desc="restyle"):
        for number in range(per_clip):
            file = folder / f"{stem}__{number}.npy"
            if file.exists():
                continue
            rng = np.random.default_rng([zlib.crc32(stem.encode()), number, seed])
            unfinished = file.with_suffix(".tmp")
            with unfinished.open("wb") as out:
                np.save(out, _pair(pipe, frames, rng))
            os.replace(unfinished, file)


def _pair(pipe: StreamPipeline, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    style = "photo" if rng.random() < 0.1 else STYLE_NAMES[rng.choice(len(STYLE_NAMES), p=STYLE_SHARES)]
    source = augment(frames, rng) if rng.random() < 0.6 else frames
    at = rng.integers(0, max(1, len(source) - NUM_FRAMES + 1))
    source = whole_latent_frames(source[at : at + NUM_FRAMES])
    options: dict[str, Any] = {"steady": False, "guided": False}
    if rng.random() < 0.5:
        options |= {"noise_scale": float(rng.uniform(0.25, 0.75)), "steps": int(rng.integers(1, 4))}
    with pipe.start(DEFAULT_PROMPTS[style], **options) as session:
        decoded = np.concatenate([session.push(source), session.flush()])
    return np.stack([decoded, source, apply_style(style, source)])


class PairCrops:
    """Random crops of all pairs in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.pairs, self.seed = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))], seed

    def draw(self, step: int) -> Tensor:
        """Decoded, input and target, [3, B, 3, 128, 128] in [-1, 1]; the same step always gives the same ones."""
        rng, crops = np.random.default_rng([self.seed, step]), []
        for _ in range(NUM_CROPS):
            pair = self.pairs[rng.integers(len(self.pairs))]
            frame = rng.integers(pair.shape[1])
            rows, columns = pair.shape[2:4]
            side = min(CROP_PX, rows, columns)
            y, x = (PERIOD_PX * rng.integers(0, (size - side) // PERIOD_PX + 1) for size in (rows, columns))
            crops.append(pair[:, frame, y : y + side, x : x + side])
        return _to_tensor(np.stack(crops, axis=1))

    @torch.no_grad()
    def score(self, guide: GuidedFilter) -> dict[str, float]:
        """Mean PSNR to the target, dB, of decoded pictures as they are and filtered."""
        before, after = [], []
        for pair in self.pairs:
            frames = np.linspace(0, pair.shape[1] - 1, SCORED_FRAMES).round().astype(int)
            decoded, source, target = pair[:, frames]
            filtered = guide(_to_tensor(decoded), _to_tensor(source))
            before.append(psnr(decoded, target))
            after.append(psnr(tensor_to_frames(filtered[None]), target))
        return {"decoded": float(np.mean(before)), "guided": float(np.mean(after))}


def _to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, -3).float() / GREY_LEVELS_PER_UNIT - 1


def flat_loss(video: Tensor, target: Tensor) -> Tensor:
    """Mean difference of the steps between pixels; its square would overlook a faint mesh on flat ground."""
    return sum(F.l1_loss(video.diff(dim=dim), target.diff(dim=dim)) for dim in (-2, -1))


def train_guide(folder: Path, guide: GuidedFilter, pairs: Path, val_pairs: Path, *, minutes: float, seed: int) -> None:
    """Train ``guide`` into ``folder`` for ``minutes`` in all; resumes."""
    crops, val_crops = PairCrops(pairs, seed), PairCrops(val_pairs, seed)

    def loss_of(step: int, _: torch.Generator) -> Tensor:
        decoded, source, target = crops.draw(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            video = guide(decoded, source)
        return detail_loss(video, target, dims=(2, 3)) + FLAT_WEIGHT * flat_loss(video, target)

    def score(shadow: dict[str, Tensor]) -> dict[str, float]:
        averaged = GuidedFilter(guide.stem.out_channels)
        averaged.load_state_dict(shadow)
        return val_crops.score(averaged)

    trainee = Trainee(guide, "guide", list(guide.parameters()))
    fit(trainee, folder, loss_of, score, minutes=minutes, peak_lr=PEAK_LR, seed=seed)
