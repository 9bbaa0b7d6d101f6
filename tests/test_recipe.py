"""A recipe as text: everything comes back, nothing wrong is let through, and what differs here is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipeline import small_pipeline, small_preset

import streamdiff_core
from streamdiff_core.config import CacheConfig, get_preset
from streamdiff_core.recipe import OptionEvent, PromptEvent, Recipe, prompt_events
from streamdiff_core.stream_options import StreamOptions
from streamdiff_core.weights import hash_weights

RECIPE = Recipe(
    preset="tiny",
    model_sha256="ab" * 32,
    input="clip.mp4",
    input_sha256="cd" * 32,
    resampled=False,
    fps=29.97,
    num_frames=120,
    prompt={"ink": 1.0, "öl auf leinwand": 0.5},
    options=StreamOptions(seed=7, steps=3, cache=CacheConfig(slot_origins=(1, 9)), deadline_ms=None, width=320),
    events=(
        PromptEvent(frame=5, prompt="charcoal", on_switch="recache"),
        OptionEvent(frame=5, options={"steps": 1, "noise_scale": 0.3}),
        PromptEvent(frame=9, prompt={"ink": 2}),
    ),
    side_by_side=True,
)


def changed(path: str, value: object) -> str:
    """The recipe's JSON with one entry set (or, for ..., removed); ``a.b.0`` reaches inside."""
    values = json.loads(RECIPE.to_json())
    *steps, last = [int(s) if s.isdigit() else s for s in path.split(".")]
    inner = values
    for step in steps:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(values)


@pytest.mark.parametrize("indent", [None, 1])
def test_there_and_back(indent: int | None) -> None:
    text = RECIPE.to_json(indent)
    again = Recipe.from_json(text)
    assert again == RECIPE and again.to_json(indent) == text
    assert isinstance(again.options.cache.slot_origins, tuple) and isinstance(again.events[1], OptionEvent)
    assert "öl" in text and ("\n" in text) == (indent is not None)
    assert json.loads(text)["streamdiff"] == streamdiff_core.__version__ and json.loads(text)["format"] == 1


def test_numpy_numbers_become_plain() -> None:
    recipe = replace(RECIPE, num_frames=np.int64(8), options=replace(RECIPE.options, noise_scale=np.float32(0.5)))
    assert Recipe.from_json(recipe.to_json()).num_frames == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "the recipe is no JSON"),
        ("[]", "recipe must be an object with named fields, got []"),
        (changed("format", 2), "recipe.format 2 is not the 1 that this version reads; update"),
        (changed("fps", ...), "recipe lacks the field 'fps'"),
        (changed("options.steps", ...), "recipe.options lacks the field 'steps'"),
        (changed("options.cache.positions", ...), "recipe.options.cache lacks the field 'positions'"),
        (changed("colour", "red"), "recipe has the unknown field 'colour'"),
        (changed("options.cache.sinks", 3), "recipe.options.cache has the unknown field 'sinks'"),
        (changed("options.steps", "3"), "steps must be a whole number, got '3'"),
        (changed("options.cache.positions", "up"), "positions must be one of absolute"),
        (changed("options", 3), "options must be"),
        (changed("prompt", 3), "prompt must be text or an object of finite numbers by name, got 3"),
        (changed("prompt", {"ink": "much"}), "prompt must be text or an object of finite numbers"),
        (changed("fps", 0), "recipe.fps 0 must be above 0"),
        (changed("fps", float("nan")), "fps must be a finite number, got nan"),
        (changed("num_frames", 0), "num_frames 0 at least 1"),
        (changed("preset", "huge"), "unknown preset 'huge'"),
        (changed("events", {}), "events must be"),
        (changed("events.0", 3), "recipe.events[0] must be an object"),
        (changed("events.0.frame", ...), "recipe.events[0] lacks the field 'frame'"),
        (changed("events.0.on_switch", ...), "recipe.events[0] lacks the field 'on_switch'"),
        (changed("events.1.prompt", "x"), "recipe.events[1] has the unknown field 'prompt'"),
        (changed("events.0.frame", 6), "recipe.events must be in the order of their frames"),
        (changed("events.0.frame", -1), "recipe.events must be in the order of their frames, from 0 on"),
    ],
)
def test_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        Recipe.from_json(text)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("options.steps", 9, "steps must be between 1 and 4"),
        ("events.1.options.steps", 9, "recipe.events[1]: steps must be between 1 and 4"),
        ("events.1.options.width", 64, "recipe.events[1]: width cannot change"),
        ("events.1.options.stepz", 1, "recipe.events[1]: unknown option 'stepz'"),
        ("events.0.on_switch", "hop", "recipe.events[0]: unknown on_switch 'hop'"),
    ],
)
def test_check_looks_at_every_event(path: str, value: object, says: str) -> None:
    RECIPE.check(get_preset("tiny"))
    with pytest.raises(ValueError) as refused:
        Recipe.from_json(changed(path, value)).check(get_preset("tiny"))
    assert str(refused.value).startswith(says)


