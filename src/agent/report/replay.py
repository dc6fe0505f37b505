"""The page of a replay: recorded and predicted actions joint by joint, and where errors are."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pizero.agent.driving.episodes import write_atomically
from pizero.agent.driving.replay import Replay, ReplayedEpisode
from pizero.agent.driving.video import scaled
from pizero.agent.report.charts import Line, line_chart
from pizero.agent.report.page import facts, page, section, table, tile

MAX_STEPS_SHOWN = 16
PICTURE_HEIGHT = 120
INK, POLICY, GRID, SOFT = "#1b2230", "#2f6fde", "#e3e7ed", "#5a6475"
STYLES = ("a", "b", "c", "d", "grey")


def write_replay_report(
    folder: Path,
    replayed: Replay,
    scores: Mapping[str, Any],
    *,
    policy: str,
    dataset: str,
    how: Sequence[tuple[str, object]],
    units: Mapping[str, str],
) -> Path:
    """Writes `report.html` and a picture for each episode into `folder`; returns the page's path.

    The page holds the pictures itself. `how` are facts on how this was made, `units` those of
    action names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for episode in replayed.episodes:
        png = plot_episode(episode, replayed, units)
        path = folder / f"episode_{episode.number:05d}.png"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(png)
        os.replace(temporary, path)
        drawn.append(_episode(episode, replayed, scores, png))
    parts = [
        _header(policy, dataset, scores),
        _tiles(scores),
        _dimensions(scores, units),
        _steps(scores),
        section(
            "Episodes",
            *drawn,
            lead="Recorded actions in black; in blue what the policy would have done, "
            f"looking again every {_steps_words(replayed.every)}. Faint lines are the whole chunks "
            "that it predicted, a dot where each begins.",
        ),
        section("How it was made", f'<div class="facts">{facts("", how)}</div>'),
        f"<footer>Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by pizero. The policy "
        "saw recorded pictures, never the results of its own actions: this is imitation, not "
        "success.</footer>",
    ]
    path = folder / "report.html"
    write_atomically(path, page(title=f"{policy} on {dataset}", parts=parts))
    return path


def plot_episode(episode: ReplayedEpisode, replayed: Replay, units: Mapping[str, str]) -> bytes:
    """A PNG with an axis for every action dimension: recorded, executed, and all chunks."""
    from matplotlib.figure import Figure

    names = replayed.action_names
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(10.8, 0.5 + 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    executed = episode.executed(replayed.every)
    length, horizon = len(episode.recorded), episode.predicted.shape[1]
    for i, axis in enumerate(axes.flat):
        if i >= len(names):
            axis.remove()
            continue
        for start, chunk in zip(episode.decided, episode.predicted, strict=True):
            inside = min(horizon, length - start)
            steps = np.arange(start, start + inside)
            axis.plot(steps, chunk[:inside, i], color=POLICY, lw=0.8, alpha=0.3)
            axis.plot(start, chunk[0, i], ".", color=POLICY, ms=4, alpha=0.6)
        axis.plot(episode.recorded[:, i], color=INK, lw=1.7, label="recorded")
        axis.plot(executed[:, i], color=POLICY, lw=1.7, label="policy")
        unit = units.get(names[i], "")
        title = f"{names[i]}  [{unit}]" if unit else names[i]
        axis.set_title(title, fontsize=9.5, color=INK, loc="left", fontweight="bold")
        _quiet(axis)
        axis.set_ylim(*_limits(replayed, i))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlim(-0.5, max(length - 0.5, 0.5))
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8.5, color=SOFT)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _quiet(axis) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GRID)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=SOFT, length=0)


def _limits(replayed: Replay, dimension: int) -> tuple[float, float]:
    """One scale for a dimension in all episodes, so that small errors look small."""
    values = [e.recorded[:, dimension] for e in replayed.episodes]
    values += [e.predicted[..., dimension].ravel() for e in replayed.episodes]
    low, high = min(x.min() for x in values), max(x.max() for x in values)
    margin = 0.08 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _header(policy: str, dataset: str, scores: Mapping[str, Any]) -> str:
    lead = (
        f"{scores['num_decisions']} decisions of the policy {policy} at moments of "
        f"{_counted(scores['num_episodes'], 'recorded episode')} of {dataset}, beside the actions "
        "that were recorded there."
    )
    return f'<h1>Predicted beside recorded</h1><p class="lead">{escape(lead)}</p>'


def _tiles(scores: Mapping[str, Any]) -> str:
    explained = [x for x in scores["explained"] if x is not None]
    relative = scores["relative_error"]
    found = [
        tile(
            "n/a" if relative is None else f"{relative:.2f}",
            "mean error, in standard deviations of what was recorded",
            "mean over dimensions and steps of the chunk; always giving the mean scores about 0.8",
            main=True,
        ),
        tile(
            "n/a" if not explained else f"{sum(explained) / len(explained):.0%}",
            "of the recorded variance predicted",
            "mean over dimensions; 0 % is no better than always the mean",
        ),
        tile(str(scores["num_decisions"]), "decisions", f"every {_steps_words(scores['every'])}"),
        tile(
            _milliseconds(scores["seconds_per_decision"]),
            "per decision",
            "median, pictures to actions, in batches",
        ),
    ]
    return f'<div class="tiles">{"".join(found)}</div>'


