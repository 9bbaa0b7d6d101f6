"""Prompts for the styles: many ways to ask for each one, and wordings kept out of training to test on.

A prompt is built from a style noun ("pencil sketch"), a style tag ("soft graphite shading"), a subject and a
template. Nouns name exactly one style; tags describe it; templates and subjects are shared by all styles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class StyleWords(NamedTuple):
    """Words of one style: `nouns` take an article, `tags` stand alone; both point at this style only."""

    nouns: tuple[str, ...]
    tags: tuple[str, ...]


DEFAULT_PROMPTS: dict[str, str] = {
    "photo": "natural photo, unchanged",
    "pencil": "graphite pencil sketch on warm paper",
    "comic": "comic book panel, flat colours and bold ink",
    "neon": "glowing neon outlines on black",
    "pixel": "8-bit pixel art, retro video game",
    "thermal": "thermal camera heat map",
    "watercolour": "soft watercolour washes on white paper",
    "oil": "thick oil painting, cobalt and yellow brush dabs",
    "cyanotype": "cyanotype sun print in Prussian blue",
    "charcoal": "charcoal and white chalk on kraft paper",
    "golden_hour": "golden hour, amber light and teal shadows",
    "ukiyo_e": "ukiyo-e Japanese woodblock print",
    "night_vision": "green night vision goggles",
}

WORDS: dict[str, StyleWords] = {
    "photo": StyleWords(
        ("natural photo", "plain photograph", "realistic photo", "real camera picture", "unedited video",
         "normal webcam image", "untouched original video", "photo", "photorealistic video",
         "raw camera shot"),
        ("unchanged", "no effect", "no filter", "natural colours", "keep it as it is", "true to life",
         "original picture", "nothing changed", "without any style", "photorealistic", "just the camera"),
    ),
    "pencil": StyleWords(
        ("pencil sketch", "pencil drawing", "graphite drawing", "graphite pencil sketch",
         "hand-drawn pencil picture", "lead pencil study", "sketchbook drawing", "soft pencil portrait",
         "grey pencil illustration", "pencil"),
        ("graphite on warm paper", "soft pencil shading", "grey graphite lines", "drawn with a pencil",
         "sketched by hand", "fine pencil lines", "light grey sketch", "sketchbook page", "graphite",
         "sketch"),
    ),
    "comic": StyleWords(
        ("comic book panel", "comic strip", "pop art poster", "graphic novel page", "cartoon drawing",
         "comic", "superhero comic", "inked cartoon", "pop art comic", "manga colour page"),
        ("flat colours and bold ink", "thick ink outlines", "pop art colours", "hot pink and lemon",
         "cartoon style", "comic style", "inked outlines and flat fields", "loud comic colours",
         "cel shaded", "pop art"),
    ),
    "neon": StyleWords(
        ("neon sign", "neon outline drawing", "glowing neon picture", "neon light sculpture",
         "cyberpunk neon scene", "neon", "synthwave outline", "laser light drawing", "blacklight drawing",
         "glowing wireframe"),
        ("glowing outlines on black", "cyan and magenta glow", "neon lights", "glowing edges in the dark",
         "electric glow", "cyberpunk", "neon tubes", "luminous lines", "neon glow",
         "pink and cyan light lines"),
    ),
    "pixel": StyleWords(
        ("pixel art picture", "8-bit pixel art", "retro video game", "pixel art sprite",
         "16-bit game screen", "pixel", "arcade game scene", "pixelated game", "blocky pixel mosaic",
         "old console game"),
        ("8-bit", "big square pixels", "pixelated", "blocky pixels", "retro game graphics", "pixel art",
         "16-bit colours", "low resolution blocks", "console game look", "arcade pixels"),
    ),
    "thermal": StyleWords(
        ("thermal image", "thermal camera picture", "heat map", "infrared heat image", "thermogram",
         "thermal", "thermal imaging scan", "heat camera view", "infrared camera shot",
         "heat vision picture"),
        ("violet to orange heat colours", "thermal colours", "infrared heat", "heat vision",
         "body heat glowing", "iron-bow palette", "hot and cold colours", "thermal imaging",
         "predator heat vision", "inferno colours"),
    ),
    "watercolour": StyleWords(
        ("watercolour painting", "watercolour", "watercolour wash", "aquarelle", "soft watercolour picture",
         "wet-on-wet watercolour", "pastel watercolour", "loose watercolour sketch",
         "watercolour illustration", "gentle aquarelle painting"),
        ("soft washes on white paper", "pale wet pigments", "aquarelle", "light washes",
         "soft pastel washes", "painted with water", "watery paint", "bleeding wet colours",
         "delicate washes", "watercolour paper"),
    ),
    "oil": StyleWords(
        ("oil painting", "thick oil painting", "oil on canvas", "impasto painting", "Van Gogh painting",
         "oil", "post-impressionist painting", "oil portrait", "palette knife painting",
         "brushy oil canvas"),
        ("thick brush dabs", "cobalt and yellow paint", "impasto", "heavy brush strokes", "thick oil paint",
         "on canvas", "rich oil colours", "brush strokes", "like Van Gogh",
         "ultramarine and chrome yellow"),
    ),
    "cyanotype": StyleWords(
        ("cyanotype", "cyanotype print", "blueprint", "Prussian blue print", "sun print",
         "blue monochrome print", "antique cyanotype", "blue and white print", "cyanotype photograph",
         "indigo blueprint picture"),
        ("Prussian blue", "blue and white", "blue monochrome", "printed by the sun", "deep blue tones",
         "blueprint paper", "blue toned", "white on blue", "Prussian blue on cotton paper",
         "cyanotype blue"),
    ),
    "charcoal": StyleWords(
        ("charcoal drawing", "charcoal sketch", "charcoal and chalk drawing", "charcoal portrait",
         "charcoal", "chalk and charcoal study", "smudged charcoal picture", "toned paper drawing",
         "burnt charcoal study", "dark charcoal illustration"),
        ("on kraft paper", "white chalk highlights", "smudged charcoal", "black charcoal strokes",
         "brown kraft paper", "charcoal on toned paper", "chalk and charcoal", "smoky black shading",
         "tan paper", "rough charcoal"),
    ),
    "golden_hour": StyleWords(
        ("golden hour shot", "golden hour", "sunset scene", "warm sunset film", "late sun picture",
         "cinematic sunset", "teal and orange film", "sunlit golden scene", "amber evening shot",
         "low sun movie still"),
        ("amber light and teal shadows", "warm golden light", "teal and orange", "glowing sunset",
         "low evening sun", "golden glow", "warm cinematic grade", "sunset light", "honey coloured light",
         "golden hour light"),
    ),
    "ukiyo_e": StyleWords(
        ("ukiyo-e print", "Japanese woodblock print", "Hokusai print", "ukiyo-e", "woodblock print",
         "Japanese print", "Edo period woodcut", "Hiroshige print", "old Japanese woodcut",
         "Edo woodblock picture"),
        ("flat indigo and vermilion", "rice paper", "woodblock", "Japanese style", "like Hokusai",
         "Edo period", "indigo outlines on rice paper", "vermilion and indigo", "Japanese woodcut",
         "in the manner of Hiroshige"),
    ),
    "night_vision": StyleWords(
        ("night vision view", "night vision camera", "night scope image", "green night vision picture",
         "night vision", "night goggles view", "green phosphor screen", "military night scope",
         "night vision video", "green surveillance image"),
        ("green phosphor glow", "green goggles", "glowing green", "seen through night goggles",
         "military green", "green monochrome", "phosphor green", "night scope", "green screen glow",
         "night vision green"),
    ),
}  # fmt: skip

SUBJECTS: tuple[str, ...] = (
    "a person", "my face", "my webcam", "a woman", "a man", "two people", "the street at night",
    "a city street", "a forest", "a river", "a dog", "a cat", "my room", "the sky", "someone talking",
    "a dancer", "flowers in a garden", "a child playing", "hands", "a car on the road", "trees in the wind",
    "this video", "the whole scene", "me",
)  # fmt: skip

TEMPLATES: tuple[str, ...] = (
    "{noun}", "{tag}", "{noun}, {tag}", "{tag}, {noun}", "{a_noun} of {subject}",
    "{noun} of {subject}, {tag}", "{subject} as {a_noun}", "{subject}, {noun}", "{subject}, {tag}",
    "{noun} portrait of {subject}", "make it look like {a_noun}", "make {subject} look like {a_noun}",
    "turn {subject} into {a_noun}, {tag}", "in the style of {a_noun}", "{subject} in the style of {a_noun}",
    "I want {a_noun}, {tag}", "show {subject} as {a_noun}", "{noun} style", "{noun} effect, {tag}",
    "please give me {a_noun}", "{a_noun} with {tag}", "{noun} look", "beautiful {noun} of {subject}",
    "a detailed {noun}, {tag}, {subject}", "{tag}, {subject}, {noun}", "render {subject} as {a_noun}",
    "video of {subject}, {noun}, {tag}",
)  # fmt: skip

HELD_OUT_PROMPTS: dict[str, list[str]] = {
    "photo": ["leave the picture as it is", "no effect, natural video",
              "show me the real camera without a filter", "do not change anything, plain photo please",
              "original footage, realistic"],
    "pencil": ["someone drew this with a grey pencil", "a page from an artist's sketchbook, graphite",
               "everything sketched in pencil", "quick pencil sketch, soft shading",
               "graphite study of an old friend"],
    "comic": ["as if printed in a comic book", "bold ink and flat pop art colours",
              "cartoon me like a superhero", "a frame from a graphic novel, inked",
              "comic hero with thick outlines"],
    "neon": ["only glowing lines in the dark, neon", "bright neon tubes trace my outline",
             "cyberpunk city of neon glow", "neon lights on a black wall",
             "draw everything with magenta and cyan light"],
    "pixel": ["like an old 8-bit game", "big blocky pixels please", "a hero in a retro pixel game",
              "pixelated like a nineties console", "world made of square pixels"],
    "thermal": ["what a heat camera sees", "infrared thermal scan of the crowd",
                "show body heat in orange and violet", "thermal vision like in the movies",
                "heat map of the room"],
    "watercolour": ["painted softly in watercolour", "pale washes of watercolor paint",
                    "a loose aquarelle of the sea", "wet pigments bleeding on white paper",
                    "delicate watercolour landscape"],
    "oil": ["painted in oil with heavy brush strokes", "Van Gogh could have painted this",
            "a canvas with thick oil paint", "impasto dabs of yellow and blue paint",
            "museum oil portrait"],
    "cyanotype": ["an old blue sun print", "everything in Prussian blue and white", "cyanotype of ferns",
                  "like an architect's blueprint", "antique blue photograph, cyanotype process"],
    "charcoal": ["drawn with charcoal and a bit of white chalk", "smudged black charcoal on brown paper",
                 "a rough charcoal study of a face", "kraft paper drawing with chalk",
                 "dark smoky charcoal art"],
    "golden_hour": ["filmed at golden hour", "warm amber sunset over everything",
                    "the low sun glows, teal shadows", "cinematic teal and orange evening",
                    "golden light like late summer"],
    "ukiyo_e": ["a print by Hokusai", "like a Japanese woodblock from the Edo period",
                "ukiyo-e wave and mountain", "flat indigo fields, Japanese woodcut",
                "woodblock scene on rice paper"],
    "night_vision": ["seen through green night vision", "soldier's night goggles",
                     "a night scope watching the yard", "phosphor green surveillance at night",
                     "green glow of a night vision camera"],
}  # fmt: skip

_AMERICAN = (("watercolour", "watercolor"), ("colour", "color"), ("grey", "gray"))
_WORD_DROPOUT = 0.08
_PUNCTUATION = ("", "", "", "", ".", "!", "...")


def normalise(prompt: str) -> str:
    """Lower case, American spelling, no punctuation: two prompts with the same result count as the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in _american(prompt.lower())).split())


