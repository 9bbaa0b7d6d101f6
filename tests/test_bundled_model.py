"""The weights in the repository do what the model card says, on the bundled clip (which is not a validation clip)."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import streamdiff_core
from streamdiff_core import StreamPipeline
from streamdiff_core.metrics import flicker, psnr
from streamdiff_core.schedules import SCHEDULES
from streamdiff_core.training.evaluate import nearest_share, restyle
from streamdiff_core.training.prompts import DEFAULT_PROMPTS, HELD_OUT_PROMPTS
from streamdiff_core.training.styles import STYLES, apply_style
from streamdiff_core.video_io import read_video

TINY = Path(streamdiff_core.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def pipe() -> StreamPipeline:
    return StreamPipeline.from_preset("tiny")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.stack(list(read_video("sample", max_seconds=2)))[8:21]


@pytest.fixture(scope="module")
def targets(clip) -> dict[str, np.ndarray]:
    return {style: apply_style(style, clip) for style in STYLES}


def test_weights_are_small_and_safe():
    files = list(TINY.iterdir())
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert max(f.stat().st_size for f in files) <= 9.5e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md", ".csv", ".png", ""}


@pytest.mark.parametrize("style", list(STYLES))
def test_prompt_gives_its_own_style(pipe, clip, targets, style):
    """Nearest to its own filter in every chunk, 3 dB nearer than the input is; also for a wording never trained on.
    Where the input is still the output changes no more than the filter's (1.0 to 2.6 times that if not held still)."""
    for prompt in (DEFAULT_PROMPTS[style], HELD_OUT_PROMPTS[style][0]):
        output = restyle(pipe, clip, prompt)
        assert nearest_share(output, targets, style) == (3, 3), prompt
        assert flicker(output, clip) <= flicker(targets[style], clip), prompt
    if style != "photo":
        assert psnr(output, targets[style]) > psnr(clip, targets[style]) + 3


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_a_stream_goes_on_as_well_with_other_steps(pipe, clip, targets, before, after):
    """With the cache that a single step wrote, two steps were 7 dB further from the filter, and stayed there."""
    with pipe.start(DEFAULT_PROMPTS["pencil"], steps=before) as session:
        first = session.push(clip[:5])
        session.set_options(steps=after)
        output = np.concatenate([first, session.push(clip[5:]), session.flush()])
    unchanged = restyle(pipe, clip, DEFAULT_PROMPTS["pencil"], steps=after)
    assert psnr(output[5:], targets["pencil"][5:]) > psnr(unchanged[5:], targets["pencil"][5:]) - 1


@pytest.mark.parametrize("style", ["oil", "watercolour"])
def test_flat_ground_shows_no_grid(pipe, clip, style):
    """Steps across the edges of 16-pixel tokens against those inside, both of at most 8 levels; 1.7 as decoded."""
    grey = restyle(pipe, clip, DEFAULT_PROMPTS[style]).mean(-1)
    ratios = []
    for axis in (1, 2):
        steps = np.moveaxis(np.abs(np.diff(grey, axis=axis)), axis, -1)
        at_edges, inside = steps[..., 15::16], np.delete(steps, np.s_[7::8], axis=-1)
        ratios.append(at_edges[at_edges < 8].mean() / inside[inside < 8].mean())
    assert np.mean(ratios) < 1.35


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_gives_the_style(pipe, clip, targets, schedule):
    """Also the rolling window, whose mixed noise levels these weights never saw: softer and more garish, but oil."""
    output = restyle(pipe, clip, DEFAULT_PROMPTS["oil"], schedule=schedule)
    assert nearest_share(output, targets, "oil") == (3, 3)


def test_self_guidance_leaves_the_input_further_behind(pipe, clip):
    """R-CFG draws the picture away from the input (SEEDS §5)."""
    gaps = []
    for scale in (1.0, 1.1, 1.2):
        output = restyle(pipe, clip, DEFAULT_PROMPTS["oil"], input_options=dict(rcfg=dict(scale=scale)))
        gaps.append(np.abs(output.astype(float) - clip).mean())
    assert gaps[0] + 2 < gaps[1] < gaps[2] - 2


def test_still_input_stays_still(pipe, clip):
    """After the cache has filled, a frozen input changes by less than a tenth of a grey level from frame to frame."""
    output = restyle(pipe, np.repeat(clip[:1], 41, axis=0), DEFAULT_PROMPTS["oil"]).astype(float)
    assert np.abs(np.diff(output[20:], axis=0)).mean((1, 2, 3)).max() < 0.1


def test_more_noise_follows_the_input_less(pipe, clip):
    for options in ({}, {"guided": False}):
        photo = partial(restyle, pipe, clip, DEFAULT_PROMPTS["photo"], **options)
        fidelity = [psnr(photo(noise_scale=s), clip) for s in (0.2, 0.5, 0.9)]
        assert fidelity[0] > fidelity[1] + 1 and fidelity[1] > fidelity[2] + 1


@pytest.mark.parametrize(("style", "gain_db"), [("neon", 5), ("pixel", 3), ("watercolour", 0.5), ("photo", 1)])
def test_the_guide_puts_edges_where_they_belong(pipe, clip, targets, style, gain_db):
    """Nearer to the style's filter than without, also in motion."""
    plain, guided = (
        psnr(restyle(pipe, clip, DEFAULT_PROMPTS[style], guided=on), targets[style]) for on in (False, True)
    )
    assert guided > plain + gain_db


def test_model_card_names_sources_and_figures():
    card = (TINY / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in ("Intel IoT DevKit", "Blender Foundation", "CC BY", "hours", "Real-time factor", "unseen"):
        assert words in card
    assert len(re.findall(r"^\| (\w+) \|", card, flags=re.M)) >= 13
