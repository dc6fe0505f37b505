"""Augmentation: what each step does, that a sample's draws are its own, parity with others.

The vectors under tests/data/augment were computed with augmax 0.4.1 on JAX, and with dlimp and
tf.image on TensorFlow 2.21; pixels are stored in 256ths of a grey level.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch

from pizero.data import Augmentation, augment
from pizero.data.augment import (
    Brightness,
    Colour,
    Contrast,
    Hue,
    Recipe,
    ResizedCrop,
    Saturation,
    Shift,
    ValueJitter,
    Warp,
)
from pizero.data.hashing import uniform

STORED = Path(__file__).parents[2] / "data" / "augment"
EVERYTHING = Augmentation(
    shift=2, crop=0.9, rotation=5, brightness=0.3, contrast=0.3, saturation=0.3
)
JITTER = ValueJitter(brightness=0.3, contrast=0.4, hue=0.1, probability=0.5)
OCTO = [
    ResizedCrop(scale=[0.8, 1.0], ratio=[0.9, 1.1]),
    Brightness(delta=0.1),
    Contrast(factor=[0.9, 1.1]),
    Saturation(factor=[0.9, 1.1]),
    Hue(delta=0.05),
]
OPENVLA = [
    ResizedCrop(scale=[0.9, 0.9], ratio=[1.0, 1.0]),
    Brightness(delta=0.2),
    Contrast(factor=[0.8, 1.2]),
    Saturation(factor=[0.8, 1.2]),
    Hue(delta=0.05),
]
RECIPES = {
    "usual": EVERYTHING,
    "octo": Recipe(steps=OCTO, rounding="tensorflow", colour_only=[1]),
    "alike": Recipe(steps=[Warp(crop=0.9, rotation=5), JITTER], alike="cameras"),
    "one draw": Recipe(steps=OPENVLA, alike="steps"),
}


def _pictures(batch: int, cameras: int = 2, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (batch, cameras, 3, side, side), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_sample_does_not_depend_on_its_batch(name):
    recipe = RECIPES[name]
    images, samples = _pictures(6), np.arange(100, 106)
    whole = recipe(images, seed=3, samples=samples)
    for i in range(6):
        alone = recipe(images[i : i + 1], seed=3, samples=samples[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=0)
    mixed = torch.tensor([4, 0, 5, 2, 1, 3])
    again = recipe(images[mixed], seed=3, samples=torch.from_numpy(samples)[mixed])
    assert torch.equal(again, whole[mixed])
    assert not torch.equal(whole, recipe(images, seed=4, samples=samples))
    assert not torch.equal(whole, recipe(images, seed=3, samples=samples + 1))


def test_input_is_left_alone_and_nothing_means_nothing():
    images = _pictures(2)
    before = images.clone()
    result = EVERYTHING(images, seed=0, samples=np.arange(2))
    assert torch.equal(images, before)
    assert result.dtype == torch.uint8
    for nothing in (Augmentation(), Recipe(steps=[])):
        assert torch.equal(nothing(images, seed=0, samples=np.arange(2)), images)


def test_shift_moves_by_whole_pixels_and_repeats_edges():
    image = torch.arange(25, dtype=torch.uint8).view(1, 1, 1, 5, 5).expand(64, 1, 3, 5, 5)
    moved = Augmentation(shift=1)(image, seed=0, samples=np.arange(64))[:, 0, 0]
    seen = set()
    for picture in moved:
        source_row, source_column = divmod(int(picture[2, 2]), 5)
        down, right = 2 - source_row, 2 - source_column
        rows = (torch.arange(5) - down).clamp(0, 4)
        columns = (torch.arange(5) - right).clamp(0, 4)
        assert torch.equal(picture, image[0, 0, 0][rows][:, columns])
        seen.add((down, right))
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_colour_only_cameras_keep_their_geometry():
    images = _pictures(8)
    result = Augmentation(shift=2, crop=0.8, rotation=9, colour_only=[1])(
        images, seed=0, samples=np.arange(8)
    )
    assert torch.equal(result[:, 1], images[:, 1])
    assert not torch.equal(result[:, 0], images[:, 0])


def test_brightness_scales_within_its_range():
    images = torch.full((200, 1, 3, 2, 2), 100, dtype=torch.uint8)
    values = Augmentation(brightness=0.2)(images, seed=0, samples=np.arange(200))[:, 0, 0, 0, 0]
    assert 80 <= values.min() <= 84
    assert 116 <= values.max() <= 120


def test_contrast_keeps_the_mean_and_saturation_the_grey():
    images = _pictures(20, 1) // 2 + 64
    samples = np.arange(20)
    contrast = Augmentation(contrast=0.3)(images, seed=0, samples=samples)
    assert (contrast.float().mean((1, 2, 3, 4)) - images.float().mean((1, 2, 3, 4))).abs().max() < 1
    assert not torch.equal(contrast, images)
    grey = images[:, :, :1].expand_as(images).contiguous()
    assert torch.equal(Augmentation(saturation=0.5)(grey, seed=0, samples=samples), grey)


def test_crop_is_exact_on_a_ramp():
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(64, 1, 3, 16, 16).contiguous()
    result = Augmentation(crop=0.75)(ramp, seed=0, samples=np.arange(64))
    slope = result[..., 1:].float() - result[..., :-1].float()
    middle = slope[..., 2:-2]
    assert (middle - 7.5).abs().max() <= 1  # 12 of 16 columns spread over all 16
    assert len({tuple(r.tolist()) for r in result[:, 0, 0, 8]}) > 20


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(0, np.arange(20000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=0.002)
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 0.0}, r"expected crop in \(0, 1\], got 0.0"),
        ({"brightness": 1.0}, r"expected brightness in \[0, 1\), got 1.0"),
        ({"shift": -1}, "expected a shift of pixels >= 0, got -1"),
        ({"saturation": -1}, "expected saturation >= 0, got -1"),
        ({"colour_only": ["wrist"]}, r"names cameras, \['wrist'\]; expected cameras=\[...\]"),
        (
            {"colour_only": ["wirst"], "cameras": ["base", "wrist"]},
            "one of base, wrist, got 'wirst'; did you mean 'wrist'",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_refusals_of_steps_and_recipes():
    for make, message in [
        (lambda: ResizedCrop(scale=[0.9, 1.1], ratio=[1, 1]), "expected 0 < scale <= 1"),
        (lambda: ResizedCrop(scale=[0.9], ratio=[1, 1]), r"scale as \[smallest, largest\]"),
        (lambda: Contrast(factor=[1.1, 0.9]), r"factor as \[smallest, largest\] >= 0, got"),
        (lambda: ValueJitter(brightness=1, contrast=0, hue=0), r"brightness in \[0, 1\), got 1"),
        (
            lambda: ValueJitter(brightness=0, contrast=0, hue=0, probability=2),
            r"probability in \[0, 1\], got 2",
        ),
        (lambda: Recipe(steps=[], alike="camera"), "got 'camera'; did you mean 'cameras'"),
        (lambda: Recipe(steps=[], rounding="up"), "rounding to be one of nearest, tensorflow"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    images, samples = _pictures(2, 3), np.arange(2)
    for recipe in (Augmentation(colour_only=[3]), Augmentation(cameras=["base", "wrist"])):
        with pytest.raises(ValueError, match=r"got n = 3"):
            recipe(images, seed=0, samples=samples)


def test_cameras_by_name_and_their_frames():
    """Six images of a sample: three cameras with two frames each."""
    picture = _pictures(4, 1).expand(4, 6, 3, 12, 12)
    result = Augmentation(
        shift=2, cameras=["base", "left_wrist", "right_wrist"], colour_only=["*wrist*", "*hand*"]
    )(picture, seed=0, samples=np.arange(4))
    assert torch.equal(result[:, 2:], picture[:, 2:])
    assert torch.equal(result[:, 0], result[:, 1])
    assert not torch.equal(result[:, 0], picture[:, 0])
    coloured = Augmentation(brightness=0.5, cameras=["a", "b", "c"])(
        picture, seed=0, samples=np.arange(4)
    ).unflatten(1, (3, 2))
    assert torch.equal(coloured[:, :, 0], coloured[:, :, 1])
    assert not torch.equal(coloured[:, 0], coloured[:, 1])


def test_cameras_alike_and_steps_alike():
    picture = _pictures(8, 1).expand(8, 4, 3, 12, 12)
    steps = [Warp(crop=0.8), JITTER]
    result = Recipe(steps=steps, alike="cameras", colour_only=[1, 3])(
        picture, seed=0, samples=np.arange(8)
    )
    assert torch.equal(result[:, 0], result[:, 2])
    assert torch.equal(result[:, 1], result[:, 3])
    assert not torch.equal(result[:, 0], result[:, 1])
    draws = Recipe(steps=OCTO, alike="steps")._draws(0, np.arange(8), np.arange(4))
    assert [d.shape for d in draws] == [(32, step.draws) for step in OCTO]
    joined = np.concatenate(draws, axis=1)
    assert (joined == joined[:, :1]).all()
    assert len(np.unique(joined)) == 32


def _run(step, images, draws) -> torch.Tensor:
    size = (images.shape[-2], images.shape[-1])
    parameters = step.parameters(np.asarray(draws), size)
    return step(images, torch.from_numpy(parameters.astype(np.float32)))


def _stored(name: str) -> dict[str, np.ndarray]:
    """Vectors by name, pictures as float or uint8 [m 3 h w]."""
    with np.load(STORED / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file}
    arrays = {k: x / np.float32(256) if x.dtype == np.uint16 else x for k, x in arrays.items()}
    return {k: np.moveaxis(x, -1, 1) if x.ndim == 4 else x for k, x in arrays.items()}


def test_openpi_exact_equals_augmax():
    stored = _stored("augmax")
    images = torch.from_numpy(stored["images"].copy())
    warped = _run(Warp(crop=0.95, rotation=5, whole_pixels=True), images, stored["geometry"])
    base = _run(JITTER, warped, stored["jitter"])
    wrist = _run(JITTER, images, stored["wrist_jitter"])
    assert {0.25, 0.75} == set(stored["wrist_jitter"][:, 3])  # some are left as they are
    np.testing.assert_allclose(base.numpy(), stored["base"], rtol=0, atol=0.004)
    np.testing.assert_allclose(wrist.numpy(), stored["wrist"], rtol=0, atol=0.004)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("crop", ResizedCrop(scale=[0.6, 1.0], ratio=[0.75, 1.4])),
        ("brightness", Brightness(delta=0.3)),
        ("contrast", Contrast(factor=[0.5, 1.5])),
        ("saturation", Saturation(factor=[0.2, 2.2])),
        ("hue", Hue(delta=0.4)),
    ],
)
def test_steps_equal_tensorflow(name, step):
    stored = _stored("tensorflow")
    draws = stored["crop_draws"] if name == "crop" else stored["colour_draws"][:, None]
    result = _run(step, torch.from_numpy(stored["images"].copy()), draws)
    np.testing.assert_allclose(result.numpy(), stored[name], rtol=0, atol=0.004)


@pytest.mark.parametrize(
    ("name", "steps", "colour_only"),
    [("octo", OCTO, []), ("octo_wrist", OCTO, [0]), ("openvla", OPENVLA, [])],
)
def test_recipes_equal_dlimp(name, steps, colour_only, monkeypatch):
    """From bytes to bytes, given dlimp's one number a picture."""
    stored = _stored("tensorflow")
    monkeypatch.setattr(augment, "uniform", lambda seed, samples, n: stored["draws"][:, None])
    recipe = Recipe(steps=steps, alike="steps", rounding="tensorflow", colour_only=colour_only)
    images = torch.from_numpy(stored["images"][:, None].copy())
    result = recipe(images, seed=0, samples=np.arange(len(images)))[:, 0]
    wrong = np.abs(result.numpy().astype(int) - stored[name])
    assert wrong.max() <= 1
    assert (wrong > 0).mean() < 0.001