def _american(text: str) -> str:
    for british, american in _AMERICAN:
        text = text.replace(british, american)
    return text


def _with_article(noun: str) -> str:
    vowel = noun[0].lower() in "aeio" or noun[0] == "8" or noun.startswith(("un", "ul"))
    return f"{'an' if vowel else 'a'} {noun}"


def _fill(template: str, noun: str, tag: str, subject: str) -> str:
    return template.format(noun=noun, a_noun=_with_article(noun), tag=tag, subject=subject)


def _words(style: str) -> StyleWords:
    if style not in WORDS:
        raise ValueError(f"unknown style {style!r}; known styles: {', '.join(WORDS)}")
    return WORDS[style]


@lru_cache(maxsize=1)
def _held_out() -> frozenset[str]:
    return frozenset(normalise(prompt) for prompts in HELD_OUT_PROMPTS.values() for prompt in prompts)


def training_prompts(style: str) -> list[str]:
    """A fixed list of different prompts for one style, the canonical one first, none held out.

    Raises:
        ValueError: Unknown style; the message lists the known ones.
    """
    nouns, tags = _words(style)
    prompts = [DEFAULT_PROMPTS[style], *nouns, *tags]
    for index, template in enumerate(TEMPLATES[2:] * 2):
        noun, tag = nouns[index % len(nouns)], tags[(3 * index + 1) % len(tags)]
        prompts.append(_fill(template, noun, tag, SUBJECTS[(5 * index) % len(SUBJECTS)]))
    prompts += [_american(prompt) for prompt in prompts]
    held_out = _held_out()
    return [prompt for prompt in dict.fromkeys(prompts) if normalise(prompt) not in held_out]


