"""Training: data on disk, resumable runs, the three stages on minuscule models, and the command."""

from __future__ import annotations

import csv
import itertools
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from streamdiff_core import pipeline
from streamdiff_core.config import ModelConfig, TextConfig, VAEConfig, get_preset
from streamdiff_core.dit import CausalWanTransformer
from streamdiff_core.frames import frames_to_tensor
from streamdiff_core.guided_filter import PERIOD_PX, GuidedFilter
from streamdiff_core.text import TinyTextEncoder
from streamdiff_core.training import (
    cli,
    data,
    dit_stage,
    guide_stage,
    refine_stage,
    runs,
    text_stage,
    vae_basis,
    vae_stage,
)
from streamdiff_core.training.prompts import HELD_OUT_PROMPTS
from streamdiff_core.training.styles import apply_style
from streamdiff_core.types import VideoReadError
from streamdiff_core.vae import TinyVAE
from streamdiff_core.weights import load_checkpoint
from tests.make_video import numbered_frames, write_video
from tests.random_pipeline import moving_frames

NUM_STYLES = len(data.STYLE_NAMES)
MODEL = ModelConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_channels=6, out_channels=6,
    text_dim=16, text_len=16, freq_dim=16, prediction="x0",
)  # fmt: skip
VAE = VAEConfig(latent_channels=6, width=8, num_blocks=1, guide_width=4)
TEXT = TextConfig(num_buckets=64, dim=16, text_len=16, num_heads=2)
PRESET = replace(get_preset("tiny"), model=MODEL, vae=VAE, text=TEXT, width=64, height=64)


class SerialPool:
    """Takes the place of the process pool: same calls, this process, arguments must still pickle."""

    def __init__(self, *_, **__) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, job, *columns):
        return map(pickle.loads(pickle.dumps(job)), *columns)

    def shutdown(self, **_):
        pass


