"""Full-size presets, with small files in the published form: from the hub to restyled frames, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from streamdiff_core import StreamPipeline, config, full_size, get_preset
from streamdiff_core.config import WAN_14B, ModelConfig
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.taehv import TAEHV
from streamdiff_core.types import CheckpointError
from streamdiff_core.umt5 import UMT5Encoder

for package in ("diffusers", "transformers", "huggingface_hub", "ftfy"):
    pytest.importorskip(package, reason="full-size presets need the extra wan")
from tests.fake_hub import FakeHub  # noqa: E402

SMALL = ModelConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8, freq_dim=16
)  # fmt: skip
FULL_SIZE = ["wan-1.3b", "wan-14b", "causvid-1.3b", "self-forcing-1.3b", "causal-forcing-1.3b"]


class FixedText(UMT5Encoder):
    """Embeddings without the encoder."""

    def encode(self, prompts):
        return torch.stack([torch.full((self.text_len, 16), len(p) / 10) for p in prompts]).to(self.device)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Every full-size preset with a small transformer; checkpoint, VAE and text folders on a fake hub."""
    from diffusers import AutoencoderKLWan

    hub = FakeHub(tmp_path, monkeypatch)
    model = CausalWanTransformer(SMALL)
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    for name in FULL_SIZE:
        preset = replace(get_preset(name), model=SMALL, width=64, height=64)
        monkeypatch.setitem(config.PRESETS, name, preset)
        path = hub.folder / preset.source.repo / preset.source.file
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({preset.source.wrapper or "generator": weights}, path)
    base = hub.folder / preset.source.base
    AutoencoderKLWan(base_dim=8).save_pretrained(base / "vae")
    monkeypatch.setattr(
        full_size, "text_encoder", lambda p, d: FixedText(None, tmp_path, name="fixed", text_len=8, device=d)
    )
    return hub


def frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_from_hub_to_frames(hub, name):
    pipe = StreamPipeline.from_preset(name, device="cpu", dtype="float32")
    video = frames(1 + 4 * 4 * pipe.preset.latent_frames_per_chunk)
    with pipe.start("a quiet harbour") as session:
        out = np.concatenate([session.push(video), session.flush()])
    assert out.shape == video.shape
    assert out.std() > 1
    with pipe.start("a quiet harbour", mode="t2v") as session:
        assert session.generate(9).shape == (9, 64, 64, 3)


def test_taehv_from_a_file(hub, tmp_path):
    save_file(TAEHV().state_dict(), tmp_path / "taew2_1.safetensors")
    pipe = StreamPipeline.from_preset("wan-1.3b", device="cpu", dtype="float32", vae=tmp_path / "taew2_1.safetensors")
    assert isinstance(pipe.vae, TAEHV)
    with pipe.start("x") as session:
        assert len(session.push(frames(5))) == 5
    assert not any("vae/" in name for name in hub.transfers)


def test_raw_latents_only_for_streamdiffusion_v2(hub):
    """Normalised where raw means were trained, or the other way round, gives washed-out pictures without an error."""
    for name in FULL_SIZE:
        vae = full_size.load_vae(get_preset(name), "wan", torch.float32)
        assert vae.raw_latents == name.startswith("wan-")


def test_weights_come_in_the_asked_number_type(hub):
    model = StreamPipeline.from_preset("wan-1.3b", device="cpu", dtype="bfloat16").transformer
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_no_gpu_is_said_before_anything_is_downloaded(hub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="needs a GPU with 3 GB and torch sees none; use 'tiny'"):
        StreamPipeline.from_preset("wan-1.3b")
    assert hub.transfers == []


def test_small_gpu_is_said_with_the_ways_out(hub, monkeypatch, caplog):
    """Refused only if nothing could run, else warned: steps and size are chosen after the weights are loaded."""
    preset, place = replace(get_preset("wan-14b"), model=WAN_14B, width=832, height=480), torch.device("cuda")
    free = {"bytes": 24e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 99e9))
    with pytest.raises(CheckpointError, match=r"needs 34 GB .*one step at 256x256, 24.0 GB are free; use preset tiny"):
        full_size.check_memory(preset, place, True)
    free["bytes"] = 48e9
    full_size.check_memory(preset, place, True)
    assert "with 1 steps at 832x480" not in caplog.text, "47 GB fit"
    full_size.check_memory(replace(preset, schedule=replace(preset.schedule, default_steps=2)), place, True)
    assert "with 2 steps at 832x480 needs 56 GB" in caplog.text
    assert "what fits: steps=1 (47 GB), or quantisation='int8' or 'fp8' (42 GB), or size 512x512 (" in caplog.text


def test_text_encoder_is_fetched_for_an_unknown_prompt_only(tmp_path, monkeypatch):
    import transformers

    hub = FakeHub(tmp_path, monkeypatch)
    base = get_preset("wan-1.3b").source.base
    for name in ("tokenizer/spiece.model", "text_encoder/config.json"):
        (hub.folder / base / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.folder / base / name).write_text("x")
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda repo, **kw: asked.append((repo, kw["subfolder"]))
    )
    monkeypatch.setattr(
        transformers.UMT5EncoderModel, "from_pretrained", lambda repo, **kw: asked.append((repo, kw["subfolder"]))
    )
    text = full_size.text_encoder(get_preset("wan-1.3b"), torch.device("cpu"))
    assert hub.transfers == [], "11 GB must not come with the preset"
    text.load()
    assert asked == [(base, "tokenizer"), (base, "text_encoder")] and len(hub.transfers) == 2


@pytest.mark.parametrize(
    ("quantisation", "words"), [("int3", "unknown quantisation 'int3'"), ("w8a8", "take int8 or fp8")]
)
def test_quantisation_that_cannot_be_is_refused_before_the_download(hub, quantisation, words):
    with pytest.raises(ValueError, match=words):
        StreamPipeline.from_preset("wan-1.3b", device="cpu", quantisation=quantisation)
    assert hub.transfers == []


@pytest.mark.parametrize("files", [{"lora": {"gone.safetensors": 1.0}}, {"vae": "gone.safetensors"}])
def test_a_missing_lora_or_vae_is_told_before_the_download(hub, files):
    with pytest.raises(CheckpointError, match="gone.safetensors"):
        StreamPipeline.from_preset("wan-1.3b", device="cpu", **files)
    assert hub.transfers == []


def test_lora_and_quantisation_reach_the_transformer(hub, tmp_path):
    plain = StreamPipeline.from_preset("wan-1.3b", device="cpu", dtype="float32").transformer
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "style.safetensors")
    lora = {str(tmp_path / "style.safetensors"): 0.5}
    styled = StreamPipeline.from_preset("wan-1.3b", device="cpu", dtype="float32", lora=lora).transformer
    change = styled.blocks[0].self_attn.q.weight - plain.blocks[0].self_attn.q.weight
    torch.testing.assert_close(change, 0.5 * up @ down, rtol=1e-4, atol=1e-4)
    pytest.importorskip("torchao")
    small = StreamPipeline.from_preset("wan-1.3b", device="cpu", dtype="bfloat16", quantisation="int8")
    with small.start("x") as session:
        assert len(session.push(frames(5))) == 5
