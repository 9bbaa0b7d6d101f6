"""chunk_decoder.py: which step comes after which, each chunk with its own input, nothing kept longer than needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET
from torch import Tensor
from torch.testing import assert_close

from streamdiff_core.chunk_decoder import ChunkDecoder
from streamdiff_core.config import SeamConfig, SteadyConfig
from streamdiff_core.deblock import deblock_
from streamdiff_core.device_streams import InTurn
from streamdiff_core.frames import tensor_to_uint8
from streamdiff_core.steady import SteadyState, hold_still
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.timing import StageTimer
from streamdiff_core.types import DenoisedChunk

SEAMS = (SeamConfig(period_px=8, largest_step=90.0, reach_px=4),)
PRESET = replace(RANDOM_PRESET, seams=SEAMS, steady=SteadyConfig(moved_levels=4, changed_levels=30, min_gain=0.1))
EVERYTHING = StreamOptions(guided=True, steady=True, noise_scale=PRESET.noise_scale)


@dataclass
class Memory:
    """What ``CellVAE`` remembers."""

    nbytes: int = 7


class CellVAE:
    """A latent value is the grey of a cell of 8x8 pixels; its guide takes a quarter of the input."""

    def new_state(self) -> Memory:
        return Memory()

    def decode(self, latents: Tensor, state: Memory) -> Tensor:
        state.nbytes += 1
        return latents.expand(-1, -1, 3, -1, -1).repeat_interleave(8, -1).repeat_interleave(8, -2)

    def guide(self, video: Tensor, source: Tensor) -> Tensor:
        return video.lerp(source, 0.25)


def make(streams: InTurn | None = None) -> ChunkDecoder:
    return ChunkDecoder(CellVAE(), PRESET, streams or InTurn(), StageTimer())


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def chunk(chunk_idx: int, num_frames: int = 4) -> DenoisedChunk:
    return DenoisedChunk(chunk_idx, random(4, 1, 2, 2, seed=chunk_idx), num_frames)


def source(chunk_idx: int) -> Tensor:
    return random(4, 3, 16, 16, seed=100 + chunk_idx)


def test_seams_are_smoothed_then_edges_taken_from_the_input_then_still_pixels_held():
    decoder, memory = make(), SteadyState()
    for chunk_idx in range(3):
        decoder.remember(chunk_idx, source(chunk_idx), EVERYTHING)
        latents = chunk(chunk_idx).latents
        video = deblock_(CellVAE().decode(latents[None], Memory())[0], SEAMS)
        video = CellVAE().guide(video, source(chunk_idx))
        want = tensor_to_uint8(hold_still(video, source(chunk_idx), memory, PRESET.steady)[None])
        assert np.array_equal(decoder.decode(chunk(chunk_idx), EVERYTHING).frames, want)


def test_every_chunk_finds_its_own_input_however_late_it_comes():
    """Two more are in the model when the first comes out, as in a stream batch."""
    late, prompt = make(), make()
    for chunk_idx in range(3):
        late.remember(chunk_idx, source(chunk_idx), EVERYTHING)
    for chunk_idx in range(3):
        prompt.remember(chunk_idx, source(chunk_idx), EVERYTHING)
        assert np.array_equal(*(d.decode(chunk(chunk_idx), EVERYTHING).frames for d in (late, prompt)))


def test_padding_is_cut():
    whole, cut = make().decode(chunk(0), EVERYTHING).frames, make().decode(chunk(0, num_frames=3), EVERYTHING).frames
    assert whole.shape == (4, 16, 16, 3) and np.array_equal(cut, whole[:3])


@pytest.mark.parametrize(
    ("options", "is_kept"),
    [
        (EVERYTHING, True),
        (replace(EVERYTHING, steady=False), True),
        (replace(EVERYTHING, guided=False), True),
        (replace(EVERYTHING, steady=False, guided=False), False),
    ],
)
def test_an_input_is_kept_while_its_chunk_is_in_the_model_and_something_wants_it(options, is_kept):
    decoder = make()
    empty = decoder.nbytes
    decoder.remember(0, source(0), options)
    assert decoder.nbytes == empty + is_kept * source(0).nbytes
    decoder.decode(chunk(0), options)
    shown = 2 * source(0)[0].nbytes if options.steady else 0
    assert decoder.nbytes == empty + 1 + shown, "a step of the VAE's memory, the picture shown last and its input"


def test_without_input_nothing_is_held_and_what_was_shown_is_forgotten():
    decoder = make()
    decoder.remember(0, source(0), EVERYTHING)
    decoder.decode(chunk(0), EVERYTHING)
    assert np.array_equal(decoder.decode(chunk(1), EVERYTHING).frames, make().decode(chunk(1), EVERYTHING).frames)
    assert decoder.nbytes == make().nbytes + 2


class OnTheirWay(InTurn):
    """Frames that arrive when they are asked for."""

    def __init__(self) -> None:
        self.arrived = []

    def fetch(self, x: Tensor):
        number, host = len(self.arrived), super().fetch(x)
        self.arrived.append(False)

        def wait() -> np.ndarray:
            self.arrived[number] = True
            return host()

        return wait


def test_frames_on_their_way_are_waited_for_in_order():
    streams = OnTheirWay()
    decoder, plain = make(streams), make()
    decoder.start(chunk(0), EVERYTHING)
    assert [c.chunk_idx for c in decoder.finished(but=1)] == [0], "a stream's first chunk is always waited for"
    for chunk_idx in (1, 2, 3):
        decoder.start(chunk(chunk_idx), EVERYTHING)
    done = list(decoder.finished(but=1))
    assert [c.chunk_idx for c in done] == [1, 2] and streams.arrived == [True, True, True, False]
    done += decoder.finished()
    assert [c.chunk_idx for c in done] == [1, 2, 3] and all(streams.arrived)
    plain.decode(chunk(0), EVERYTHING)
    for c in done:
        assert_close(c.frames, plain.decode(chunk(c.chunk_idx), EVERYTHING).frames)
