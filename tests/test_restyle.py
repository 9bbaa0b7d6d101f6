"""A whole clip through a stream: lengths, rates, shapes, pairing, interruption, names, and the before/after strip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_video import frame_numbers, numbered_frames, write_video
from PIL import Image
from tiny_pipeline import small_pipeline

from streamdiff_core.pipeline import StreamPipeline
from streamdiff_core.recipe import prompt_events
from streamdiff_core.restyle import default_output, expected_frames, restyle_frames, restyle_video
from streamdiff_core.strip import KEPT, StripCollector
from streamdiff_core.video_io import probe, read_video


@pytest.fixture(scope="module")
def pipe() -> StreamPipeline:
    return small_pipeline()


def clip(folder: Path, num_frames: int, height: int = 64, width: int = 80, **options: object) -> Path:
    return write_video(folder / "clip.mp4", numbered_frames(num_frames, height, width), **options)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 6, 19])
def test_frames_and_rate_are_kept(pipe: StreamPipeline, tmp_path: Path, num_frames: int) -> None:
    source = clip(tmp_path, num_frames, fps=10)
    result = restyle_video(pipe, source, "pencil", tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert result.num_frames == info.num_frames == sum(1 for _ in read_video(tmp_path / "out.mp4")) == num_frames
    assert info.fps == pytest.approx(10)
    assert result.stats.num_frames_in == result.stats.num_frames_out == num_frames


def test_every_frame_stands_beside_its_own_source(pipe: StreamPipeline) -> None:
    """Fails when a frame is delivered beside the frame that happens to be pushed at that moment."""
    numbered = numbered_frames(22, 64, 64)
    with pipe.start("pencil", steps=2) as session:
        pairs = list(restyle_frames(session, numbered))
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    assert frame_numbers(before) == list(range(22))
    with pipe.start("pencil", steps=2) as session:
        at_once = np.concatenate([session.push(numbered), session.flush()])
    np.testing.assert_array_equal(after, at_once)


@pytest.mark.parametrize(("height", "width"), [(160, 90), (65, 121), (40, 40)])
def test_shape_is_kept(pipe: StreamPipeline, tmp_path: Path, height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, height, width, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
    result = restyle_video(pipe, folder, "pencil", tmp_path / "out.mp4")
    assert (result.width >= result.height) == (width >= height)
    assert result.width % 16 == result.height % 16 == 0 and min(result.width, result.height) >= 64
    assert result.num_frames == 3


def test_size_side_by_side_and_max_seconds(pipe: StreamPipeline, tmp_path: Path) -> None:
    source, out = clip(tmp_path, 20, fps=10), tmp_path / "out.mp4"
    result = restyle_video(
        pipe, source, "pencil", out, size=(96, 64), side_by_side_output=True, max_seconds=0.7, strip=tmp_path / "s.png"
    )
    info = probe(out)
    assert (info.width, info.height, result.num_frames) == (192, 64, 7)
    with Image.open(result.strip) as picture:
        assert picture.width > 6 * 96 and picture.height > 2 * 64


def test_variable_frame_rate_becomes_constant(pipe: StreamPipeline, tmp_path: Path) -> None:
    source = clip(tmp_path, 6, times_ms=[0, 100, 200, 500, 600, 700])
    info = probe(source)
    result = restyle_video(pipe, source, "pencil", tmp_path / "out.mp4")
    assert info.is_variable_frame_rate and result.num_frames == info.num_frames == 8


def test_interrupt_leaves_a_playable_file(pipe: StreamPipeline, tmp_path: Path) -> None:
    seen = []

    def stop_after_9(num_frames: int, _: object) -> None:
        seen.append(num_frames)
        if sum(seen) >= 9:
            raise KeyboardInterrupt

    out = tmp_path / "out.mp4"
    result = restyle_video(pipe, clip(tmp_path, 25), "pencil", out, strip=tmp_path / "s.png", progress=stop_after_9)
    assert result.interrupted and result.output == out
    assert result.num_frames == sum(seen) == sum(1 for _ in read_video(out)) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "out.mp4", "s.png"]


def test_interrupt_before_the_first_frame_leaves_nothing(pipe: StreamPipeline, tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streamdiff_core.session.StreamSession.push", stop)
    result = restyle_video(pipe, clip(tmp_path, 3), "pencil", tmp_path / "out.mp4", strip=tmp_path / "s.png")
    assert result.interrupted and result.output is None and result.strip is None
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_later_prompt_changes_the_picture_only_after_its_time(pipe: StreamPipeline) -> None:
    frames = numbered_frames(29, 64, 64)

    def run(prompts: list[tuple[float, str]]) -> np.ndarray:
        with pipe.start("pencil", steps=1) as session:
            pairs = restyle_frames(session, frames, prompt_events(prompts, 10, "reset"))
            return np.concatenate([after for _, after in pairs])

    plain, changed = run([]), run([(1.3, "oil painting")])
    same = (plain == changed).all(axis=(1, 2, 3))
    assert same[:13].all()  # frame 13 = 1.3 s is where the 4th chunk (13 … 16) begins
    assert not same[13:].reshape(-1, 4).all(axis=1).any()  # every chunk from then on


def test_summary_is_complete(pipe: StreamPipeline, tmp_path: Path) -> None:
    result = restyle_video(pipe, clip(tmp_path, 14, fps=16), "pencil", tmp_path / "out.mp4", steps=1)
    summary = result.summary()
    assert summary["fps"] == pytest.approx(14 / summary["seconds"])
    assert summary["real_time_factor"] == pytest.approx(summary["fps"] / 16)
    assert set(summary["latency_ms"]) == {"p50", "p95", "p99"} and summary["ttff_ms"] > 0
    assert {"encode", "denoise", "decode"} <= set(summary["stage_ms"])
    assert result.options["steps"] == 1


def test_default_output_is_named_after_both_and_never_taken(tmp_path: Path) -> None:
    first = default_output("/videos/my cat.mov", "Oil painting: at night, by the sea", tmp_path)
    assert first == tmp_path / "my cat_oil_painting_at_night.mp4"
    first.touch()
    assert default_output("/videos/my cat.mov", "oil painting at night", tmp_path).name.endswith("night_2.mp4")
    assert default_output("sample", "!!", tmp_path).name == "sample_restyled.mp4"


@pytest.mark.parametrize(
    ("fps", "max_seconds", "count"), [(None, None, 20), (5, None, 10), (None, 0.5, 5), (5, 0.5, 2)]
)
def test_expected_frames(tmp_path: Path, fps: float | None, max_seconds: float | None, count: int) -> None:
    source = clip(tmp_path, 20, fps=10)
    assert expected_frames(probe(source), fps, max_seconds) == count
    assert sum(1 for _ in read_video(source, fps=fps, max_seconds=max_seconds)) == count


@pytest.mark.parametrize("num_frames", [1, 2, 6, 64, 65, 1000])
def test_strip_moments_are_even_and_bounded(num_frames: int) -> None:
    collector = StripCollector(fps=10)
    for i in range(num_frames):
        frame = np.full((1, 4, 4, 3), i % 256, np.uint8)
        collector.add(frame, frame)
        assert len(collector._pairs) <= 2 * KEPT
    moments = collector.moments()
    numbers = [number for number, _, _ in moments]
    assert len(numbers) == min(6, num_frames) and numbers[0] == 0 and numbers[-1] >= 0.9 * (num_frames - 1)
    assert all(before[0, 0, 0] == number % 256 for number, before, _ in moments)
    gaps = np.diff(numbers)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= max(1, num_frames // KEPT)


def test_strip_shows_source_above_and_result_below(tmp_path: Path) -> None:
    collector = StripCollector(fps=10)
    red, blue = (np.full((6, 64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    collector.add(red, blue)
    path = collector.save(tmp_path / "s.png", "a very long prompt " * 20, "note")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = len(pixels) // 2
    is_red, is_blue = ((pixels == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert is_red[:middle].sum() == is_blue[middle:].sum() == 6 * 64 * 64
    assert is_red[middle:].sum() == is_blue[:middle].sum() == 0


def test_strip_without_frames_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        StripCollector(fps=10).save(tmp_path / "s.png", "x")
