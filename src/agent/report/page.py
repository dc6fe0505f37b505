"""The look of report.html: one stylesheet for light and dark, and the pieces of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2230; --soft: #5a6475; --faint: #8b94a3;
  --rule: #e3e7ed;
  --track: #edf0f4; --a: #2f6fde; --b: #e0812b; --c: #1f9d6b; --d: #9257c9; --grey: #9aa4b2;
  --good: #1f9d6b; --bad: #cf5046;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1f28; --ink: #e8ebf1; --soft: #aab3c1; --faint: #7b8595;
    --rule: #2b323e;
    --track: #262d38; --a: #6ea1ff; --b: #f2a354; --c: #4cc998; --d: #bd8bf0; --grey: #6d7787;
    --good: #4cc998; --bad: #f0857b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 6px; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 20px 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 12px; max-width: 74ch; }
p.note, .lead { color: var(--soft); }
.lead { font-size: 16px; max-width: 78ch; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 24px 26px; margin-top: 20px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: 1.7fr 1fr 1fr 1fr; gap: 14px; margin-top: 22px; }
.tiles.few { grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 18px 20px; }
.tile .value { font-size: 34px; font-weight: 650; letter-spacing: -.02em; line-height: 1.1;
  font-variant-numeric: tabular-nums; }
.tile.main .value { font-size: 60px; color: var(--a); }
.tile .what { color: var(--ink); font-weight: 600; margin-top: 4px; font-size: 14px;
  line-height: 1.35; }
.tile .how { color: var(--faint); font-size: 12.5px; margin-top: 3px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--faint);
  padding: 6px 10px 6px 0;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.name { white-space: nowrap; font-weight: 600; }
td.quiet, .quiet { color: var(--faint); font-size: 13px; }
td.wide { width: 38%; min-width: 200px; }
td.rate { font-weight: 650; text-align: right; white-space: nowrap; }
td.close { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr));
  gap: 18px 26px;
  margin-top: 14px; }
svg { max-width: 100%; height: auto; display: block; }
svg.bar { width: 100%; height: 22px; }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
svg .tick { font-size: 11px; fill: var(--faint); }
svg .small { font-size: 11px; fill: var(--soft); }
svg .tiny { font-size: 9.5px; fill: var(--faint); }
svg .label { font-size: 12.5px; fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .line.faint { stroke-width: 1; opacity: .4; }
svg .line.bold { stroke-width: 2.4; }
svg .a { stroke: var(--a); } svg .b { stroke: var(--b); } svg .c { stroke: var(--c); }
svg .d { stroke: var(--d); } svg .grey { stroke: var(--grey); } svg .ink { stroke: var(--ink); }
svg rect { stroke: none !important; }
svg rect.a { fill: var(--a); } svg rect.b { fill: var(--b); } svg rect.c { fill: var(--c); }
svg rect.d { fill: var(--d); } svg rect.grey { fill: var(--grey); }
svg rect.cell { opacity: .82; } svg rect.blind { fill: var(--track); opacity: 1; }
svg rect.track { fill: var(--track); } svg rect.fill { opacity: .88; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; opacity: .75;
  vector-effect: non-scaling-stroke; }
svg.bar.thin { height: 12px; } svg.bar.thin .whisker { opacity: .4; }
.plots svg { width: 100%; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px;
  margin-top: 12px; }
figure { margin: 0; }
figure video, figure img { width: 100%; border-radius: 8px; display: block; background: #14171c; }
figcaption { font-size: 13px; color: var(--soft); margin-top: 5px; }
.mark { font-weight: 650; } .mark.good { color: var(--good); } .mark.bad { color: var(--bad); }
.key { display: inline-flex; align-items: center; gap: 6px; margin-right: 16px; font-size: 13px;
  color: var(--soft); }
.key i { width: 12px; height: 12px; border-radius: 3px; display: inline-block; opacity: .88; }
.pair { display: grid; grid-template-columns: 460px 1fr; gap: 30px; align-items: start; }
.chunks { display: grid; grid-template-columns: 150px 1fr; gap: 14px; align-items: center;
  border-top: 1px solid var(--rule); padding: 12px 0; }
.chunks .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr));
  gap: 6px; }
.chunks img { width: 100%; border-radius: 6px; image-rendering: auto; }
.facts { columns: 3 280px; column-gap: 36px; }
.facts.whole { columns: 1; }
.facts > div { break-inside: avoid; padding-top: 14px; }
.facts h3 { margin-top: 0; }
.facts td { padding: 4px 10px 4px 0; font-size: 13.5px; }
.facts td:first-child { color: var(--faint); white-space: nowrap; width: 42%; }
.facts.whole td:first-child { width: 22%; }
.facts td:last-child { overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); font-weight: 600;
  font-size: 14px; }
pre { background: var(--track); border-radius: 8px; padding: 14px 16px; font-size: 12.5px;
  line-height: 1.45;
  overflow-x: auto; max-height: 560px; }
footer { color: var(--faint); font-size: 13px; margin-top: 26px; }
@media (max-width: 860px) {
  .tiles { grid-template-columns: 1fr 1fr; } .tile.main { grid-column: 1 / -1; }
  .pair, .charts, .chunks { grid-template-columns: 1fr; }
  main { padding: 24px 14px 48px; } section { padding: 18px 16px; }
}
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""

# Films play while they are in view; a click stops one. Without scripts they have buttons.
SCRIPT = """
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
  const show = ({ target, isIntersecting }) => {
    if (isIntersecting && !target.dataset.held) target.play().catch(() => {}); else target.pause();
  };
  const watch = new IntersectionObserver((entries) => entries.forEach(show), { threshold: 0.4 });
  document.querySelectorAll("video").forEach((video) => {
    video.controls = false;
    video.addEventListener("click", () => {
      video.dataset.held = video.paused ? "" : "1";
      if (video.paused) video.play(); else video.pause();
    });
    watch.observe(video);
  });
}
"""


def page(*, title: str, parts: Iterable[str], style: str = "", script: str = "") -> str:
    """A whole offline document; `style` and `script` are what this kind of page has of its own."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}{script}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, lead: str = "") -> str:
    """A card with a heading; empty if it has nothing to show."""
    body = "".join(parts)
    if not body:
        return ""
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{opening}{body}</section>"


def tile(value: str, what: str, how: str, *, main: bool = False) -> str:
    """One number with what it is and where it comes from."""
    return (
        f'<div class="tile{" main" if main else ""}"><div class="value">{escape(value)}</div>'
        f'<div class="what">{escape(what)}</div><div class="how">{escape(how)}</div></div>'
    )


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Cells are (CSS class, HTML)."""
    heads = "".join(f'<th class="{style}">{text}</th>' for style, text in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{style}">{cell}</td>' for style, cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def facts(title: str, values: Iterable[tuple[str, object]]) -> str:
    """A small two-column list."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in values
    )
    return f"<div><h3>{escape(title)}</h3><table>{rows}</table></div>" if rows else ""


def key(entries: Iterable[tuple[str, str]]) -> str:
    """A legend: (CSS colour variable, label)."""
    return "".join(
        f'<span class="key"><i style="background:var(--{colour})"></i>{escape(label)}</span>'
        for colour, label in entries
    )


def folded(title: str, text: str) -> str:
    """A long text behind a title that opens it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
