"""What is read of one data set to show it: values of whole episodes, and how they are learnt.

Small sets are read entirely; of large ones whole episodes, evenly chosen, up to a million steps,
so memory does not grow with the data. Axes: e chosen episodes, n their steps, d dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pizero.agent.sources import Source
from pizero.data.hashing import mix_bits
from pizero.data.normalize import KINDS, make_normalizer, subtract_state
from pizero.data.stats import Statistics

LIMIT = 1_000_000  # steps
BINS = 48
BOUNDED = ("quantile", "min_max")  # kinds that bring values into [-1, 1]
REACH = {"quantile": 2.0, "min_max": 1.5, "z_score": 5.0}  # of histograms of normalised values
Groups = dict[str, np.ndarray]


@dataclass(frozen=True)
class Values:
    """States and actions of whole episodes."""

    episodes: np.ndarray  # which of the data set's, int64 [e]
    starts: np.ndarray  # first row of each in the arrays here, int64 [e]
    lengths: np.ndarray  # int64 [e]
    states: np.ndarray  # float32 [n S]
    actions: np.ndarray  # float32 [n A]
    total: int  # steps of the data set

    @property
    def is_whole(self) -> bool:
        """Whether these are all steps of the data set."""
        return len(self.actions) == self.total

    def rows(self, *, before: int = 0, after: int = 0) -> np.ndarray:
        """Rows with so many of their own episode's steps before and after them."""
        steps = np.arange(len(self.actions)) - np.repeat(self.starts, self.lengths)
        left = np.repeat(self.lengths, self.lengths) - 1 - steps
        return np.flatnonzero((steps >= before) & (left >= after))


@dataclass(frozen=True)
class Scaled:
    """One group of values after a normalisation, before any clipping; per dimension [d]."""

    counts: list[list[int]]  # [d bins], from -reach to reach, what lies beyond in the last bins
    reach: float
    outside: np.ndarray  # share of values outside [-1, 1]
    largest: np.ndarray  # of absolute values
    clips: bool  # whether the rule cuts them


@dataclass(frozen=True)
class Scaling:
    """State and action under one way of normalising."""

    label: str
    kinds: Mapping[str, str]  # group -> kind
    parts: Mapping[str, Scaled]
    is_configured: bool


@dataclass(frozen=True)
class Look:
    """What the page and its checks know of a data set."""

    source: Source
    values: Values  # with 0 for what is no number
    broken: Mapping[str, np.ndarray]  # share of values that are no number [d]
    texts: list[str]  # of every episode of the data set
    recorded: Mapping[str, Statistics]  # as the data have it
    learnt: Mapping[str, Statistics]  # after a robot's maps and delta mask
    scalings: tuple[Scaling, ...]  # the configured one first, if there is one

    def names(self, group: str) -> tuple[str, ...]:
        """Names of the dimensions of `state` or `action`."""
        return self.source.state_names if group == "state" else self.source.action_names

    def array(self, group: str) -> np.ndarray:
        """The values [n d] of `state` or `action`, as recorded."""
        return self.values.states if group == "state" else self.values.actions


def look_at(source: Source, *, limit: int = LIMIT, first: str = "quantile") -> Look:
    """Read what is needed. `first` is the kind of normalisation to show before the others, unless
    a robot or a configuration says how."""
    values, broken = _repaired(read_values(source, limit=limit))
    groups = {"state": values.states} if values.states.shape[1] else {}
    groups["action"] = values.actions
    recorded = {name: Statistics.of(array) for name, array in groups.items()}
    policy = learnt_values(source, values)
    is_same = all(policy[name] is array for name, array in groups.items())
    learnt = recorded if is_same else {name: Statistics.of(array) for name, array in policy.items()}
    if (mask := source.dataset.action_mask) is not None:
        learnt = {**learnt, "action": replace(learnt["action"], mask=np.array(mask, bool))}
    return Look(
        source=source,
        values=values,
        broken=broken,
        texts=source.dataset.texts(),
        recorded=recorded,
        learnt=learnt,
        scalings=tuple(_scalings(source, policy, learnt, first)),
    )


