"""Settings by name: what is read, what is refused, and where each lands among the options of a stream."""

from __future__ import annotations

from collections import Counter

import pytest

from streamdiff_core.config import CacheConfig
from streamdiff_core.inputs import INPUTS
from streamdiff_core.kv_policies import POLICIES
from streamdiff_core.option_names import apply_settings, parse_setting, parse_settings, parse_variation, start_with
from streamdiff_core.schedules import SCHEDULES

CACHE = CacheConfig(sink_frames=1, window_frames=3, positions="packed")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("policy=sink,ema_sink", ("sink", "ema_sink")),
        ("steps=1,2", (1, 2)),
        ("noise_scale=.5,0.75", (".5", 0.75)),  # JSON has no ".5": text, which check_options refuses
        ("steady=true,False", (True, False)),
        ("deadline_ms=null", (None,)),
        ("window_frames = 3 , 4", (3, 4)),
        ("ema_sink.decay=0.5", (0.5,)),
        ('frame_routing.choose_by="a,b"', ("a,b",)),
        ("forcing_kv.dynamic_heads=[[],[0,1]],[[0],[]]", ([[], [0, 1]], [[0], []])),
        ("inputs=none,freeze+rcfg", ("none", "freeze+rcfg")),
    ],
)
def test_variations_are_read(text: str, values: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamdiff_core.option_names._check_knob", lambda *_: None)
    name, found = parse_variation(text)
    assert name == text.partition("=")[0].strip() and found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps", "'steps' is no setting"),
        ("=2", "is no setting"),
        ("steps=", "steps needs a value"),
        ("steps=1,,2", "steps needs a value"),
        ("steps=1,2,1", "the same value twice"),
        ("colour=red", "unknown setting 'colour'; known: seed, steps"),
        ("width=64", "unknown setting 'width'"),
        ("policy_options=1", "unknown setting 'policy_options'"),
        ("policy=sink,sunk", "unknown policy 'sunk'; known: anchor_forcing"),
        ("schedule=7", "unknown schedule '7'"),
        ("inputs=freeze+thaw", "unknown input rule 'thaw'"),
        ("emasink.decay=1", "no mechanism is called 'emasink'"),
        ("ema_sink.speed=1", "ema_sink has no knob 'speed'; it has: decay"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_variation(text)


def test_one_setting_has_one_value_and_stands_once() -> None:
    assert parse_setting("steps=2") == ("steps", 2)
    assert parse_settings(["steps=2", "freeze.settle_chunks=1"]) == {"steps": 2, "freeze.settle_chunks": 1}
    with pytest.raises(ValueError, match="2 values; give one"):
        parse_setting("steps=1,2")
    with pytest.raises(ValueError, match="steps is set twice"):
        parse_settings(["steps=1", "steps=2"])


def test_every_setting_lands_where_it_belongs() -> None:
    before = {"policy": "sink", "schedule": "stream_batch", "steps": 2}
    settings = {
        "steps": 3, "window_frames": 5, "policy": "ema_sink", "ema_sink.decay": 0.5, "deep_forcing.memory_frames": 9,
        "schedule": "sequential", "sequential.cache_per_step": True,
        "inputs": "freeze+rcfg", "freeze.settle_chunks": 4,
    }  # fmt: skip
    assert apply_settings(before, settings, CACHE) == {
        "steps": 3, "policy": "ema_sink", "policy_options": {"decay": 0.5},
        "schedule": "sequential", "schedule_options": {"cache_per_step": True},
        "input_options": {"freeze": {"settle_chunks": 4}, "rcfg": {}},
        "cache": CacheConfig(sink_frames=1, window_frames=5, positions="packed"),
    }  # fmt: skip
    assert before == {"policy": "sink", "schedule": "stream_batch", "steps": 2}


def test_knobs_of_another_mechanism_do_not_stay() -> None:
    before = {"policy": "ema_sink", "policy_options": {"decay": 0.5}}
    assert apply_settings(before, {"policy": "sink"}, CACHE)["policy_options"] == {}
    assert apply_settings(before, {"policy": "ema_sink"}, CACHE)["policy_options"] == {"decay": 0.5}
    assert apply_settings(before, {"steps": 1}, CACHE)["policy_options"] == {"decay": 0.5}


def test_a_single_stream_refuses_a_knob_that_is_not_in_use() -> None:
    with pytest.raises(ValueError, match="freeze.settle_chunks changes nothing: the stream does not use freeze"):
        start_with({"policy": "sink"}, {"freeze.settle_chunks": 1}, CACHE)
    with pytest.raises(ValueError, match="window_frames must be a whole number"):
        start_with({}, {"window_frames": "many"}, CACHE)


def test_a_knob_names_one_mechanism() -> None:
    """``name.knob`` has no kind in front, so no two mechanisms may share a name."""
    counts = Counter([*POLICIES, *SCHEDULES, *INPUTS])
    assert max(counts.values()) == 1 and len(counts) >= 20
