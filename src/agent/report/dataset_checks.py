"""What a person would want to be told of a data set before training on it, in plain words.

Each check looks at one thing and says nothing when that is as it should be. Thresholds are such
that a sound data set of any robot passes; what is worth knowing but not wrong is a "note".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pizero.agent.report import dataset_recording as recording
from pizero.agent.report.dataset_findings import (
    Finding,
    Inspected,
    constant_dimensions,
    counted,
    listed,
    percent,
)
from pizero.agent.report.dataset_look import BOUNDED, Look
from pizero.agent.report.dataset_motion import (
    Gripper,
    Relation,
    grippers,
    jumps,
    relations,
    resting_share,
)
from pizero.agent.report.dataset_pictures import Probes

CLIPPED = 0.05  # quantiles of the data themselves leave out 2 %
FAR = 20.0  # normalised values beyond this come from a few odd frames
UNLIKE = 5.0  # ratio of actions to the changes of the state that follow
SLOW = 3  # steps until the state follows an action
RESTING = 0.3


Check = Callable[[Inspected], Iterable[Finding]]


def find(look: Look, probes: Probes) -> list[Finding]:
    """All findings, the bad ones first."""
    inspected = Inspected(look, probes)
    found = [finding for check in CHECKS for finding in check(inspected)]
    return sorted(found, key=lambda finding: finding.level != "bad")


# -- numbers --------------------------------------------------------------------------------------


def _no_numbers(it: Inspected) -> Iterator[Finding]:
    for group, share in it.look.broken.items():
        if share.any():
            names = [n for n, s in zip(it.look.names(group), share, strict=True) if s]
            yield Finding(
                "bad",
                f"NaN or infinite values in {group}",
                f"{listed(names)}: up to {percent(share.max())} of the steps. One of them makes "
                "the loss NaN; leave these episodes out or mend them.",
            )


def _constant(it: Inspected) -> Iterator[Finding]:
    for group, statistics in it.look.learnt.items():
        found = constant_dimensions(statistics)
        for way, advice in (
            ("constant", "It teaches nothing; normalisation only centres it."),
            (
                "nearly constant",
                "Dividing by so small a spread would blow up noise; normalisation only centres it.",
            ),
            (
                "q01 = q99",
                "It changes in fewer than 2 % of the steps, so quantiles see no spread. Use "
                "min-max or z-score, or a mask that leaves it as it is.",
            ),
        ):
            names = [it.look.names(group)[i] for i, w in found.items() if w == way]
            if names:
                yield Finding(
                    "bad" if way == "q01 = q99" else "note",
                    f"{group.capitalize()} hardly changes: {listed(names)}"
                    if way != "constant"
                    else f"{group.capitalize()} never changes: {listed(names)}",
                    f"{way}. {advice}",
                )


def _clipped(it: Inspected) -> Iterator[Finding]:
    scaling = it.look.scalings[0]
    for group, scaled in scaling.parts.items():
        if scaling.kinds[group] not in BOUNDED:
            continue
        hit = [
            f"{name} {percent(share)}"
            for name, share in zip(it.look.names(group), scaled.outside, strict=True)
            if share > CLIPPED
        ]
        if hit:
            what = "are cut off by clipping" if scaled.clips else "are larger than 1"
            yield Finding(
                "bad",
                f"Many normalised {group} values lie outside [-1, 1]",
                f"With the normalisation of {scaling.label}, these {what}: {listed(hit)}. The "
                "statistics are of other data, or in other units; those of this data are written "
                "by scripts/compute_stats.py.",
            )


def _far(it: Inspected) -> Iterator[Finding]:
    scaling = it.look.scalings[0]
    for group, scaled in scaling.parts.items():
        hit = [
            f"{name} up to {size:.0f}"
            for name, size in zip(it.look.names(group), scaled.largest, strict=True)
            if size > FAR
        ]
        if hit and not scaled.clips:
            yield Finding(
                "bad",
                f"A few {group} values are enormous after normalisation",
                f"With {scaling.label}: {listed(hit)}. They dominate the loss of their batches; "
                "look for broken episodes, clip, or filter with max_"
                f"{group} in the data's configuration.",
            )


def _short(it: Inspected) -> Iterator[Finding]:
    horizon = (it.data.horizon - 1) * it.data.stride + 1
    lengths = np.asarray(it.data.lengths)
    if single := int((lengths < 2).sum()):
        yield Finding(
            "note",
            f"{counted(single, 'episode')} of one step",
            "Nothing happens in it; min_steps in the data's configuration leaves such out.",
        )
    short = int((lengths < horizon).sum())
    if short > 0.05 * len(lengths):
        yield Finding(
            "note",
            f"{_part_of(short, len(lengths))} shorter than a chunk",
            f"A chunk spans {counted(horizon, 'step')}; in {counted(short, 'episode')} every chunk "
            "ends in repeated last actions. Those do not count in the loss unless learn_past_end "
            "is set.",
        )


# -- motion ---------------------------------------------------------------------------------------


def _relations(it: Inspected) -> Iterator[Finding]:
    found = relations(it.look)
    changes = [r for r in found if r.kind == "change"]
    unlike = [r for r in changes if r.gain * UNLIKE < 1 or r.gain > UNLIKE]
    if unlike:
        ratios = sorted(1 / r.gain for r in unlike)
        middle = ratios[len(ratios) // 2]
        size = f"{middle:.0f} times" if middle > 1 else f"1/{1 / middle:.0f} of"
        yield Finding(
            "note",
            f"Actions are about {size} the changes of the state that follow",
            f"{_actions(unlike)}: they go along with the state's changes, but in other units or "
            "through a controller. Fine for training on this robot alone; do not mix it with "
            "robots whose actions are plain changes under common statistics.",
        )
    early = [
        r
        for r in found
        if (r.kind == "change" and r.lag <= 0 and r.correlation > r.previous - 1e-9)
        or (r.kind == "target" and r.lag < 0)
    ]
    if early and 2 * len(early) >= len([r for r in found if r.kind != "none"]):
        yield Finding(
            "bad",
            "Actions seem to come after what they cause",
            f"{_actions(early)}: each action resembles most what the state did before it. The "
            "action column may be shifted by a step, or hold what was measured and not what was "
            "commanded.",
        )
    slow = [r for r in found if r.kind != "none" and r.lag >= SLOW]
    if slow:
        lag = max(r.lag for r in slow)
        rate = it.look.source.fps
        seconds = f" ({lag / rate:.2g} s)" if rate else ""
        yield Finding(
            "note",
            f"The state follows actions {counted(lag, 'step')}{seconds} later",
            f"{_actions(slow)}: chunks much shorter than that hardly see what they do.",
        )


def _grippers(it: Inspected) -> Iterator[Finding]:
    found = grippers(it.look)
    for gripper in found:
        if gripper.changes < 0.05:
            yield Finding(
                "note",
                f"The {gripper.group} {gripper.name} rarely moves",
                f"It crosses the middle of its range {gripper.changes:.2g} times in an episode.",
            )
        unit = it.look.source.unit(gripper.name)
        claimed = _open_end(unit)
        if gripper.start is not None and claimed is not None:
            starts_high = gripper.start == gripper.high
            if starts_high != (claimed > 0.5):
                yield Finding(
                    "note",
                    f"The {gripper.group} {gripper.name} starts closed, or its sign is wrong",
                    f"By the robot's file its unit is “{unit}”, but episodes begin at "
                    f"{gripper.start:.3g}. Most robots begin with an open hand.",
                )
    for state, action in _gripper_pairs(found):
        together = _togetherness(it.look, state, action)
        if together is not None and together < -0.3:
            yield Finding(
                "note",
                f"State and action of {action.name} run opposite ways",
                f"Their correlation is {together:.2f}: one grows as the hand opens, the other as "
                "it closes. Harmless if it is meant; a trap when grippers of several sets are "
                "made alike.",
            )


def _jumps(it: Inspected) -> Iterator[Finding]:
    found = jumps(it.look)
    turns = [j for j in found if j.turn]
    if turns:
        yield Finding(
            "bad",
            f"Angles wrap around: {listed([j.name for j in turns])}",
            f"{counted(sum(j.count for j in turns), 'jump')} of about {turns[0].turn} within a "
            f"step, e.g. in episode {turns[0].episode} at step {turns[0].step}. The same "
            "pose has two values at opposite ends of the range.",
        )
    if other := [j for j in found if not j.turn]:
        yield Finding(
            "bad",
            f"The state jumps: {listed([j.name for j in other])}",
            f"{counted(sum(j.count for j in other), 'change')} of more than half the range within "
            f"a step, e.g. in episode {other[0].episode} at step {other[0].step}. Steps may be "
            "missing there, or sensors failed.",
        )


def _resting(it: Inspected) -> Iterator[Finding]:
    share = resting_share(it.look)
    if share is not None and share > RESTING:
        yield Finding(
            "note",
            f"The robot rests in {percent(share)} of the steps",
            "A policy learns to rest as well. The idle filter in the data's configuration leaves "
            "such frames out.",
        )


CHECKS: tuple[Check, ...] = (
    recording.refused,
    _no_numbers,
    recording.damaged,
    _constant,
    _clipped,
    _far,
    _relations,
    _grippers,
    _jumps,
    _resting,
    recording.flags,
    recording.timestamps,
    recording.duplicates,
    _short,
    recording.words,
    recording.stored_pictures,
    recording.probed_pictures,
)
LOOKED_FOR = (
    "values that are no numbers, dimensions that do not change, values that normalisation cuts off "
    "or blows up, actions out of step or out of scale with the state, grippers of unclear sign, "
    "jumps, gaps in time, repeated, short and unlabelled episodes, and pictures that are missing, "
    "black or do not move"
)


def _actions(found: Sequence[Relation]) -> str:
    return listed([r.action for r in found])


def _gripper_pairs(found: Sequence[Gripper]) -> Iterator[tuple[Gripper, Gripper]]:
    """The grippers of state and action that belong together, where that is plain."""
    states = [g for g in found if g.group == "state"]
    actions = [g for g in found if g.group == "action"]
    if len(states) == len(actions):
        yield from zip(states, actions, strict=True)


def _togetherness(look: Look, state: Gripper, action: Gripper) -> float | None:
    """Correlation of a commanded and a measured opening two steps later."""
    rows = look.values.rows(after=2)
    if len(rows) < 30:
        return None
    x = look.values.actions[rows, look.names("action").index(action.name)]
    y = look.values.states[rows + 2, look.names("state").index(state.name)]
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 1e-6 and y.std() > 1e-6 else None


def _open_end(unit: str) -> float | None:
    """The value that a unit like "1 open 0 closed" gives to open."""
    words = unit.replace(",", " ").split()
    if "open" in words and (at := words.index("open")):
        try:
            return float(words[at - 1])
        except ValueError:
            return None
    return None


def _part_of(count: int, total: int) -> str:
    if count == total:
        return "All episodes are"
    return f"{percent(count / total)} of the episodes are"
