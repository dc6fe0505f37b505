"""The page of a data set, or of a mixture of several: what is in it, and what is odd about it.

    write_dataset_report(Path("bridge.html"), open_sources(...))

One offline document: findings in plain words, whole episodes, instructions, lengths, every
dimension of states and actions before and after normalisation, and the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np

from pizero.agent.driving.episodes import write_atomically
from pizero.agent.report.charts import histogram
from pizero.agent.report.dataset_checks import LOOKED_FOR, find
from pizero.agent.report.dataset_episodes import episode_section
from pizero.agent.report.dataset_facts import OnDisk, fact_section, on_disk, size_words
from pizero.agent.report.dataset_findings import Finding, counted
from pizero.agent.report.dataset_look import LIMIT, Look, look_at
from pizero.agent.report.dataset_pictures import probe_cameras
from pizero.agent.report.dataset_style import SCRIPT, STYLE
from pizero.agent.report.dataset_values import motion_section, value_sections
from pizero.agent.report.page import page, section, table, tile
from pizero.agent.sources import Source, Sources

FILM_BYTES = 7_000_000  # of all films; base64 makes a third more of them
EPISODES = 6  # shown, of all data sets together
MOST_INSTRUCTIONS = 15
FEW_VIEWS = 3


@dataclass(frozen=True)
class Part:
    """A data set's share of the page, and what the overview of a mixture needs of it."""

    source: Source
    findings: list[Finding]
    html: str


