"""cuda_graphs.py with a graph for CPUs: operations are written down with their tensors and later run on that memory.

Whatever a replay would not do on a GPU it does not do here either: Python is not run again, numbers that were baked in
stay, and what was recorded has not been computed yet (it is filled with NaN).
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_pipeline import RANDOM_PRESET, moving_frames, random_pipeline, record_latents, stream
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamdiff_core import cuda_graphs
from streamdiff_core.config import CacheConfig
from streamdiff_core.cuda_graphs import CudaCapture, record_forwards
from streamdiff_core.kv_cache import CacheView, KVCache
from streamdiff_core.kv_policies import POLICIES, make_policy
from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.types import RowPlan

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.is_nonzero.default}
FROM_HOST = {aten.lift_fresh.default}
FRAMES = moving_frames(221)


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def memory(x):
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """A recorded graph."""

    def __init__(self):
        super().__init__()
        self.steps, self.num_replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS | FROM_HOST:
            raise RuntimeError(f"{func} is not permitted while a stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def forget_results(self):
        """A capture computes nothing."""
        for func, args, kwargs, out in self.steps:
            owned = {memory(x) for x in tensors((args, kwargs))}
            for x in tensors(out):
                if func._schema.is_mutable or memory(x) not in owned:
                    x.fill_(float("nan") if x.is_floating_point() or x.is_complex() else -1)

    def replay(self):
        self.num_replays += 1
        for func, args, kwargs, out in self.steps:
            for new, fixed in zip(tensors(func(*args, **kwargs)), tensors(out), strict=True):
                if memory(new) != memory(fixed):
                    fixed.copy_(new)


class Tapes(list):
    """Stands in for ``CudaCapture``."""

    def __call__(self, run):
        with Tape() as tape:
            out = run()
        tape.forget_results()
        self.append(tape)
        return tape.replay, out

    @property
    def num_replays(self):
        return sum(tape.num_replays for tape in self)


def recorded_pipeline():
    pipe, tapes = random_pipeline(), Tapes()
    record_forwards(pipe.transformer, tapes)
    return pipe, tapes


def with_switches(pipe, **options):
    """A stream with a prompt switch of each kind in it; its latents, and the frames."""
    session = pipe.start("pencil", steps=2, seed=3, **options)
    latents, out, start = record_latents(session), [], 0
    for length, switch in ((61, "keep"), (40, "recache"), (40, "flush"), (40, "reset"), (40, None)):
        out.append(session.push(FRAMES[start : start + length]))
        start += length
        if switch:
            session.set_prompt(f"oil after {switch}", on_switch=switch)
    return latents, np.concatenate([*out, session.flush()])


@pytest.mark.parametrize("schedule", ["stream_batch", "sequential"])
@pytest.mark.parametrize("positions", ["absolute", "packed", "slots", "ahead", "wrap"])
def test_same_stream_bit_for_bit(schedule, positions):
    cache = CacheConfig(sink_frames=1, window_frames=3, positions=positions, refresh_at=9)
    eager = with_switches(random_pipeline(), cache=cache, schedule=schedule)
    pipe, tapes = recorded_pipeline()
    got = with_switches(pipe, cache=cache, schedule=schedule)
    assert len(got[0]) == 55 and tapes.num_replays > 25
    for a, b in zip(eager[0], got[0], strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(eager[1], got[1])


def test_a_row_keeps_its_own():
    """To and fro between two prompts: the recaching forwards of the two rows differ in nothing but the row."""

    def run(pipe):
        session, out = pipe.start("pencil", steps=2), []
        for start in range(0, 205, 12):  # three chunks: the window's slots lie as before
            out.append(session.push(FRAMES[start : start + 12]))
            session.set_prompt("oil" if start % 24 else "pencil", on_switch="recache")
        return np.concatenate(out)

    pipe, tapes = recorded_pipeline()
    assert np.array_equal(run(random_pipeline()), run(pipe)) and tapes.num_replays > 10


@pytest.mark.parametrize("positions", ["absolute", "packed", "wrap"])
def test_a_window_of_three_slots_is_three_graphs(positions):
    cache = CacheConfig(sink_frames=1, window_frames=3, positions=positions, refresh_at=50)
    pipe, tapes = recorded_pipeline()
    session = pipe.start("pencil", steps=2, cache=cache)
    session.push(FRAMES[:45])  # the cache fills; every slot has its turn twice
    before, num_graphs = tapes.num_replays, len(tapes)
    session.push(FRAMES[45:105])
    assert len(tapes) == num_graphs
    assert tapes.num_replays == before + 15, "each chunk is one replay"
    assert sum(tape.num_replays >= 5 for tape in tapes) == 3


def test_two_steady_ticks_are_the_same_operations():
    """In kind, shape and stride, and other slots only: nothing else would fit in a graph."""
    pipe, tapes = recorded_pipeline()
    pipe.start("pencil", steps=2).push(FRAMES[:61])
    steady = [
        [(str(func), [(x.shape, x.stride(), x.dtype) for x in tensors(out)]) for func, _, _, out in tape.steps]
        for tape in tapes[-3:]
    ]
    assert steady[0] == steady[1] == steady[2] and len(steady[0]) > 100


def test_streams_side_by_side_and_the_end_of_one():
    alone = [stream(random_pipeline().start("pencil", seed=seed), FRAMES[:61]) for seed in (1, 2)]
    pipe, tapes = recorded_pipeline()
    recordings = pipe.transformer.forward.recordings
    sessions = [pipe.start("pencil", seed=seed) for seed in (1, 2)]
    out = [[], []]
    for start in range(0, 61, 4):
        for i, session in enumerate(sessions):
            out[i].append(session.push(FRAMES[:61][start : start + 4]))
    for i, session in enumerate(sessions):
        out[i].append(session.flush())
        assert np.array_equal(np.concatenate(out[i]), alone[i])
    assert tapes.num_replays > 10 and len(recordings) == 2
    sessions.pop(0).close()
    del session
    gc.collect()
    assert len(recordings) == 1, "a recording that outlives its cache holds its memory, or worse, writes to it"


def test_what_cannot_repeat_runs_as_always():
    """Rows of two streams in one forward, and a policy that edits slots."""
    pipe, tapes = recorded_pipeline()
    one, two = (pipe.start("pencil", schedule="sequential", steps=1, seed=seed) for seed in (0, 1))
    for start in (0, *range(5, 61, 4)):
        rows = []
        for session in (one, two):
            work = session._denoiser.work(session.encode_chunk(FRAMES[start : start + (4 if start else 5)]).chunk)
            rows += next(work)
        pipe.engine.forward(rows)
    assert not tapes
    stream(pipe.start("pencil", policy="ema_sink", steps=1), FRAMES[:61])
    assert not tapes


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy(policy):
    """Those that edit, select or merge are partly or never recorded; none may notice."""
    sinks = "released" if policy == "sink" else "off"
    cache = CacheConfig(sink_frames=2, window_frames=4, positions="packed", adaptive_sink=sinks)
    options = {"policy": policy, "cache": cache, "steps": 2, "schedule": "stream_batch"}
    pipe, _ = recorded_pipeline()
    eager, got = (stream(p.start("pencil", **options), FRAMES[:101]) for p in (random_pipeline(), pipe))
    assert np.array_equal(eager, got)


def test_layers_that_differ_are_not_recorded():
    """Their positions could not be told from those of the first layer."""
    session = random_pipeline().start("pencil")
    session.push(FRAMES[:21])
    cache = session.cache
    row = session.newest_row()
    assert cache.begin(row.cache_row, row.frame_ids).moves() is not None
    cache._rotated_to[1][row.cache_row][0] = 99
    assert cache.begin(row.cache_row, row.frame_ids).moves() is None


def test_no_more_than_so_many(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    pipe, tapes = recorded_pipeline()
    session = pipe.start("pencil", steps=1)
    session.push(FRAMES[:61])
    (known,) = pipe.transformer.forward.recordings.values()
    assert len(known) == 2
    assert not tapes, "three forwards in turn: each is forgotten before it comes again"


def test_the_one_not_used_for_longest_goes():
    pipe, _ = recorded_pipeline()
    session = pipe.start("pencil", steps=1)
    session.push(FRAMES[:61])
    session.set_prompt("oil")
    session.push(FRAMES[61:69])
    session.set_prompt("pencil")
    session.push(FRAMES[69:89])
    (known,) = pipe.transformer.forward.recordings.values()
    assert [recording is not None for recording in known.values()][-5:] == [False, False, True, True, True]


@pytest.mark.parametrize("position", [None, 7])
def test_a_replay_leaves_the_positions_that_a_forward_leaves(position):
    """``None``: written, and read without being turned."""
    model, plan = RANDOM_PRESET.model, RowPlan(((0, 0),), 2, (position, 3), (7,))
    at = []
    for replayed in (False, True):
        cache = KVCache(model, make_policy("sink", CacheConfig()), num_rows=1, tokens_per_frame=2)
        for layer in cache._rotated_to:
            layer[0][:2] = 5, 3
        view = CacheView(cache, 0, plan)
        if replayed:
            view.note(view.moves())
        else:
            for layer in range(model.num_layers):
                view.update(layer, *torch.ones(2, 2, model.num_heads, model.head_dim))
        at.append(cache._rotated_to)
    assert at[0] == at[1] and at[0][1][0][:2] == [position, 3]


def test_what_torch_is_asked_for(monkeypatch):
    """Memory in common for all recordings, and no objection to what other threads do on the GPU meanwhile."""
    asked, inside = [], []

    @contextmanager
    def graph(graph, **options):
        inside.append(graph)
        yield asked.append(options)
        inside.clear()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = CudaCapture()
    for _ in range(2):
        replay, out = capture(lambda: len(inside))
        assert out == 1 and not inside and replay() == "replayed"
    assert asked[0] == asked[1] and asked[0]["capture_error_mode"] == "thread_local"


def test_without_a_gpu_the_option_is_refused():
    with pytest.raises(ValueError, match="need a GPU, the model is on cpu; leave out --cuda-graphs"):
        record_forwards(random_pipeline(RANDOM_PRESET).transformer)
    with pytest.raises(ValueError, match="leave out --cuda-graphs"):
        StreamPipeline.from_preset("tiny", device="cpu", cuda_graphs=True)
