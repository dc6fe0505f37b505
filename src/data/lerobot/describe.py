"""Statistics as LeRobot records them: of vectors, and of pictures by channel in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def describe_values(values: np.ndarray) -> dict[str, Any]:
    """min, max, mean, std, count and quantiles of each dimension of values [n ...], as lists."""
    rows = values.reshape(len(values), -1)
    wide = rows.astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": wide.mean(0), "std": wide.std(0)}
    found["count"] = np.array([len(rows)])
    # One dimension at a time: quantiles need a copy.
    quantiles = np.array([np.quantile(column, list(QUANTILES.values())) for column in wide.T])
    found |= dict(zip(QUANTILES, quantiles.T, strict=True))
    return {name: array.tolist() for name, array in found.items()}


class PixelCounts:
    """How often each level occurs in each channel; their statistics are exact."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)
        self.pictures = 0

    def add(self, image: np.ndarray) -> None:
        """Count a picture, uint8 [h w 3]."""
        for channel in range(3):
            self.counts[channel] += np.bincount(image[..., channel].reshape(-1), minlength=256)
        self.pictures += 1

    def merge(self, other: PixelCounts) -> None:
        """Count what another one has counted."""
        self.counts += other.counts
        self.pictures += other.pictures

    def describe(self) -> dict[str, Any]:
        """As `describe_values`, in the shape [3 1 1] that LeRobot gives pictures."""
        levels = np.arange(256) / 255
        total = self.counts[0].sum()
        mean = self.counts @ levels / total
        variance = (self.counts * (levels - mean[:, None]) ** 2).sum(1) / total
        present = self.counts > 0
        found = {
            "min": levels[present.argmax(1)],
            "max": levels[255 - present[:, ::-1].argmax(1)],
            "mean": mean,
            "std": np.sqrt(variance),
        }
        ends = self.counts.cumsum(1)
        for name, q in QUANTILES.items():
            place = q * (total - 1)
            low, high = (
                np.array([np.searchsorted(row, at, side="right") for row in ends])
                for at in (np.floor(place), np.ceil(place))
            )
            found[name] = levels[low] + (levels[high] - levels[low]) * (place - np.floor(place))
        shaped = {name: values.reshape(3, 1, 1).tolist() for name, values in found.items()}
        return shaped | {"count": [self.pictures]}
