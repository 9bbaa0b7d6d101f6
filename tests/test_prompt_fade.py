"""prompt_fade.py: weights by hand, exact ends, and a session in which only the prompt changes (SEEDS §8-8)."""

import math

import pytest
import torch
from random_pipeline import moving_frames, random_pipeline, record_latents
from torch.testing import assert_close

from streamdiff_core.attention import PromptContext
from streamdiff_core.prompt_fade import PromptFade, likeness


def prompt_of(*means: float) -> PromptContext:
    """One layer, two text positions, one head; keys around these means, values their negatives."""
    keys = torch.tensor(means, dtype=torch.float64) + torch.tensor([[[[1.0]], [[-1.0]]]], dtype=torch.float64)
    return PromptContext((keys,), (-keys,))


EAST, NORTH, WEST = prompt_of(1, 0), prompt_of(0, 1), prompt_of(-1, 0)


@pytest.mark.parametrize(
    "new, cosine, num_frames",
    [(EAST, 1, 3), (prompt_of(4, 3), 0.8, 6), (prompt_of(3, 4), 0.6, 9), (NORTH, 0, 15), (WEST, -1, 15)],
)
def test_unlike_prompts_take_longer(new, cosine, num_frames):
    """3 + 12 (1 - cos), to a multiple of 3: 3; 5.4 → 6 (5.4 / 3 = 1.8); 7.8 → 9 (2.6); 15; 27 → 15."""
    assert math.isclose(likeness(EAST, new), cosine, abs_tol=1e-6)
    assert PromptFade(EAST, new, 0).num_frames == num_frames


def test_weights_by_hand():
    """Switch at frame 10, fade of 3 frames: 10 11 12 wait, then a third, two thirds, all of the way on a cosine."""
    fade = PromptFade(EAST, EAST, 10)
    assert [round(fade.weight(f), 4) for f in range(8, 18)] == [0, 0, 0, 0, 0, 0.25, 0.75, 1, 1, 1]
    assert PromptFade(EAST, EAST, 10, wait_frames=0).weight(10) == fade.weight(13)


def test_ends_are_the_prompts_themselves_and_the_middle_is_a_blend():
    fade = PromptFade(EAST, NORTH, 0)
    assert fade.at(2) is EAST and fade.at(17) is NORTH and fade.at(500) is NORTH
    weight, middle = fade.weight(8), fade.at(8)
    assert 0 < weight < 1
    assert_close(middle.keys[0], (1 - weight) * EAST.keys[0] + weight * NORTH.keys[0])
    assert_close(middle.values[0], (1 - weight) * EAST.values[0] + weight * NORTH.values[0])


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


def played(pipe, switch, schedule="sequential"):
    """Latents and prompts per chunk; the prompt changes before latent frame 7 (chunk 6)."""
    session, clip = pipe.start("pencil", schedule=schedule), moving_frames(25 + 4 * 22)
    latents, prompts, work = record_latents(session), [], session._denoiser.work

    def record(chunk, switch=None):
        prompts.append(chunk and chunk.prompt)
        return work(chunk, switch)

    session._denoiser.work = record
    session.push(clip[:25])
    if switch:
        session.set_prompt("oil paint", switch)
    session.push(clip[25:])
    session.flush()
    return latents, [p for p in prompts if p is not None]


@pytest.mark.parametrize("schedule", ["sequential", "stream_batch"])
def test_a_stream_slides_into_the_new_prompt(pipe, schedule):
    """Chunk c holds frame c + 1 from chunk 1 on: 6 7 8 wait with the old prompt, bit for bit as without a switch."""
    old, new = pipe.encode_prompt("pencil"), pipe.encode_prompt("oil paint")
    n = PromptFade(old, new, 7).num_frames
    latents, prompts = played(pipe, "fade", schedule)
    plain, _ = played(pipe, None, schedule)
    assert all(p is old for p in prompts[:9]) and all(p is new for p in prompts[8 + n :])
    assert all(p is not old and p is not new for p in prompts[9 : 8 + n])
    assert all(torch.equal(a, b) for a, b in zip(latents[:9], plain[:9], strict=True))
    assert not torch.allclose(latents[9], plain[9], atol=1e-6)


def test_a_second_switch_starts_from_where_the_first_one_is(pipe):
    session, clip = pipe.start("pencil", schedule="sequential"), moving_frames(61)
    session.push(clip[:25])
    session.set_prompt("oil paint", "fade")
    session.push(clip[25:45])  # five chunks: frames 7 … 11
    under_way = session._prompt_at(12)
    session.set_prompt("ink", "fade")
    assert_close(session._prompt_at(12).keys, under_way.keys, rtol=0, atol=0)
    session.set_prompt("chalk", "keep")
    assert session._prompt_at(12) is pipe.encode_prompt("chalk")
