"""device_streams.py with streams for CPUs that know what has to be finished before each piece of work may begin.

Everything runs at once and in order here; what is looked at is what a GPU would be free to do.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from random_pipeline import moving_frames, random_pipeline, stream

from streamdiff_core.device_streams import StageStreams
from streamdiff_core.pipeline import StreamPipeline

FRAMES = moving_frames(41)
CHUNKS = range(10)


class FakeStream:
    """``finished``: work that is over before anything put here from now on begins."""

    def __init__(self, *_):
        self.finished = frozenset()

    def wait_stream(self, other):
        self.finished |= other.finished


class FakeCuda:
    """``before[work]``: what is finished when it begins; ``used_on``: streams a tensor's memory is kept for."""

    def __init__(self, monkeypatch):
        self.caller = self.current = FakeStream()
        self.host, self.before, self.used_on = FakeStream(), {}, []
        self.counts = {}
        cuda = self

        class Event:
            def record(self):
                self.finished = cuda.current.finished

            def synchronize(self):
                cuda.host.wait_stream(self)

        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.entering)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: self.used_on.append((memory(x), s)))
        plain = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: plain(*size, **rest))

    @contextmanager
    def entering(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def watch(self, monkeypatch, owner, method, name):
        """Number the calls of a method and note what they come after."""
        real = getattr(owner, method)

        def call(*args, **kwargs):
            work = (name, self.counts.setdefault(name, 0))
            self.counts[name] += 1
            self.before[work] = self.current.finished
            self.current.finished |= {work}
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, call)


def memory(x):
    return x.untyped_storage().data_ptr()


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.fixture
def pipe(cuda, monkeypatch):
    """One step, so that forward k is chunk k."""
    pipe = random_pipeline()
    pipe.overlap_stages = True
    cuda.watch(monkeypatch, pipe.vae, "encode", "encode")
    cuda.watch(monkeypatch, pipe.engine, "forward", "denoise")
    cuda.watch(monkeypatch, pipe.vae, "decode", "decode")
    return pipe


def chunks():
    """The clip as chunks."""
    return np.split(FRAMES, range(5, len(FRAMES), 4))


def test_each_chunk_in_order_and_neighbours_at_once(cuda, pipe):
    session = pipe.start("pencil", steps=1)
    for frames in chunks():
        session.push(frames)
    session.flush()
    for k in CHUNKS:
        assert ("encode", k) in cuda.before["denoise", k]
        assert {("denoise", k), ("encode", k)} <= cuda.before["decode", k]
        for name in ("encode", "denoise", "decode"):
            assert {(name, j) for j in range(k)} <= cuda.before[name, k], "a stage takes its chunks in turn"
        assert not any(name == "decode" for name, _ in cuda.before["denoise", k]), "no denoising waits for a decoder"
        assert {name for name, _ in cuda.before["encode", k]} <= {"encode"}, "and no encoding for either"


def test_frames_come_one_chunk_later_and_are_there_when_they_come(cuda, pipe):
    """Without the first chunk's: it comes at once."""
    session = pipe.start("pencil", steps=1)
    out, held = [], []
    for frames in chunks():
        out.append(session.push(frames))
        held.append(max([j for name, j in cuda.host.finished if name == "decode"], default=-1))
    out.append(session.flush())
    assert [len(clip) for clip in out] == [5, 0, *[4] * 8, 4]
    assert held == [0, 0, *range(1, 9)], "the host waits for what it returns, not for the newest chunk"
    assert ("decode", 9) in cuda.host.finished
    assert np.array_equal(np.concatenate(out), stream(random_pipeline().start("pencil", steps=1), FRAMES))


@pytest.mark.parametrize("options", [{"schedule": "stream_batch"}, {"input_options": {"freeze": {}}}, {"steady": True}])
def test_same_frames_as_in_turn(pipe, options):
    frames = FRAMES.copy()
    frames[17:30] = frames[17]  # stands still
    plain = stream(random_pipeline().start("pencil", steps=2, **options), frames)
    assert np.array_equal(stream(pipe.start("pencil", steps=2, **options), frames, [5, 7, 12, 1, 16]), plain)


def test_text_to_video(pipe):
    plain, late = (p.start("pencil", steps=1, mode="t2v") for p in (random_pipeline(), pipe))
    for count in (5, 6, 9):
        assert np.array_equal(late.generate(count), plain.generate(count))


def test_memory_stays_for_the_stream_that_reads_it(cuda, pipe):
    """What was made on one stream and is read on another: latents into the denoiser, x0 and the input into the
    decoder."""
    session = pipe.start("pencil", steps=1, steady=True)
    streams = session._streams._streams
    encoded = session.encode_chunk(FRAMES[:5])
    assert (memory(encoded.chunk.latents), cuda.caller) in cuda.used_on
    source = memory(session._decoder._sources[0])
    (denoised,) = session.denoise_chunk(encoded)
    frames = session.decode_chunk(denoised).frames
    assert ("decode", 0) in cuda.host.finished, "who decodes a chunk himself gets its frames"
    assert {(memory(denoised.latents), streams["decode"]), (source, streams["decode"])} <= set(cuda.used_on)
    assert np.array_equal(frames, random_pipeline().start("pencil", steps=1, steady=True).push(FRAMES[:5]))


def test_streams_begin_after_what_the_caller_did(cuda):
    cuda.caller.finished = frozenset({"weights"})
    streams = StageStreams(torch.device("cpu"))._streams
    assert streams["encode"] is not streams["decode"]
    assert all("weights" in stream.finished for stream in streams.values())


def test_closing_lets_go(pipe):
    session = pipe.start("pencil", steps=1)
    session.push(FRAMES)
    decoder = weakref.ref(session._decoder)
    assert len(decoder()._under_way) == 1
    session.close()
    assert decoder() is None


def test_without_a_gpu_the_option_is_refused():
    with pytest.raises(ValueError, match="on a GPU, the model is on cpu; leave out --overlap-stages"):
        StreamPipeline.from_preset("tiny", device="cpu", overlap_stages=True)