def test_check_knows_what_earlier_events_did() -> None:
    """A clean pass is fine once the schedule has become sequential, and only then."""
    to_sequential = OptionEvent(frame=1, options={"schedule": "sequential"})
    clean = OptionEvent(frame=2, options={"clean_pass": True})
    replace(RECIPE, events=(to_sequential, clean)).check(get_preset("tiny"))
    with pytest.raises(ValueError, match=r"recipe.events\[0\]: .*clean_pass"):
        replace(RECIPE, events=(clean,)).check(get_preset("tiny"))


@pytest.mark.parametrize("fps", [10.0, 29.97, 16.0, 23.976])
def test_prompts_by_time_begin_with_the_first_frame_not_earlier(fps: float) -> None:
    for seconds in (0, 0.5, 1.3, 2.0, 59.97, 100 / fps, 7 / fps + 1e-6):
        (event,) = prompt_events([(seconds, "ink")], fps, "reset")
        assert event.frame / fps >= seconds - 1e-9 and (event.frame == 0 or (event.frame - 1) / fps < seconds - 1e-9)
    late, early = (2.0, "late"), (1.0, "early")
    assert [e.prompt for e in prompt_events([late, early], fps, "keep")] == ["early", "late"]


def test_model_hash_is_that_of_the_numbers() -> None:
    pipe, same = small_pipeline(), small_pipeline()
    assert len(pipe.model_sha256) == 64 and pipe.model_sha256 == same.model_sha256
    for module in ("transformer", "vae", "text_encoder"):
        other = small_pipeline()
        next(getattr(other, module).parameters()).data.view(-1)[0] += 1e-3
        assert other.model_sha256 != pipe.model_sha256, module
    small = small_pipeline()
    small.transformer.to(torch.bfloat16)
    assert small.model_sha256 != pipe.model_sha256
    zeros = [torch.nn.Module(), torch.nn.Module()]
    for module, dtype in zip(zeros, (torch.int32, torch.float32), strict=True):
        module.register_buffer("x", torch.zeros(2, dtype=dtype))
    assert hash_weights(zeros[:1]) != hash_weights(zeros[1:])
    weight = next(pipe.transformer.parameters())
    weight.data.view(-1)[0] += 1  # computed once: no second pass over gigabytes
    assert pipe.model_sha256 == same.model_sha256


def test_differences_are_one_line() -> None:
    pipe = small_pipeline()
    same = replace(RECIPE, model_sha256=pipe.model_sha256)
    assert same.differences(pipe) is None
    assert "weights abababab… (these are " + pipe.model_sha256[:8] in RECIPE.differences(pipe)
    older = replace(same, streamdiff="0.0.1").differences(pipe)
    assert "streamdiff 0.0.1 (this is " in older and "weights" not in older
    both = replace(RECIPE, streamdiff="0.0.1").differences(pipe)
    assert "0.0.1" in both and "weights" in both and "\n" not in both


def test_public_names() -> None:
    assert streamdiff_core.Recipe is Recipe and streamdiff_core.PromptEvent is PromptEvent
    assert streamdiff_core.OptionEvent is OptionEvent and small_preset().name == "tiny"