def _dimensions(scores: Mapping[str, Any], units: Mapping[str, str]) -> str:
    rows = []
    for i, name in enumerate(scores["action_names"]):
        explained = scores["explained"][i]
        spread = scores["recorded_spread"][i]
        error = scores["mean_absolute_error"][i]
        share = error / spread if explained is not None else None
        rows.append(
            [
                ("name", escape(name)),
                *([("quiet", escape(units.get(name, "")))] if units else []),
                ("wide", _bar(share)),
                ("rate", "" if share is None else f"{share:.2f}"),
                ("number", f"{error:.4g}"),
                ("number", f"{scores['root_mean_square_error'][i]:.4g}"),
                ("number quiet", f"{spread:.4g}"),
                ("number quiet", "constant" if explained is None else f"{explained:.0%}"),
            ]
        )
    head = [
        ("", "action"), *([("", "unit")] if units else []),
        ("", "mean error against the recorded spread"),
        ("number", ""), ("number", "mean error"), ("number", "root mean square"),
        ("number", "spread"), ("number", "explained"),
    ]  # fmt: skip
    note = (
        '<p class="note" style="margin-top:12px">Errors are absolute, in the robot&rsquo;s units, '
        "over all steps of the predicted chunks that lie within the episode. &ldquo;Spread&rdquo; "
        "is the standard deviation of the recorded actions.</p>"
    )
    return section("Error by dimension", table(head, rows), note)


def _steps(scores: Mapping[str, Any]) -> str:
    errors = np.array(scores["mean_absolute_error_of_step"])  # [h a]
    horizon, names = len(errors), scores["action_names"]
    shown = np.unique(
        np.linspace(0, horizon - 1, min(horizon, MAX_STEPS_SHOWN)).round().astype(int)
    )
    spread = np.array(scores["recorded_spread"])
    head = [("", "action"), *(("number", str(h + 1)) for h in shown)]
    rows = []
    for i, name in enumerate(names):
        cells = []
        for h in shown:
            share = errors[h, i] / spread[i] if spread[i] > 1e-8 else 0.0
            cells.append(("number", _heat(errors[h, i], share)))
        rows.append([("name", escape(name)), *cells])
    lines = [
        Line(name, list(range(1, horizon + 1)), (errors[:, i] / spread[i]).tolist(), STYLES[i % 5])
        for i, name in enumerate(names)
        if spread[i] > 1e-8
    ]
    if len(lines) > len(STYLES):  # more lines than colours say nothing
        relative = scores["relative_error_of_step"]
        lines = [Line("mean of all dimensions", list(range(1, horizon + 1)), relative, "a bold")]
    chart = line_chart(
        lines, title="Mean error in recorded standard deviations", x_label="step of the chunk",
        width=960, height=260,
    )  # fmt: skip
    lead = "How far ahead the policy sees: step 1 is the next action of the chunk."
    return section(
        "Error by step of the chunk",
        f'<div class="plots">{chart}</div>' if horizon > 1 else "",
        f"<h3>Mean absolute error, robot units</h3>{table(head, rows)}",
        lead=lead,
    )


def _episode(
    episode: ReplayedEpisode, replayed: Replay, scores: Mapping[str, Any], png: bytes
) -> str:
    spread = replayed.spread
    moving = spread > 1e-8
    error = np.nanmean(np.abs(episode.errors), axis=(0, 1))
    words = (
        "" if not moving.any() else f", mean error {(error[moving] / spread[moving]).mean():.2f}"
    )
    pictures = "".join(
        f'<figure><img alt="what the policy saw" src="{_png(images)}">'
        f"<figcaption>step {step}</figcaption></figure>"
        for step, images in episode.pictures
        if images
    )
    text = escape(episode.text) or "(no instruction)"
    what = f"episode {episode.number}, {len(episode.recorded)} steps{words}"
    plot = base64.b64encode(png).decode()
    return (
        f'<h3 style="margin-top:26px;font-size:16px;color:var(--ink)">&ldquo;{text}&rdquo; '
        f'<span class="quiet" style="font-weight:400">{what}</span></h3>'
        '<div style="display:flex;gap:14px;flex-wrap:wrap;margin-bottom:10px">'
        f"{pictures}</div>"
        f'<figure><img alt="recorded and predicted actions" style="background:#fff" '
        f'src="data:image/png;base64,{plot}"></figure>'
    )


def _png(images: Mapping[str, np.ndarray]) -> str:
    """Every camera's picture side by side."""
    row = np.concatenate([scaled(x, height=PICTURE_HEIGHT) for x in images.values()], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _bar(share: float | None) -> str:
    """The error as a part of the spread; a full bar is one standard deviation."""
    if share is None:
        return ""
    width = 318 * min(share, 1.0)
    return (
        '<svg class="bar" viewBox="0 0 320 22" preserveAspectRatio="none" role="img">'
        f"<title>{share:.2f} standard deviations</title>"
        '<rect class="track" x="1" y="6" width="318" height="10" rx="3"/>'
        f'<rect class="fill a" x="1" y="6" width="{width:.1f}" height="10" rx="3"/></svg>'
    )


def _heat(value: float, share: float) -> str:
    shade = round(60 * min(max(share, 0.0), 1.0))
    return (
        '<span style="display:block;padding:3px 6px;border-radius:4px;font-size:12.5px;'
        f'background:color-mix(in srgb, var(--b) {shade}%, transparent)">{value:.3g}</span>'
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _steps_words(every: int) -> str:
    return "step" if every == 1 else f"{every} steps"
