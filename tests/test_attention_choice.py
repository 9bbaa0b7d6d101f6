"""attention_choice.py: the order is that of the times, kernels that cannot are left out, and the engine obeys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from random_pipeline import moving_frames, random_modules, random_pipeline
from ring import ring_of
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from streamdiff_core import attention_choice, pipeline
from streamdiff_core.attention_choice import rank_backends

CPU = torch.device("cpu")
FLASH, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH


class Calls(TorchDispatchMode):
    """Which kernel each attention call takes; under inference mode it arrives here whole."""

    def __init__(self):
        super().__init__()
        self.taken = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            self.taken.add(SDPBackend(torch._fused_sdp_choice(*args, **(kwargs or {}))))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def kernel(run):
    """The one kernel that all attention calls took."""
    with Calls() as calls:
        run()
    (taken,) = calls.taken
    return taken


@pytest.mark.parametrize("fastest", [FLASH, MATH])
def test_fastest_comes_first_and_what_cannot_run_is_left_out(fastest):
    """A CPU has two of the four kernels."""
    ran = []

    def time_ms(call, device):
        ran.append(kernel(call))
        return 1.0 if ran[-1] == fastest else 2.0 + len(ran)

    order = rank_backends(2, 16, 32, 64, torch.float32, CPU, time_ms=time_ms)
    assert set(order) == {FLASH, MATH} and order[0] == fastest
    assert len(ran) == 2 * attention_choice.REPEATS
    assert kernel(lambda: torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 32, 16))) == FLASH


def test_best_of_several_calls_counts():
    """One slow call, as by another program on the GPU, decides nothing."""
    times = iter([9.0, 1.0, 9.0, 9.0, 9.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    order = rank_backends(2, 16, 32, 64, torch.float32, CPU, time_ms=lambda call, device: next(times))
    assert order[0] == FLASH


def test_engine_takes_the_preferred_kernels():
    """A CPU looks at which are allowed, not at their order; the order is for GPUs."""
    frames, outs = moving_frames(21), {}
    for first, preferred in ((FLASH, [FLASH, MATH]), (MATH, [MATH])):
        pipe = random_pipeline()
        pipe.engine.attention = preferred
        session = pipe.start("pencil")
        session.push(frames[:5])
        assert kernel(lambda s=session: s.push(frames[5:13])) == first
        outs[first] = session.push(frames[13:]).astype(int)
    assert abs(outs[FLASH] - outs[MATH]).max() <= 1


def test_measured_once_on_a_gpu_and_never_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "rank_backends", lambda *args: asked.append(args) or [FLASH])
    pipe = random_pipeline()
    options = pipe.start("pencil").options
    assert not asked and pipe.engine.attention is None
    pipe.device = SimpleNamespace(type="cuda")
    pipe._choose_attention(options)
    pipe._choose_attention(options)
    model, tokens = pipe.preset.model, (options.height // 8 // 2) * (options.width // 8 // 2)
    slots = options.cache.cache_frames
    assert asked == [
        (model.num_heads, model.head_dim, tokens, slots * tokens, pipe.transformer.dtype, pipe.device)
    ]  # fmt: skip
    assert pipe.engine.attention == [FLASH]
    with ring_of(1, pipe.preset, lambda: random_modules(pipe.preset)) as ring:
        ring.device = pipe.device
        ring._choose_attention(options)
    assert len(asked) == 1, "ranks keep PyTorch's choice"
