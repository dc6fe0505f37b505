"""Whole episodes to look at: film, strip of pictures, words, and curves that follow the film."""

from __future__ import annotations

import base64
from html import escape

import numpy as np

from pizero.agent.report.charts import Line, small_multiple
from pizero.agent.report.dataset_look import Look
from pizero.agent.report.dataset_motion import relations
from pizero.agent.report.dataset_pictures import Recording, record, spread
from pizero.agent.report.page import key, section

MANY = 16  # curves of one group beyond these are folded away


def episode_section(look: Look, *, count: int, max_bytes: int) -> str:
    """`count` episodes, evenly chosen; their films take at most `max_bytes` together."""
    data = look.source.dataset
    chosen = spread(data.num_episodes, count)
    recordings = [
        record(data, e, fps=look.source.fps, max_bytes=max_bytes // len(chosen)) for e in chosen
    ]
    together = _together(look)
    legend = key([("a", "action"), *([("c", "state")] if "state" in look.recorded else [])])
    lead = (
        "Evenly chosen. The upright line in the curves follows the film; click a curve to go "
        "there, and the film to stop it."
        if any(r.film for r in recordings)
        else "Evenly chosen."
    )
    return section(
        "Episodes", legend, *(_episode(look, r, together) for r in recordings), lead=lead
    )


def _episode(look: Look, recording: Recording, together: set[str]) -> str:
    text = escape(look.texts[recording.number].strip()) or "(no instruction)"
    rate = look.source.fps
    seconds = f", {recording.length / rate:.1f} s" if rate else ""
    what = f"episode {recording.number}, {recording.length} steps{seconds}"
    curves = _curves(look, recording, together)
    return (
        '<div class="episode">'
        f'<h3 class="words">&ldquo;{text}&rdquo; <span class="quiet">{what}</span></h3>'
        f'<div class="beside">{_film(recording)}<div class="curves">{curves}</div></div>'
        f"{_strips(recording)}</div>"
    )


def _film(recording: Recording) -> str:
    if not recording.film:
        return ""
    data = base64.b64encode(recording.film).decode()
    names = escape(", ".join(recording.cameras))
    return (
        '<figure><video muted loop playsinline controls preload="auto" '
        f'src="data:video/mp4;base64,{data}"></video><figcaption>{names}</figcaption></figure>'
    )


def _strips(recording: Recording) -> str:
    parts = []
    for name, pictures in recording.strips.items():
        cells = "".join(
            f'<img alt="{escape(name)}, step {step}" title="step {step}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
            if picture
            else '<span class="nothing">no picture</span>'
            for step, picture in zip(recording.steps, pictures, strict=True)
        )
        parts.append(f'<div class="strip" title="{escape(name)}">{cells}</div>')
    if not parts:
        return '<p class="note">No camera has a picture here.</p>'
    steps = "".join(f"<span>{step}</span>" for step in recording.steps)
    return "".join(parts) + f'<div class="strip steps">{steps}</div>'


def _curves(look: Look, recording: Recording, together: set[str]) -> str:
    """A little chart for each dimension; those of state and action share one where they should."""
    data = look.source.dataset
    start = int(data.starts[recording.number])
    rows = slice(start, start + int(data.lengths[recording.number]))
    actions, states = data.action_table[rows], data.state_table[rows]
    moves = recording.film is not None and len(actions) == recording.length
    charts: dict[str, list[str]] = {"action": [], "state": []}
    for i, name in enumerate(look.names("action")):
        lines = [(actions[:, i], "a")]
        if name in together:
            j = look.names("state").index(name)
            lines.insert(0, (states[:, j], "c"))
        charts["action"].append(_chart(look, name, lines, moves=moves, group="action", i=i))
    for i, name in enumerate(look.names("state")):
        if name not in together:
            lines = [(states[:, i], "c")]
            charts["state"].append(_chart(look, name, lines, moves=moves, group="state", i=i))
    parts = []
    for group, drawn in charts.items():
        if not drawn:
            continue
        grid = f'<div class="grid">{"".join(drawn)}</div>'
        if len(drawn) > MANY:
            title = f"{len(drawn)} dimensions of the {group}"
            grid = f"<details><summary>{title}</summary>{grid}</details>"
        parts.append(grid)
    return "".join(parts)


def _together(look: Look) -> set[str]:
    """Names of actions that are targets of the state of the same name: one scale fits both."""
    return {r.action for r in relations(look) if r.kind == "target" and r.action == r.state}


def _chart(
    look: Look,
    name: str,
    lines: list[tuple[np.ndarray, str]],
    *,
    moves: bool,
    group: str,
    i: int,
) -> str:
    statistics = look.recorded[group]
    low = min(float(statistics.q01[i]), *(float(np.nanmin(y)) for y, _ in lines))  # type: ignore[index]
    high = max(float(statistics.q99[i]), *(float(np.nanmax(y)) for y, _ in lines))  # type: ignore[index]
    margin = 0.06 * (high - low) or 0.5
    return small_multiple(
        [Line("", range(len(y)), [float(v) for v in y], style) for y, style in lines],
        title=name, low=low - margin, high=high + margin, width=172, height=84, has_cursor=moves,
    )  # fmt: skip
