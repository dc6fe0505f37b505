"""report.html: one offline page that says what a run achieved and how it was measured."""

from pizero.agent.report.write import write_report

__all__ = ["write_report"]
