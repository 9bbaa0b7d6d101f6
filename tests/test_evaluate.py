"""Model-card figures: shares and scores by hand, and the whole report on a pipeline that changes nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from streamdiff_core.training import data, evaluate
from streamdiff_core.training.prompts import DEFAULT_PROMPTS, HELD_OUT_PROMPTS
from streamdiff_core.training.styles import apply_style
from tests.make_video import write_video
from tests.random_pipeline import moving_frames


def level(*values: int) -> np.ndarray:
    """Four 2x2 frames of each grey level."""
    return np.repeat(np.array(values, np.uint8), 4)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)


def test_nearest_share_counts_whole_chunks_by_squared_error():
    targets = {"a": level(0, 0, 0), "b": level(200, 200, 200)}
    output = np.concatenate([level(90, 110, 255), level(0)[:3]])  # nearest: a, b, b; three frames are no chunk
    padded = {name: np.concatenate([t, t[:3]]) for name, t in targets.items()}
    assert evaluate.nearest_share(output, padded, "a") == (1, 3)
    assert evaluate.nearest_share(output, padded, "b") == (2, 3)


class Session:
    """Streams what ``make(prompt)`` says, two frames late."""

    def __init__(self, prompt, make, log, options):
        self.prompt, self.make, self.log, self.held = prompt, make, log, None
        log.append((prompt, options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def push(self, frames):
        out = self.make(self.prompt, frames)
        self.held = out[-2:]
        return out[:-2]

    def flush(self):
        return self.held


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SIZE_PX", 64)
    monkeypatch.setattr(data, "MIN_CLIP_FRAMES", 9)
    monkeypatch.setattr(evaluate, "reconstruction_psnr", lambda vae, clips, styles: dict.fromkeys(styles, 33.0))
    folder = tmp_path / "val"
    folder.mkdir()
    for i in range(2):
        still = np.repeat(moving_frames(2, i), 5, axis=0)  # one change, else still
        write_video(folder / f"clip{i}.mp4", still)
    return folder


def pipe_of(make, log=None):
    """A pipeline whose sessions apply ``make(prompt, frames)``."""
    log = [] if log is None else log
    return SimpleNamespace(
        vae=None,
        preset=SimpleNamespace(fps=16.0),
        start=lambda prompt, **options: Session(prompt, make, log, options),
    )


STYLE_OF = {DEFAULT_PROMPTS[s]: s for s in DEFAULT_PROMPTS} | {
    p: s for s in HELD_OUT_PROMPTS for p in HELD_OUT_PROMPTS[s]
}


def test_a_perfect_model_scores_full_marks_with_canonical_and_unseen_prompts(clips):
    log = []
    pipe = pipe_of(lambda prompt, frames: apply_style(STYLE_OF[prompt], frames), log)
    score, other = evaluate.score_styles(pipe, clips, ("neon", "oil"))
    assert (score.style, other.style, score.vae_psnr) == ("neon", "oil", 33.0)
    assert score.psnr == other.psnr == float("inf")
    assert score.own_style_share == score.own_style_share_held_out == 1.0
    assert score.flicker == score.filter_flicker
    assert 3 < score.unchanged_psnr < 25
    asked = [prompt for prompt, _ in log]
    assert asked.count(DEFAULT_PROMPTS["neon"]) == 2
    assert set(HELD_OUT_PROMPTS["neon"][:2]) <= set(asked), "each clip another unseen prompt"


def test_a_model_deaf_to_unseen_prompts_is_found_out(clips):
    def make(prompt, frames):
        return apply_style("neon", frames) if prompt == DEFAULT_PROMPTS["neon"] else frames

    (score,) = evaluate.score_styles(pipe_of(make), clips, ("neon",))
    assert score.own_style_share == 1.0 and score.own_style_share_held_out == 0.0


def test_flicker_of_the_output_shows_beside_the_filters(clips):
    def shaking(_, frames):
        out = frames.astype(int)
        out[::2] += 10
        return out.clip(0, 255).astype(np.uint8)

    (score,) = evaluate.score_styles(pipe_of(shaking), clips, ("photo",))
    assert score.flicker == pytest.approx(10, abs=1.0) and score.filter_flicker < 1


def test_noise_curve_asks_for_every_noise_scale(clips):
    log = []
    rows = evaluate.noise_curve(pipe_of(lambda _, frames: 255 - frames, log), clips, num_frames=5)
    assert [row["noise_scale"] for row in rows] == list(evaluate.NOISE_SCALES)
    assert [options["noise_scale"] for _, options in log[::2]] == list(evaluate.NOISE_SCALES)
    inputs = [frames[:5] for _, frames in data.iter_clips(clips)]
    error = [np.square(255.0 - 2.0 * frames).mean() for frames in inputs]
    assert rows[0]["psnr_to_input"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(error))), abs=1e-3)


def test_drift_of_a_steady_and_of_a_fading_output(clips):
    seconds = 3.0
    steady = evaluate.drift_over_a_minute(pipe_of(lambda _, frames: frames), clips, seconds=seconds)
    assert steady == {
        "seconds": seconds, "max_delta_e": 0.0, "max_contrast_change": 0.0, "max_sharpness_change": 0.0
    }  # fmt: skip

    def fading(_, frames):
        assert len(frames) == 48
        return (frames * np.linspace(1, 0.5, len(frames))[:, None, None, None]).astype(np.uint8)

    drift = evaluate.drift_over_a_minute(pipe_of(fading), clips, seconds=seconds)
    assert drift["max_delta_e"] > 5 and 0.1 < drift["max_contrast_change"] < 0.7


def test_the_report_is_valid_json_even_where_a_figure_is_infinite(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "STYLE_NAMES", ("photo", "neon"))
    monkeypatch.setattr(evaluate, "NOISE_SCALES", (0.5,))
    drift = evaluate.drift_over_a_minute
    monkeypatch.setattr(evaluate, "drift_over_a_minute", lambda *a: drift(*a, seconds=2.0))
    monkeypatch.setattr(evaluate.score_styles, "__defaults__", (("photo", "neon"),))
    pipe = pipe_of(lambda _, frames: np.clip(frames, 1, 254) ^ 1)
    report = tmp_path / "out" / "evaluation.json"
    result = evaluate.evaluate(pipe, clips, report)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads(report.read_text(encoding="utf-8"), parse_constant=refuse)
    photo = saved["styles"][0]
    assert photo["style"] == "photo" and photo["unchanged_psnr"] is None and photo["psnr"] > 40
    assert saved["mean_psnr"] == pytest.approx(np.mean([s["psnr"] for s in saved["styles"]]))
    assert set(saved) == set(result) == {
        "styles", "mean_psnr", "own_style_share", "own_style_share_held_out", "noise_curve", "drift"
    }  # fmt: skip