@pytest.fixture
def small(monkeypatch):
    """64 px clips of 16 frames, crops of 32 px, phases of a few rows, all in this process."""
    monkeypatch.setattr(data, "SIZE_PX", 64)
    monkeypatch.setattr(data, "MIN_CLIP_FRAMES", 16)
    monkeypatch.setattr(data, "ProcessPoolExecutor", SerialPool)
    monkeypatch.setattr(data.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(vae_stage, "CROP_PX", 32)
    monkeypatch.setattr(vae_stage, "CROPS_PER_CLIP", 1)
    monkeypatch.setattr(guide_stage, "CROP_PX", 32)
    monkeypatch.setattr(guide_stage, "NUM_CROPS", 4)
    monkeypatch.setattr(dit_stage, "PROMPTS_PER_STYLE", 2)
    phases = [dit_stage.Phase(0, 1, 4, 4), dit_stage.Phase(0.5, 2, 4, 2), dit_stage.Phase(0.5, 2, 8, 1)]
    monkeypatch.setattr(dit_stage, "PHASES", phases)


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock of a run takes one second, so that minutes become a number of steps."""
    ticks = itertools.count()
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


@pytest.fixture
def clips(tmp_path, small):
    """Two moving clips."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for seed in range(2):
        write_video(folder / f"clip{seed}.mp4", moving_frames(18, seed))
    return folder


@pytest.fixture
def vae():
    """A linear VAE with orthonormal rows, uneven scales and an offset."""
    vae = TinyVAE(replace(VAE, num_blocks=0))
    vae.basis.copy_(torch.linalg.qr(torch.randn(768, 6)).Q.T)
    vae.scale.copy_(torch.tensor([0.4, 0.7, 1.0, 1.5, 2.0, 3.0]))
    vae.mean.fill_(0.2)
    return vae


@pytest.fixture
def coded_clips(tmp_path):
    """Prepared latents that say where they are: value = 20 * place + style."""
    places = 20.0 * np.arange(6 * 6 * 8 * 8, dtype=np.float32).reshape(1, 6, 6, 8, 8)
    styles = np.arange(NUM_STYLES, dtype=np.float32).reshape(-1, 1, 1, 1, 1)
    np.save(tmp_path / "coded__v0.npy", places + styles)
    return data.LatentClips(tmp_path)


# --- data ---


def test_a_clip_is_read_at_the_training_size(tmp_path, small):
    wide = np.repeat(numbered_frames(17), 2, axis=2)
    frames = data.read_clip(write_video(tmp_path / "wide.mp4", wide))
    assert frames.shape == (17, 64, 64, 3) and frames.dtype == np.uint8


def test_a_short_clip_is_refused_by_name(tmp_path, small):
    with pytest.raises(VideoReadError, match=r"short\.mp4 has 15 frames, 16 are needed"):
        data.read_clip(write_video(tmp_path / "short.mp4", numbered_frames(15)))


def test_the_shortest_clip_still_gives_four_latent_frames():
    frames = np.zeros((data.MIN_CLIP_FRAMES, 256, 256, 3), np.uint8)
    lengths = [len(data.augment(frames, np.random.default_rng(seed))) for seed in range(40)]
    assert min(len(data.whole_latent_frames(np.empty(n))) for n in lengths) == 13  # 1 + 4 * 3


@pytest.mark.parametrize(("given", "kept"), [(1, 1), (4, 1), (5, 5), (8, 5), (9, 9)])
def test_whole_latent_frames(given, kept):
    assert data.whole_latent_frames(np.arange(given)).tolist() == list(range(kept))


def test_augment_treats_all_frames_alike_and_repeats(small):
    frames = np.repeat(moving_frames(1), 8, axis=0)
    for seed in range(5):
        out = data.augment(frames, np.random.default_rng(seed))
        assert out.shape[1:] == (64, 64, 3) and out.dtype == np.uint8
        assert (out == out[:1]).all()
        assert np.array_equal(out, data.augment(frames, np.random.default_rng(seed)))
        assert not np.array_equal(out[0], frames[0])


def test_prepare_encodes_every_clip_and_style_once(clips, tmp_path, vae):
    folder = tmp_path / "latents"
    data.prepare(clips, folder, vae, (0, 1))
    assert sorted(f.name for f in folder.iterdir()) == [f"clip{i}__v{v}.npy" for i in (0, 1) for v in (0, 1)]
    latents = np.load(folder / "clip1__v0.npy")
    assert latents.shape == (NUM_STYLES, 5, 6, 8, 8) and latents.dtype == np.float16
    frames = data.read_clip(clips / "clip1.mp4")[:17]
    for i in (0, 3, NUM_STYLES - 1):
        styled = torch.from_numpy(apply_style(data.STYLE_NAMES[i], frames)).permute(0, 3, 1, 2)[None] / 127.5 - 1
        padded = torch.cat([styled[:, :1]] * 3 + [styled], dim=1)  # the first frame is four copies of itself
        patches = vae._to_patches(padded)
        expected = ((patches - vae.mean) @ vae.basis.T * vae.scale).permute(0, 1, 4, 2, 3)[0]
        assert_close(torch.from_numpy(latents[i]).float(), expected, rtol=2e-3, atol=5e-3)  # float16 file


def test_prepare_goes_on_where_it_was_interrupted(clips, tmp_path, vae, monkeypatch):
    folder, encode, calls = tmp_path / "latents", data.encode_styles, []

    def interrupted(frames, model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(frames, model)

    def half_written(file, array):
        file.write(b"\x93NUMPY half")
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "encode_styles", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(clips, folder, vae, (0,))
    first = folder / "clip0__v0.npy"
    before = first.stat().st_mtime_ns, first.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.np, "save", half_written)
        data.prepare(clips, folder, vae, (0,))
    assert data.LatentClips(folder).rescan() == 1, "a half-written file is never taken for a clip"
    data.prepare(clips, folder, vae, (0,))
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before, "a finished clip is not made again"
    assert sorted(f.name for f in folder.iterdir()) == ["clip0__v0.npy", "clip1__v0.npy"]
    assert len(np.load(folder / "clip1__v0.npy")) == NUM_STYLES


def test_prepare_without_clips_says_so(tmp_path, vae):
    with pytest.raises(ValueError, match="no .mp4 clips"):
        data.prepare(tmp_path, tmp_path / "latents", vae, (0,))


def test_sampled_source_and_target_are_the_same_crop_of_the_same_frames(clips, tmp_path, vae):
    whole = [data.encode_styles(frames, vae).float() for _, frames in data.iter_clips(clips)]
    data.prepare(clips, tmp_path / "latents", vae, (0,))
    styles = np.array([0, 3, 7, 12, 5, 5, 1, 2])
    rng = np.random.default_rng(0)
    source, target = data.LatentClips(tmp_path / "latents").sample(rng, styles, num_frames=2, cells=4)
    assert source.shape == target.shape == (8, 2, 6, 4, 4) and source.dtype == torch.float32
    places = set()
    for row, style in enumerate(styles):
        found = [
            (clip, t, y, x)
            for clip, t, y, x in itertools.product(range(2), range(4), (0, 2, 4), (0, 2, 4))
            if torch.equal(whole[clip][0, t : t + 2, :, y : y + 4, x : x + 4], source[row])
        ]
        assert len(found) == 1, "every source crop is found at one place"
        clip, t, y, x = found[0]
        assert torch.equal(target[row], whole[clip][style, t : t + 2, :, y : y + 4, x : x + 4])
        places.add(found[0])
    assert len(places) > 4 and len({p[0] for p in places}) == 2


def test_clips_that_are_too_short_are_left_out_and_none_is_an_error(coded_clips):
    np.save(coded_clips.folder / "brief__v0.npy", np.zeros((NUM_STYLES, 2, 6, 8, 8), np.float32))
    assert coded_clips.rescan() == 2
    source, _ = coded_clips.sample(np.random.default_rng(0), np.zeros(20, int), num_frames=3, cells=4)
    assert source.shape[1] == 3 and (source.flatten(1).max(1).values > 0).all()
    with pytest.raises(ValueError, match="has 7 latent frames"):
        coded_clips.sample(np.random.default_rng(0), np.zeros(1, int), num_frames=7, cells=4)


# --- closed-form basis ---


def test_fit_basis_is_orthonormal_centred_and_scaled(monkeypatch):
    still = [(str(i), np.repeat(moving_frames(1, i), 6, axis=0)) for i in range(2)]
    monkeypatch.setattr(vae_basis, "iter_clips", lambda _: still)
    vae = vae_basis.fit_basis(None, VAE)
    assert_close(vae.basis @ vae.basis.T, torch.eye(6), atol=1e-5, rtol=0)
    total, weight, square = 0, 0, 0
    for style, (_, frames) in itertools.product(data.STYLE_NAMES, still):
        z = vae.encode(frames_to_tensor(apply_style(style, frames[:1])), vae.new_state())[0, 0].double()
        w = 4 if style == "photo" else 1
        total, square, weight = total + w * z.mean((1, 2)), square + w * z.square().mean((1, 2)), weight + w
    assert_close(total / weight, torch.zeros(6).double(), atol=1e-3, rtol=0)
    std = (square / weight).sqrt()
    assert std[0].item() == pytest.approx(10, rel=1e-4)
    component_std = std / vae.scale
    assert_close((std / std[0]).square(), component_std / component_std[0], rtol=1e-3, atol=0)  # power 0.5


def test_separate_motion_keeps_still_input_still():
    """Four equal frames have zeros in every changing component, and constant components cannot make them differ."""
    vae = TinyVAE(replace(VAE, latent_channels=6))
    vae.basis.copy_(torch.linalg.qr(torch.randn(768, 6) + torch.eye(768)[:, :6])[0].T)
    vae.basis[:3] += 2 * vae.basis[:3].unflatten(1, (3, 4, -1)).mean(2, keepdim=True).expand(-1, -1, 4, -1).flatten(1)
    moves = vae_basis.is_motion(vae)
    assert 0 < moves.sum() < 6
    vae_basis.separate_motion(vae)
    assert_close(vae.basis @ vae.basis.T, torch.eye(6), atol=1e-5, rtol=0)
    rows = vae.basis.unflatten(1, (3, 4, -1))
    assert_close(rows[moves].mean(2), torch.zeros(int(moves.sum()), 3, 64), atol=1e-6, rtol=0)
    assert_close(rows[~moves].std(2), torch.zeros(int((~moves).sum()), 3, 64), atol=1e-6, rtol=0)


def test_is_motion_and_latent_std_by_hand():
    vae = TinyVAE(replace(VAE, latent_channels=2))
    row = torch.zeros(2, 3, 4, 64)
    row[0, 0, :, 0] = 0.5  # the same in all four frames
    row[1, 0, :, 0] = torch.tensor([0.5, -0.5, 0.5, -0.5])
    vae.basis.copy_(row.flatten(1))
    assert vae_basis.is_motion(vae).tolist() == [False, True]
    latents = torch.tensor([3.0, 4.0]).repeat_interleave(2).reshape(1, 2, 2, 1)
    latents[0, 1, 1] = 0
    assert_close(vae_basis.latent_std(vae, latents), torch.tensor([3.0, 8.0**0.5]))


# --- runs ---


def make_run(folder):
    model = nn.Linear(2, 1)
    return model, runs.Run(folder, model=model, average=runs.Average(model, 0.5))


def test_a_run_resumes_weights_step_and_seconds(tmp_path, clock):
    model, run = make_run(tmp_path)  # second 0
    run.step = 7
    run.save()  # looks at the clock once: second 1
    other, resumed = make_run(tmp_path)
    assert resumed.step == 7
    assert resumed.seconds == 1 + 1, "one second before, one since"
    assert_close(other.weight, model.weight)
    assert_close(resumed.parts["average"].shadow["weight"], model.weight)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    _, run = make_run(tmp_path)
    run.save()
    before = (tmp_path / "last.pt").read_bytes()

    def half(_, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize(("error", "kept"), [(None, 3), (KeyboardInterrupt, 3), (ValueError, 2)])
def test_a_run_saves_at_the_end_and_on_ctrl_c_but_not_after_a_failed_step(tmp_path, error, kept):
    _, run = make_run(tmp_path)
    run.step = 2
    run.save()
    try:
        with run:
            run.step = 3
            if error:
                raise error
    except (KeyboardInterrupt, ValueError) as raised:
        assert type(raised) is error
    assert make_run(tmp_path)[1].step == kept


def test_metrics_and_curve(tmp_path, clock):
    _, run = make_run(tmp_path)
    run.log({"loss": 0.123456, "psnr": 20.0})
    run.step = 5
    run.log({"loss": 0.1, "psnr": 21.0})
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(r["step"], r["seconds"], r["loss"]) for r in rows] == [
        ("0", "1.0", "0.12346"),
        ("5", "2.0", "0.1"),
    ]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_curve_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    make_run(tmp_path)[1].log({"loss": 1.0})
    assert (tmp_path / "metrics.csv").exists() and not (tmp_path / "curve.png").exists()


def test_average_warms_up(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = runs.Average(model, decay=0.24)
    nn.init.ones_(model.weight)
    average.update(model)  # decay (1 + 1) / (10 + 1)
    assert average.shadow["weight"].item() == pytest.approx(9 / 11)
    model.weight.data.fill_(2.0)
    average.update(model)  # (1 + 2) / (10 + 2) = 0.25 > 0.24
    assert average.shadow["weight"].item() == pytest.approx(0.24 * 9 / 11 + 0.76 * 2)


@pytest.mark.parametrize(
    ("step", "progress", "share"),
    [(0, 0, 1 / 50), (24, 0, 1 / 2), (49, 0, 1), (80, 0, 1), (80, 0.5, 0.51), (80, 1, 0.02)],
)
def test_learning_rate(step, progress, share):
    assert runs.learning_rate(2.0, step, progress, 50) == pytest.approx(2 * share)


# --- text ---


def test_pool_leaves_padding_out():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    assert_close(text_stage.pool(tokens), torch.tensor([[2.0, 3.0], [0.0, 0.0]]))


def test_strangers_come_between_the_words_of_the_prompt():
    words, added = "oil painting of a cat".split(), set()
    for seed in range(60):
        out = text_stage.with_strangers(" ".join(words), np.random.default_rng(seed)).split()
        rest = iter(out)
        assert all(word in rest for word in words), out  # in order: `in` consumes the iterator
        added.add(len(out) - len(words))
    assert added == {0, 1, 2, 3, 4}


def test_held_out_accuracy_counts_and_names_the_wrong_ones():
    style_of = {p: i for i, style in enumerate(data.STYLE_NAMES) for p in HELD_OUT_PROMPTS[style]}
    one_hot = torch.eye(NUM_STYLES)
    encoder = SimpleNamespace(encode=lambda prompts: torch.stack([one_hot[style_of[p]][None] for p in prompts]))
    assert text_stage.held_out_accuracy(encoder, nn.Identity()) == (1.0, [])
    prompt = HELD_OUT_PROMPTS["oil"][0]
    style_of[prompt] = data.STYLE_NAMES.index("neon")
    accuracy, wrong = text_stage.held_out_accuracy(encoder, nn.Identity())
    assert accuracy == pytest.approx(1 - 1 / len(style_of))
    assert wrong == [f"{prompt!r}: neon for oil"]


@pytest.mark.parametrize(("error", "kept"), [(KeyboardInterrupt, 3), (MemoryError, 2)], ids=["ctrl-c", "killed"])
def test_text_training_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, monkeypatch, error, kept):
    monkeypatch.setattr(text_stage, "LOG_EVERY_STEPS", 2)

    def train(name):
        text_stage.train_text(tmp_path / name, TEXT, num_steps=6, batch=4)
        return torch.load(tmp_path / name / "last.pt", weights_only=True)

    whole, draw, calls = train("whole"), text_stage.sample_prompt, []

    def stopped(style, rng):
        calls.append(1)
        if len(calls) == 3 * 4 + 2:  # in the middle of step 3
            raise error
        return draw(style, rng)

    monkeypatch.setattr(text_stage, "sample_prompt", stopped)
    with pytest.raises(error):
        train("broken")
    assert torch.load(tmp_path / "broken" / "last.pt", weights_only=True)["step"] == kept
    torch.manual_seed(99)
    broken = train("broken")
    assert broken["step"] == whole["step"] == 6
    for part in ("encoder", "readout"):
        assert_close(broken[part], whole[part], rtol=0, atol=0)
    assert (tmp_path / "broken" / "wrong.txt").read_text(encoding="utf-8")
    before = (tmp_path / "broken" / "last.pt").stat().st_mtime_ns
    train("broken")
    assert (tmp_path / "broken" / "last.pt").stat().st_mtime_ns == before, "nothing left to do, nothing written"


# --- decoder ---


def test_detail_loss_by_hand():
    target = torch.rand(1, 2, 1, 2, 2)
    assert vae_stage.detail_loss(target.clone(), target).item() == 0
    assert vae_stage.detail_loss(target + 0.5, target).item() == pytest.approx(0.25)  # no edge differs
    for dim in (1, 3, 4):  # half of the values are 1 too high: 1/2, and every difference along dim: 1/2 of 1
        step = torch.arange(2).reshape([2 if d == dim else 1 for d in range(5)])
        assert vae_stage.detail_loss(target + step, target).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dim", [3, 4])
def test_seam_loss_sees_steps_at_the_edges_of_tokens_only(dim):
    target = torch.rand(2, 3, 3, 48, 48)
    for at, loss in (
        (16, 0.5),
        (32, 0.5),
        (15, 0),
        (17, 0),
        (8, 0),
    ):  # a step of 1 at one of two edges: 1 of 2 is wrong
        step = (torch.arange(48) >= at).float().reshape([48 if d == dim else 1 for d in range(5)])
        assert refine_stage.seam_loss(target + step, target).item() == pytest.approx(loss, abs=1e-6)
    assert refine_stage.seam_loss(target.repeat(1, 1, 1, 2, 2), target.repeat(1, 1, 1, 2, 2)).item() == 0


def test_the_hardest_style_is_drawn_more_often(coded_clips):
    share = 3 / (NUM_STYLES + 2)
    assert data.STYLE_SHARES[data.STYLE_NAMES.index("neon")] == pytest.approx(share)
    bank = torch.arange(NUM_STYLES).float()[:, None, None, None].expand(NUM_STYLES, 3, 2, 2)
    batches, phase = dit_stage.Batches(coded_clips, bank, seed=0), dit_stage.Phase(0, frames=1, cells=4, rows=16)
    drawn = torch.cat([batches.draw(step, phase)["context"][:, 0, 0] for step in range(60)])
    assert (drawn == data.STYLE_NAMES.index("neon")).float().mean() == pytest.approx(share, abs=0.04)


def test_pixel_batches_repeat_and_differ_by_step(clips):
    batches = vae_stage.PixelBatches(clips, seed=0)
    first = batches.draw(0)
    assert first.shape == (2, 9, 3, 32, 32) and first.abs().max() <= 1
    assert torch.equal(first, batches.draw(0)) and not torch.equal(first, batches.draw(1))
    assert vae_stage._repeat_to(np.arange(3), 5).tolist() == [0, 1, 2, 2, 2]


def test_reconstruction_psnr_is_that_of_the_projection(clips, vae):
    _, frames = next(data.iter_clips(clips))
    for path in sorted(clips.glob("*.mp4"))[1:]:
        path.unlink()
    vae.mean.fill_(-0.3)
    x = vae._to_patches(torch.cat([frames_to_tensor(frames[:1])] * 3 + [frames_to_tensor(frames[:17])], dim=1))
    back = (x - vae.mean) @ vae.basis.T @ vae.basis + vae.mean
    pixels = (vae._from_patches(back)[0, 3:].clamp(-1, 1) + 1) * 127.5
    truth = torch.from_numpy(frames[:17]).permute(0, 3, 1, 2)
    expected = 10 * torch.log10(255**2 / (pixels.round() - truth).square().mean())
    scores = vae_stage.reconstruction_psnr(vae, clips, ("photo",))
    assert scores == {"photo": pytest.approx(expected.item(), abs=1e-3)}


def test_decoder_training_starts_at_the_closed_form_and_leaves_the_encoder_alone(clips, tmp_path, clock):
    vae = vae_basis.fit_basis(clips, VAE)
    frozen = {name: getattr(vae, name).clone() for name in ("basis", "mean", "scale")}
    vae_stage.train_decoder(tmp_path / "run", vae, clips, clips, minutes=0.5)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] > 2 and state["seconds"] >= 30
    assert state["vae"]["detail.weight"].abs().max() > 0
    for name, value in frozen.items():
        assert_close(state["vae"][name], value, rtol=0, atol=0)
    assert "photo" in (tmp_path / "run" / "metrics.csv").read_text(), "the end is always measured"


