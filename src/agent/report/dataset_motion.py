"""What a robot's numbers say of how it moves: what actions do to states, grippers, and jumps.

Nothing here knows the robot; names of dimensions help where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pizero.agent.report.dataset_look import Look

LAGS = range(-1, 11)  # steps from an action to the state that it is compared with
RELATED = 0.35  # least correlation that says something
MOST_ROWS = 200_000  # of correlations
GRIPPER_WORDS = ("grip", "jaw", "claw", "finger")
HALF_TURNS = {"2π": 2 * math.pi, "360 degrees": 360.0}


@dataclass(frozen=True)
class Relation:
    """How one dimension of actions is seen again in the state.

    `kind` is "change" (the action is like the state's change from the step before to `lag` steps
    later), "target" (like the state itself), or "none".
    """

    action: str
    state: str
    kind: str
    lag: int
    correlation: float
    gain: float  # how much the state moves for a unit of action, by their standard deviations
    previous: float  # correlation with the change that led to the present state


@dataclass(frozen=True)
class Gripper:
    """One dimension that opens and closes something."""

    group: str
    name: str
    low: float
    high: float
    is_binary: bool
    share_low: float  # of steps near each end
    share_high: float
    starts_high: float  # share of episodes that begin nearer to the high end
    changes: float  # mean number of crossings of the middle in an episode

    @property
    def start(self) -> float | None:
        """The end at which nearly all episodes begin; None if there is none."""
        if 0.1 < self.starts_high < 0.9:
            return None
        return self.high if self.starts_high >= 0.9 else self.low


@dataclass(frozen=True)
class Jumps:
    """Sudden changes of one dimension of the state."""

    name: str
    count: int
    episode: int  # the first one, and where
    step: int
    turn: str  # "2π" or "360 degrees" if they are whole turns, else empty


def relations(look: Look) -> list[Relation]:
    """One for each dimension of actions that has a state of the same name, or the same place."""
    pairs = _pairs(look)
    values = look.values
    if not pairs or not len(values.actions):
        return []
    a, s = ([i for i, _ in pairs], [j for _, j in pairs])
    before, after = max(1, 1 - LAGS[0]), LAGS[-1]
    rows = values.rows(before=before, after=after)
    while len(rows) < 100 and after > 2:  # short episodes
        after -= 1
        rows = values.rows(before=before, after=after)
    if len(rows) < 30:
        return []
    rows = rows[:: max(1, len(rows) // MOST_ROWS)]
    lags = [lag for lag in LAGS if lag <= after]
    actions = values.actions[rows][:, a].astype(np.float64)
    states = {k: values.states[rows + k][:, s].astype(np.float64) for k in (lags[0] - 1, *lags)}
    change = np.stack([_correlation(actions, states[k] - states[k - 1]) for k in lags])
    target = np.stack([_correlation(actions, states[k]) for k in lags])
    found = []
    for n, (i, j) in enumerate(pairs):
        c, t = int(change[:, n].argmax()), int(target[:, n].argmax())
        name = look.names("action")[i], look.names("state")[j]
        previous = float(change[lags.index(0), n])
        if target[t, n] > max(0.8, change[c, n]):
            gain = _ratio(states[lags[t]][:, n], actions[:, n])
            found.append(Relation(*name, "target", lags[t], float(target[t, n]), gain, previous))
        elif change[c, n] > RELATED:
            moved = states[lags[c]][:, n] - states[lags[c] - 1][:, n]
            gain = _ratio(moved, actions[:, n])
            found.append(Relation(*name, "change", lags[c], float(change[c, n]), gain, previous))
        else:
            best = float(max(change[c, n], target[t, n]))
            found.append(Relation(*name, "none", 0, best, math.nan, previous))
    return found


def grippers(look: Look) -> list[Gripper]:
    """Those dimensions that are called so or, without names, a last one of two values."""
    found = []
    for group in look.recorded:
        values, names = look.array(group), look.names(group)
        named = [i for i, name in enumerate(names) if _is_gripper(name)]
        unnamed = not named and _is_numbered(names) and len(names) > 1
        for i in named or ([len(names) - 1] if unnamed else []):
            gripper = _gripper(look, group, names[i], values[:, i])
            if gripper is not None and (named or gripper.is_binary):
                found.append(gripper)
    return found


def jumps(look: Look) -> list[Jumps]:
    """Dimensions of the state that move smoothly but for single steps of half their range."""
    values = look.values
    rows = values.rows(after=1)
    if "state" not in look.recorded or len(rows) < 30:
        return []
    statistics, hands = look.recorded["state"], {g.name for g in grippers(look)}
    assert statistics.q01 is not None
    assert statistics.q99 is not None
    found = []
    for i, name in enumerate(look.names("state")):
        spread = statistics.q99[i] - statistics.q01[i]
        column = values.states[:, i].astype(np.float64)
        moved = np.abs(column[rows + 1] - column[rows])
        # Values that take a few levels only (buttons, counters) may jump as they please.
        if name in hands or spread < 1e-4 or len(np.unique(column[:5000])) < 10:
            continue
        turn, whole = "", np.zeros(len(moved), bool)
        for word, size in HALF_TURNS.items():
            around = np.abs(moved - size) < 0.1 * size
            if around.any() and spread > 0.5 * size:
                turn, whole = word, around
        is_jump = whole if turn else moved > 0.5 * spread
        # Where large steps are common, or nothing moves smoothly, they are no jumps.
        is_rare = is_jump.mean() < (0.1 if turn else 0.01)
        if is_jump.any() and is_rare and np.quantile(moved, 0.9) < 0.1 * spread:
            row = int(rows[is_jump][0])
            e = int(np.searchsorted(values.starts, row, side="right")) - 1
            place = int(values.episodes[e]), row + 1 - int(values.starts[e])
            found.append(Jumps(name, int(is_jump.sum()), *place, turn))
    return found


def resting_share(look: Look) -> float | None:
    """The share of steps after which no state and no gripper command changes noticeably."""
    values = look.values
    rows = values.rows(after=1)
    if "state" not in look.recorded or len(rows) < 30:
        return None
    statistics = look.recorded["state"]
    assert statistics.q01 is not None
    assert statistics.q99 is not None
    spread = statistics.q99 - statistics.q01
    moving = spread > 1e-6
    if not moving.any():
        return None
    moved = np.abs(values.states[rows + 1] - values.states[rows])[:, moving] / spread[moving]
    return float((moved < 1e-3).all(axis=1).mean())


def _pairs(look: Look) -> list[tuple[int, int]]:
    """Positions of an action and a state that may be of one thing; grippers have their own way."""
    if "state" not in look.recorded:
        return []
    states, actions = list(look.names("state")), list(look.names("action"))
    if _is_numbered(states) and _is_numbered(actions) and len(states) == len(actions):
        pairs = [(i, i) for i in range(len(actions))]
    else:
        pairs = [(i, states.index(name)) for i, name in enumerate(actions) if name in states]
    hands = {(g.group, g.name) for g in grippers(look)}
    return [(i, j) for i, j in pairs if ("action", actions[i]) not in hands]


def _gripper(look: Look, group: str, name: str, values: np.ndarray) -> Gripper | None:
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-6:
        return None
    place = (values - low) / (high - low)
    share_low, share_high = float((place < 0.1).mean()), float((place > 0.9).mean())
    is_high = place > 0.5
    crossings = is_high[1:] != is_high[:-1]
    crossings[look.values.starts[1:] - 1] = False  # from one episode to the next
    return Gripper(
        group=group,
        name=name,
        low=low,
        high=high,
        is_binary=float(((place < 0.02) | (place > 0.98)).mean()) > 0.98,
        share_low=share_low,
        share_high=share_high,
        starts_high=float(is_high[look.values.starts].mean()),
        changes=float(crossings.sum() / len(look.values.starts)),
    )


def _is_gripper(name: str) -> bool:
    return any(word in name.lower() for word in GRIPPER_WORDS)


def _is_numbered(names: Sequence[str]) -> bool:
    """Whether the dimensions have no names of their own."""
    return all(name.split(" ")[-1].isdigit() for name in names)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of columns [n d]: [d], 0 where one is constant."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x * x).mean(axis=0) * (y * y).mean(axis=0))
    return np.where(scale > 1e-12, (x * y).mean(axis=0) / np.maximum(scale, 1e-12), 0.0)


def _ratio(moved: np.ndarray, action: np.ndarray) -> float:
    spread = float(action.std())
    return float(moved.std()) / spread if spread > 1e-12 else math.nan
