"""Training data: real clips -> augmented source -> every style's target -> latents on disk.

Filters and encoding run once per clip and variant; training then reads float16 latents of all styles through
memory maps. A variant changes crop, mirror, colour and frame phase before the filters run, so that source and
targets stay aligned. Resumable: a clip that is on disk is not made again.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from streamdiff_core.config import VAEConfig
from streamdiff_core.frames import frames_to_tensor, resize_and_crop
from streamdiff_core.training.styles import STYLES, apply_style
from streamdiff_core.types import VideoReadError
from streamdiff_core.vae import TinyVAE
from streamdiff_core.video_io import read_video

STYLE_NAMES = tuple(STYLES)
STYLE_SHARES = np.array([3.0 if style == "neon" else 1.0 for style in STYLE_NAMES])
"""How often each style is drawn for training: the hardest one more often."""
STYLE_SHARES /= STYLE_SHARES.sum()
SIZE_PX = 256
MIN_CLIP_FRAMES = 32
"""So that four latent frames are left when a variant starts later and skips every other frame."""


def read_clip(path: Path) -> np.ndarray:
    """All frames of a clip, cropped and resized to the training size: uint8 [T, 256, 256, 3].

    Raises:
        VideoReadError: unreadable, or too short to train on.
    """
    frames = np.stack(list(read_video(path)))
    if len(frames) < MIN_CLIP_FRAMES:
        raise VideoReadError(f"{path} has {len(frames)} frames, {MIN_CLIP_FRAMES} are needed; leave it out")
    return resize_and_crop(frames, SIZE_PX, SIZE_PX)


def whole_latent_frames(frames: np.ndarray) -> np.ndarray:
    """The longest start of a clip that has 1 + 4n frames."""
    return frames[: (len(frames) - 1) // 4 * 4 + 1]


def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random crop, mirror, gain, gamma and frame phase for a whole clip: uint8 [T', 256, 256, 3]."""
    frames = frames[rng.integers(0, 4) :]
    if rng.random() < 0.25:
        frames = frames[::2]  # faster motion
    side = int(SIZE_PX * rng.uniform(0.6, 1.0))
    y, x = rng.integers(0, frames.shape[1] - side + 1), rng.integers(0, frames.shape[2] - side + 1)
    gain, gamma = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.75, 1.25), rng.uniform(0.75, 1.35)
    table = np.arange(256)[:, None] / 255
    table = np.clip((table * gain) ** gamma * 255, 0, 255).astype(np.uint8)  # [256, 3]
    mirror = -1 if rng.random() < 0.5 else 1
    size, out = (SIZE_PX, SIZE_PX), []
    for frame in frames:
        patch = cv2.resize(frame[y : y + side, x : x + side], size, interpolation=cv2.INTER_CUBIC)
        out.append(np.stack([table[patch[..., c], c] for c in range(3)], axis=-1)[:, ::mirror])
    return np.stack(out)


@torch.no_grad()
def encode_styles(frames: np.ndarray, vae: TinyVAE, styles: Sequence[str] = STYLE_NAMES) -> Tensor:
    """Source clip -> latents of every style, float16 [S, F, C, h, w]; frames beyond 1 + 4n are dropped."""
    frames = whole_latent_frames(frames)
    latents = [vae.encode(frames_to_tensor(apply_style(s, frames)), vae.new_state())[0] for s in styles]
    return torch.stack(latents).half()


def _prepare_clip(clip: Path, variant: int, *, folder: Path, config: VAEConfig, weights: dict[str, Tensor]) -> None:
    target = folder / f"{clip.stem}__v{variant}.npy"
    if target.exists():
        return
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    vae = TinyVAE(config)
    vae.load_state_dict(weights)
    frames = read_clip(clip)
    if variant:
        frames = augment(frames, np.random.default_rng([zlib.crc32(clip.stem.encode()), variant]))
    unfinished = target.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.save(file, encode_styles(frames, vae).numpy())
    os.replace(unfinished, target)


def prepare(clips: Path, folder: Path, vae: TinyVAE, variants: Sequence[int], num_workers: int = 2) -> None:
    """Encode every clip of ``clips`` in every variant (0 is the clip as it is) into ``folder``.

    Raises:
        ValueError: no .mp4 in ``clips``.
        VideoReadError: a clip cannot be read.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(clips.glob("*.mp4"))
    if not files:
        raise ValueError(f"no .mp4 clips in {clips}; point --clips at a folder of short videos")
    job = partial(_prepare_clip, folder=folder, config=vae.config, weights=vae.state_dict())
    clips_in_turn = files * len(variants)
    variant_of = np.repeat(variants, len(files)).tolist()
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        try:
            for _ in tqdm(pool.map(job, clips_in_turn, variant_of), total=len(variant_of), desc="encode"):
                pass
        except BaseException:  # Ctrl-C too: leave now, not after the last clip
            pool.shutdown(cancel_futures=True)
            raise


class LatentClips:
    """Memory-mapped latents of all prepared clips; new files are picked up by ``rescan``.

    Raises:
        FileNotFoundError: nothing has been prepared yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clips: list[np.ndarray] = []
        if not self.rescan():
            raise FileNotFoundError(errno.ENOENT, "no prepared clips", str(folder))

    def rescan(self) -> int:
        """Open every finished file; returns the number of clips."""
        self.clips = [np.load(file, mmap_mode="r") for file in sorted(self.folder.glob("*__v*.npy"))]
        return len(self.clips)

    def sample(
        self, rng: np.random.Generator, styles: np.ndarray, num_frames: int, cells: int
    ) -> tuple[Tensor, Tensor]:
        """Random crops of random clips.

        Args:
            styles: style index per row [B].
            num_frames: consecutive latent frames F.
            cells: crop side in latent cells.

        Returns:
            Source and target latents, each float32 [B, F, C, cells, cells].

        Raises:
            ValueError: no clip is long enough.
        """
        clips = [clip for clip in self.clips if clip.shape[1] >= num_frames]
        if not clips:
            raise ValueError(f"no clip in {self.folder} has {num_frames} latent frames; use longer clips")
        source, target = [], []
        for style in styles:
            clip = clips[rng.integers(len(clips))]
            at = rng.integers(0, clip.shape[1] - num_frames + 1)
            even = 2 * rng.integers(0, (clip.shape[-1] - cells) // 2 + 1, 2)
            cut = (slice(at, at + num_frames), slice(None), *(slice(e, e + cells) for e in even))
            source.append(clip[(0, *cut)])
            target.append(clip[(int(style), *cut)])
        return torch.from_numpy(np.stack(source)).float(), torch.from_numpy(np.stack(target)).float()


def iter_clips(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, frames) of every .mp4 in a folder, sorted."""
    for path in sorted(folder.glob("*.mp4")):
        yield path.stem, read_clip(path)