def _lookup(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear, black outside; image [3 h w]."""
    result = np.zeros(3)
    top, left = int(np.floor(y)), int(np.floor(x))
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                result += weight * image[:, row, column]
    return result


def test_geometry_equals_a_loop_over_pixels():
    images, draws = _pictures(3, 1, 8)[:, 0, :, :6], uniform(0, np.arange(3), 4)
    height, width = images.shape[-2:]
    warped = _run(Warp(crop=0.7, rotation=20), images, draws[:, :3]).numpy()
    cropped = _run(ResizedCrop(scale=[0.5, 0.9], ratio=[0.8, 1.2]), images, draws).numpy()
    for i, (image, draw) in enumerate(zip(images.numpy(), draws, strict=True)):
        turn = np.radians(20 * (2 * draw[2] - 1))
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        centre = np.array([height, width]) / 2 - 0.5
        moved = (2 * draw[:2] - 1) * 0.3 * np.array([height, width]) / 2
        area, ratio = 0.5 + 0.4 * draw[0], 0.8 * 1.5 ** draw[1]
        tall, wide = min(1, (area / ratio) ** 0.5), min(1, (area * ratio) ** 0.5)
        for y in range(height):
            for x in range(width):
                place = centre + moved + 0.7 * rotation @ (np.array([y, x]) - centre)
                expected = _lookup(image, *place)
                np.testing.assert_allclose(warped[i, :, y, x], expected, atol=0.01)
                row = (draw[2] * (1 - tall) + tall * y / (height - 1)) * (height - 1)
                column = (draw[3] * (1 - wide) + wide * x / (width - 1)) * (width - 1)
                expected = _lookup(image, row, column)
                np.testing.assert_allclose(cropped[i, :, y, x], expected, atol=0.01)


def test_hue_and_saturation_equal_the_standard_library():
    images, draws = _pictures(3, 1, 5)[:, 0], np.array([[0.0], [0.4], [0.99]])
    images[0, :, 0] = 128  # grey
    images[1, :, 0] = 0
    hue = _run(Hue(delta=0.5), images, draws).numpy()
    saturation = _run(Saturation(factor=[0.5, 3.0]), images, draws).numpy()
    for i, (image, (draw,)) in enumerate(zip(images.numpy(), draws, strict=True)):
        for y, x in np.ndindex(*image.shape[1:]):
            h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255))
            turned = colorsys.hsv_to_rgb((h + draw - 0.5) % 1, s, v)
            np.testing.assert_allclose(hue[i, :, y, x] / 255, turned, atol=1e-5)
            fuller = colorsys.hsv_to_rgb(h, min(1, s * (0.5 + 2.5 * draw)), v)
            np.testing.assert_allclose(saturation[i, :, y, x] / 255, fuller, atol=1e-5)


def test_drawn_parameters_keep_to_their_ranges():
    draws = uniform(5, np.arange(4000), 4)
    size = (224, 224)
    shares = ResizedCrop(scale=[0.8, 1.0], ratio=[0.9, 1.1]).parameters(draws, size)
    area, ratio = shares[:, 0] * shares[:, 4], shares[:, 0] / shares[:, 4]
    assert (shares[:, [0, 4]] <= 1).all()
    assert 0.79 < area.min() < 0.81 < 0.97 < area.max() <= 1
    assert 0.9 <= ratio.min() < 0.91 < 1.09 < ratio.max() <= 1.1
    edge = np.abs(shares[:, [2, 5]]) + shares[:, [0, 4]]
    assert edge.max() <= 1 + 1e-9  # windows stay inside
    kept, added, slope, turn = JITTER.parameters(draws, size).T
    assert 0.48 < ((kept == 1) & np.isclose(slope, 1) & (turn == 0)).mean() < 0.52
    assert 0.7 <= kept.min() < 0.71
    assert 76 < added.max() <= 76.5
    assert 0.59 < np.abs(turn).max() <= 0.6
    affine = Warp(crop=0.95, rotation=5, whole_pixels=True).parameters(draws[:, :3], (224, 100))
    determinant = affine[:, 0] * affine[:, 4] - affine[:, 1] * affine[:, 3]
    np.testing.assert_allclose(determinant, 212 / 224 * 0.95)


def test_shift_is_the_same_on_every_device():
    images = _pictures(40, 1)[:, 0, :, :9]
    moves = Shift(pixels=3).parameters(uniform(0, np.arange(40), 2), (9, 12)).astype(int)
    by_index = augment._shift(images, torch.from_numpy(moves))
    assert torch.equal(by_index, augment._shift_on_cpu(images, moves))
    floats = augment._shift_on_cpu(images / 3, moves)  # behind a step that needed floats
    torch.testing.assert_close(floats, by_index / 3)
    far = _run(Shift(pixels=30), images, uniform(0, np.arange(40), 2))
    moves = Shift(pixels=30).parameters(uniform(0, np.arange(40), 2), (99, 99)).astype(int)
    assert torch.equal(far, augment._shift(images, torch.from_numpy(moves)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_gpu_equals_cpu_within_a_grey_level(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images, samples = _pictures(16, side=64), np.arange(16)
    expected = RECIPES[name](images, seed=1, samples=samples)
    on_gpu = images.cuda()
    torch.cuda.set_sync_debug_mode("error")  # the host must not wait for the device
    try:
        result = RECIPES[name](on_gpu, seed=1, samples=samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.device.type == "cuda"
    assert (result.cpu().int() - expected.int()).abs().max() <= 1


def test_colour_is_one_affine_map():
    """Against the three done one after another in float64."""
    images, draws = _pictures(4, 1)[:, 0], uniform(2, np.arange(4), 3)
    result = _run(Colour(brightness=0.3, contrast=0.4, saturation=0.5), images, draws).numpy()
    brightness, contrast, saturation = (1 + (2 * draws - 1) * [0.3, 0.4, 0.5]).T[..., None, None]
    pixels = images.double().numpy()
    grey = np.tensordot([0.299, 0.587, 0.114], pixels, (0, 1))[:, None]
    pixels = grey + (pixels - grey) * saturation[:, None]
    mean = pixels.mean((1, 2, 3), keepdims=True)
    pixels = (mean + (pixels - mean) * contrast[:, None]) * brightness[:, None]
    np.testing.assert_allclose(result, pixels, atol=1e-3)
