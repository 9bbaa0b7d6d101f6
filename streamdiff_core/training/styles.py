"""Deterministic style filters: the targets the small bundled model learns to imitate.

Every filter is a pure function of one frame. It uses fixed constants only (no statistics of the frame),
softens its input before it looks for edges and steps between tones smoothly, so that a calm video stays calm.
Lines are at least about two pixels wide: a linear 8x8x4-frame patch code can then still carry them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

StyleFilter = Callable[[np.ndarray], np.ndarray]
Stops = tuple[tuple[int, int, int], ...]

MIN_SIDE_PX = 64
GRAIN_LIMIT = 4.0 / 255.0
_RAMP_LEVELS = 1024


@lru_cache(maxsize=64)
def _ramp_table(stops: Stops) -> np.ndarray:
    """Colours along evenly spaced `stops` (8-bit RGB) as a float32 [_RAMP_LEVELS, 3] table in 0..1."""
    at = np.linspace(0.0, 1.0, len(stops))
    levels = np.linspace(0.0, 1.0, _RAMP_LEVELS)
    colours = np.asarray(stops, dtype=np.float64) / 255.0
    table = np.stack([np.interp(levels, at, colours[:, channel]) for channel in range(3)], axis=1)
    return cv2.GaussianBlur(table.astype(np.float32), (1, 63), 0, sigmaY=12.0, borderType=cv2.BORDER_REPLICATE)


@lru_cache(maxsize=32)
def _grain(height_px: int, width_px: int, softness_px: float, seed: int) -> np.ndarray:
    """Smooth fixed paper grain, float32 [H, W, 1] within +-GRAIN_LIMIT, the same for every frame."""
    noise = np.random.default_rng(seed).standard_normal((height_px, width_px)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), softness_px)
    noise *= GRAIN_LIMIT / 2.5 / max(float(noise.std()), 1e-6)
    return np.clip(noise, -GRAIN_LIMIT, GRAIN_LIMIT)[..., None]


def _blur(image: np.ndarray, sigma_px: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma_px)


def _soften(frame: np.ndarray, sigma_px: float) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> blurred float32 RGB in 0..1."""
    return _blur(frame.astype(np.float32) * np.float32(1 / 255), sigma_px)