# --- guided filter ---


def test_pairs_are_what_the_model_makes_unguided_and_resume(tmp_path, clips):
    """Same clips, same bytes, whatever is there already; what a guide would add is not learned from."""
    preset = replace(PRESET, vae=replace(VAE, num_blocks=0))
    parts = CausalWanTransformer(MODEL), TinyVAE(preset.vae), TinyTextEncoder(TEXT)
    pipe = pipeline.StreamPipeline.from_modules(preset, *parts)
    guide_stage.make_pairs(pipe, clips, tmp_path / "a", 3, seed=0)
    files = sorted((tmp_path / "a").glob("*.npy"))
    assert [f.name for f in files] == [f"clip{i}__{k}.npy" for i in range(2) for k in range(3)]
    first = [np.load(f) for f in files]
    assert all(pair.dtype == np.uint8 and pair.shape[0] == 3 and pair.shape[1] % 4 == 1 for pair in first)
    assert any(not np.array_equal(pair[1], pair[2]) for pair in first), "the target is styled"
    files[1].unlink()
    torch.nn.init.ones_(parts[1].guide.out.bias)
    guide_stage.make_pairs(pipe, clips, tmp_path / "a", 3, seed=0)
    assert np.array_equal(np.load(files[1]), first[1]) and not list((tmp_path / "a").glob("*.tmp"))


