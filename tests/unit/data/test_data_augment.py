"""Augmentation: what each part does, and that a sample's draws are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pizero.data import Augmentation
from pizero.data.hashing import uniform

EVERYTHING = Augmentation(
    shift=2, crop=0.9, rotation=5, brightness=0.3, contrast=0.3, saturation=0.3
)


def _pictures(batch: int, cameras: int = 2, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (batch, cameras, 3, side, side), dtype=torch.uint8, generator=generator
    )


def test_a_sample_does_not_depend_on_its_batch():
    images, samples = _pictures(6), np.arange(100, 106)
    whole = EVERYTHING(images, seed=3, samples=samples)
    for i in range(6):
        alone = EVERYTHING(images[i : i + 1], seed=3, samples=samples[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=0)
    assert not torch.equal(whole, EVERYTHING(images, seed=4, samples=samples))
    assert not torch.equal(whole, EVERYTHING(images, seed=3, samples=samples + 1))


def test_input_is_left_alone_and_nothing_means_nothing():
    images = _pictures(2)
    before = images.clone()
    result = EVERYTHING(images, seed=0, samples=np.arange(2))
    assert torch.equal(images, before)
    assert result.dtype == torch.uint8
    assert torch.equal(Augmentation()(images, seed=0, samples=np.arange(2)), images)


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
        ({"shift": -1}, "expected shift and saturation >= 0, got -1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)
