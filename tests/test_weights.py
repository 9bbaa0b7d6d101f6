"""Checkpoints: every accepted form gives the same weights, every bad file is named and changes nothing."""

import copy
import json
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from streamdiff_core import weights
from streamdiff_core.config import ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.types import CheckpointError
from streamdiff_core.weights import convert_keys, load_checkpoint, save_checkpoint, to_diffusers_keys

CONFIG = ModelConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4,
    text_dim=8, text_len=5, freq_dim=16,
)  # fmt: skip
X0_CONFIG = ModelConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_channels=4, out_channels=4,
    text_dim=8, text_len=5, freq_dim=16, prediction="x0",
)  # fmt: skip


def random_model(config=CONFIG):
    model = CausalWanTransformer(config).requires_grad_(False)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor))
    return model


def velocity(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 4, 4, 4, generator=generator).to(model.dtype)
    context = torch.randn(1, 5, 8, generator=generator)
    return model(x, torch.full((1, 2), 300.0), model.encode_prompt(context))


def assert_same_weights(model, state):
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.fixture
def state():
    return dict(random_model().state_dict())


@pytest.fixture
def model():
    return random_model()


def fsdp(state):
    """Names as FSDP's wrappers spell them: at the root and inside every block."""
    return {
        "model._fsdp_wrapped_module." + name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"): value
        for name, value in state.items()
    }


NAMINGS = {
    "wan": lambda state: state,
    "model prefix": lambda state: {"model." + name: value for name, value in state.items()},
    "fsdp": fsdp,
    "comfy": lambda state: {"model.diffusion_model." + name: value for name, value in state.items()},
    "diffusers": to_diffusers_keys,
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("wrapper", [None, "generator", "generator_ema", "state_dict"])
def test_pickles_in_every_wrapper(model, state, tmp_path, wrapper, naming):
    named = NAMINGS[naming](state)
    torch.save({wrapper: named, "step": 7} if wrapper else named, tmp_path / "model.pt")
    report = load_checkpoint(model, tmp_path)
    assert (report.wrapper, report.path.name, report.num_tensors) == (wrapper, "model.pt", len(state))
    assert report.layout == ("diffusers" if naming == "diffusers" else "wan")
    assert_same_weights(model, state)


def test_choice_between_two_wrappers(model, state, tmp_path):
    """``generator`` comes first, as upstream; the averaged weights are there for the asking."""
    averaged = {name: value + 1 for name, value in state.items()}
    torch.save({"generator_ema": averaged, "generator": state}, tmp_path / "model.pt")
    assert load_checkpoint(model, tmp_path).wrapper == "generator"
    assert_same_weights(model, state)
    assert load_checkpoint(model, tmp_path, wrapper="generator_ema").wrapper == "generator_ema"
    assert_same_weights(model, averaged)
    with pytest.raises(CheckpointError, match="no state dict under 'critic'; entries: generator_ema, generator"):
        load_checkpoint(model, tmp_path, wrapper="critic")


def test_pickle_of_the_old_format(model, state, tmp_path):
    """Not a zip archive, so it cannot be memory-mapped."""
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "old.pth")
    assert_same_weights(model, state)


def test_key_tables_are_inverse(state):
    assert convert_keys(to_diffusers_keys(state)) == state
    assert convert_keys(state) == state
    renamed = to_diffusers_keys(state)
    assert renamed["blocks.1.norm2.weight"] is state["blocks.1.norm3.weight"]
    assert renamed["scale_shift_table"] is state["head.modulation"]
    assert renamed["blocks.0.scale_shift_table"] is state["blocks.0.modulation"]
    assert not set(renamed) & set(state) - {"patch_embedding.weight", "patch_embedding.bias"} - {
        f"blocks.{i}.norm3.{p}" for i in range(2) for p in ("weight", "bias")
    }