def test_crops_of_a_pair_are_of_one_place_and_begin_with_a_token(tmp_path):
    frames, rows, columns = np.meshgrid(np.arange(5), np.arange(64), np.arange(96), indexing="ij")
    place = np.stack([frames, rows, columns], axis=-1).astype(np.uint8)
    np.save(tmp_path / "a.npy", np.stack([place, place + 50, place + 100]))
    crops, seen = guide_stage.PairCrops(tmp_path, seed=0), set()
    for step in range(20):
        decoded, source, target = ((crops.draw(step) + 1) * 127.5).round().int()
        assert torch.equal(source, decoded + 50) and torch.equal(target, decoded + 100)
        assert decoded.shape == (16, 3, 64, 64)
        corners = decoded[:, :, 0, 0]
        assert (corners[:, 1:] % PERIOD_PX == 0).all()
        seen |= {tuple(corner) for corner in corners.tolist()}
    assert seen == {(t, 0, x) for t in range(5) for x in (0, 16, 32)}
    assert torch.equal(crops.draw(3), crops.draw(3)) and not torch.equal(crops.draw(3), crops.draw(4))


def test_flat_loss_by_hand():
    """A mesh of columns at a depth of 0.01: every step along a row is 0.01 off, none along a column."""
    target = torch.zeros(1, 3, 8, 8)
    mesh = 0.01 * (torch.arange(8) % 2).expand(1, 3, 8, 8)
    assert guide_stage.flat_loss(target + 0.3, target).item() == 0
    assert guide_stage.flat_loss(target + mesh, target).item() == pytest.approx(0.01)


