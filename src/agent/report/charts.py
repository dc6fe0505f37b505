"""Charts of the report as hand-written SVG: small, sharp, and coloured by the page's own CSS.

Every function returns an `<svg>` string. Colours come from CSS classes (`report_page.STYLE`), so a
chart follows the reader's light or dark theme, which a picture drawn in advance cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One curve. `style` is a CSS class: a, b, c, d (colours), with "faint" or "bold" beside it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "a"


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "",
    log_y: bool = False,
    width: int = 460,
    height: int = 230,
) -> str:
    """Curves over a common axis, with round ticks and a legend above."""
    lines = [_thinned(line) for line in lines if len(line.x) > 0]
    if not lines:
        return ""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if math.isfinite(y) and (y > 0 or not log_y)]
    if not ys:
        return ""
    left, right, top, bottom = 52, 20, 44, 34 if x_label else 22
    # Over a small range a logarithmic axis has hardly a round number to mark.
    log_y = log_y and max(ys) > 5 * min(ys)
    x_axis = _Axis.around(xs, start=left, stop=width - right)
    y_axis = _Axis.around(ys, start=height - bottom, stop=top, log=log_y)
    parts = [_open(width, height, title), _text(left - 44, 16, title, "title")]
    parts += [_legend(lines, x=left - 44, y=34)]
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(left - 6, y + 3.5, _number(value), "tick", anchor="end"))
    for value in x_axis.ticks():
        parts.append(
            _text(x_axis(value), height - bottom + 14, _number(value), "tick", anchor="middle")
        )
    if x_label:
        parts.append(
            _text((left + width - right) / 2, height - 4, x_label, "tick", anchor="middle")
        )
    parts += [_path(line, x_axis, y_axis) for line in lines]
    return "".join([*parts, "</svg>"])


def small_multiple(
    lines: Sequence[Line],
    *,
    title: str,
    low: float,
    high: float,
    width: int = 190,
    height: int = 120,
    has_cursor: bool = False,
) -> str:
    """A little chart without numbers on its x axis; a whole column shares `low` and `high`.

    `has_cursor` adds an upright line that a script may move by up to its `data-span`.
    """
    left, right, top, bottom = 34, 6, 22, 8
    x_axis = _Axis.around([x for line in lines for x in line.x], start=left, stop=width - right)
    y_axis = _Axis.around([low, high], start=height - bottom, stop=top)
    parts = [_open(width, height, title), _text(left, 12, title, "small")]
    for value in y_axis.ticks(count=4):
        y = y_axis(value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(left - 5, y + 3, _number(value), "tiny", anchor="end"))
    parts += [_path(line, x_axis, y_axis) for line in lines]
    if has_cursor:
        parts.append(
            f'<line class="cursor" data-span="{width - left - right}" x1="{left}" x2="{left}" '
            f'y1="{top - 4}" y2="{height - bottom}"/>'
        )
    return "".join([*parts, "</svg>"])


def histogram(
    counts: Sequence[int],
    *,
    low: float,
    high: float,
    label: str,
    marks: Sequence[tuple[float, str]] = (),
    inside: tuple[float, float] | None = None,
    ticks: Sequence[float] | None = None,
    width: int = 190,
    height: int = 50,
) -> str:
    """Bars over equal bins from `low` to `high`, as high as the square root of their counts.

    `marks` are (value, what it is) for thin lines; bars beyond `inside` have another colour.
    `ticks` None: round numbers.
    """
    left, right, top, bottom = 4, 4, 4, 15
    base = height - bottom
    x_axis = _Axis(low, high, left, width - right)
    # Nearly all values of a robot that rests lie in one bin; the root keeps the others in sight.
    tallest = math.sqrt(max(*counts, 1))
    step = (high - low) / len(counts)
    paths = {"a": "", "b": ""}
    for i, count in enumerate(counts):
        if not count:
            continue
        x, bar = x_axis(low + i * step), max(1.0, (base - top) * math.sqrt(count) / tallest)
        middle = low + (i + 0.5) * step
        beyond = inside is not None and not inside[0] <= middle <= inside[1]
        wide = max(x_axis(low + (i + 1) * step) - x - 0.6, 0.6)
        paths["b" if beyond else "a"] += f"M{x:.1f} {base}v-{bar:.1f}h{wide:.1f}v{bar:.1f}z"
    parts = [_open(width, height, label)]
    parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    parts += [f'<path class="bars {style}" d="{d}"/>' for style, d in paths.items() if d]
    for value, what in marks:
        if low <= value <= high:
            x = x_axis(value)
            parts.append(
                f'<line class="quantile" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{base + 3}">'
                f"<title>{escape(what)}</title></line>"
            )
    last = -math.inf
    for value in x_axis.ticks() if ticks is None else ticks:
        x, text = x_axis(value), _number(value)
        reach = 2.7 * len(text)
        at = min(max(x, left + reach), width - right - reach)
        if at - reach > last:
            parts.append(_text(at, height - 3, text, "tiny", anchor="middle"))
            last = at + reach + 3
    return "".join([*parts, "</svg>"])


def interval_bar(
    score: Mapping[str, float],
    *,
    style: str = "a",
    label: str = "",
    width: int = 320,
    height: int = 22,
) -> str:
    """A rate as a bar from 0 to 100 % with its interval as a whisker."""

    def x(share: float) -> float:
        return 1 + share * (width - 2)

    middle = height / 2
    hover = (
        f"{label + ': ' if label else ''}{score['successes']} of {score['trials']}, "
        f"95 % interval {score['low']:.0%} to {score['high']:.0%}"
    )
    return "".join(
        [
            f'<svg class="bar{" thin" if height < 16 else ""}" viewBox="0 0 {width} {height}" '
            'role="img" preserveAspectRatio="none">',
            f"<title>{escape(hover)}</title>",
            f'<rect class="track" x="1" y="4" width="{width - 2}" height="{height - 8}" rx="3"/>',
            f'<rect class="fill {style}" x="1" y="4" width="{x(score["rate"]) - 1:.1f}" '
            f'height="{height - 8}" rx="3"/>',
            f'<line class="whisker" x1="{x(score["low"]):.1f}" x2="{x(score["high"]):.1f}" '
            f'y1="{middle}" y2="{middle}"/>',
            *(
                f'<line class="whisker" x1="{x(score[end]):.1f}" x2="{x(score[end]):.1f}" '
                f'y1="{middle - 4}" y2="{middle + 4}"/>'
                for end in ("low", "high")
            ),
            "</svg>",
        ]
    )


def sight_picture(
    segments: Sequence[Mapping], *, styles: Mapping[str, str], width: int = 460
) -> str:
    """Who may look at whom: a row for each asking segment, a column for each segment looked at.

    Sides grow with the logarithm of a segment's length, so that one state token can still be seen
    beside hundreds of image tokens.
    """
    left, top = 120, 74
    weights = [1.6 + math.log2(1 + s["length"]) for s in segments]
    unit = (width - left - 10) / sum(weights)
    starts = [sum(weights[:i]) * unit for i in range(len(weights) + 1)]
    height = top + starts[-1] + 8
    parts = [_open(width, height, "attention"), _text(0, 14, "rows ask, columns answer", "tick")]
    for i, asking in enumerate(segments):
        y, h = top + starts[i], starts[i + 1] - starts[i]
        style = styles[asking["expert"]]
        parts.append(_text(left - 10, y + h / 2, asking["name"], "label", anchor="end"))
        parts.append(
            _text(left - 10, y + h / 2 + 13, _tokens(asking["length"]), "tiny", anchor="end")
        )
        x = left + starts[i] + h / 2
        parts.append(
            f'<text class="label" transform="translate({x:.1f} {top - 8}) rotate(-32)">'
            f"{escape(asking['name'])}</text>"
        )
        for j, asked in enumerate(segments):
            sees = asked["block"] <= asking["block"]
            hover = f"{asking['name']} {'sees' if sees else 'does not see'} {asked['name']}"
            parts.append(
                f'<rect class="cell {style if sees else "blind"}" x="{left + starts[j] + 1:.1f}" '
                f'y="{y + 1:.1f}" width="{starts[j + 1] - starts[j] - 2:.1f}" height="{h - 2:.1f}" '
                f'rx="3"><title>{escape(hover)}</title></rect>'
            )
    return "".join([*parts, "</svg>"])


def smoothed(values: Sequence[float], *, span: int) -> list[float]:
    """Exponential moving average over about `span` values, without the bias towards the first."""
    decay = math.exp(-1 / max(1, span))
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @staticmethod
    def around(values: Sequence[float], *, start: float, stop: float, log: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if low == high:
            low, high = (low * 0.5, high * 2) if log else (low - 0.5, high + 0.5)
        if not log and low > 0 and low < 0.35 * high:
            low = 0.0
        return _Axis(low, high, start, stop, log)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
            values = [m * 10.0**d for d in decades for m in steps]
            return [v for v in values if self.low <= v <= self.high]
        raw = (self.high - self.low) / count
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _thinned(line: Line) -> Line:
    every = max(1, math.ceil(len(line.x) / MAX_POINTS))
    return Line(line.label, list(line.x)[::every], list(line.y)[::every], line.style)


def _path(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    points = " ".join(
        f"{x_axis(x):.1f},{y_axis(y):.1f}"
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(y)
    )
    return f'<polyline class="line {line.style}" points="{points}"/>'


def _legend(lines: Sequence[Line], *, x: float, y: float) -> str:
    parts, at = [], x
    for line in lines:
        if not line.label:
            continue
        parts.append(
            f'<line class="line {line.style}" x1="{at}" x2="{at + 14}" y1="{y - 4}" y2="{y - 4}"/>'
        )
        parts.append(_text(at + 19, y, line.label, "tick"))
        at += 19 + 5.9 * len(line.label) + 12
    return "".join(parts)


def _open(width: float, height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}">'
    )


def _text(x: float, y: float, text: str, style: str, *, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
