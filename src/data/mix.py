"""Several datasets, or groups of one dataset's episodes, drawn in fixed proportions.

A source is a set of episodes with a weight. `Mix` turns weights into an `Order` and finds the
dataset and frame of each sample number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pizero.data.dataset import RldsDataset, Sample
from pizero.data.rlds.spec import unknown_key
from pizero.data.sampler import Order


class Mix:
    """Weighted datasets by name.

    Without `weights` every frame counts alike. `balance` names episode metadata, such as `task`;
    its distinct values then share each dataset's weight equally. Weights are shares of samples,
    not of frames: a dataset of weight 2 is drawn twice as often as one of weight 1.
    """

    def __init__(
        self,
        *,
        datasets: Mapping[str, RldsDataset],
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
        self._sources: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._shares: list[float] = []
        for number, (name, dataset) in enumerate(self.datasets.items()):
            groups = _groups(dataset, balance)
            weight = float(len(dataset)) if weights is None else float(weights[name])
            for episodes in groups:
                ends = np.cumsum(dataset.episode_lengths[episodes])
                self._sources.append((number, dataset.episode_starts[episodes], ends))
                self._shares.append(weight / len(groups))
        self._weighted = weights is not None or balance is not None

    def __len__(self) -> int:
        """Frames of all datasets."""
        return sum(len(dataset) for dataset in self.datasets.values())

    def order(self, seed: int) -> Order:
        """The order of samples over the sources of this mix."""
        sizes = [int(ends[-1]) for _, _, ends in self._sources]
        return Order(sizes, seed=seed, weights=self._shares if self._weighted else None)

    def locate(self, order: Order, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position in `names` and frame of that dataset, int64 [n] each."""
        source, place = order(numbers)
        dataset, frame = np.empty_like(source), np.empty_like(place)
        for s in np.unique(source).tolist():
            number, starts, ends = self._sources[s]
            rows = source == s
            episode = np.searchsorted(ends, place[rows], side="right")
            before = np.concatenate([[0], ends[:-1]])[episode]
            dataset[rows] = number
            frame[rows] = starts[episode] + place[rows] - before
        return dataset, frame

    def read(self, dataset: int, frame: int) -> Sample:
        """One sample, with the name of its dataset."""
        name = self.names[dataset]
        return self.datasets[name].read(frame) | {"dataset": name}


def _groups(dataset: RldsDataset, balance: str | None) -> list[np.ndarray]:
    """Episodes of each group, as positions among the chosen episodes."""
    if balance is None:
        return [np.arange(dataset.num_episodes)]
    values = dataset.metadata(balance)
    return [np.flatnonzero(values == value) for value in sorted(set(values.tolist()))]