def test_the_guide_learns_from_the_input(tmp_path, clock, small):
    """Decoded pictures are grey, the target is the input: only who looks at the input can do better."""
    source = moving_frames(8)
    (tmp_path / "pairs").mkdir()
    np.save(tmp_path / "pairs" / "a.npy", np.stack([np.full_like(source, 127), source, source]))
    guide = GuidedFilter(8)
    guide_stage.train_guide(
        tmp_path / "run", guide, tmp_path / "pairs", tmp_path / "pairs", minutes=8, seed=0
    )  # fmt: skip
    with (tmp_path / "run" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["guided"]) > float(last["decoded"]) + 2


# --- transformer ---


def test_block_causal_mask_by_hand():
    rows = ["1100", "1100", "1111", "1111"]
    assert dit_stage.block_causal_mask(2, 2).int().tolist() == [[int(c) for c in row] for row in rows]


def test_noise_is_shared_by_the_frames_of_about_half_of_the_rows():
    noise = dit_stage.draw_noise(torch.zeros(400, 2, 1, 2, 2), torch.Generator().manual_seed(0))
    shared = (noise[:, 0] == noise[:, 1]).flatten(1).all(1).float().mean().item()
    assert 0.4 < shared < 0.6 and noise.std().item() == pytest.approx(1, abs=0.05)


