"""Image augmentation on uint8 batches, drawn per sample from (seed, sample number).

    images -> step -> step -> ... -> rounded once

It runs where the images are. All random numbers are drawn on the host and go to the device as one
small table, so nothing waits for a GPU, and a sample looks the same whatever batch, worker or
device it lands on.

Axes: b samples, n images of a sample (camera by camera, of each its frames), m = b n images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pizero.data.hashing import uniform
from pizero.data.normalize import expect_one_of
from pizero.types import UInt8

_UNMOVED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # the two rows of an affine map
_TINY = 1e-6  # grey levels; keeps the hue of grey finite


class Step(Protocol):
    """One change of a picture; images [m 3 h w] are uint8 or, once a step needed it, float32.

    `draws` is how many random numbers in [0, 1) an image takes. `still` are the parameters that
    move nothing, for cameras that keep their geometry; None for a step that changes colours only.
    """

    draws: int

    @property
    def still(self) -> tuple[float, ...] | None: ...

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """What `draws` [m draws] mean for images of size (height, width): [m parameters]."""
        ...

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Changed copies; floats stay in [0, 255] and may be changed in place."""
        ...


class Recipe:
    """Steps that change every image of a batch, one after another.

    cameras      their names, in order, where an image has several frames or `colour_only` has
                 names; the frames of a camera are drawn alike. None: every image is a camera
    colour_only  cameras that keep their geometry, by name, pattern ("*wrist*") or position: where
                 the camera moves with the hand, a shift would tell a lie about the hand
    alike        None: every camera and step draws for itself. "cameras": those that move draw
                 alike, and so do those that do not. "steps": one number of a camera decides all
                 its steps, so that pictures with a larger window are also brighter, and so on
    rounding     "nearest", or "tensorflow": down, after stretching 255 to 255.5
    """

    def __init__(
        self,
        *,
        steps: Sequence[Step],
        cameras: Sequence[str] | None = None,
        colour_only: Sequence[str | int] = (),
        alike: Literal["cameras", "steps"] | None = None,
        rounding: Literal["nearest", "tensorflow"] = "nearest",
    ) -> None:
        if alike is not None:
            expect_one_of("alike", alike, ("cameras", "steps"))
        expect_one_of("rounding", rounding, ("nearest", "tensorflow"))
        self.steps, self.alike, self.rounding = tuple(steps), alike, rounding
        self.cameras = None if cameras is None else tuple(cameras)
        self.colour_only = _positions(colour_only, self.cameras)

    def __call__(
        self, images: UInt8[Tensor, "b n 3 h w"], *, seed: int, samples: np.ndarray | Tensor
    ) -> UInt8[Tensor, "b n 3 h w"]:
        """Augmented copies of the images of samples [b], numbers on the host."""
        cameras = self._camera_of_image(images.shape[1])
        still = np.isin(cameras, self.colour_only)
        slots = still.astype(int) if self.alike == "cameras" else cameras
        draws = self._draws(seed, np.asarray(samples), slots)
        size = (images.shape[-2], images.shape[-1])
        rows = np.tile(still, len(images))
        tables = []
        for step, share in zip(self.steps, draws, strict=True):
            table = step.parameters(share, size)
            if step.still is not None:
                table[rows] = step.still
            tables.append(torch.from_numpy(table.astype(np.float32)))
        flat = images.flatten(0, 1)
        for step, table in zip(self.steps, _to_device(tables, images.device), strict=True):
            flat = step(flat, table)
        return _to_uint8(flat, self.rounding).view(images.shape)

    def _camera_of_image(self, images: int) -> np.ndarray:
        """Position of the camera of each of the n images."""
        cameras = images if self.cameras is None else len(self.cameras)
        if images % cameras or not all(0 <= c < cameras for c in self.colour_only):
            raise ValueError(
                f"expected images [b n 3 h w] of cameras {list(self.cameras or range(images))}, "
                f"colour_only {list(self.colour_only)} of them, got n = {images}"
            )
        return np.arange(images) // (images // cameras)

    def _draws(self, seed: int, samples: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
        """For each step [m draws], where images of one slot draw alike."""
        counts = [step.draws for step in self.steps]
        width = 1 if self.alike == "steps" else sum(counts)
        number = int(slots.max(initial=-1)) + 1
        drawn = uniform(seed, samples, number * width).reshape(len(samples), number, width)
        drawn = drawn[:, slots].reshape(len(samples) * len(slots), width)
        if self.alike == "steps":
            return [np.repeat(drawn, count, axis=1) for count in counts]
        return np.split(drawn, np.cumsum(counts), axis=1)[: len(counts)]


class Augmentation(Recipe):
    """The usual changes: random shift, crop, rotation and colour.

    shift        up to so many pixels either way, edges repeated
    crop         side of the window kept, as a fraction; it is resized back
    rotation     up to so many degrees; black outside
    brightness   factor in 1 +- value; likewise contrast (about the image's mean) and saturation

    `cameras` and `colour_only` as in Recipe; all cameras of a sample are drawn apart.
    """

    def __init__(
        self,
        *,
        shift: int = 0,
        crop: float = 1.0,
        rotation: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        cameras: Sequence[str] | None = None,
        colour_only: Sequence[str | int] = (),
    ) -> None:
        super().__init__(
            steps=[
                Shift(pixels=shift),
                Warp(crop=crop, rotation=rotation),
                Colour(brightness=brightness, contrast=contrast, saturation=saturation),
            ],
            cameras=cameras,
            colour_only=colour_only,
        )


class Shift:
    """Up to so many whole pixels either way, the edge repeated behind."""

    draws, still = 2, (0.0, 0.0)

    def __init__(self, *, pixels: int) -> None:
        if pixels < 0:
            raise ValueError(f"expected a shift of pixels >= 0, got {pixels}")
        self.pixels = pixels

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        moves = np.rint((draws * 2 - 1) * (self.pixels + 0.499))  # down, right
        farthest = np.array(size) - 1  # beyond, nothing but the edge is seen
        return moves.clip(-farthest, farthest)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        if not self.pixels:
            return images
        if images.device.type == "cpu":
            return _shift_on_cpu(images, parameters.numpy().astype(int))
        return _shift(images, parameters.long())


class Warp:
    """Crop, resize back and rotate about the centre, by one bilinear lookup; black outside.

    `crop` is the side of the window as a fraction, `whole_pixels` rounds it down to whole pixels,
    `rotation` counts in degrees either way.
    """

    draws, still = 3, _UNMOVED

    def __init__(
        self, *, crop: float = 1.0, rotation: float = 0.0, whole_pixels: bool = False
    ) -> None:
        if not 0 < crop <= 1:
            raise ValueError(f"expected crop in (0, 1], got {crop}")
        self.crop, self.rotation, self.whole_pixels = crop, rotation, whole_pixels

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        down, right, turn = (draws * 2 - 1).T
        angle = turn * math.radians(self.rotation)
        tall, wide = self.crop, self.crop
        if self.whole_pixels:
            tall, wide = (int(side * self.crop) / side for side in size)
        cos, sin, ratio = np.cos(angle), np.sin(angle), size[0] / size[1]
        rows = [cos * wide, -sin * wide * ratio, right * (1 - wide)]
        rows += [sin * tall / ratio, cos * tall, down * (1 - tall)]
        return np.stack(rows, axis=1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        if self.crop == 1 and not self.rotation:
            return images
        return _look_up(images, parameters, corners=False)


class ResizedCrop:
    """A window of a share of the area and an aspect ratio (log-uniform), as dlimp has it.

    The corners of the window become those of the picture (`tf.image.crop_and_resize`), so there is
    a little less than a pixel of it at each edge than elsewhere.
    """

    draws, still = 4, _UNMOVED

    def __init__(self, *, scale: Sequence[float], ratio: Sequence[float]) -> None:
        self.scale, self.ratio = _range("scale", scale), _range("ratio", ratio)
        if self.scale[1] > 1 or not self.scale[0] or not self.ratio[0]:
            raise ValueError(f"expected 0 < scale <= 1 and ratio > 0, got {scale} and {ratio}")

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        scale, ratio, down, right = draws.T
        scale = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** ratio
        tall, wide = np.minimum(np.sqrt([scale / ratio, scale * ratio]), 1)
        none = np.zeros_like(tall)
        rows = [wide, none, (2 * right - 1) * (1 - wide), none, tall, (2 * down - 1) * (1 - tall)]
        return np.stack(rows, axis=1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        return _look_up(images, parameters, corners=True)


class Colour:
    """Brightness, contrast about the image's mean and saturation about its grey, as factors.

    Each factor lies in 1 +- value; the three are one affine map of the colours.
    """

    draws, still = 3, None

    def __init__(
        self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast)):
            if not 0 <= value < 1:
                raise ValueError(f"expected {name} in [0, 1), got {value}")
        if saturation < 0:
            raise ValueError(f"expected saturation >= 0, got {saturation}")
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return 1 + (draws * 2 - 1) * [self.brightness, self.contrast, self.saturation]

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        if not (self.brightness or self.contrast or self.saturation):
            return images
        brightness, contrast, saturation = _columns(parameters)
        pixels = images.float()
        if self.saturation:
            red, green, blue = pixels.unbind(1)
            grey = (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)
            pixels = pixels.mul_(saturation).add_(grey.mul_(1 - saturation))
        if not self.contrast:
            return pixels.mul_(brightness)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        return pixels.mul_(brightness * contrast).add_(brightness * mean * (1 - contrast))


class Brightness:
    """Up to a share of the whole range is added to all colours (`tf.image.random_brightness`)."""

    draws, still = 1, None

    def __init__(self, *, delta: float) -> None:
        self.delta = delta

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return (draws * 2 - 1) * self.delta * 255

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        (added,) = _columns(parameters)
        return (images.float() + added).clamp_(0, 255)


class Contrast:
    """Each channel is stretched about its own mean by a factor (`tf.image.random_contrast`)."""

    draws, still = 1, None

    def __init__(self, *, factor: Sequence[float]) -> None:
        self.factor = _range("factor", factor)

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return self.factor[0] + draws * (self.factor[1] - self.factor[0])

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        (factor,) = _columns(parameters)
        pixels = images.float()
        mean = pixels.mean((2, 3), keepdim=True)
        return ((pixels - mean).mul_(factor).add_(mean)).clamp_(0, 255)


class Saturation:
    """The saturation of HSV times a factor, at most full (`tf.image.random_saturation`)."""

    draws, still = 1, None

    def __init__(self, *, factor: Sequence[float]) -> None:
        self.factor = _range("factor", factor)

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return self.factor[0] + draws * (self.factor[1] - self.factor[0])

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        (factor,) = _columns(parameters)
        pixels = images.float()
        value, spread = _value_and_spread(pixels)
        # With hue and value fixed, the distance of a channel from the value goes with saturation.
        fullest = value / spread.clamp_min(_TINY)
        return value - (value - pixels).mul_(torch.minimum(factor, fullest))


class Hue:
    """The hue of HSV turned by up to a share of the circle (`tf.image.random_hue`)."""

    draws, still = 1, None

    def __init__(self, *, delta: float) -> None:
        self.delta = delta

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return (draws * 2 - 1) * self.delta * 6

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        (turn,) = _columns(parameters)
        pixels = images.float()
        value, spread = _value_and_spread(pixels)
        return _from_hsv(_hue(pixels, value, spread) + turn, value, spread)


class ValueJitter:
    """The colour jitter of augmax, as openpi's JAX code runs it: on hue and value, or not at all.

    Brightness moves the value towards white or black by up to a share, contrast bends it by an
    S-curve of three lines through the middle, hue turns by up to a share of the circle. All of it
    happens with `probability`. (augmax has a saturation too, but drops what it computes.)
    """

    draws, still = 4, None

    def __init__(
        self, *, brightness: float, contrast: float, hue: float, probability: float = 1.0
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast)):
            if not 0 <= value < 1:
                raise ValueError(f"expected {name} in [0, 1), got {value}")
        if not 0 <= probability <= 1:
            raise ValueError(f"expected probability in [0, 1], got {probability}")
        self.strengths = (brightness, contrast, hue)
        self.probability = probability

    def parameters(self, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        amounts = (draws[:, :3] * 2 - 1) * self.strengths
        amounts[draws[:, 3] >= self.probability] = 0
        brightness, contrast, hue = amounts.T
        slope = np.tan((contrast + 1) * math.pi / 4)
        return np.stack([1 - abs(brightness), brightness.clip(0) * 255, slope, hue * 6], axis=1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        kept, added, slope, turn = _columns(parameters)
        pixels = images.float()
        value, spread = _value_and_spread(pixels)
        bright = value * kept + added
        lower, upper = bright / slope, (bright - 255) / slope + 255
        bent = ((bright - 127.5) * slope + 127.5).clamp(
            torch.minimum(lower, upper), torch.maximum(lower, upper)
        )
        saturation = spread / value.clamp_min(_TINY)
        return _from_hsv(_hue(pixels, value, spread) + turn, bent, bent * saturation)


def _positions(
    colour_only: Sequence[str | int], cameras: tuple[str, ...] | None
) -> tuple[int, ...]:
    """Positions of the named cameras; a pattern may fit none of them."""
    found: set[int] = set()
    for name in colour_only:
        if isinstance(name, int):
            found.add(name)
        elif cameras is None:
            raise ValueError(
                f"colour_only names cameras, {list(colour_only)}; expected cameras=[...] as well"
            )
        elif any(sign in name for sign in "*?["):
            found |= {i for i, camera in enumerate(cameras) if fnmatchcase(camera, name)}
        else:
            expect_one_of("a camera in colour_only", name, cameras)
            found.add(cameras.index(name))
    return tuple(sorted(found))


def _range(name: str, pair: Sequence[float]) -> tuple[float, float]:
    if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
        raise ValueError(f"expected {name} as [smallest, largest] >= 0, got {list(pair)}")
    return float(pair[0]), float(pair[1])


def _to_device(tables: list[Tensor], device: torch.device) -> list[Tensor]:
    """All tables in one transfer that the host does not wait for."""
    if device.type == "cpu" or not tables:
        return tables
    joined = torch.cat(tables, dim=1)
    if device.type == "cuda":
        joined = joined.pin_memory()
    widths = [table.shape[1] for table in tables]
    return list(joined.to(device, non_blocking=True).split(widths, dim=1))


def _columns(parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters [m p] one by one, to be broadcast over images [m 3 h w]."""
    return parameters[..., None, None, None].unbind(1)


def _look_up(images: Tensor, affine: Tensor, *, corners: bool) -> Tensor:
    """Bilinear lookup at affine [m 6] of the pixel positions, black outside; float32.

    Positions go from -1 to 1, between the outer corners of the picture or, with `corners`, between
    the centres of its corner pixels. Plain sums, because `F.affine_grid` would take what precision
    matrix products are allowed on a GPU.
    """
    axes = [_axis(side, corners, images.device) for side in images.shape[-2:]]
    a, b, c, d, e, f = (column[..., 0] for column in _columns(affine))
    y, x = axes[0][:, None], axes[1]
    grid = torch.stack([a * x + b * y + c, d * x + e * y + f], dim=-1)
    padding = "border" if corners else "zeros"  # on the outermost centres rounding must not matter
    return F.grid_sample(images.float(), grid, padding_mode=padding, align_corners=corners)


def _axis(side: int, corners: bool, device: torch.device) -> Tensor:
    centres = torch.arange(side, dtype=torch.float32, device=device)
    last = max(side - 1, 1)
    return centres * (2 / last) - 1 if corners else (centres * 2 + 1) / side - 1


def _shift(images: Tensor, moves: Tensor) -> Tensor:
    """Each image [m 3 h w] moved by its (down, right) pixels, the edge repeated behind it."""
    number, _, height, width = images.shape
    down, right = moves[:, 0, None], moves[:, 1, None]
    rows = (torch.arange(height, device=images.device) - down).clamp_(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp_(0, width - 1)
    which = torch.arange(number, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _shift_on_cpu(images: Tensor, moves: np.ndarray) -> Tensor:
    """The same by copying windows and edges, several times as fast on a CPU."""
    height, width = images.shape[-2:]
    sources = images.numpy()
    moved = np.empty(images.shape, sources.dtype)
    for image, source, (down, right) in zip(moved, sources, moves.tolist(), strict=True):
        top, bottom = max(down, 0), height + min(down, 0)
        left, end = max(right, 0), width + min(right, 0)
        image[:, top:bottom, left:end] = source[
            :, top - down : bottom - down, left - right : end - right
        ]
        image[:, :top, left:end] = image[:, top : top + 1, left:end]
        image[:, bottom:, left:end] = image[:, bottom - 1 : bottom, left:end]
        image[:, :, :left] = image[:, :, left : left + 1]
        image[:, :, end:] = image[:, :, end - 1 : end]
    return torch.from_numpy(moved)


def _value_and_spread(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest channel, and how far below it the smallest lies; [m 1 h w] both."""
    smallest, value = pixels.aminmax(dim=1, keepdim=True)
    return value, value - smallest


def _hue(pixels: Tensor, value: Tensor, spread: Tensor) -> Tensor:
    """[m 1 h w] on a circle of six: red 0, green 2, blue 4; grey counts as red."""
    red, green, blue = pixels.split(1, dim=1)
    scale = 1 / spread.clamp_min(_TINY)
    from_green = torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    return torch.where(value == red, (green - blue) * scale, from_green)


def _from_hsv(hue: Tensor, value: Tensor, spread: Tensor) -> Tensor:
    """The pixels [m 3 h w] whose hue, largest channel and distance to the smallest these are."""
    offsets = torch.arange(5, 0, -2, dtype=hue.dtype, device=hue.device).view(1, 3, 1, 1)
    place = (offsets + hue) % 6
    return value - spread * torch.minimum(place, 4 - place).clamp_(0, 1)


def _to_uint8(pixels: Tensor, rounding: str) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    pixels = pixels.mul_(255.5 / 255) if rounding == "tensorflow" else pixels.add_(0.5)
    pixels = pixels.clamp_(0, 255)
    if pixels.device.type == "cpu":
        return torch.from_numpy(pixels.numpy().astype(np.uint8))  # six times as fast as torch's
    return pixels.to(torch.uint8)