def test_two_keys_for_one_tensor(model, state, tmp_path):
    torch.save({**state, "model.head.head.bias": state["head.head.bias"]}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: several keys name the same tensor: head\.head\.bias"):
        load_checkpoint(model, tmp_path)


# --- files that do not fit ---


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


BAD_STATES = {
    "missing": (
        lambda s: without(s, "head.head.bias", "blocks.1.norm3.weight"),
        r"2 missing keys \(blocks\.1\.norm3\.weight, head\.head\.bias\)",
    ),
    "unexpected": (
        lambda s: {**s, **{f"img_emb.{i}": torch.ones(1) for i in range(11)}},
        r"11 unexpected keys \(img_emb\.0, .*img_emb\.7, …\)",
    ),
    "shape": (
        lambda s: {**s, "head.head.weight": torch.ones(64, 24)},
        r"1 wrong shapes \(head\.head\.weight expected \(16, 24\) found \(64, 24\)\)",
    ),
    "integers": (
        lambda s: {**s, "head.head.bias": torch.ones(16, dtype=torch.int8)},
        r"1 wrong number types \(head\.head\.bias expected torch\.float32 found torch\.int8",
    ),
    "sparse": (
        lambda s: {**s, "head.head.bias": torch.ones(16).to_sparse()},
        "wrong number types .*sparse",
    ),
    "language model": (
        lambda s: {
            "model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2),
            "lm_head.weight": torch.ones(2),
        },
        r"no key in common, another kind of model; 69 missing keys .*2 unexpected keys \(layers\.0",
    ),
    "empty": (lambda s: {}, "no key in common"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_state_that_does_not_fit(model, state, tmp_path, case):
    """All is checked first: even tensors that come before the bad one keep their values."""
    before = copy.deepcopy(model.state_dict())
    make, text = BAD_STATES[case]
    torch.save({"generator": make(state)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(model, tmp_path)
    assert str(tmp_path / "model.pt") in str(caught.value) and "Nothing was loaded" in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert_same_weights(model, before)


class Payload:
    """Unpickling it without care creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_truncated(path, state, length=0.6):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * length)])


BAD_FILES = {
    "truncated.safetensors": (write_truncated, "truncated"),
    "header.safetensors": (lambda p, s: write_truncated(p, s, 0.01), "truncated"),
    "truncated.pt": (write_truncated, "truncated"),
    "code.pt": (lambda p, s: torch.save({"generator": Payload(p.parent / "ran")}, p), "more than tensors"),
    "text.pt": (lambda p, s: p.write_text("404: Not Found"), "neither safetensors nor a PyTorch file"),
    "page.safetensors": (lambda p, s: p.write_text("<!DOCTYPE html><html></html>"), "neither safetensors"),
    "empty.safetensors": (lambda p, s: p.write_bytes(b""), "neither safetensors"),
    "pointer.safetensors": (
        lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "list.pt": (lambda p, s: torch.save([torch.ones(2)], p), "holds a list, not a state dict"),
    "run.pt": (lambda p, s: torch.save({"a": torch.ones(2), "step": 3}, p), r"1 entries .* \(step\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_cannot_be_read(model, state, tmp_path, name):
    before = copy.deepcopy(model.state_dict())
    write, text = BAD_FILES[name]
    write(tmp_path / name, state)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(model, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert_same_weights(model, before)
    assert not (tmp_path / "ran").exists()


def test_what_a_file_is_does_not_depend_on_its_name(model, state, tmp_path):
    save_file(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.weights")
    for name in ("a.pt", "b.weights"):
        load_checkpoint(model, tmp_path / name)
        assert_same_weights(model, state)
        model = random_model()


# --- our own files ---


def test_save_and_load(model, tmp_path):
    saved = random_model(X0_CONFIG)
    path = tmp_path / "deep" / "dit.safetensors"
    assert save_checkpoint(saved, path, metadata={"recipe": "a"}) == [path]
    other = random_model(X0_CONFIG)
    report = load_checkpoint(other, path)
    assert report.metadata["recipe"] == "a"
    assert_same_weights(other, saved.state_dict())
    assert "latent_std" in other.state_dict()
    missing = without(load_file(path), "latent_std")
    save_file(missing, path)
    with pytest.raises(CheckpointError, match=r"1 missing keys \(latent_std\)"):
        load_checkpoint(other, path)


def test_half_precision_on_disk(model, state, tmp_path):
    """Loaded in the model's own type: stored once rounded, float32 again in the model."""
    saved = random_model()
    (path,) = save_checkpoint(saved, tmp_path / "dit.safetensors", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}
    load_checkpoint(model, path)
    assert_same_weights(model, {name: v.bfloat16().float() for name, v in saved.state_dict().items()})


def test_shards(model, tmp_path):
    saved, path = random_model(), tmp_path / "dit.safetensors"
    save_checkpoint(saved, path)
    files = save_checkpoint(saved, path, max_shard_bytes=40_000)
    names = [file.name for file in files]
    count = len(files) - 1
    assert count >= 2 and names[0] == f"dit-00001-of-{count:05d}.safetensors"
    assert names[-1] == "dit.safetensors.index.json"
    assert all(file.stat().st_size <= 40_000 for file in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names), "the single file is gone, no .tmp is left"
    for source in (path, files[-1]):
        load_checkpoint(model, source)
        assert_same_weights(model, saved.state_dict())
        model = random_model()
    assert save_checkpoint(saved, path) == [path] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"text_embedding\.2\.weight alone takes .* raise max_shard_bytes"):
        save_checkpoint(saved, path, max_shard_bytes=6_500)


def test_files_of_the_bundled_size_stay_under_the_limit(tmp_path):
    """Real default limit, 24 MB of weights: the header is counted too."""
    module = torch.nn.ParameterList(torch.ones(4096) for _ in range(1500))
    files = save_checkpoint(module, tmp_path / "large.safetensors")
    assert len(files) == 4 and max(f.stat().st_size for f in files) <= 9_500_000


def test_shard_that_is_missing_or_outside(model, tmp_path):
    save_checkpoint(random_model(), tmp_path / "a.safetensors", max_shard_bytes=40_000)
    index = tmp_path / "a.safetensors.index.json"
    (tmp_path / "a-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a-00002-of-00003"):
        load_checkpoint(model, index)
    index.write_text(json.dumps({"weight_map": {"head.head.bias": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_checkpoint(model, index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(model, index)


def test_interrupted_save_keeps_the_old_file(model, state, tmp_path, monkeypatch):
    path = tmp_path / "dit.safetensors"
    save_checkpoint(model, path)

    def disk_full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(random_model(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert_same_weights(model, load_file(path))


# --- where the weights go ---


def test_model_on_the_meta_device(state, tmp_path):
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "half.safetensors")
    with torch.device("meta"):
        model = CausalWanTransformer(CONFIG).bfloat16()
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert_same_weights(model, {name: value.half().bfloat16() for name, value in state.items()})
    assert isinstance(model.head.head.weight, torch.nn.Parameter)


@pytest.mark.parametrize("meta", [False, True])
def test_loading_into_a_fused_model(state, tmp_path, meta):
    torch.save(state, tmp_path / "model.pt")
    plain = random_model()
    load_checkpoint(plain, tmp_path)
    if meta:
        with torch.device("meta"):
            fused = CausalWanTransformer(CONFIG).requires_grad_(False).fuse()
    else:
        fused = random_model().fuse()
    load_checkpoint(fused, tmp_path)
    assert_same_weights(fused, state)
    assert_close(velocity(fused), velocity(plain), atol=1e-4, rtol=1e-5)
    save_checkpoint(fused, tmp_path / "again.safetensors")
    assert_same_weights(plain, load_file(tmp_path / "again.safetensors"))


def test_memory_is_kept_and_gradients_too(state, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    model = CausalWanTransformer(CONFIG)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_checkpoint(model, tmp_path)
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())


# --- where files are looked for ---


def test_folders(model, state, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder"):
        load_checkpoint(model, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds none of .*model\.pt; name one of its 0 weight files"):
        load_checkpoint(model, tmp_path)
    torch.save(state, tmp_path / "my_own_name.pt")
    load_checkpoint(model, str(tmp_path))
    assert_same_weights(model, state)
    torch.save(state, tmp_path / "second.pt")
    with pytest.raises(CheckpointError, match="name one of its 2 weight files"):
        load_checkpoint(model, tmp_path)


def test_hub_repository(model, state, tmp_path, monkeypatch):
    """Only the known files of the wanted subfolder are asked for."""
    asked = {}

    def snapshot_download(repository, allow_patterns):
        asked.update(repository=repository, patterns=allow_patterns)
        return str(tmp_path)

    (tmp_path / "v2v").mkdir()
    torch.save({"generator": state}, tmp_path / "v2v" / "model.pt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    load_checkpoint(model, "someone/model-1.3B", subfolder="v2v")
    assert_same_weights(model, state)
    assert asked["repository"] == "someone/model-1.3B"
    assert all(pattern.startswith("v2v/") for pattern in asked["patterns"])
    assert "v2v/model.pt" in asked["patterns"]


def test_hub_out_of_reach(model, monkeypatch):
    def snapshot_download(repository, allow_patterns):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="someone/model: .*pip install huggingface_hub"):
        load_checkpoint(model, "someone/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(CheckpointError, match="someone/model: .* the hub said: no route to host$"):
        load_checkpoint(model, "someone/model")
    with pytest.raises(CheckpointError, match=r"here/model\.pt: no such file or folder$"):
        load_checkpoint(model, "here/model.pt")