def test_frame_ids_are_packed_or_have_one_gap_after_the_sink():
    ids = dit_stage.random_frame_ids(400, 4, torch.Generator().manual_seed(0))
    assert (ids[:, 0] == 0).all() and (ids[:, 2:] - ids[:, 1:-1] == 1).all() and (ids[:, 1] >= 1).all()
    packed = (ids[:, 1] == 1).float().mean().item()
    assert 0.65 < packed < 0.85 and ids.max() > 100


def test_batches_repeat_and_keep_one_prompt_per_group(coded_clips):
    bank = torch.arange(NUM_STYLES).float()[:, None, None, None].expand(NUM_STYLES, 3, 2, 2)
    batches = dit_stage.Batches(coded_clips, bank, seed=0)
    phase = dit_stage.Phase(0, frames=2, cells=4, rows=32)
    mixed = 0
    for step in range(60):
        rows = batches.draw(step, phase)
        assert torch.equal(rows["target"], batches.draw(step, phase)["target"])
        style = (rows["target"] - rows["source"]).flatten(1)
        assert_close(style, style[:, :1].expand_as(style), rtol=0, atol=0.02)  # same place, one style a row
        asked = rows["context"][rows["group"]][:, 0, 0]  # the bank of style i is full of i, mixes lie between
        assert_close(style[:, 0], asked, rtol=0, atol=0.02)
        mixed += bool((asked % 1).any())
    assert 1 <= mixed <= 15


class FixedError(dit_stage.Objective):
    """Answers with the target plus a known error and keeps the noise levels it was asked at."""

    answer: torch.Tensor

    def predict(self, xt, sigma, prompts, ids, mask):
        self.sigma = sigma
        return self.answer


@pytest.mark.parametrize("frames", [1, 3])
def test_the_loss_is_the_decoded_pixel_error(vae, frames):
    rows = 6
    objective = FixedError(CausalWanTransformer(MODEL), vae)
    objective.detail_weight = torch.ones(6)
    target = torch.randn(rows, frames, 6, 4, 4)
    error = torch.randn(1, frames, 6, 4, 4).expand_as(target)  # the same in all rows
    pixels = (error / vae.scale[:, None, None]).square().mean((2, 3, 4), keepdim=True)
    error = error / pixels.sqrt()  # and as large in all frames: any mask has the same mean
    objective.answer = target + error
    batch = {
        "source": target,
        "target": target,
        "context": torch.randn(rows, 16, 16),
        "group": torch.arange(rows),
    }
    loss, psnr = objective(batch, torch.Generator().manual_seed(1), self_input=False)

    decoded = vae._from_patches((error / vae.scale[:, None, None]).permute(0, 1, 3, 4, 2) @ vae.basis)
    decoded = decoded.unflatten(1, (frames, 4))  # [B, F, 4, 3, H, W]
    per_frame = decoded.square().mean((2, 3, 4, 5))
    weight = 1 / (objective.sigma.square() + 0.1)
    expected = (per_frame * weight).mean()
    if frames > 1:
        change = decoded.diff(dim=1).square().mean((2, 3, 4, 5))
        expected = expected + 0.5 * (change * weight[:, 1:]).mean()
    assert_close(loss, expected, rtol=1e-4, atol=0)
    assert psnr == pytest.approx(-10 * np.log10(per_frame.mean().item() / 4), abs=1e-3)  # of 0…1, not -1…1


