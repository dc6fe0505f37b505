"""State and action dimension by dimension: histograms as recorded and as learnt, and statistics."""

from __future__ import annotations

from html import escape
from itertools import count

import numpy as np

from pizero.agent.report.charts import histogram
from pizero.agent.report.dataset_checks import CLIPPED
from pizero.agent.report.dataset_findings import listed
from pizero.agent.report.dataset_look import BOUNDED, Look, counts_of
from pizero.agent.report.dataset_motion import Gripper, Relation, grippers, relations
from pizero.agent.report.page import section, table

WIDEN = 0.6  # histograms reach so many ranges of the quantiles beyond these
_numbers = count()


def value_sections(look: Look) -> list[str]:
    """A card for actions, one for the state."""
    return [_group(look, group) for group in ("action", "state") if group in look.recorded]


def motion_section(look: Look) -> str:
    """What actions do to the state, and the grippers."""
    parts = [_relation_table(look, relations(look)), _gripper_table(look, grippers(look))]
    return section("How the robot moves", *parts)


def _group(look: Look, group: str) -> str:
    names, statistics = look.names(group), look.recorded[group]
    units = [look.source.unit(name) for name in names]
    head = [
        ("", group), ("", "values"), ("", "normalised"), ("number", "outside ±1"),
        ("number", "mean"), ("number", "std"), ("number", "min"), ("number", "q01"),
        ("number", "q99"), ("number", "max"),
    ]  # fmt: skip
    rows = []
    for i, name in enumerate(names):
        unit = f'<div class="quiet">{escape(units[i])}</div>' if units[i] else ""
        kinds = [s.parts[group] for s in look.scalings]
        drawn, shares = [], []
        for scaling, scaled in zip(look.scalings, kinds, strict=True):
            reach = scaled.reach
            drawn.append(
                histogram(
                    scaled.counts[i], low=-reach, high=reach, ticks=[-reach, -1, 0, 1, reach],
                    label=f"{name} after {scaling.label}", marks=[(-1, "-1"), (1, "1")],
                    inside=(-1, 1) if scaling.kinds[group] in BOUNDED else None,
                )
            )  # fmt: skip
            bad = scaling.kinds[group] in BOUNDED and scaled.outside[i] > CLIPPED
            share = f"{scaled.outside[i]:.1%}"
            shares.append(f'<span class="mark bad">{share}</span>' if bad else share)
        numbers = [getattr(statistics, k)[i] for k in ("mean", "std", "min", "q01", "q99", "max")]
        rows.append(
            [
                ("dimension", f"<strong>{escape(name)}</strong>{unit}"),
                ("bars", _recorded(look, group, i, name)),
                ("bars", _variants(drawn)),
                ("number", _variants(shares)),
                *(("number quiet", _short(x)) for x in numbers),
            ]
        )
    return section(
        "Actions" if group == "action" else "State",
        f'<div class="kinds">{_switch(look)}<div class="wide-table">{table(head, rows)}</div>'
        f"{_note(look, group)}</div>",
    )


def _recorded(look: Look, group: str, i: int, name: str) -> str:
    statistics, values = look.recorded[group], look.array(group)[:, i]
    low, high = float(statistics.min[i]), float(statistics.max[i])  # type: ignore[index]
    q01, q99 = float(statistics.q01[i]), float(statistics.q99[i])  # type: ignore[index]
    if high - low < 1e-9:
        return f'<span class="quiet">always {_short(low)}</span>'
    if q99 > q01:  # far outliers would leave one bar
        low = max(low, q01 - WIDEN * (q99 - q01))
        high = min(high, q99 + WIDEN * (q99 - q01))
    return histogram(
        counts_of(values, low=low, high=high),
        low=low, high=high, label=f"{name} as recorded",
        marks=[(q01, f"q01 {_short(q01)}"), (q99, f"q99 {_short(q99)}")],
    )  # fmt: skip


def _switch(look: Look) -> str:
    """Buttons for the ways of normalising; the style sheet does the rest."""
    group, parts = next(_numbers), []
    for i, scaling in enumerate(look.scalings):
        name = f"kind-{group}-{i}"
        checked = " checked" if i == 0 else ""
        parts.append(f'<input type="radio" name="kind-{group}" id="{name}"{checked}>')
        parts.append(f'<label for="{name}">{escape(scaling.label)}</label>')
    return "".join(parts)


