"""A policy beside recorded episodes: what it would have done at every moment, and what was done.

The policy looks at recorded pictures and states, never at the results of its own actions, so this
measures how well it imitates, not whether it succeeds.

Axes: d decisions, h horizon, a action dimensions, t steps of an episode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pizero.agent.policy import Policy, keyed_noise
from pizero.data.dataset import EpisodeDataset


@dataclass(frozen=True)
class ReplayedEpisode:
    """One episode; `predicted[i]` is the chunk decided at step `decided[i]`.

    `pictures` are what the policy saw at its first, middle and last decision: {camera: [h w 3]}.
    """

    number: int
    text: str
    recorded: np.ndarray  # [t a]
    decided: np.ndarray  # [d]
    predicted: np.ndarray  # [d h a]
    pictures: tuple[tuple[int, dict[str, np.ndarray]], ...]

    @property
    def errors(self) -> np.ndarray:
        """Predicted minus recorded [d h a], NaN past the end of the episode."""
        steps = self.decided[:, None] + np.arange(self.predicted.shape[1])
        inside = steps < len(self.recorded)
        recorded = self.recorded[np.minimum(steps, len(self.recorded) - 1)]
        return np.where(inside[..., None], self.predicted - recorded, np.nan)

    def executed(self, every: int) -> np.ndarray:
        """The actions [t a] of a robot that looks again `every` steps; NaN where none reach."""
        actions = np.full_like(self.recorded, np.nan)
        for start, chunk in zip(self.decided, self.predicted, strict=True):
            stop = min(start + every, start + len(chunk), len(actions))
            actions[start:stop] = chunk[: stop - start]
        return actions


@dataclass(frozen=True)
class Replay:
    """All episodes, and how long a decision took (the median over batches, per observation)."""

    episodes: tuple[ReplayedEpisode, ...]
    every: int
    action_names: tuple[str, ...]
    seconds_per_decision: float

    @property
    def errors(self) -> np.ndarray:
        """[d h a] of all episodes together, NaN past their ends."""
        return np.concatenate([episode.errors for episode in self.episodes])

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation [a] of the recorded actions: what an error is to be held against."""
        return np.concatenate([e.recorded for e in self.episodes]).std(axis=0)


def replay(
    policy: Policy,
    data: EpisodeDataset,
    *,
    episodes: Sequence[int],
    every: int,
    batch_size: int = 16,
    num_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Replay:
    """Decide every `every` steps of the given episodes (positions in `data`).

    Noise is a function of (seed, episode, step). Raises ValueError for a dataset whose actions have
    another width than the policy's.
    """
    if every < 1:
        raise ValueError(f"expected every >= 1, got {every}")
    if data.action_dim != policy.pipeline.robot_action_dim:
        raise ValueError(
            f"the dataset's actions have {data.action_dim} dimensions, the policy's "
            f"{policy.pipeline.robot_action_dim}"
        )
    replayed, seconds = [], []
    for episode in episodes:
        start, length = data.episode_starts[episode], data.episode_lengths[episode]
        decided = np.arange(0, length, every)
        chunks, seen, text = [], {}, ""
        for first in range(0, len(decided), batch_size):
            steps = decided[first : first + batch_size]
            samples = data.read_many(start + steps)
            text = text or samples[0]["text"]
            began = time.perf_counter()
            keys = [(seed, int(episode), int(step)) for step in steps]
            chunks.append(_decide(policy, samples, keys, num_steps))
            seconds.append((time.perf_counter() - began) / len(steps))
            shown = {0, len(decided) // 2, len(decided) - 1}
            for i, sample in enumerate(samples, first):
                if i in shown:
                    seen[int(decided[i])] = {n: _newest(x) for n, x in sample["images"].items()}
            progress(len(steps))
        replayed.append(
            ReplayedEpisode(
                number=int(data.episodes[episode]),
                text=text,
                recorded=np.array(data.actions[start : start + length]),
                decided=decided,
                predicted=np.concatenate(chunks),
                pictures=tuple(sorted(seen.items(), key=lambda item: item[0])),
            )
        )
    return Replay(tuple(replayed), every, action_names(policy), float(np.median(seconds)))


def action_names(policy: Policy) -> tuple[str, ...]:
    """What the entries of an action are called, with their units where a robot tells."""
    robot = policy.pipeline.robot
    if robot is None:
        return tuple(f"action {i}" for i in range(policy.pipeline.robot_action_dim))
    return robot.action_names


def scores(replayed: Replay) -> dict[str, Any]:
    """Errors by dimension and by step of the chunk, in robot units and against the spread.

    `explained` is the share of the recorded variance that is predicted: 1 is perfect, 0 no better
    than always giving the mean.
    """
    errors, spread = replayed.errors, replayed.spread
    squares, size = np.nanmean(errors**2, axis=(0, 1)), np.abs(errors)
    moving = spread > 1e-8
    safe = np.where(moving, spread, 1)
    # Steps of the chunk that lie beyond the end of every episode have no error.
    table = np.nanmean(size[:, ~np.isnan(size).all(axis=(0, 2))], axis=0)  # [h a]
    return {
        "action_names": list(replayed.action_names),
        "num_episodes": len(replayed.episodes),
        "num_decisions": len(errors),
        "every": replayed.every,
        "seconds_per_decision": replayed.seconds_per_decision,
        "mean_absolute_error": np.nanmean(size, axis=(0, 1)).tolist(),
        "root_mean_square_error": np.sqrt(squares).tolist(),
        "recorded_spread": spread.tolist(),
        "explained": [
            float(1 - s / v**2) if m else None
            for s, v, m in zip(squares, spread, moving, strict=True)
        ],
        "mean_absolute_error_of_step": table.tolist(),
        "relative_error": float((np.nanmean(size, axis=(0, 1)) / safe)[moving].mean())
        if moving.any()
        else None,
        "relative_error_of_step": (table / safe)[:, moving].mean(axis=1).tolist()
        if moving.any()
        else None,
        "episodes": [
            {
                "episode": e.number,
                "text": e.text,
                "steps": len(e.recorded),
                "mean_absolute_error": np.nanmean(np.abs(e.errors), axis=(0, 1)).tolist(),
            }
            for e in replayed.episodes
        ],
    }


def _decide(
    policy: Policy,
    samples: Sequence[dict[str, Any]],
    keys: Sequence[tuple[int, int, int]],
    num_steps: int | None,
) -> np.ndarray:
    noise = torch.stack([keyed_noise(policy.noise_shape, *key) for key in keys])
    observations = [
        {
            "images": {c: sample["images"].get(c) for c in policy.pipeline.cameras},
            "text": sample["text"],
            "state": sample.get("state"),
        }
        for sample in samples
    ]
    return policy.act_batch(
        observations, noise=policy.noise_scale * noise, num_steps=num_steps, live=False
    )


def _newest(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else image[-1]
