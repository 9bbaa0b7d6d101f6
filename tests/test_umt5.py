"""umT5: what is asked of the encoder, what is kept on disk, and that it is not loaded twice."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from streamdiff_core.umt5 import UMT5Encoder, clean_prompt

transformers = pytest.importorskip("transformers", reason="umT5 comes through transformers (extra wan)")
pytest.importorskip("ftfy", reason="umT5 prompts are cleaned with ftfy (extra wan)")


class WordTokenizer:
    """Words to numbers, with an end token, padded: what umT5's tokenizer does, without its files."""

    def __call__(self, texts, *, padding, truncation, max_length, **_):
        assert (padding, truncation) == ("max_length", True)
        ids = [[2 + sum(word.encode()) % 90 for word in text.split()][: max_length - 1] + [1] for text in texts]
        return {
            "input_ids": torch.tensor([row + [0] * (max_length - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in ids]),
        }


@pytest.fixture
def model():
    config = transformers.UMT5Config(
        vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, relative_attention_num_buckets=8
    )
    return transformers.UMT5EncoderModel(config).eval()


@pytest.fixture
def loads():
    return []


@pytest.fixture
def text(tmp_path, model, loads):
    def load():
        loads.append(1)
        return WordTokenizer(), model

    return UMT5Encoder(load, tmp_path, name="test", text_len=12)


def test_rows_are_the_encoders_and_zero_beyond_the_prompt(text, model):
    out = text.encode(["a red boat", "a lighthouse in the fog at night"])
    assert out.shape == (2, 12, 16) and out.dtype == torch.float32
    ids = WordTokenizer()(["a red boat"], padding="max_length", truncation=True, max_length=4)
    with torch.no_grad():
        alone = model(ids["input_ids"], ids["attention_mask"]).last_hidden_state[0]  # no padding at all
    torch.testing.assert_close(out[0, :4], alone, rtol=1e-2, atol=1e-2)  # kept in bfloat16
    assert not out[0, 4:].any() and out[0, :4].abs().min() > 0
    assert not out[1, 8:].any() and out[1, 7].any()


def test_encoder_is_loaded_once_per_new_prompt_and_never_for_a_known_one(text, loads):
    first = text.encode(["one", "two"])
    assert len(loads) == 1
    assert torch.equal(text.encode(["two", "one"]), first.flip(0))
    assert len(loads) == 1, "both are on disk"
    text.encode(["two", "three"])
    assert len(loads) == 2


def test_encoder_is_freed_after_use(tmp_path, model):
    alive = []

    def load():
        copy = type(model)(model.config)
        alive.append(weakref.ref(copy))
        return WordTokenizer(), copy

    UMT5Encoder(load, tmp_path, name="test", text_len=6).encode(["one"])
    gc.collect()
    assert alive[0]() is None, "11 GB would stay in memory"


def test_embeddings_of_other_weights_or_lengths_are_not_used(text, tmp_path, loads):
    text.encode(["one"])
    UMT5Encoder(text.load, tmp_path, name="other", text_len=12).encode(["one"])
    UMT5Encoder(text.load, tmp_path, name="test", text_len=8).encode(["one"])
    assert len(loads) == 3


def test_repeated_prompts_give_as_many_rows(text):
    assert torch.equal(*text.encode(["one", "one "]))


def test_shipped_embeddings_come_first_and_need_no_encoder(text, tmp_path, loads):
    """Exported here, shipped there: not loaded, nothing written, unknown prompts still computed."""
    expected = text.encode(["a red boat", "one"])
    text.export(["a  red boat", "one"], tmp_path / "there" / "prompts.safetensors")
    assert len(loads) == 1
    other = UMT5Encoder(
        text.load, tmp_path / "cache", name="test", text_len=12, shipped=tmp_path / "there" / "prompts.safetensors"
    )
    assert torch.equal(other.encode(["a red boat", "one"]), expected)
    assert len(loads) == 1 and not other.folder.exists()
    other.encode(["one", "two"])
    assert len(loads) == 2 and len(list(other.folder.iterdir())) == 1
    other.name = "other weights"
    other.encode(["one"])
    assert len(loads) == 3, "embeddings of other weights are not used, shipped or not"
    other.shipped.write_bytes(b"half")
    other.name = "test"
    assert torch.equal(other.encode(["one"]), expected[1:])
    assert len(loads) == 4


def test_damaged_file_is_computed_again(text, loads):
    whole = text.encode(["one"])
    text.file_of("one").write_bytes(b"half")
    assert torch.equal(text.encode(["one"]), whole)
    assert len(loads) == 2
    assert [path.suffix for path in text.folder.iterdir()] == [".safetensors"], "no half-written file stays"


def test_prompts_are_cleaned_as_wan_does():
    assert clean_prompt("  a &amp;amp;  b\n\tcafÃ© ") == "a & b café"