def _variants(pieces: list[str]) -> str:
    return "".join(f'<div class="kind">{piece}</div>' for piece in pieces)


def _note(look: Look, group: str) -> str:
    robot, learning = look.source.robot, look.source.learning
    words = [
        "Bars are as high as the square root of their counts. Thin lines mark q01 and q99 on the "
        "left, -1 and 1 on the right; the last bars hold what lies beyond."
    ]
    maps = () if robot is None else robot.state_maps if group == "state" else robot.action_maps
    if maps:
        done = listed([type(m).__name__ for m in maps])
        words.append(f"Normalised are the values after the robot&rsquo;s {escape(done)}.")
    mask = None if learning is None else learning.delta_mask
    if group == "action" and mask and any(mask):
        names = listed([n for n, m in zip(look.names(group), mask, strict=False) if m])
        words.append(f"{escape(names)} are learnt relative to the present state.")
    if learning is not None and learning.statistics is not None:
        words.append(
            f"{escape(learning.whose.capitalize())} normalises by given statistics "
            f"({escape(learning.origin)}), not by those of this data."
        )
    if not look.values.is_whole:
        words.append(
            f"From {len(look.values.actions):,} of {look.values.total:,} steps, whole episodes "
            "evenly chosen."
        )
    return f'<p class="note">{" ".join(words)}</p>'


def _relation_table(look: Look, found: list[Relation]) -> str:
    if not found:
        return ""
    rate = look.source.fps
    rows = []
    for r in found:
        after = f"{r.lag} step" + ("" if r.lag == 1 else "s")
        if rate and r.lag > 0:
            after += f", {r.lag / rate:.2g} s"
        meaning = {
            "change": "like the change of the state",
            "target": "like the state itself",
            "none": "unlike both",
        }[r.kind]
        is_known = r.kind != "none"
        rows.append(
            [
                ("name", escape(r.action)),
                ("", meaning),
                ("number", f"{r.correlation:.2f}"),
                ("number", after if is_known else ""),
                ("number", f"{r.gain:.2g}" if is_known else ""),
            ]
        )
    head = [
        ("", "action"), ("", "is most"), ("number", "correlation"), ("number", "after"),
        ("number", "state moves per unit"),
    ]  # fmt: skip
    note = (
        '<p class="note">Each action is compared with the state of the same name from a step '
        "before to ten steps after it. Plain changes move the state by about 1 per unit.</p>"
    )
    return f"<h3>What actions do to the state</h3>{table(head, rows)}{note}"


def _gripper_table(look: Look, found: list[Gripper]) -> str:
    if not found:
        return ""
    has_units = any(look.source.unit(g.name) for g in found)
    rows = []
    for g in found:
        ends = g.share_low + g.share_high
        kind = "two values" if g.is_binary else "nearly two values" if ends > 0.9 else "continuous"
        start = "either end" if g.start is None else f"{g.start:.3g}"
        rows.append(
            [
                ("name", escape(f"{g.name} ({g.group})")),
                ("", kind),
                ("number", f"{g.low:.3g} to {g.high:.3g}"),
                ("number", f"{g.share_low:.0%}"),
                ("number", f"{g.share_high:.0%}"),
                ("number", start),
                ("number", f"{g.changes:.2g}"),
                *([("quiet", escape(look.source.unit(g.name)))] if has_units else []),
            ]
        )
    head = [
        ("", "gripper"), ("", "values"), ("number", "range"), ("number", "time at the low end"),
        ("number", "at the high end"), ("number", "episodes begin at"),
        ("number", "changes an episode"), *([("", "unit")] if has_units else []),
    ]  # fmt: skip
    note = (
        '<p class="note">Robots mostly begin with an open hand: where episodes begin is most '
        "probably what &ldquo;open&rdquo; is.</p>"
    )
    return f"<h3>Grippers</h3>{table(head, rows)}{note}"


def _short(value: float) -> str:
    """Four significant digits."""
    value = float(np.float64(value))
    return "0" if abs(value) < 5e-7 else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
