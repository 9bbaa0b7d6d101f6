import numpy as np
import pytest

from streamdiff_core.training.prompts import (
    DEFAULT_PROMPTS,
    HELD_OUT_PROMPTS,
    WORDS,
    normalise,
    sample_prompt,
    training_prompts,
)


def drawn(style: str, count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sample_prompt(style, rng) for _ in range(count)]


def test_every_style_has_words_prompts_and_held_out_prompts():
    styles = pytest.importorskip("streamdiff_core.training.styles", exc_type=ImportError).STYLES
    assert list(styles) == list(WORDS) == list(DEFAULT_PROMPTS) == list(HELD_OUT_PROMPTS)


@pytest.mark.parametrize("style", WORDS)
def test_training_prompts_are_many_different_and_start_with_the_default(style):
    prompts = training_prompts(style)
    assert prompts[0] == DEFAULT_PROMPTS[style]
    assert len({normalise(prompt) for prompt in prompts}) >= 40
    assert prompts == training_prompts(style)


@pytest.mark.parametrize("style", WORDS)
def test_held_out_prompts_are_never_trained_on_but_share_words(style):
    trained = [normalise(p) for p in training_prompts(style) + drawn(style, 500)]
    seen_words = {word for prompt in trained for word in prompt.split()}
    assert len(HELD_OUT_PROMPTS[style]) >= 5
    for prompt in map(normalise, HELD_OUT_PROMPTS[style]):
        assert prompt not in trained
        assert seen_words & {word for word in prompt.split() if len(word) > 3}, prompt


@pytest.mark.parametrize("style", WORDS)
def test_samples_are_repeatable_varied_and_name_the_style(style):
    samples = drawn(style, 300)
    assert samples == drawn(style, 300)
    assert len(set(samples)) > 200
    cues = [normalise(cue) for cue in (*WORDS[style].nouns, *WORDS[style].tags, DEFAULT_PROMPTS[style])]
    for sample in samples:
        assert any(cue in normalise(sample) for cue in cues), sample


def test_no_noun_or_tag_belongs_to_two_styles():
    owners = {}
    for style, words in WORDS.items():
        for cue in words.nouns + words.tags:
            assert owners.setdefault(normalise(cue), style) == style


def test_both_spellings_are_trained():
    prompts = training_prompts("watercolour")
    assert any("watercolour" in p for p in prompts) and any("watercolor " in p for p in prompts)


def test_normalise_ignores_case_spelling_and_punctuation():
    assert normalise("Soft GREY, water-colour!") == normalise("soft gray water color")


@pytest.mark.parametrize("ask", [training_prompts, lambda style: sample_prompt(style, np.random.default_rng(0))])
def test_unknown_style_names_the_known_ones(ask):
    with pytest.raises(ValueError, match=r"unknown style 'cubist'.*photo, pencil.*night_vision"):
        ask("cubist")
