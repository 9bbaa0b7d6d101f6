"""text.py: hashed n-grams by hand, and umT5's contract: fixed length, zero rows after the prompt."""

import zlib

import pytest
import torch
from torch.testing import assert_close

from streamdiff_core.config import TextConfig
from streamdiff_core.text import TinyTextEncoder, word_ngrams
from streamdiff_core.types import TextEncoder

CONFIG = TextConfig(num_buckets=512, dim=16, text_len=6, num_layers=2, num_heads=2)
PROMPTS = [
    "",
    "watercolor",
    "a watercolor painting",
    "one two three four five six seven eight",
    "日本の漫画、インク",
]


@pytest.fixture
def encoder() -> TinyTextEncoder:
    encoder = TinyTextEncoder(CONFIG).double().eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def test_fits_the_protocol(encoder):
    assert isinstance(encoder, TextEncoder)


def test_ngrams_by_hand():
    # "ink" is marked <ink>: the word, its 3-grams and its 4-grams
    grams = ["<ink>", "<in", "ink", "nk>", "<ink", "ink>"]
    assert word_ngrams("ink", 512) == [zlib.crc32(g.encode()) % 512 for g in grams]


def test_buckets_do_not_change_between_versions():
    """Weights are trained against these numbers. Python's own hash() would differ in every process."""
    assert word_ngrams("a", 4096) == [683, 683]  # crc32 of <a>, the word and its only 3-gram
    assert word_ngrams("ink", 4096)[0] == 1022  # crc32 of <ink>


def test_words_by_hand(encoder):
    words = encoder.tokenize("Oil-paint, THICK  brush!")
    assert words == [word_ngrams(w, 512) for w in ("oil", "paint", "thick", "brush")]


@pytest.mark.parametrize("prompt", ["", "   ", "!?…", "\n", "\ud800"])
def test_a_prompt_without_words_is_one_empty_word(encoder, prompt):
    assert encoder.tokenize(prompt) == [word_ngrams("", 512)]
    out = encoder.encode([prompt])
    assert out.isfinite().all() and out[0, 0].abs().sum() > 0 and not out[0, 1:].any()


def test_rows_after_the_prompt_are_zero(encoder):
    out = encoder.encode(PROMPTS)
    assert out.shape == (5, 6, 16)
    for row, prompt in zip(out, PROMPTS, strict=True):
        num_words = len(encoder.tokenize(prompt))
        assert row[:num_words].abs().sum(-1).min() > 0 and not row[num_words:].any()


def test_a_batch_is_each_prompt_alone(encoder):
    """Catches padding that is attended to: the short prompts would see the long one's length."""
    batch = encoder.encode(PROMPTS)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert_close(row, encoder.encode([prompt])[0], rtol=0, atol=1e-12)


def test_inference_and_training_paths_agree(encoder):
    """PyTorch takes another kernel for encoder layers without gradients."""
    with_grad = encoder.encode(PROMPTS)
    with torch.inference_mode():
        assert_close(with_grad.detach(), encoder.encode(PROMPTS), rtol=0, atol=1e-10)


def test_long_prompts_are_cut(encoder):
    words = "one two three four five six seven eight".split()
    assert len(encoder.tokenize(" ".join(words))) == 6
    assert_close(encoder.encode([" ".join(words)]), encoder.encode([" ".join(words[:6])]))
    assert encoder.encode(["word " * 10_000]).shape == (1, 6, 16)


def test_same_seed_and_prompt_same_tokens():
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(TinyTextEncoder(CONFIG).encode(["pencil sketch", "néon 霓虹"]))
    assert_close(outs[0], outs[1], rtol=0, atol=0)


def test_order_case_and_spelling(encoder):
    a, b, c, d = encoder.encode(["red car blue sky", "blue car red sky", "RED car, Blue sky.", "red cars blue sky"])
    # positions count: without them b would be a with two rows swapped
    assert (a[[2, 1, 0, 3]] - b[:4]).abs().max() > 1e-3
    assert_close(a, c)  # case and punctuation do not
    table = encoder.table.weight
    near = torch.cosine_similarity(*(table[word_ngrams(w, 512)].mean(0) for w in ("painting", "paintings")), dim=0)
    far = torch.cosine_similarity(*(table[word_ngrams(w, 512)].mean(0) for w in ("painting", "cyberpunk")), dim=0)
    assert near > far + 0.2 and (a - d).abs().max() > 1e-3  # an inflection is near, but not the same


def test_unicode_words_have_vectors_of_their_own(encoder):
    a, b = encoder.encode(["水墨画", "浮世绘"])
    assert (a[0] - b[0]).abs().max() > 1e-3
    assert encoder.encode(["café 🎨 ñandú"])[0, :2].abs().sum() > 0
