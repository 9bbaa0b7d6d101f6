import numpy as np
import pytest

pytest.importorskip("cv2")

from streamdiff_core.training.styles import GRAIN_LIMIT, STYLES, _grain, apply_style, photo


def scene(height_px: int = 96, width_px: int = 96, seed: int = 0) -> np.ndarray:
    """A face-like disc with two eyes on a gradient: edges, flat fields and several colours."""
    y, x = np.mgrid[:height_px, :width_px].astype(np.float32)
    image = np.stack([x / width_px, y / height_px, 1 - x / width_px], axis=-1) * 200 + 20
    middle_y, middle_x, radius = height_px / 2, width_px / 2, min(height_px, width_px) / 3
    image[(y - middle_y) ** 2 + (x - middle_x) ** 2 < radius**2] = (224, 172, 140)
    for side in (-1, 1):
        eye = (y - middle_y + radius / 4) ** 2 + (x - middle_x - side * radius / 3) ** 2 < (radius / 6) ** 2
        image[eye] = (40, 30, 30)
    noise = np.random.default_rng(seed).normal(0, 1.0, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


def test_photo_comes_first_and_changes_nothing():
    frame = scene()
    assert next(iter(STYLES)) == "photo"
    assert len(STYLES) == 13
    np.testing.assert_array_equal(photo(frame), frame)
    assert photo(frame) is not frame


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("size", [(64, 64), (67, 101), (130, 71)])
def test_shape_and_type_for_odd_sizes(name, size):
    styled = STYLES[name](scene(*size))
    assert styled.dtype == np.uint8
    assert styled.shape == (*size, 3)


@pytest.mark.parametrize("name", STYLES)
def test_same_frame_gives_same_picture_and_is_not_written_to(name):
    frame = scene()
    before = frame.copy()
    clip = apply_style(name, np.stack([frame] * 3))
    np.testing.assert_array_equal(clip[0], clip[2])
    np.testing.assert_array_equal(clip[1], STYLES[name](frame))
    np.testing.assert_array_equal(frame, before)


@pytest.mark.parametrize("name", STYLES)
def test_sensor_noise_is_not_amplified(name):
    a, b = scene(seed=1), scene(seed=2)
    change_in = np.abs(a.astype(float) - b).mean()
    change_out = np.abs(STYLES[name](a).astype(float) - STYLES[name](b)).mean()
    assert change_out <= 1.3 * change_in


def test_styles_differ_from_the_photo_and_from_each_other():
    frame = scene(128, 128)
    styled = {name: style(frame) for name, style in STYLES.items()}
    names = list(STYLES)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert psnr_db(styled[name], styled[other]) < 22, (name, other)


def test_pixel_blocks_lie_on_the_four_pixel_grid():
    styled = STYLES["pixel"](scene(70, 90))
    np.testing.assert_array_equal(styled[0:4, 4:8], np.broadcast_to(styled[0, 4], (4, 4, 3)))
    np.testing.assert_array_equal(styled[64:68, 84:88], np.broadcast_to(styled[64, 84], (4, 4, 3)))


def test_grain_is_gentle_and_fixed():
    grain = _grain(80, 72, 1.6, 1)
    assert np.abs(grain).max() <= GRAIN_LIMIT
    assert grain.std() > 0
    assert _grain(80, 72, 1.6, 1) is grain


def test_unknown_style_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown style 'cubist'.*photo, pencil.*night_vision"):
        apply_style("cubist", scene()[None])


@pytest.mark.parametrize(
    "frames",
    [
        scene(),
        scene()[None].astype(np.float32),
        np.zeros((1, 40, 64, 3), np.uint8),
        np.zeros((1, 64, 64, 4), np.uint8),
    ],
)
def test_frames_of_the_wrong_kind_are_refused(frames):
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\]"):
        apply_style("pencil", frames)


def test_no_frames_give_no_frames():
    assert apply_style("neon", np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 64, 64, 3)
