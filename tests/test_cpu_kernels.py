"""The fast bfloat16 paths against PyTorch's own functions in float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from streamdiff_core import cpu_kernels
from streamdiff_core.cpu_kernels import linear_gelu, scaled_dot_product


def test_attention_is_as_close_to_float64_as_the_fused_kernel():
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (20, 50, 50))
    exact = F.scaled_dot_product_attention(q, k, v)
    small = [x.bfloat16() for x in (q, k, v)]
    with torch.inference_mode():
        ours = (scaled_dot_product(*small) - exact).abs().max()
        fused = (F.scaled_dot_product_attention(*small) - exact).abs().max()
    assert ours < 0.03  # values of order 1, three decimal digits
    assert ours < 3 * fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_number_types_take_the_library_path_bit_for_bit(dtype):
    q, k, v = (torch.randn(1, 2, n, 8, dtype=dtype) for n in (5, 9, 9))
    mask = torch.rand(5, 9) < 0.7
    mask[:, 0] = True
    assert torch.equal(scaled_dot_product(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(scaled_dot_product(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_a_mask_is_obeyed_in_bfloat16():
    q, k, v = (torch.randn(1, 1, 4, 8).bfloat16() for _ in range(3))
    mask = torch.eye(4, dtype=torch.bool)
    assert_close(scaled_dot_product(q, k, v, mask), v)  # each query sees only its own key


def test_long_sequences_do_not_write_their_scores_out(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "MAX_SCORES", 10)
    monkeypatch.setattr(torch, "softmax", None)  # would be called by the written-out form
    q, k, v = (torch.randn(1, 1, 4, 8).bfloat16() for _ in range(3))
    with torch.inference_mode():
        assert scaled_dot_product(q, k, v).shape == (1, 1, 4, 8)


def test_gradients_flow_through_the_library_path():
    q, k, v = (torch.randn(1, 1, 4, 8).bfloat16().requires_grad_() for _ in range(3))
    scaled_dot_product(q, k, v).sum().backward()
    linear = nn.Linear(8, 16).bfloat16()
    linear_gelu(q.detach(), linear).sum().backward()
    assert q.grad is not None and linear.weight.grad is not None


@pytest.mark.parametrize("fused", [True, False])
def test_linear_gelu(monkeypatch, fused):
    monkeypatch.setattr(cpu_kernels, "_HAS_FUSED_GELU", fused and cpu_kernels._HAS_FUSED_GELU)
    linear, x = nn.Linear(32, 48).bfloat16(), torch.randn(7, 32).bfloat16()
    exact = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()), approximate="tanh")
    with torch.inference_mode():
        assert_close(linear_gelu(x, linear).double(), exact, rtol=2**-7, atol=2**-8)


def test_compiled_code_takes_both_and_gives_the_same():
    """``aot_eager`` traces as inductor does: memory kept between calls or an unknown operation would stop it."""
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16() for n in (20, 50, 50))
    linear, x = nn.Linear(16, 48).bfloat16(), torch.randn(7, 16).bfloat16()

    def both():
        return scaled_dot_product(q, k, v), linear_gelu(x, linear)

    with torch.inference_mode():
        for got, want in zip(torch.compile(both, backend="aot_eager", fullgraph=True)(), both(), strict=True):
            assert_close(got, want)


def test_scores_reuse_one_piece_of_memory_per_thread_and_results_do_not():
    """A result that lay in that memory would change with the next call, one shared by threads at any time."""
    q, k, v, other = (torch.randn(1, 2, n, 8).bfloat16() for n in (5, 9, 9, 5))
    with torch.inference_mode():
        result = scaled_dot_product(q, k, v)
        kept = result.clone()
        scaled_dot_product(other, k, v)
    assert torch.equal(result, kept)
    mine = cpu_kernels._scratch(2, 5, 9)
    assert cpu_kernels._scratch(1, 5, 9).data_ptr() == mine.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cpu_kernels._scratch, 2, 5, 9).result().data_ptr() != mine.data_ptr()


def test_memory_taken_in_a_session_serves_outside_it(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_thread", threading.local())
    q, k, v = (torch.randn(1, 1, 4, 8).bfloat16() for _ in range(3))
    with torch.inference_mode():
        inside = scaled_dot_product(q, k, v)
    assert torch.equal(scaled_dot_product(q, k, v), inside)
