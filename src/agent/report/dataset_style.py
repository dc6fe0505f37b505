"""What the page of a data set adds to the look of report.html."""

from __future__ import annotations

STYLE = """
h1.part { margin-top: 56px; }
.tiles.five { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tiles.five .value { font-size: 28px; }
.pair.even { grid-template-columns: 1.6fr 1fr; } .pair.even td.wide { width: 26%; min-width: 90px; }
.findings { list-style: none; margin: 4px 0 0; padding: 0; }
.findings li { padding: 11px 0 11px 16px; border-top: 1px solid var(--rule);
  position: relative; }
.findings li::before { content: ""; position: absolute; left: 0; top: 17px; width: 7px;
  height: 7px; border-radius: 50%; background: var(--b); }
.findings li.bad::before { background: var(--bad); }
.findings strong { display: block; font-size: 15px; }
.findings span { display: block; color: var(--soft); font-size: 14px; max-width: 100ch; }
table + p.note, .wide-table + p.note, svg + p.note { margin: 12px 0 0; font-size: 13.5px;
  max-width: 92ch; }
p.fine { color: var(--soft); margin-top: 8px; }
.words { margin: 0 0 10px; font-size: 16px; color: var(--ink); }
.words .quiet { font-weight: 400; margin-left: 6px; }
.episode { border-top: 1px solid var(--rule); padding: 18px 0 22px; }
.episode:first-of-type { margin-top: 14px; }
.beside { display: flex; gap: 20px; align-items: flex-start; }
.beside figure { flex: 0 0 300px; } .beside .curves { flex: 1 1 0; min-width: 0; }
.curves .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 2px 8px; }
.curves .grid + .grid { margin-top: 8px; border-top: 1px dashed var(--rule); padding-top: 8px; }
.curves svg { width: 100%; cursor: crosshair; }
svg .cursor { stroke: var(--ink); stroke-width: 1; opacity: .55; }
.strip { display: flex; gap: 4px; margin-top: 12px; } .strip + .strip { margin-top: 4px; }
.strip > * { flex: 1 1 0; min-width: 0; border-radius: 4px; }
.strip img { width: 0; object-fit: cover; }
.strip .nothing { background: var(--track); color: var(--faint); font-size: 11px;
  display: grid; place-items: center; }
.strip.steps { margin-top: 2px; } .strip.steps span { font-size: 11px; color: var(--faint);
  text-align: center; font-variant-numeric: tabular-nums; }
svg path.bars { stroke: none; } svg path.a { fill: var(--a); opacity: .82; }
svg path.b { fill: var(--b); opacity: .95; }
svg .quantile { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 2; opacity: .7; }
td.bars { width: 200px; min-width: 170px; padding-top: 4px; padding-bottom: 4px; }
td.bars svg { width: 100%; }
td.dimension { min-width: 84px; } td.dimension .quiet { font-size: 11.5px; line-height: 1.25; }
.wide-table { overflow-x: auto; }
.wide-table th { white-space: normal; vertical-align: bottom; }
 .wide-table td.number { font-size: 13px; }
td.bar-cell { min-width: 90px; }
.kinds > input { position: absolute; opacity: 0; pointer-events: none; }
.kinds > label { display: inline-block; padding: 3px 12px; margin: 2px 6px 12px 0;
  border: 1px solid var(--rule); border-radius: 999px; font-size: 13px; color: var(--soft);
  cursor: pointer; }
.kinds > input:checked + label { background: var(--a); border-color: var(--a); color: var(--card);
  font-weight: 600; }
.kinds > input:focus-visible + label { outline: 2px solid var(--ink); outline-offset: 1px; }
.kind { display: none; }
.kinds > input:nth-of-type(1):checked ~ .wide-table .kind:nth-of-type(1),
.kinds > input:nth-of-type(2):checked ~ .wide-table .kind:nth-of-type(2),
.kinds > input:nth-of-type(3):checked ~ .wide-table .kind:nth-of-type(3),
.kinds > input:nth-of-type(4):checked ~ .wide-table .kind:nth-of-type(4) { display: block; }
a { color: var(--a); text-decoration: none; } a:hover { text-decoration: underline; }
@media (max-width: 860px) {
  .beside { flex-direction: column; } .beside figure { flex: none; width: 100%; }
  .pair.even { grid-template-columns: 1fr; }
}
"""

# The upright line in an episode's curves goes with its film, and the film where a curve is clicked.
SCRIPT = """
document.querySelectorAll(".episode").forEach((episode) => {
  const video = episode.querySelector("video");
  const lines = [...episode.querySelectorAll(".cursor")];
  if (!video || !lines.length) return;
  const move = () => {
    const share = video.duration ? video.currentTime / video.duration : 0;
    const place = (line) => `translate(${share * line.dataset.span})`;
    lines.forEach((line) => line.setAttribute("transform", place(line)));
    if (!video.paused) requestAnimationFrame(move);
  };
  ["play", "seeked", "timeupdate"].forEach((name) => video.addEventListener(name, move));
  lines.forEach((line) => {
    const chart = line.ownerSVGElement;
    chart.addEventListener("click", (event) => {
      const box = line.getBoundingClientRect();
      const unit = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
      const start = chart.getBoundingClientRect().left + line.x1.baseVal.value * unit;
      const share = (event.clientX - start) / (line.dataset.span * unit);
      video.currentTime = Math.min(Math.max(share, 0), 0.999) * video.duration;
    });
  });
});
"""
