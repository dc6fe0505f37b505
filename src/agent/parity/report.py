"""What came of checking a case."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pizero.agent.parity.case import Case
from pizero.agent.parity.rules import Rule, Verdict


@dataclass(frozen=True)
class Row:
    """One compared tensor."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    verdict: Verdict


@dataclass
class Section:
    """What came of one set of weights, or of transforms; `left_out` says what and why."""

    source: Path
    rows: list[Row] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    error: str | None = None
    layout: str = ""

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.verdict.ok]

    @property
    def ok(self) -> bool:
        return self.error is None and bool(self.rows) and not self.failed


@dataclass(frozen=True)
class CaseReport:
    case: Case
    sections: tuple[Section, ...]

    @property
    def ok(self) -> bool:
        return all(section.ok for section in self.sections)


def words(error: Exception) -> str:
    """What went wrong, for a table."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