def _luma(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _colourise(tone: np.ndarray, stops: Stops) -> np.ndarray:
    """Map a tone image [H, W] in 0..1 through a colour ramp to RGB [H, W, 3]."""
    index = np.clip(tone * (_RAMP_LEVELS - 1) + 0.5, 0, _RAMP_LEVELS - 1).astype(np.int32)
    return np.take(_ramp_table(stops), index, axis=0)


def _smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _soft_steps(tone: np.ndarray, levels: int, hardness: float = 0.9) -> np.ndarray:
    """Posterise with smooth stairs: slope between 1 - hardness and 1 + hardness, never a jump."""
    phase = tone * levels
    return (phase - hardness / (2 * np.pi) * np.sin(2 * np.pi * phase)) / levels


def _ink(tone: np.ndarray, sigma_px: float, low: float, high: float) -> np.ndarray:
    """Soft dark-side contour lines [H, W]: 0 no line, 1 full ink (difference of Gaussians)."""
    return _smoothstep(_blur(tone, 1.8 * sigma_px) - _blur(tone, sigma_px), low, high)


def _grade(image: np.ndarray, tone: np.ndarray, stops: Stops, chroma: float) -> np.ndarray:
    """Colour ramp over the tone plus `chroma` times the image's own colour difference from grey."""
    return _colourise(tone, stops) + chroma * (image - _luma(image)[..., None])


def _mix(image: np.ndarray, colour: tuple[int, int, int], amount: np.ndarray) -> np.ndarray:
    """Lay a colour (8-bit RGB) over an image where amount [H, W] is 1."""
    weight = amount[..., None]
    return image * (1.0 - weight) + weight * (np.asarray(colour, dtype=np.float32) / 255.0)


def _finish(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)


def photo(frame: np.ndarray) -> np.ndarray:
    """The picture as it is."""
    return frame.copy()


def pencil(frame: np.ndarray) -> np.ndarray:
    """Graphite on warm paper: colour dodge against the blurred inverse, a little grey for body."""
    grey = _luma(_soften(frame, 1.1))
    dodge = np.clip(grey / (_blur(grey, 8.0) + 0.03), 0.0, 1.0)
    tone = 0.80 * dodge * dodge + 0.20 * grey
    page = _colourise(tone, ((38, 40, 46), (128, 124, 120), (205, 198, 186), (248, 242, 229)))
    return _finish(page + _grain(*grey.shape, 1.6, 1))


def comic(frame: np.ndarray) -> np.ndarray:
    """Pop-art panel: violet-blue, hot pink and lemon fields, vivid own colours, thick ink."""
    small = cv2.bilateralFilter(cv2.GaussianBlur(frame, (0, 0), 1.0), 5, 45, 5)
    image = small.astype(np.float32) / 255.0
    tone = _luma(image)
    fields = _soft_steps(np.clip(1.15 * tone - 0.02, 0, 1), 4)
    inks = ((20, 12, 84), (64, 40, 196), (250, 52, 126), (255, 160, 160), (255, 238, 120), (255, 252, 220))
    colour = _grade(image, fields, inks, 1.1)
    return _finish(_mix(np.clip(colour, 0, 1), (14, 10, 30), _ink(tone, 1.3, 0.012, 0.05)))


def neon(frame: np.ndarray) -> np.ndarray:
    """Glowing outlines on night blue; the hue turns from cyan to magenta with the edge's direction."""
    tone = _luma(_soften(frame, 1.9))
    edge_x, edge_y = cv2.Scharr(tone, cv2.CV_32F, 1, 0), cv2.Scharr(tone, cv2.CV_32F, 0, 1)
    strength = cv2.magnitude(edge_x, edge_y)
    turn = (edge_x * edge_x / (strength * strength + 0.02))[..., None]
    lines = np.clip(_smoothstep(strength, 0.10, 1.7) * 1.1, 0, 1)[..., None]
    hue = turn * np.float32([1.0, 0.12, 0.78]) + (1 - turn) * np.float32([0.0, 0.85, 1.0])
    light = lines * hue
    glow = 0.9 * _blur(light, 2.5) + 0.9 * _blur(light, 7.0)
    floor = _colourise(tone, ((4, 3, 20), (12, 8, 44), (30, 14, 74)))
    return _finish(floor + 0.65 * light + 0.9 * glow + 0.35 * lines * lines)


def pixel(frame: np.ndarray) -> np.ndarray:
    """8-bit game: 4-pixel blocks (grid aligned with 8-pixel patches), six soft levels, candy colours."""
    height, width = frame.shape[:2]
    padded = cv2.copyMakeBorder(frame, 0, -height % 8, 0, -width % 8, cv2.BORDER_REPLICATE)
    cells = cv2.resize(padded, (padded.shape[1] // 4, padded.shape[0] // 4), interpolation=cv2.INTER_AREA)
    image = cells.astype(np.float32) / 255.0
    stops = (
        (26, 20, 84),
        (84, 44, 140),
        (190, 80, 120),
        (246, 142, 112),
        (255, 206, 140),
        (142, 230, 216),
        (236, 255, 248),
    )
    blocks = _finish(_grade(image, _soft_steps(_luma(image), 5), stops, 1.0))
    return np.repeat(np.repeat(blocks, 4, axis=0), 4, axis=1)[:height, :width].copy()


def thermal(frame: np.ndarray) -> np.ndarray:
    """Heat camera: iron-bow colours from black through violet and orange to white."""
    tone = _luma(_soften(frame, 1.8))
    iron = (
        (4, 2, 24),
        (48, 6, 110),
        (150, 14, 130),
        (226, 60, 60),
        (250, 150, 20),
        (255, 226, 90),
        (255, 255, 235),
    )
    return _finish(_colourise(np.clip(1.1 * tone, 0, 1), iron))


def watercolour(frame: np.ndarray) -> np.ndarray:
    """Wet washes on white paper: smoothed at half size, light pigments, darker rims where washes meet."""
    height, width = frame.shape[:2]
    half = cv2.resize(frame, ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA)
    for _ in range(2):
        half = cv2.bilateralFilter(half, 7, 40, 5)
    image = _blur(cv2.resize(half, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255.0, 1.0)
    tone = _luma(image)
    stops = ((78, 74, 140), (112, 152, 198), (204, 206, 218), (252, 230, 216), (254, 251, 245))
    wash = _grade(image, _soft_steps(tone, 5, 0.6), stops, 1.5)
    rims = np.abs(_blur(tone, 3.0) - tone)[..., None]
    return _finish(wash - 1.8 * rims + _grain(height, width, 1.8, 2))


def oil(frame: np.ndarray) -> np.ndarray:
    """Thick paint: soft Kuwahara dabs, ultramarine shadows and chrome-yellow lights."""
    image = _soften(frame, 0.8)
    tone = _luma(image)
    mean = cv2.blur(image, (5, 5))
    average = cv2.blur(tone, (5, 5))
    variance = np.maximum(cv2.blur(tone * tone, (5, 5)) - average * average, 0)
    weight = (1.0 / (variance + 6e-5)) ** 3 * 1e-12
    stack = cv2.copyMakeBorder(np.dstack([mean * weight[..., None], weight]), 3, 3, 3, 3, cv2.BORDER_REFLECT_101)
    height, width = tone.shape
    total = sum(stack[y : y + height, x : x + width] for y in (0, 6) for x in (0, 6))
    dabs = _blur(total[..., :3] / total[..., 3:], 0.7)
    tone = _luma(dabs)
    stops = ((8, 18, 66), (18, 62, 138), (72, 130, 146), (196, 150, 78), (250, 204, 84), (255, 242, 190))
    return _finish(_grade(dabs, tone, stops, 0.9))


def cyanotype(frame: np.ndarray) -> np.ndarray:
    """Sun print: Prussian blue on cream cotton paper."""
    tone = _luma(_soften(frame, 1.0))
    tone = tone + 0.6 * (tone - _blur(tone, 5.0))
    print_tone = _smoothstep(tone, -0.05, 1.0)
    page = _colourise(print_tone, ((6, 24, 74), (14, 58, 128), (64, 122, 186), (170, 204, 226), (246, 246, 236)))
    return _finish(page + _grain(*tone.shape, 1.8, 3))


def charcoal(frame: np.ndarray) -> np.ndarray:
    """Black charcoal and white chalk on toned kraft paper."""
    tone = _luma(_soften(frame, 1.3))
    relief = tone - _blur(tone, 12.0)
    mark = 0.5 + 1.5 * relief + 0.5 * (tone - 0.45)
    stops = (
        (20, 16, 16),
        (62, 48, 40),
        (140, 104, 70),
        (198, 156, 108),
        (222, 188, 142),
        (250, 240, 222),
        (255, 252, 246),
    )
    page = _colourise(mark, stops)
    page = _mix(page, (18, 14, 14), 0.85 * _ink(tone, 1.8, 0.008, 0.06))
    return _finish(page + _grain(*tone.shape, 1.5, 4))


def golden_hour(frame: np.ndarray) -> np.ndarray:
    """Low sun: teal shadows, amber light, a warm bloom."""
    image = _soften(frame, 0.7)
    tone = _luma(image)
    stops = ((0, 36, 56), (36, 74, 86), (194, 104, 60), (252, 168, 84), (255, 226, 164))
    graded = _grade(image, tone, stops, 0.8)
    bloom = _blur(_smoothstep(tone, 0.45, 1.0), 9.0)[..., None] * np.float32([0.32, 0.14, 0.02])
    return _finish(graded + bloom)


def ukiyo_e(frame: np.ndarray) -> np.ndarray:
    """Japanese woodblock print: flat indigo, vermilion, sage and rice-paper fields with soft outlines."""
    image = cv2.bilateralFilter(cv2.GaussianBlur(frame, (0, 0), 1.4), 5, 40, 5).astype(np.float32) / 255.0
    tone = _luma(image)
    stops = ((26, 38, 84), (48, 92, 128), (206, 84, 60), (226, 176, 130), (240, 222, 184), (246, 236, 210))
    fields = _grade(image, _soft_steps(tone, 5), stops, 0.3)
    return _finish(_mix(fields, (24, 26, 48), 0.9 * _ink(tone, 1.5, 0.01, 0.05)) + _grain(*tone.shape, 1.8, 5))


def night_vision(frame: np.ndarray) -> np.ndarray:
    """Light amplifier: phosphor green, lifted shadows, bloom around lights, faint scan lines."""
    tone = _luma(_soften(frame, 1.2))
    bloom = _blur(_smoothstep(tone, 0.5, 1.0), 6.0)
    scan = (1.0 - 0.05 * np.cos(2 * np.pi * (np.arange(frame.shape[0]) + 0.5) / 8)).astype(np.float32)[:, None]
    stops = ((0, 12, 4), (4, 74, 22), (24, 156, 50), (90, 226, 96), (196, 255, 170), (236, 255, 214))
    return _finish(_colourise((0.9 * tone + 0.3 * bloom) * scan, stops))


STYLES: dict[str, StyleFilter] = {
    style.__name__: style
    for style in (
        photo, pencil, comic, neon, pixel, thermal, watercolour,
        oil, cyanotype, charcoal, golden_hour, ukiyo_e, night_vision,
    )
}  # fmt: skip


def apply_style(name: str, frames: np.ndarray) -> np.ndarray:
    """Style a clip frame by frame.

    Args:
        name: A key of `STYLES`.
        frames: uint8 [T, H, W, 3] RGB, H and W at least 64.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        ValueError: Unknown style, or frames that are not uint8 [T, H, W, 3] of at least 64x64 pixels.
    """
    if name not in STYLES:
        raise ValueError(f"unknown style {name!r}; known styles: {', '.join(STYLES)}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape[1:3]) < MIN_SIDE_PX:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] with sides of at least {MIN_SIDE_PX} px,"
            f" got {frames.dtype} {list(frames.shape)}"
        )
    style = STYLES[name]
    return np.stack([style(frame) for frame in frames]) if len(frames) else frames.copy()