def read_values(source: Source, *, limit: int = LIMIT) -> Values:
    """All steps, or those of evenly chosen episodes with at most about `limit` steps."""
    data = source.dataset
    total = int(data.lengths.sum())
    chosen = np.arange(data.num_episodes)[:: max(1, -(-total // limit))]
    lengths = np.asarray(data.lengths, np.int64)[chosen]
    begins = np.asarray(data.starts, np.int64)[chosen]
    starts = np.cumsum(lengths) - lengths
    rows: Any = np.arange(int(lengths.sum())) + np.repeat(begins - starts, lengths)
    if len(rows) and np.array_equal(begins - begins[0], starts):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)  # they stay on disk
    return Values(
        episodes=chosen,
        starts=starts,
        lengths=lengths,
        states=data.state_table[rows],
        actions=data.action_table[rows],
        total=total,
    )


def learnt_values(source: Source, values: Values) -> Groups:
    """State and action as a policy learns them, before normalisation: [n d].

    With a delta mask, of the actions of a chunk one is drawn for each frame.
    """
    robot, learning = source.robot, source.learning
    states, actions = values.states, values.actions
    if robot is not None and robot.state_maps and states.shape[1]:
        states = robot.encode_state(states)
    if robot is not None and robot.action_maps:
        actions = robot.encode_actions(actions)
    mask = None if learning is None else learning.delta_mask
    if mask is not None and any(mask):
        rows = np.arange(len(actions))
        ahead = (mix_bits(0, rows) % np.uint64(source.dataset.horizon)).astype(np.int64)
        ends = np.repeat(values.starts + values.lengths, values.lengths)
        rows, ahead = rows[rows + ahead < ends], ahead[rows + ahead < ends]
        actions = subtract_state(actions[rows + ahead], states[rows], mask)
    return ({"state": states} if states.shape[1] else {}) | {"action": actions}


def counts_of(values: np.ndarray, *, low: float, high: float, bins: int = BINS) -> list[int]:
    """How many values [n] lie in each bin; what lies beyond is in the first and the last one."""
    return np.histogram(np.clip(values, low, high), bins=bins, range=(low, high))[0].tolist()


def _repaired(values: Values) -> tuple[Values, Groups]:
    """The values with 0 for NaN and infinity, and the share of these in each dimension."""
    finite = {"state": np.isfinite(values.states), "action": np.isfinite(values.actions)}
    if all(x.all() for x in finite.values()):
        return values, {}
    states = np.where(finite["state"], values.states, 0)
    actions = np.where(finite["action"], values.actions, 0)
    broken = {name: 1 - x.mean(axis=0) for name, x in finite.items()}
    return replace(values, states=states, actions=actions), broken


def _scalings(
    source: Source, groups: Groups, statistics: Mapping[str, Statistics], first: str
) -> list[Scaling]:
    found = []
    learning = source.learning
    if learning is not None and "action" in learning.normalization:
        rules: dict[str, dict[str, Any]] = {}
        for name in groups:  # a policy that reads no state may leave it out
            rule = learning.normalization.get(name, "identity")
            rules[name] = {"kind": rule} if isinstance(rule, str) else dict(rule)
        given = statistics if learning.statistics is None else learning.statistics
        found.append(_scaling(learning.whose, groups, rules, given, configured=True))
    for kind in sorted(REACH, key=lambda k: (k != first, list(KINDS).index(k))):
        rules = {name: {"kind": kind} for name in groups}
        found.append(_scaling(kind.replace("_", "-"), groups, rules, statistics))
    return found


def _scaling(
    label: str,
    groups: Groups,
    rules: Mapping[str, dict[str, Any]],
    statistics: Mapping[str, Statistics],
    *,
    configured: bool = False,
) -> Scaling:
    parts = {}
    for name, values in groups.items():
        rule = {k: v for k, v in rules[name].items() if k != "clip"}
        width = values.shape[1]
        scaled = make_normalizer(name, rule, statistics, width).normalize(values)
        reach = REACH.get(rule["kind"], 2.0)
        size = np.abs(scaled)
        parts[name] = Scaled(
            # What is exactly 1 belongs to the inside.
            counts=[counts_of(x * (1 - 1e-6), low=-reach, high=reach) for x in scaled.T],
            reach=reach,
            outside=(size > 1 + 1e-6).mean(axis=0),
            largest=size.max(axis=0),
            clips=rules[name].get("clip") is not None,
        )
    kinds = {name: str(rules[name]["kind"]) for name in groups}
    return Scaling(label, kinds, parts, configured)
