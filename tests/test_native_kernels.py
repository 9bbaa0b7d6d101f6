"""The C++ loops against the same sums in float64, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from streamdiff_core import native_kernels as native
from streamdiff_core.kv_cache import heads_first
from streamdiff_core.rope import rotate

needs_kernels = pytest.mark.skipif(not native.is_ready(), reason="no AVX512-BF16 or no g++ here")
HALF = {"rtol": 2**-8, "atol": 2**-9}
"""One rounding to bfloat16 of numbers of order 1."""
ATTENTION = {"rtol": 2**-8, "atol": 2**-7}
"""And of the weights, of which few share a value of up to 4 where there are few keys."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def untried(monkeypatch, tmp_path):
    """A process that has not asked yet, with a cache folder of its own."""
    monkeypatch.setattr(native._Kernels, "library", None)
    monkeypatch.setattr(native._Kernels, "was_tried", False)
    monkeypatch.setattr(native, "runs_here", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "streamdiff"


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, n, d] and [N, n, d] twice -> [L, n * d], float64."""
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()).flatten(1)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return native.attend(q, k, v, torch.full((len(q), q[0].numel()), 7.0, dtype=torch.bfloat16))


@needs_kernels
@pytest.mark.parametrize("n, d", [(1, 64), (3, 128)])
@pytest.mark.parametrize("queries, keys", [(64, 128), (1, 1), (65, 129), (63, 3), (130, 514)])
def test_attention(queries, keys, n, d):
    """Whole tiles, one number too many or too few, keys left over from a group of four."""
    q, k, v = (torch.randn(length, n, d).bfloat16() for length in (queries, keys, keys))
    assert_close(attended(q, k, v).double(), exact(q, k, v), **ATTENTION)


@needs_kernels
def test_scores_that_grow_from_block_to_block_are_rescaled():
    """Without rescaling the first block would outweigh the last by e^80."""
    k = torch.randn(600, 2, 64).bfloat16()
    k = (k * torch.linspace(0.1, 4, 600)[:, None, None]).bfloat16()
    q, v = (4 * torch.randn(70, 2, 64)).bfloat16(), torch.randn(600, 2, 64).bfloat16()
    assert_close(attended(q, k, v).double(), exact(q, k, v), rtol=2**-7, atol=2**-7)


@needs_kernels
def test_keys_may_lie_by_head_and_queries_in_a_larger_tensor():
    store = heads_first(torch.randn(2, 5, 16, 3, 64).bfloat16())
    k, v = (store[row].flatten(0, 1) for row in range(2))
    q = torch.randn(40, 9, 64).bfloat16()[:, 3:6]
    assert not k.is_contiguous() and not q.is_contiguous()
    assert torch.equal(attended(q, k, v), attended(*(x.contiguous() for x in (q, k, v))))


@needs_kernels
def test_attention_as_bytes_for_an_8_bit_layer():
    q, k, v = (torch.randn(length, 2, 64).bfloat16() for length in (20, 50, 50))
    out = native.attend(q, k, v, torch.empty(20, 128, dtype=torch.uint8), per_step=300.0, offset=128.5)
    want = (exact(q, k, v) * 300 + 128.5).floor().clamp(0, 255)
    assert (out.double() - want).abs().max() <= 1
    assert (out == want).double().mean() > 0.9  # weights have 8 bits too
    assert out.min() == 0 and out.max() == 255, "some were clipped"


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    q, k, v = (torch.randn(length, 3, 64).bfloat16() for length in (200, 300, 300))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):  # five: more than heads, which are then split
            torch.set_num_threads(threads)
            results.append(attended(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.uint8])
def test_sum_and_norm(dtype, out_dtype):
    """Three groups of tokens; a modulation or gate of the wrong group would be an error of order 1."""
    x, added = torch.randn(12, 32), torch.randn(12, 32).to(dtype)
    gate, shift, scale = torch.randn(3, 3, 32).unbind()
    if out_dtype == torch.uint8:
        shift, scale = 100 + 60 * shift, 60 * scale
    total, out = torch.empty_like(x), torch.empty(12, 32, dtype=out_dtype)
    native.add_norm(x, added, gate, total, (shift, scale), out, 1e-6)
    by_token = [m.repeat_interleave(4, 0) for m in (gate, shift, scale)]
    want = torch.addcmul(x, added.float(), by_token[0])
    assert_close(total, want)
    want = torch.addcmul(by_token[1], F.layer_norm(want, (32,), eps=1e-6), by_token[2])
    if out_dtype == torch.uint8:
        assert (out.float() - want.clamp(0, 255).floor()).abs().max() <= 1
    else:
        assert_close(out.float(), want, **HALF)


@needs_kernels
def test_sum_or_norm_alone():
    x, added, bias, weight = torch.randn(6, 32), torch.randn(6, 32), torch.randn(32), torch.randn(32)
    out, kept = torch.empty(6, 32, dtype=torch.bfloat16), x.clone()
    native.add_norm(x, None, None, None, (bias, weight), out, 1e-6)
    assert_close(out.float(), F.layer_norm(x, (32,), weight, bias, 1e-6), **HALF)
    assert torch.equal(x, kept)
    native.add_norm(x, added, None, x, None, None, 1e-6)
    assert_close(x, kept + added)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation(dtype):
    """Columns out of a wider product, rotations per row or shared by rows."""
    wide, weight = torch.randn(2, 10, 3 * 128).to(dtype), torch.randn(128)
    x = wide[..., 128:256]
    normal = F.rms_norm(x.float(), (128,), weight, 1e-6).unflatten(-1, (2, 64))
    for shape in ((2, 10, 32), (10, 32)):
        turn = torch.polar(torch.ones(shape), torch.randn(shape))
        assert_close(native.norm_rotate(x, weight, turn, 2, 1e-6).float(), rotate(normal, turn), **HALF)
    assert_close(native.norm_rotate(x, weight, None, 2, 1e-6).float(), normal, **HALF)


@needs_kernels
@pytest.mark.parametrize("tokens, width, outputs", [(96, 64, 64), (1, 2, 128), (103, 256, 192), (200, 1024, 64)])
def test_linear(tokens, width, outputs):
    """Whole blocks, one token, a block and a tile begun."""
    x, weight = torch.randn(1, tokens, width).bfloat16(), torch.randn(outputs, width).bfloat16()
    bias = torch.randn(outputs)
    exact = F.linear(x.double(), weight.double(), bias.double())
    scale = width**0.5  # of the results; sums are in float32
    assert_close(native.linear(x, native.pack(weight), bias).double(), exact, rtol=2**-8, atol=1e-5 * scale)
    assert_close(
        native.linear(x, native.pack(weight), bias, gelu=True).double(), F.gelu(exact, approximate="tanh"),
        rtol=2**-7, atol=1e-4 * scale,
    )  # fmt: skip


@needs_kernels
def test_gelu_up_to_where_it_is_flat():
    x = torch.cat([torch.linspace(-60, 60, 4000), torch.linspace(-4, 4, 4000)]).bfloat16().unsqueeze(1)
    x = F.pad(x, (0, 1))
    weight, bias = torch.eye(2).bfloat16().repeat(32, 1), torch.zeros(64)
    want = F.gelu(x[:, :1].double(), approximate="tanh").expand(-1, 32)
    assert_close(native.linear(x, native.pack(weight), bias, gelu=True)[:, ::2].double(), want, **HALF)


@needs_kernels
def test_turning_keys_leaves_the_other_columns():
    keys, raw = (heads_first(torch.randn(1, 3, 5, 2, width).bfloat16())[0] for width in (64, 20))
    before, turn = keys.clone(), torch.polar(torch.ones(3, 10), torch.randn(3, 10))
    native.turn(raw, keys, turn)
    assert_close(keys[..., :20].float(), rotate(raw.float(), turn[:, None]), **HALF)
    assert torch.equal(keys[..., 20:], before[..., 20:])


@needs_kernels
def test_switched_off_for_a_while():
    with native.switched_off():
        assert not native.is_ready()
        with native.switched_off():
            pass
        assert not native.is_ready(), "the inner one does not end the outer one"
    assert native.is_ready()


@needs_kernels
def test_compiled_once_and_kept(untried, monkeypatch):
    assert native.is_ready()
    (file,) = untried.iterdir()
    monkeypatch.setattr(native._Kernels, "was_tried", False)
    monkeypatch.setattr(native.subprocess, "run", None)  # would be called by a second compilation
    assert native.is_ready() and list(untried.iterdir()) == [file]


def test_a_source_that_does_not_compile_is_told_and_leaves_nothing(untried, monkeypatch, tmp_path, caplog):
    (tmp_path / "broken.cpp").write_text("int main( {")
    monkeypatch.setattr(native, "SOURCE", tmp_path / "broken.cpp")
    monkeypatch.setattr(native.shutil, "which", lambda name: f"/usr/bin/{name}")
    with caplog.at_level(logging.WARNING):
        assert not native.is_ready()
    assert "PyTorch's operations are used" in caplog.text
    assert not list(untried.iterdir())


@pytest.mark.parametrize("lacking", ["compiler", "instructions"])
def test_without_a_compiler_or_the_instructions_nothing_is_tried(untried, monkeypatch, lacking):
    if lacking == "compiler":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(native, "runs_here", lambda: False)
    assert not native.is_ready() and not Path(untried).exists()


@needs_kernels
def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(untried, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.is_ready()