def test_psnr_without_a_row_from_the_source_is_nan_and_does_not_spoil_the_mean(vae):
    objective = FixedError(CausalWanTransformer(MODEL), vae)
    target = objective.answer = torch.randn(1, 1, 6, 4, 4)
    batch = {
        "source": target,
        "target": target,
        "context": torch.randn(1, 16, 16),
        "group": torch.zeros(1).long(),
    }
    values = [objective(batch, torch.Generator().manual_seed(s), False)[1] for s in range(20)]
    assert 0 < np.isnan(values).sum() < 20


def test_validation_is_the_pixel_error_of_each_style(coded_clips, vae, monkeypatch):
    monkeypatch.setattr(dit_stage.Objective, "predict", lambda _, xt, *__: torch.zeros_like(xt))
    model, encoder = CausalWanTransformer(MODEL), TinyTextEncoder(TEXT)
    result = dit_stage.validate(model, vae, coded_clips, encoder)
    latents = torch.from_numpy(np.array(coded_clips.clips[0][:, 2]))  # frames 2, 8, …: one of six
    decoded = (latents / vae.scale[:, None, None]).permute(0, 2, 3, 1) @ vae.basis
    expected = -10 * torch.log10(decoded.double().square().mean((1, 2, 3)) / 4)
    assert result["psnr_1_step"] == pytest.approx(expected.mean().item(), abs=1e-3)
    assert result["psnr_2_steps"] == pytest.approx(expected.mean().item(), abs=1e-3)
    assert result["worst_style"] == pytest.approx(expected.min().item(), abs=1e-3)


def test_transformer_training_keeps_what_was_learned_before_ctrl_c(
    coded_clips, tmp_path, vae, clock, small, monkeypatch
):
    one_row = dit_stage.Phase(0, 2, 4, rows=1)  # often none that starts from the source
    monkeypatch.setattr(dit_stage, "PHASES", [one_row])
    folder, latents = tmp_path / "dit", coded_clips.folder
    encoder = TinyTextEncoder(TEXT)

    def train():
        dit_stage.train_dit(folder, MODEL, vae, encoder, latents, latents, minutes=1.5, peak_lr=1e-4)
        return torch.load(folder / "last.pt", weights_only=True)

    update = runs.Average.update

    def stopped(self, model):
        update(self, model)
        if self.updates == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Average, "update", stopped)
        train()
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert saved["step"] == 3 and saved["average"]["updates"] == 4 and saved["seconds"] < 90
    state = train()
    assert state["step"] > 6 and state["average"]["updates"] == state["step"] + 1 and state["seconds"] >= 90
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert int(rows[-1]["step"]) == state["step"]
    assert all(np.isfinite(float(v)) for v in rows[-1].values()), rows[-1]


# --- command ---


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(stage in out for stage in (*cli.STAGES, "all"))


@pytest.mark.parametrize(
    ("stage", "named"), [("all", "clips"), ("prepare", "clips"), ("decoder", "clips"), ("evaluate", "val")]
)
def test_stages_that_need_clips_ask_for_them(stage, named, tmp_path, capsys):
    assert cli.main([stage, "--work", str(tmp_path)]) == 2
    assert f"--{named} must be a folder with .mp4 clips, got None" in capsys.readouterr().err
    assert cli.main([stage, "--clips", str(tmp_path), "--val", str(tmp_path)]) == 2
    assert f"--{named} must be a folder with .mp4 clips, got {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "missing"), [("dit", "last.pt"), ("export", "last.pt"), ("decoder", "vae_basis.pt")])
def test_a_missing_earlier_stage_is_named(stage, missing, tmp_path, clips, capsys):
    (tmp_path / "work").mkdir()
    if stage == "dit":
        torch.save(TinyVAE(get_preset("tiny").vae).state_dict(), tmp_path / "work" / "vae_basis.pt")
    folders = ["--work", str(tmp_path / "work"), "--clips", str(clips), "--val", str(clips)]
    assert cli.main([stage, *folders]) == 1
    error = capsys.readouterr().err
    assert missing in error and error.endswith("is missing; run the earlier stages first\n")


