"""Success rates with honest intervals: what a list of finished episodes amounts to.

An evaluation runs a few dozen starts of each task, so every rate comes with its Wilson score
interval (Wilson 1927): unlike the textbook normal interval it stays inside [0, 1] and does not
shrink to nothing at 0 of 20 or 20 of 20.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pizero.agent.driving.episodes import EpisodeResult

RULES = ("any", "end")


@dataclass(frozen=True)
class Rate:
    """Successes out of trials, with the 95 % interval of the true rate."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.successes / self.trials

    def to_json(self) -> dict[str, float | int]:
        return {
            "rate": self.rate,
            "low": self.low,
            "high": self.high,
            "successes": self.successes,
            "trials": self.trials,
        }


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, without continuity correction."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"expected 0 <= successes <= trials and at least one trial, got {successes} of {trials}"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At the ends the formula gives 0 and 1 exactly, but for rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def rate(outcomes: Iterable[bool]) -> Rate:
    """The rate of a set of outcomes."""
    values = [bool(x) for x in outcomes]
    successes = sum(values)
    low, high = wilson(successes, len(values))
    return Rate(successes=successes, trials=len(values), low=low, high=high)


def summarise(results: Sequence[EpisodeResult], *, headline: str) -> dict[str, dict]:
    """Per arm: the rate over all its episodes, and per task, under both rules of success.

    `headline` ("any" or "end") is repeated as "success". Arms whose instruction names another
    task have "named" beside it: the rate at which the goal that the words name was reached.
    """
    if headline not in RULES:
        raise ValueError(f"the rule of success must be one of {RULES}, got {headline!r}")
    arms: dict[str, dict] = {}
    for arm in dict.fromkeys(r.arm for r in results):
        of_arm = [r for r in results if r.arm == arm]
        tasks = dict.fromkeys(r.task for r in of_arm)
        arms[arm] = {
            **_rates(of_arm, headline),
            "tasks": {
                task: _rates([r for r in of_arm if r.task == task], headline) for task in tasks
            },
        }
    return arms


def _rates(results: Sequence[EpisodeResult], headline: str) -> dict:
    scores: dict[str, object] = {
        rule: rate(r.success[rule] for r in results).to_json() for rule in RULES
    }
    scores["success"] = scores[headline]
    if all(r.named_success is not None for r in results):
        scores["named"] = rate(
            r.named_success[headline] for r in results if r.named_success is not None
        ).to_json()
    finished = [r.first_success for r in results if r.first_success is not None]
    scores["mean_steps_to_success"] = sum(finished) / len(finished) if finished else None
    return scores