def write_dataset_report(
    output: Path,
    sources: Sources,
    *,
    episodes: int | None = None,
    limit: int = LIMIT,
    first: str = "quantile",
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Writes the page and returns its path.

    `episodes` are shown of each data set, `limit` steps of each are looked at, and `first` is the
    kind of normalisation to begin with; `progress` hears the name of each data set that is begun.
    """
    if episodes is None:
        episodes = max(1, EPISODES // len(sources.parts))
    parts = []
    for source in sources.parts:
        progress(source.name)
        parts.append(
            _part(
                source,
                episodes=episodes,
                limit=limit,
                first=first,
                max_bytes=FILM_BYTES // len(sources.parts),
                is_alone=len(sources.parts) == 1,
            )
        )
    head = "" if len(parts) == 1 else _overview(sources, parts)
    footer = f"<footer>Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by pizero.</footer>"
    html = page(
        title=sources.title,
        parts=[head, *(part.html for part in parts), footer],
        style=STYLE,
        script=SCRIPT,
    )
    write_atomically(output, html)
    return output


def _part(
    source: Source, *, episodes: int, limit: int, first: str, max_bytes: int, is_alone: bool
) -> Part:
    look = look_at(source, limit=limit, first=first)
    probes = probe_cameras(source.dataset)
    findings = find(look, probes)
    disk = on_disk(source.dataset.index.directory)
    level = "h1" if is_alone else "h1 class='part'"
    pieces = [
        f"<header id='{_anchor(source.name)}'><{level}>{escape(source.name)}</h1>"
        f'<p class="lead">{escape(_sentence(look, disk))}</p></header>',
        _tiles(look, disk),
        _finding_section(findings),
        episode_section(look, count=episodes, max_bytes=max_bytes),
        _instruction_section(look),
        *value_sections(look),
        motion_section(look),
        fact_section(look, disk, probes),
    ]
    return Part(source, findings, "\n".join(pieces))


def _sentence(look: Look, disk: OnDisk) -> str:
    source, data = look.source, look.source.dataset
    robot = f" of {source.robot.name}" if source.robot else ""
    return (
        f"{disk.format.split(',')[0]} data{robot}: {counted(data.num_episodes, 'episode')} of the "
        f"split {data.split}, seen by {counted(len(data.cameras), 'camera')}, each step with "
        f"{data.state_dim or 'no'} numbers of state and {data.action_dim} of action."
    )


def _tiles(look: Look, disk: OnDisk) -> str:
    source, data = look.source, look.source.dataset
    distinct = {t.strip() for t in look.texts if t.strip()}
    unlabeled = sum(not t.strip() for t in look.texts)
    lengths = np.asarray(data.lengths)
    steps = int(lengths.sum())
    drawn = "" if steps == len(data) else f", of {steps:,} steps"
    rate = source.fps
    found = [
        tile(f"{data.num_episodes:,}", "episodes", _length_words(lengths, rate)),
        tile(f"{len(data):,}", "frames" + drawn, f"chunks of {data.horizon} actions"),
        tile(
            _time_words(steps / rate) if rate else "?",
            "of robot time",
            f"at {rate:g} actions a second" if rate else "the control rate is not known (--fps)",
        ),
        tile(
            f"{len(distinct):,}",
            "instruction" if len(distinct) == 1 else "instructions",
            f"{unlabeled / max(len(look.texts), 1):.0%} of the episodes have none"
            if unlabeled
            else "every episode has one",
        ),
        tile(size_words(disk.size), "on disk", "all splits"),
    ]
    return f'<div class="tiles few five">{"".join(found)}</div>'


def _finding_section(findings: Sequence[Finding]) -> str:
    if not findings:
        body = (
            f'<p class="fine"><span class="mark good">Nothing stands out.</span> Looked for: '
            f"{escape(LOOKED_FOR)}.</p>"
        )
        return section("What to know before training", body)
    items = "".join(
        f'<li class="{f.level}"><strong>{escape(f.title)}</strong><span>{escape(f.detail)}</span>'
        "</li>"
        for f in findings
    )
    bad = sum(f.level == "bad" for f in findings)
    words = [
        f'<span class="mark bad">{bad} to mend or decide</span>' if bad else "",
        counted(len(findings) - bad, "thing") + " worth knowing" if len(findings) > bad else "",
    ]
    lead = ", ".join(word for word in words if word)
    return section("What to know before training", f'<ul class="findings">{items}</ul>', lead=lead)


def _instruction_section(look: Look) -> str:
    counts = Counter(text.strip() for text in look.texts)
    counts.pop("", None)
    lengths = np.asarray(look.source.dataset.lengths)
    total = len(look.texts)
    most = counts.most_common(MOST_INSTRUCTIONS)
    rows = []
    for text, count in most:
        width = 316 * count / most[0][1]
        bar = (
            '<svg class="bar thin" viewBox="0 0 320 12" preserveAspectRatio="none" role="img">'
            f'<rect class="fill a" x="1" y="2" width="{width:.1f}" height="8" rx="3"/></svg>'
        )
        rows.append(
            [
                ("", escape(text)),
                ("wide bar-cell", bar),
                ("number", f"{count:,}"),
                ("number quiet", f"{count / total:.1%}"),
            ]
        )
    head = [("", "instruction"), ("", ""), ("number", "episodes"), ("number", "share")]
    listing = table(head, rows) if rows else '<p class="note">No instruction at all.</p>'
    if (rest := len(counts) - len(most)) > 0:
        others = sum(counts.values()) - sum(count for _, count in most)
        listing += f'<p class="note">and {rest:,} more, in {counted(others, "episode")}</p>'
    low, high = int(lengths.min()), int(lengths.max())
    if low == high:
        chart = f'<p class="note">All have {counted(low, "step")}.</p>'
    else:
        bins = min(48, high - low + 1)
        edges = (low - 0.5, high + 0.5) if bins == high - low + 1 else (low, high)
        drawn = np.histogram(lengths, bins=bins, range=edges)[0]
        middle = float(np.median(lengths))
        chart = histogram(
            drawn.tolist(), low=edges[0], high=edges[1], width=370, height=140,
            label="steps of an episode", marks=[(middle, f"median {middle:g}")],
        )  # fmt: skip
        words = f"{low:,} to {high:,} steps, median {middle:g} (marked), mean {lengths.mean():.1f}"
        chart += f'<p class="note">{words}</p>'
    return section(
        "Instructions and lengths",
        f'<div class="pair even"><div>{listing}</div><div><h3>Steps of an episode</h3>{chart}'
        "</div></div>",
    )


def _overview(sources: Sources, parts: Sequence[Part]) -> str:
    """What a mixture is made of."""
    assert sources.mix is not None
    shares = sources.mix.shares()
    views = list(dict.fromkeys(c for part in parts for c in part.source.dataset.cameras))
    rows = []
    for part in parts:
        source, data = part.source, part.source.dataset
        share, learning = shares[source.name], source.learning
        widths = (None, None) if learning is None else (learning.state_dim, learning.action_dim)
        bad = sum(f.level == "bad" for f in part.findings)
        link = f'<a href="#{_anchor(source.name)}">{escape(source.name)}</a>'
        rows.append(
            [
                ("name", link),
                ("number", f"{share:.1%}"),
                ("bar-cell", _share_bar(share, max(shares.values()))),
                ("number", _passes(share * 1e6 / len(data))),
                ("number", f"{len(data):,}"),
                ("number", f"{data.num_episodes:,}"),
                ("number", f"{len(data) / data.num_episodes:.1f}"),
                ("number", "" if source.fps is None else f"{source.fps:g} Hz"),
                ("number", _padded(data.state_dim, widths[0])),
                ("number", _padded(data.action_dim, widths[1])),
                ("number", f'<span class="mark bad">{bad}</span>' if bad else "0"),
                *_camera_cells(list(data.cameras), views),
            ]
        )
    head = [
        ("", "data set"), ("number", "of samples"), ("", ""),
        ("number", "passes in a million"), ("number", "frames"), ("number", "episodes"),
        ("number", "length"), ("number", "rate"), ("number", "state"), ("number", "action"),
        ("number", "to mend"),
        *([("number", escape(v)) for v in views] if len(views) <= FEW_VIEWS else [("", "cameras")]),
    ]  # fmt: skip
    frames = sum(len(part.source.dataset) for part in parts)
    lead = (
        f"{counted(len(parts), 'data set')} with {frames:,} frames. Weights are shares of samples: "
        "how often a set is drawn, whatever its size."
    )
    note = (
        '<p class="note">&ldquo;Passes in a million&rdquo;: how often all frames of the set are '
        "seen in a million samples. State and action: numbers of the set + padding up to the "
        "model&rsquo;s width. Length: mean steps of an episode.</p>"
    )
    return f'<header><h1>{escape(sources.title)}</h1><p class="lead">{lead}</p></header>' + section(
        "The mixture", f'<div class="wide-table">{table(head, rows)}</div>', note
    )


def _passes(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def _camera_cells(own: Sequence[str], views: Sequence[str]) -> list[tuple[str, str]]:
    """A tick for each view where all sets share a few of them, else their names."""
    if len(views) > FEW_VIEWS:
        return [("quiet", escape(", ".join(own)))]
    missing = '<span class="quiet">&ndash;</span>'
    return [("number", "&#10003;" if view in own else missing) for view in views]


def _share_bar(share: float, largest: float) -> str:
    width = 118 * share / largest
    return (
        '<svg class="bar thin" viewBox="0 0 120 12" preserveAspectRatio="none" role="img">'
        f'<rect class="fill a" x="1" y="2" width="{width:.1f}" height="8" rx="3"/></svg>'
    )


def _padded(width: int, model: int | None) -> str:
    if not width:
        return "none"
    return f"{width}" if model is None or model <= width else f"{width} + {model - width}"


def _anchor(name: str) -> str:
    return "set-" + "".join(c if c.isalnum() else "-" for c in name)


def _length_words(lengths: np.ndarray, rate: float | None) -> str:
    mean = float(lengths.mean())
    if lengths.min() == lengths.max():
        return f"of {counted(int(mean), 'step')}" + (f", {mean / rate:.1f} s" if rate else "")
    seconds = f", {mean / rate:.1f} s" if rate else ""
    return f"{int(lengths.min())} to {int(lengths.max())} steps, {mean:.0f} in the mean{seconds}"


def _time_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.0f} h" if seconds >= 36000 else f"{seconds / 3600:.1f} h"
