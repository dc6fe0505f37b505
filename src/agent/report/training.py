"""The report's pictures of learning: curves of a run, and predicted chunks beside the expert's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pizero.agent.report.charts import Line, line_chart, small_multiple, smoothed
from pizero.agent.report.page import key, section

# Entries of a metrics line that say when it was written, not what was measured.
CLOCKS = {"step", "kind", "samples", "time", "seconds", "epoch"}
STYLES = ("a", "b", "c", "d", "grey")


def training_section(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss, held-out error and accuracy, learning rate and speed against the step."""
    train = [row for row in metrics if row.get("kind") == "train"]
    val = [row for row in metrics if row.get("kind") == "val"]
    charts = []
    loss = _series(train, "loss")
    lines = []
    if loss:
        steps, values = loss
        span = max(1, len(values) // 40)
        lines = [
            Line("", steps, values, "a faint"),
            Line("training, smoothed", steps, smoothed(values, span=span), "a"),
        ]
    if held_out := _series(val, "loss"):
        lines.append(Line("held-out episodes", *held_out, "b bold"))
    charts.append(line_chart(lines, title="Loss", x_label="step", log_y=True))

    for title, members in _groups(val):
        drawn = [
            Line(label, *series, STYLES[i % len(STYLES)])
            for i, (name, label) in enumerate(members.items())
            if (series := _series(val, name))
        ]
        charts.append(line_chart(drawn, title=title, x_label="step"))
    rates = [n for n in _names(train) if n == "lr" or n.startswith("lr/")]
    drawn = [
        Line(name.removeprefix("lr").lstrip("/"), *series, STYLES[i % len(STYLES)])
        for i, name in enumerate(rates)
        if (series := _series(train, name))
    ]
    charts.append(line_chart(drawn, title="Learning rate", x_label="step"))
    for name, title in (
        ("grad_norm", "Norm of the gradient"),
        ("samples_per_second", "Samples per second"),
    ):
        if series := _series(train, name):
            charts.append(line_chart([Line("", *series, "a")], title=title, x_label="step"))
    body = "".join(charts)
    return section("Training", f'<div class="charts">{body}</div>' if body else "")


def chunk_section(held_out: Mapping[str, Any] | None) -> str:
    """Chunks predicted for frames of held-out episodes, over what the expert did there."""
    if not held_out or not held_out["frames"]:
        return ""
    frames, names = held_out["frames"], held_out["action_names"]
    limits = []
    for i in range(len(names)):
        values = [v[i] for f in frames for v in f["expert"]]
        values += [v[i] for f in frames for chunk in (f["predicted"], *f["draws"]) for v in chunk]
        limits.append((min(values), max(values)))
    rows = []
    for frame in frames:
        plots = []
        for i, name in enumerate(names):
            steps = list(range(len(frame["expert"])))
            lines = [Line("", steps, [v[i] for v in c], "grey faint") for c in frame["draws"]]
            lines.append(Line("", steps, [v[i] for v in frame["expert"]], "ink bold"))
            lines.append(Line("", steps, [v[i] for v in frame["predicted"]], "a bold"))
            low, high = limits[i]
            plots.append(small_multiple(lines, title=name, low=low, high=high))
        when = f"episode {frame['episode']}, step {frame['step']}"
        caption = f"{escape(frame['text'])}<br><span class=quiet>{when}</span>"
        picture = f"data:image/png;base64,{frame['picture']}"
        rows.append(
            f'<div class="chunks"><figure><img alt="what the policy sees" src="{picture}">'
            f"<figcaption>{caption}</figcaption></figure>"
            f'<div class="plots">{"".join(plots)}</div></div>'
        )
    legend = key(
        [
            ("ink", "expert"),
            ("a", "policy, as it is driven"),
            ("grey", f"{len(frames[0]['draws'])} draws of the full noise"),
        ]
    )
    lead = (
        "What the policy would do at moments of episodes it was not trained on, in the robot's own "
        f"units. Mean absolute error over {held_out['num_frames']} frames: "
        f"{held_out['mean_absolute_error']:.3f}."
    )
    return section("Predicted and expert actions", legend, *rows, lead=lead)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(n for row in rows for n, v in row.items() if isinstance(v, int | float))
    return [n for n in names if n not in CLOCKS]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]] | None:
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return ([p[0] for p in points], [p[1] for p in points]) if points else None


def _groups(val: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Held-out measures that belong in one chart: its title, and name -> label."""
    names = [n for n in _names(val) if n != "loss"]
    shares = {n: n.removeprefix("accuracy_") for n in names if n.startswith("accuracy_")}
    error = {n: "" for n in names if n == "action_l1"}
    unread = {n: "" for n in names if n == "undecodable"}
    robot = {n: n.removeprefix("robot_l1/") for n in names if n.startswith("robot_l1/")}
    groups = [
        ("Error on held-out episodes, normalised (L1)", error),
        ("Share of held-out actions within ... of the expert", shares),
        ("Share of answers that spell no actions", unread),
        ("Error on held-out episodes by action dimension, robot units", robot),
    ]
    return [(title, members) for title, members in groups if members]
