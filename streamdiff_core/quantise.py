"""Weight-only quantisation of a transformer's large matrices through torchao: int8 or fp8, half the memory of bfloat16.

Activations stay in the model's number type. The small layers that steer everything (time, text, patches, head) are left
alone, as is usual for diffusion transformers.
"""

from __future__ import annotations

from torch import nn

from streamdiff_core.attention import SelfAttention

KINDS = ("int8", "fp8")


def check_kind(kind: str) -> None:
    """Refuse what ``quantise`` could not do, before anything is loaded.

    Raises:
        ValueError: unknown kind, or torchao is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown quantisation {kind!r}; use one of {', '.join(KINDS)}, or w8a8 for 8-bit products")
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ValueError("quantisation needs torchao: pip install 'streamdiff[wan]'") from error


def quantise(model: nn.Module, kind: str) -> nn.Module:
    """Quantise the linear layers of a transformer's blocks, in place.

    Raises:
        ValueError: as ``check_kind``.
    """
    check_kind(kind)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    for module in model.modules():  # the joint q/k/v product reads memory that quantised weights do not have
        if isinstance(module, SelfAttention):
            module.unfuse()
    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and name.startswith("blocks."))
    return model
