"""Several datasets, or groups of one dataset's episodes, drawn in fixed proportions.

A source is a set of episodes with a weight. `Mix` turns weights into an `Order` and finds the
dataset and frame of each sample number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pizero.data.dataset import EpisodeDataset, Sample
from pizero.data.index import unknown_key
from pizero.data.sampler import Order

ORDERS = ("global", "windowed")


class Mix:
    """Weighted datasets by name.

    Without `weights` every frame counts alike. `balance` names episode metadata, such as `task`;
    its distinct values then share each dataset's weight equally. Weights are shares of samples,
    not of frames: a dataset of weight 2 is drawn twice as often as one of weight 1.
    """

    def __init__(
        self,
        *,
        datasets: Mapping[str, EpisodeDataset],
        weights: Mapping[str, float] | None = None,
        balance: str | None = None,
    ) -> None:
        if not datasets:
            raise ValueError("expected at least one dataset, got none")
        for name in weights or {}:
            if name not in datasets:
                raise unknown_key(name, datasets, where="the mix")
        missing = [name for name in datasets if weights is not None and name not in weights]
        if missing:
            raise ValueError(f"expected a weight for every dataset, got none for {missing}")
        self.datasets = dict(datasets)
        self.names = list(datasets)
        self.weights, self.balance = weights, balance
        self._sources: list[_Source] = []
        self._shares: list[float] = []
        for number, (name, dataset) in enumerate(self.datasets.items()):
            groups = _groups(dataset, balance)
            weight = float(len(dataset)) if weights is None else float(weights[name])
            for episodes in groups:
                lengths = dataset.episode_lengths[episodes]
                starts = dataset.episode_starts[episodes]
                self._sources.append(_Source(number, episodes, starts, lengths))
                self._shares.append(weight / len(groups))
        self._weighted = weights is not None or balance is not None

    def __len__(self) -> int:
        """Frames of all datasets."""
        return sum(len(dataset) for dataset in self.datasets.values())

    def order(self, seed: int, *, kind: str = "global", window: int = 64) -> Order:
        """The order of samples over the sources of this mix, `global` or `windowed`."""
        if kind not in ORDERS:
            raise ValueError(f"expected an order of {', '.join(ORDERS)}, got {kind!r}")
        return Order(
            [source.size for source in self._sources],
            seed=seed,
            weights=self._shares if self._weighted else None,
            lengths=[s.lengths for s in self._sources] if kind == "windowed" else None,
            window=window,
        )

    def shares(self) -> dict[str, float]:
        """The share of samples that each dataset gives."""
        weights = self._shares if self._weighted else [float(s.size) for s in self._sources]
        found = dict.fromkeys(self.names, 0.0)
        for source, weight in zip(self._sources, weights, strict=True):
            found[self.names[source.dataset]] += weight / sum(weights)
        return found

    def locate(self, order: Order, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position in `names` and frame of that dataset, int64 [n] each."""
        source, place = order(numbers)
        dataset, frame = np.empty_like(source), np.empty_like(place)
        for s in np.unique(source).tolist():
            found, rows = self._sources[s], source == s
            episode = np.searchsorted(found.ends, place[rows], side="right")
            dataset[rows] = found.dataset
            frame[rows] = (found.starts + found.lengths - found.ends)[episode] + place[rows]
        return dataset, frame

    def advise(self, order: Order, block: tuple[int, int, int]) -> None:
        """Have the images of a block of a windowed order read ahead."""
        source = self._sources[block[0]]
        self.datasets[self.names[source.dataset]].advise(source.episodes[order.episodes(*block)])

    def read(self, dataset: int, frame: int, *, draw: int | None = None) -> Sample:
        """One sample, with the name of its dataset; `draw` as in EpisodeDataset.read."""
        name = self.names[dataset]
        return self.datasets[name].read(frame, draw=draw) | {"dataset": name}


@dataclass(frozen=True)
class _Source:
    """Episodes of a dataset, as positions among its chosen ones, with their frames."""

    dataset: int
    episodes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    @property
    def size(self) -> int:
        return int(self.lengths.sum())


def _groups(dataset: EpisodeDataset, balance: str | None) -> list[np.ndarray]:
    """Episodes of each group, as positions among the chosen episodes."""
    if balance is None:
        return [np.arange(dataset.num_episodes)]
    values = dataset.metadata(balance)
    return [np.flatnonzero(values == value) for value in sorted(set(values.tolist()))]
