"""Reading what people have and writing what players play, against files made by tests/make_video.py."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_video import frame_numbers, numbered_frames, write_video
from PIL import Image

from streamdiff_core import video_reader
from streamdiff_core.types import VideoReadError
from streamdiff_core.video_io import VideoWriter, probe, read_video, sample_clip_path, side_by_side


def partial_files(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if "partial" in p.name]


# reading: what is in the file


def test_sample_clip_is_bundled() -> None:
    info = probe("sample")
    assert (info.width, info.height, info.fps, info.num_frames) == (256, 256, 16.0, 81)
    assert len(list(read_video("sample", max_seconds=0.5))) == 8
    assert sample_clip_path().stat().st_size < 700_000


@pytest.mark.parametrize("num_frames", [1, 2, 20])
def test_constant_rate_keeps_every_frame(tmp_path: Path, num_frames: int) -> None:
    path = write_video(tmp_path / "in.mp4", numbered_frames(num_frames), audio_s=0.5)
    info = probe(path)
    assert (info.width, info.height, info.num_frames) == (80, 64, num_frames)
    assert info.fps == pytest.approx(16) and not info.is_variable_frame_rate
    assert info.duration_s == pytest.approx(num_frames / 16, abs=0.01)
    assert frame_numbers(list(read_video(path))) == list(range(num_frames))


def test_resampling_takes_the_newest_frame_not_later(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.mp4", numbered_frames(12), fps=12)
    # 12 → 8 fps: sample k is at 1.5 k source frames; the newest frame not later is floor(1.5 k).
    assert frame_numbers(list(read_video(path, fps=8))) == [0, 1, 3, 4, 6, 7, 9, 10]
    # 12 → 24 fps: each frame twice.
    assert frame_numbers(list(read_video(path, fps=24))) == sorted([*range(12), *range(12)])
    assert frame_numbers(list(read_video(path, fps=8, max_seconds=0.5))) == [0, 1, 3, 4]


def test_variable_rate_becomes_even(tmp_path: Path) -> None:
    # Every 100 ms, but nothing at 400, 500 and 600 ms: frame 3 stays on screen for four samples.
    times_ms = [0, 100, 200, 300, 700, 800, 900]
    path = write_video(tmp_path / "in.mkv", numbered_frames(7), times_ms=times_ms, fps=10)
    info = probe(path)
    assert info.is_variable_frame_rate and info.fps == pytest.approx(10, rel=1e-3)
    frames = frame_numbers(list(read_video(path)))
    assert frames == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6]
    assert info.num_frames == len(frames)


def test_millisecond_clock_is_not_a_variable_rate(tmp_path: Path) -> None:
    times_ms = [round(1000 * i / 30) for i in range(20)]  # 0, 33, 67, 100: rounded, not uneven
    path = write_video(tmp_path / "in.mkv", numbered_frames(20), times_ms=times_ms, fps=30)
    assert not probe(path).is_variable_frame_rate
    # Frame 2 comes at 67 ms, 0.3 ms after its sample time: comparing exactly would repeat frame 1 there.
    assert frame_numbers(list(read_video(path, fps=30))) == list(range(20))


def test_a_long_file_is_scanned_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "in.mp4", numbered_frames(28))
    monkeypatch.setattr(video_reader, "_SCAN_PACKETS", 22)
    info = probe(path)
    assert info.fps == pytest.approx(16) and info.num_frames == 28
    assert info.duration_s == pytest.approx(28 / 16, abs=0.01)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_phone_rotation_is_applied(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    # White top-left corner: 90° anticlockwise puts it bottom left, clockwise top right, 180° bottom right.
    frames = np.zeros((3, 64, 128, 3), dtype=np.uint8)
    frames[:, :16, :16] = 255
    path = write_video(tmp_path / "in.mp4", frames, rotation=rotation)
    info, first = probe(path), next(read_video(path))
    assert first.shape == ((64, 128, 3) if rotation == 180 else (128, 64, 3))
    assert (info.height, info.width) == first.shape[:2]
    assert first[corner].min() > 200 and first[0, 0].max() < 60


def test_anamorphic_pixels_become_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.mkv", numbered_frames(3, 64, 64), pixel_aspect=Fraction(4, 3))
    assert next(read_video(path)).shape == (64, 85, 3)
    assert probe(path).width == 85


def test_colours_survive_the_round_trip(tmp_path: Path) -> None:
    colours = np.array([(200, 30, 40), (30, 180, 60), (40, 60, 210), (128, 128, 128), (250, 240, 30)], np.uint8)
    frames = np.repeat(np.repeat(colours[:, None, None], 64, 1), 64, 2)
    with VideoWriter(tmp_path / "out.mp4", 16) as writer:
        writer.write(frames)
    for expected, frame in zip(colours, read_video(tmp_path / "out.mp4"), strict=True):
        # 3 levels: 8-bit limited-range luma. BT.601 read as BT.709 would be tens of levels off.
        np.testing.assert_allclose(frame.reshape(-1, 3).mean(0), expected, atol=3)


def test_recoding_does_not_darken(tmp_path: Path) -> None:
    before = np.stack(list(read_video("sample", max_seconds=0.5)))
    with VideoWriter(tmp_path / "out.mp4", 16, crf=10) as writer:
        writer.write(before)
    after = np.stack(list(read_video(tmp_path / "out.mp4")))
    # FFmpeg's default rounding loses a level in each pass: a clip edited ten times would be visibly dark.
    assert np.abs((after.astype(float) - before).mean(axis=(0, 1, 2))).max() < 0.5


# reading: images


def save_images(folder: Path, frames: np.ndarray, names: list[str]) -> Path:
    folder.mkdir()
    for frame, name in zip(frames, names, strict=True):
        Image.fromarray(frame).save(folder / name)
    return folder


def test_folder_of_images_in_natural_order(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "f", numbered_frames(3), ["shot10.png", "shot2.jpg", "Shot1.webp"])
    (folder / "notes.txt").write_text("not an image")
    assert frame_numbers(list(read_video(folder))) == [2, 1, 0]
    info = probe(folder)
    assert (info.width, info.height, info.num_frames, info.fps) == (80, 64, 3, 16.0)


def test_names_that_mix_digits_and_letters_sort(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "f", numbered_frames(3), ["b.png", "1.png", "a2.png"])
    assert frame_numbers(list(read_video(folder))) == [1, 2, 0]


def test_mixed_sizes_name_the_file(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "f", numbered_frames(2), ["a.png", "b.png"])
    Image.new("RGB", (10, 20)).save(folder / "c.png")
    with pytest.raises(VideoReadError, match=r"c\.png is 10×20 pixels but a\.png is 80×64.*Resize"):
        read_video(folder)


def test_one_image_and_its_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert (probe(tmp_path / "phone.jpg").width, probe(tmp_path / "phone.jpg").height) == (20, 40)
    assert [f.shape for f in read_video(tmp_path / "phone.jpg")] == [(40, 20, 3)]


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match="holds no"):
        read_video(tmp_path)


def test_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(VideoReadError, match=r"a\.png is not a readable image"):
        read_video(tmp_path)


# reading: what cannot be read


def test_errors_come_at_the_call_in_one_sentence_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    write_video(tmp_path / "sound.mp4", numbered_frames(0), audio_s=0.5)
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(20)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # the index of an MP4 is at its end
    for name, text in {
        "missing.mp4": "No such file",
        "empty.mp4": "is empty",
        "text.mp4": "not a video that FFmpeg can read",
        "noise.mp4": "not a video that FFmpeg can read",
        "sound.mp4": "only sound",
        "cut.mp4": "not a video that FFmpeg can read",
    }.items():
        for reader in (probe, read_video):
            with pytest.raises(VideoReadError, match=text) as caught:
                reader(tmp_path / name)
            message = str(caught.value)
            assert name in message and "\n" not in message and message.endswith(".")


def test_track_without_frames(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoReadError, match=r"none\.mkv"):
        read_video(tmp_path / "none.mkv")


def test_damage_in_the_middle_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "in.mp4", numbered_frames(20))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[8:10]:
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    frames = list(read_video(path))
    assert len(frames) == 18 and frame_numbers(frames[:8]) == list(range(8))
    assert "2 packets skipped, 18 frames read" in caplog.text


def test_a_cut_file_gives_what_it_has(tmp_path: Path) -> None:
    data = write_video(tmp_path / "in.mkv", numbered_frames(20)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: int(len(data) * 0.9)])
    frames = frame_numbers(list(read_video(tmp_path / "cut.mkv")))
    assert 2 < len(frames) < 20 and frames == list(range(len(frames)))


@pytest.mark.parametrize("argument", [{"fps": 0}, {"max_seconds": -1}, {"fps": float("nan")}])
def test_bad_arguments(argument: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        read_video("sample", **argument)


# writing


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv", "out.webm"])
def test_write_in_pieces_then_read(tmp_path: Path, name: str) -> None:
    frames = numbered_frames(12)
    with VideoWriter(tmp_path / name, 16) as writer:
        writer.write(frames[:0])
        writer.write(frames[:1])
        writer.write(frames[1:])
        assert not (tmp_path / name).exists()  # nobody meets half a file
    assert writer.num_frames == 12
    assert frame_numbers(list(read_video(tmp_path / name))) == list(range(12))
    assert probe(tmp_path / name).fps == pytest.approx(16)
    assert not partial_files(tmp_path)


def test_mp4_is_what_players_expect(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", 30000 / 1001) as writer:
        writer.write(numbered_frames(4, 65, 81))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
        assert (stream.height, stream.width) == (66, 82)  # odd sides padded
        assert stream.codec_context.colorspace == 1  # BT.709
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts before it is all downloaded


def test_padding_repeats_the_edge(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", 16) as writer:
        writer.write(np.full((2, 65, 65, 3), 200, np.uint8))
    frame = next(read_video(tmp_path / "out.mp4"))
    assert frame.shape == (66, 66, 3) and frame.min() > 190  # zero padding would be black


def test_gif_times_do_not_drift(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.gif", 16) as writer:
        writer.write(numbered_frames(16))
    # 1/16 s is 6.25 of the format's ticks; always rounding down would lose 4 % of the length.
    assert probe(tmp_path / "out.gif").duration_s == pytest.approx(1.0, abs=0.011)
    assert frame_numbers(list(read_video(tmp_path / "out.gif"))) == list(range(16))


def test_folder_of_png(tmp_path: Path) -> None:
    frames = numbered_frames(3)
    with VideoWriter(f"{tmp_path}/out/", 16) as writer:
        writer.write(frames)
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [f"frame_{i:05d}.png" for i in range(3)]
    assert np.array_equal(np.stack(list(read_video(tmp_path / "out"))), frames)
    with pytest.raises(ValueError, match="not an empty folder"):
        VideoWriter(tmp_path / "out", 16)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out/"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_a_playable_file(tmp_path: Path, name: str, error: type) -> None:
    with pytest.raises(error), VideoWriter(f"{tmp_path}/{name}", 16) as writer:
        writer.write(numbered_frames(5))
        raise error
    assert frame_numbers(list(read_video(f"{tmp_path}/{name}"))) == [0, 1, 2, 3, 4]
    assert not partial_files(tmp_path)


def test_nothing_written_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", 16):
        raise KeyboardInterrupt
    writer = VideoWriter(tmp_path / "out.mp4", 16)
    assert writer.finish() is None and writer.finish() is None
    assert (tmp_path / "out.mp4").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_failed_completion_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.mp4").write_bytes(b"older")
    writer = VideoWriter(tmp_path / "out.mp4", 16)
    writer.write(numbered_frames(3))

    close = writer._output.close

    def no_space() -> None:
        close()
        raise OSError("No space left on device")

    monkeypatch.setattr(writer._output, "close", no_space)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt  # the first error is the one that is reported
    assert (tmp_path / "out.mp4").read_bytes() == b"older" and not partial_files(tmp_path)


def test_failed_completion_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = VideoWriter(tmp_path / "out.gif", 16)
    writer.write(numbered_frames(3))
    monkeypatch.setattr(writer._output, "_path", tmp_path / "nowhere" / "out.gif")
    with pytest.raises(OSError, match="nowhere"), writer:
        pass
    assert not list(tmp_path.iterdir())


def test_finish_twice_and_write_after(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", 16)
    writer.write(numbered_frames(2))
    assert writer.finish() == writer.finish() == tmp_path / "out.mp4"
    with pytest.raises(ValueError, match="already finished"):
        writer.write(numbered_frames(1))


def test_writer_refuses_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.mp4.*ends in /"):
        VideoWriter(tmp_path / "out.avi", 16)
    with pytest.raises(ValueError, match="does not exist; create it"):
        VideoWriter(tmp_path / "nowhere" / "out.mp4", 16)
    with pytest.raises(ValueError, match="fps must be above 0"):
        VideoWriter(tmp_path / "out.mp4", 0)
    with VideoWriter(tmp_path / "out.mp4", 16) as writer:
        writer.write(numbered_frames(1, 64, 64))
        with pytest.raises(ValueError, match="resize first"):
            writer.write(numbered_frames(1, 64, 80))


def test_side_by_side_matches_the_sizes() -> None:
    out = side_by_side(np.full((2, 100, 200, 3), 9, np.uint8), np.full((2, 64, 64, 3), 7, np.uint8))
    assert out.shape == (2, 64, 128, 3) and (out[:, :, :64] == 9).all() and (out[:, :, 64:] == 7).all()
    with pytest.raises(ValueError, match="2 frames before and 1 after"):
        side_by_side(out, out[:1])


@pytest.mark.parametrize("size", [(64, 64), (65, 81)])
def test_lossless_video_keeps_every_value(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "o.mkv", 16, lossless=True, comment="as it was") as writer:
        writer.write(frames)
    np.testing.assert_array_equal(np.stack(list(read_video(tmp_path / "o.mkv"))), frames)
    with pytest.raises(ValueError, match="lossless video ends in .mkv or .mp4"):
        VideoWriter(tmp_path / "o.webm", 16, lossless=True)