def test_no_prepared_clips_is_a_missing_stage(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.LatentClips(tmp_path)
    assert error.value.filename == str(tmp_path)


def test_an_unreadable_clip_or_missing_weights_is_one_line(tmp_path, clips, capsys):
    folders = ["--work", str(tmp_path / "work"), "--clips", str(clips), "--val", str(clips)]
    assert cli.main(["evaluate", *folders]) == 1
    assert "transformer.safetensors" in capsys.readouterr().err
    (clips / "a_bad.mp4").write_bytes(b"no video")
    assert cli.main(["prepare", *folders]) == 1
    error = capsys.readouterr().err
    assert error.startswith("streamdiff-train: ") and "a_bad.mp4" in error and "Traceback" not in error


def test_ctrl_c_says_that_nothing_is_lost(tmp_path, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_text", stop)
    assert cli.main(["text", "--work", str(tmp_path)]) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


def test_export_writes_weights_that_a_pipeline_loads(tmp_path):
    preset, work, out = get_preset("tiny"), tmp_path / "work", tmp_path / "out"
    parts = CausalWanTransformer(preset.model), TinyVAE(preset.vae), TinyTextEncoder(preset.text)
    for name, model in (("dit", parts[0]), ("decoder", TinyVAE(preset.vae)), ("refine", parts[1])):
        average = runs.Average(model, 0.9)
        average.shadow = {key: value + 0.25 for key, value in average.shadow.items()}
        run = runs.Run(work / name, model=model, average=average)
        run.step = 120
        run.log({"psnr": 1.0})
        run.save()
    run = runs.Run(work / "text", encoder=parts[2])
    run.log({"loss": 1.0})
    run.save()
    assert cli.main(["export", "--work", str(work), "--out", str(out)]) == 0
    assert sorted(f.name for f in out.glob("*.csv")) == [
        "decoder_metrics.csv",
        "dit_metrics.csv",
        "refine_metrics.csv",
        "text_metrics.csv",
    ]
    files = list(out.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 32e6 and max(f.stat().st_size for f in files) < 9.5e6
    pipe = pipeline.StreamPipeline.from_preset("tiny", weights=out, dtype="float32", device="cpu")
    loaded = pipe.transformer.state_dict()
    for key, value in parts[0].state_dict().items():  # the averaged weights, not the last ones
        assert_close(loaded[key], (value.float() + 0.25).bfloat16().float(), rtol=0, atol=0)
    assert_close(pipe.vae.state_dict(), {k: v + 0.25 for k, v in parts[1].state_dict().items()}, rtol=0, atol=0)
    assert_close(pipe.text_encoder.state_dict(), dict(parts[2].state_dict()), rtol=0, atol=0)


def test_unpacked_weights_are_a_checkpoint_to_train_on_from(tmp_path, capsys):
    """Unpack then export gives the bundled tensors back; training would go on from step 0 with them."""
    from safetensors.torch import load_file

    bundled, work, out = pipeline.ASSETS / "tiny", tmp_path / "work", tmp_path / "out"
    assert cli.main(["unpack", "--work", str(work), "--out", str(bundled)]) == 0
    run = runs.Run(work / "dit", model=CausalWanTransformer(get_preset("tiny").model))
    assert (run.step, run.seconds < 5) == (0, True)
    assert cli.main(["unpack", "--work", str(work), "--out", str(bundled)]) == 1
    assert "holds a checkpoint already" in capsys.readouterr().err
    for stage in ("dit", "decoder", "refine", "text"):
        runs.Run(work / stage).log({"loss": 1.0})
    assert cli.main(["export", "--work", str(work), "--out", str(out)]) == 0
    for file in bundled.glob("*.safetensors"):
        assert_close(load_file(out / file.name), load_file(file), rtol=0, atol=0)


def test_all_stages_in_one_go_make_a_model_that_streams(tmp_path, clips, clock, monkeypatch, capsys):
    from streamdiff_core.training import evaluate

    for module in (cli, pipeline):
        monkeypatch.setattr(module, "get_preset", lambda _: PRESET)
    short = text_stage.train_text
    monkeypatch.setattr(text_stage, "train_text", lambda *a, **k: short(*a, **k, num_steps=2, batch=4))
    made = []

    def only_stream(pipe, folder, report):
        made.append(evaluate.restyle(pipe, moving_frames(9), "oil painting"))
        return {"styles": [], "mean_psnr": 1.5}

    monkeypatch.setattr(evaluate, "evaluate", only_stream)
    command = ["all", "--work", str(tmp_path / "work"), "--clips", str(clips), "--val", str(clips)]
    command += ["--variants", "1", "--threads", "1"]
    command += ["--minutes", "0.5", "--decoder-minutes", "0.5", "--guide-minutes", "0.5"]
    assert cli.main(command) == 0
    assert made[0].shape == (9, 64, 64, 3)
    exported = TinyVAE(VAE)
    load_checkpoint(exported, tmp_path / "work" / "export" / "vae.safetensors")
    assert exported.guide.out.weight.abs().max() > 0, "the guide was trained after the export and is in it"
    assert '"mean_psnr": 1.5' in capsys.readouterr().out
    step = torch.load(tmp_path / "work" / "dit" / "last.pt", weights_only=True)["step"]
    assert cli.main(command) == 0, "a second time nothing is trained"
    assert torch.load(tmp_path / "work" / "dit" / "last.pt", weights_only=True)["step"] == step
