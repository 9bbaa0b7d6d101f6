"""Checkpoints with the real shapes of 1.3B and 14B, in every key style in circulation.

The files are real ones with holes in place of numbers: gigabytes long, a few MB on disk, and since tensors are
memory-mapped, loading them takes no memory either. The oracle for names and shapes is diffusers' own model.
"""

from __future__ import annotations

import json
import math
import struct

import psutil
import pytest
import torch
from torch._subclasses import FakeTensorMode

from streamdiff_core.config import WAN_14B, get_preset
from streamdiff_core.full_size import empty_transformer
from streamdiff_core.lora import merge_lora
from streamdiff_core.types import CheckpointError
from streamdiff_core.weight_files import read_file
from streamdiff_core.weights import convert_keys, load_checkpoint, to_diffusers_keys

PRESETS = {"wan-1.3b": (825, 1_418_996_800), "wan-14b": (1095, 14_288_491_584)}  # SPEC §1.1


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


NAMINGS = {
    "original": lambda state: state,
    "published": prefixed("model."),
    "fsdp": prefixed("model._fsdp_wrapped_module."),
    "comfy": prefixed("model.diffusion_model."),
    "diffusers": to_diffusers_keys,
}


def shapes_of(name):
    return {key: value.shape for key, value in empty_transformer(get_preset(name), torch.bfloat16).state_dict().items()}


def write_pickle(path, shapes, wrapper=None):
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        torch.save({wrapper: state} if wrapper else state, path)


def write_safetensors(path, shapes):
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_shards(folder, shapes, suffix, count=6):
    """As diffusers publishes the 14B model."""
    names, write = list(shapes), {".safetensors": write_safetensors, ".bin": write_pickle}[suffix]
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}{suffix}" for i in range(count)]
    for i, file in enumerate(files):
        write(folder / file, {name: shapes[name] for name in names[i::count]})
    weight_map = {name: files[i % count] for i, name in enumerate(names)}
    (folder / f"diffusion_pytorch_model{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def check_loaded(model, preset):
    state, (num_tensors, num_parameters) = model.state_dict(), PRESETS[preset]
    assert len(state) == num_tensors
    assert sum(x.numel() for x in state.values()) == num_parameters
    assert not any(x.is_meta for x in state.values()) and {x.dtype for x in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_style_is_a_bijection(preset, naming):
    shapes = shapes_of(preset)
    named = NAMINGS[naming](shapes)
    assert len(named) == len(shapes) == PRESETS[preset][0]
    assert convert_keys(named) == shapes


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_diffusers(preset):
    """14B and 1.3B as diffusers builds them; its table of rotary angles is no weight."""
    diffusers = pytest.importorskip("diffusers")
    model = get_preset(preset).model
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=model.num_heads, attention_head_dim=model.head_dim, num_layers=model.num_layers,
            ffn_dim=model.ffn_dim, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16,
        )  # fmt: skip
    assert {name: value.shape for name, value in theirs.state_dict().items()} == to_diffusers_keys(shapes_of(preset))


@pytest.mark.parametrize("wrapper", [None, "generator", "generator_ema"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_pickle_of_the_1_3b_size(tmp_path, naming, wrapper):
    write_pickle(tmp_path / "model.pt", NAMINGS[naming](shapes_of("wan-1.3b")), wrapper)
    model = empty_transformer(get_preset("wan-1.3b"), torch.bfloat16)
    report = load_checkpoint(model, tmp_path / "model.pt", wrapper=wrapper)
    assert (report.wrapper, report.num_tensors) == (wrapper, 825)
    check_loaded(model, "wan-1.3b")


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize(("preset", "suffix"), [("wan-1.3b", ".safetensors"), ("wan-14b", ".bin")])
def test_shards(tmp_path, preset, suffix, naming):
    write_shards(tmp_path, NAMINGS[naming](shapes_of(preset)), suffix)
    model = empty_transformer(get_preset(preset), torch.bfloat16)
    assert load_checkpoint(model, tmp_path).layout == ("diffusers" if naming == "diffusers" else "wan")
    check_loaded(model, preset)


def test_the_other_size_is_refused(tmp_path):
    write_pickle(tmp_path / "model.pt", NAMINGS["published"](shapes_of("wan-1.3b")), "generator")
    model = empty_transformer(get_preset("wan-14b"), torch.bfloat16)
    with pytest.raises(CheckpointError, match="270 missing keys .*wrong shapes .*5120.*1536.* Nothing was loaded"):
        load_checkpoint(model, tmp_path)
    assert all(x.is_meta for x in model.state_dict().values())


def test_a_file_larger_than_the_memory_says_so(tmp_path):
    """Linux refuses to map it for private use; "damaged" would send its owner to download 50 GB again."""
    room = psutil.virtual_memory().total + psutil.swap_memory().total
    write_pickle(tmp_path / "model.pt", {f"x{i}": (2**30,) for i in range(2 + room // 2**31)})
    try:
        read_file(tmp_path / "model.pt")
    except CheckpointError as error:
        assert "larger than this machine's memory" in str(error) and "damaged" not in str(error)
    else:
        pytest.skip("this system maps files of any size")


# --- LoRA ---

LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
           "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip
LORA_NAMINGS = {
    "original": lambda name: (f"diffusion_model.{name}", "lora_down", "lora_up"),
    "kohya": lambda name: ("lora_unet_" + name.replace(".", "_"), "lora_down", "lora_up"),
    "diffusers": lambda name: (f"transformer.{diffusers_name(name)}", "lora_A", "lora_B"),
    "peft": lambda name: (f"base_model.model.{diffusers_name(name)}", "lora_A.default", "lora_B.default"),
}


def diffusers_name(name):
    return next(iter(to_diffusers_keys({f"{name}.weight": 0}))).removesuffix(".weight")


@pytest.mark.parametrize("naming", LORA_NAMINGS)
def test_lora_on_every_matrix_of_14b(tmp_path, naming):
    """Names and shapes of all 400 find their place; the products, on the meta device, cost nothing."""
    model, shapes = empty_transformer(get_preset("wan-14b"), torch.bfloat16), {}
    for layer in range(WAN_14B.num_layers):
        for linear in LINEARS:
            weight = model.state_dict()[f"blocks.{layer}.{linear}.weight"]
            name, down, up = LORA_NAMINGS[naming](f"blocks.{layer}.{linear}")
            shapes |= {f"{name}.{down}.weight": (1, weight.shape[1]), f"{name}.{up}.weight": (weight.shape[0], 1)}
    write_safetensors(tmp_path / "style.safetensors", shapes)
    report = merge_lora(model, tmp_path / "style.safetensors")
    assert (report.num_merged, report.ranks) == (400, (1,))
