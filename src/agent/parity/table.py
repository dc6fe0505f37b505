"""The report of a case, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pizero.agent.parity.report import CaseReport, Section


def show(report: CaseReport, console: Console, *, failing_only: bool = False) -> None:
    """Print a table for each set of weights, and what follows from it."""
    for section in report.sections:
        for part in _parts(report, section, failing_only):
            console.print(part, soft_wrap=not isinstance(part, Table))


def _parts(report: CaseReport, section: Section, failing_only: bool) -> Iterator[RenderableType]:
    inside = section.source.relative_to(report.case.folder)
    title = f"{report.case.name} · {inside}" + (f" ({section.layout})" if section.layout else "")
    rows = section.failed if failing_only else section.rows
    if rows:
        table = Table(title=title, title_justify="left", title_style="bold", expand=False)
        table.add_column("tensor", overflow="fold")
        table.add_column("shape")
        for name in ("max abs", "relative"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("tolerance")
        table.add_column("", no_wrap=True)
        for row in rows:
            v = row.verdict
            word = Text("ok*" if v.note else "ok", "green") if v.ok else Text("FAILS", "bold red")
            name = Text(row.name)
            if v.note:
                name.append(f"\n{v.note}", style="dim")
            shape = "x".join(map(str, row.shape)) or "scalar"
            table.add_row(name, shape, f"{v.max_abs:.1e}", f"{v.relative:.1e}", str(row.rule), word)
        yield table
    else:
        yield Text(title, "bold")
    if section.error:
        yield Text(f"FAILS: {section.error}", "bold red")
        return
    if section.unknown:
        yield Text(f"not compared, no such thing here: {', '.join(section.unknown)}")
    for line in section.left_out:
        yield Text(f"not compared: {line}")
    compared, failed = len(section.rows), len(section.failed)
    within = f"{compared - failed} of {compared} tensors within tolerance"
    if again := sum(row.verdict.ok and bool(row.verdict.note) for row in section.rows):
        within += f", {again} of them at a second look (ok*)"
    if not compared:
        within += ": nothing to compare"
    yield Text(within, "green" if section.ok else "bold red")
