"""Numbers of another implementation against ours: docs/parity.md, scripts/check_parity.py."""

from pizero.agent.parity.case import Case, read_case
from pizero.agent.parity.check import check_case
from pizero.agent.parity.report import CaseReport, Row, Section
from pizero.agent.parity.table import show

__all__ = ["Case", "CaseReport", "Row", "Section", "check_case", "read_case", "show"]