def sample_prompt(style: str, rng: np.random.Generator) -> str:
    """Draw one prompt for a style: template x noun x tag x subject, then spelling, lost words and case.

    The words of the style itself are never lost, and a held-out prompt is never drawn.

    Raises:
        ValueError: Unknown style; the message lists the known ones.
    """
    words = _words(style)
    held_out = _held_out()
    while True:
        prompt = _draw(style, words, rng)
        if normalise(prompt) not in held_out:
            return prompt


def _draw(style: str, words: StyleWords, rng: np.random.Generator) -> str:
    template, noun, tag, subject = (
        choices[rng.integers(len(choices))] for choices in (TEMPLATES, words.nouns, words.tags, SUBJECTS)
    )
    prompt = DEFAULT_PROMPTS[style] if rng.random() < 0.1 else _fill(template, noun, tag, subject)
    kept = set(f"{noun} {tag} {DEFAULT_PROMPTS[style]}".split())
    parts = [part for part in prompt.split() if part.strip(",") in kept or rng.random() >= _WORD_DROPOUT]
    prompt = " ".join(parts)
    if rng.random() < 0.4:
        prompt = _american(prompt)
    if rng.random() < 0.2:
        prompt = prompt.replace(",", "")
    case = rng.random()
    if case < 0.25:
        prompt = prompt.lower()
    elif case < 0.5:
        prompt = prompt[:1].upper() + prompt[1:]
    elif case < 0.53:
        prompt = prompt.upper()
    return prompt.rstrip(",") + _PUNCTUATION[rng.integers(len(_PUNCTUATION))]
