"""A case, checked: every set of weights in it is loaded and every stored number compared.

Numbers are compared in the arithmetic that the case names for them. Two kinds of stored number
deserve a second look before they count as missed, and the table says when one was taken:

- keys and values, where the case stores the prefix embeddings too: from those. Else the rounding
  of the vision tower, amplified by the layers, would be counted at every stage behind it;
- bfloat16 numbers, which depend on the order of rounding: against a whole run of ours that rounds
  elsewhere (where openpi does, in written-out attention, in the weights alone, or nowhere).

A case may hold its weights in two precisions. Its plain numbers were made with one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pizero.agent.parity.case import DTYPES, FAST, Case, read_case
from pizero.agent.parity.fast import FastAnswers
from pizero.agent.parity.flow import Answer, FlowAnswers
from pizero.agent.parity.gradients import Gradients, gradients_of, joined_twins, named_for
from pizero.agent.parity.report import CaseReport, Row, Section, words
from pizero.agent.parity.rounding import rounded_as_openpi
from pizero.agent.parity.rules import Rule, Verdict, compare, rule_for
from pizero.agent.parity.transforms import check_transforms, is_transforms
from pizero.agent.weights import Found, Loaded, inspect, load_model
from pizero.agent.weights.folder import model_weights
from pizero.types import Tensor

# What may stand between `out.` and the name: who made the number, or in which arithmetic.
MAKERS = ("jax", "pytorch", "torch")


class Answers(Protocol):
    """What a model family can answer."""

    def answer(self, name: str, stored: Tensor) -> Answer | None: ...
    def loss(self) -> Tensor: ...


def check_case(folder: str | Path) -> CaseReport:
    """Check every set of weights of a case, or, of one without weights, its transforms.

    Raises ValueError where the folder is no case.
    """
    if is_transforms(folder):
        return check_transforms(folder)
    case = read_case(folder)
    runs = {path: _Run(case, path) for path in case.sources}
    sections = {path: _check_source(case, run) for path, run in runs.items()}
    passed = [path for path, section in sections.items() if section.ok]
    for path, section in sections.items():
        for other in passed if section.failed else ():
            if copy := _rounded_copy(runs[path], runs[other]):
                _set_apart(case, section, f"{copy} {other.relative_to(case.folder)}")
                break
    return CaseReport(case, tuple(sections.values()))


def _check_source(case: Case, run: _Run) -> Section:
    """Check one set of weights. Nothing is raised: what goes wrong is in the section."""
    section = Section(run.path)
    try:
        section.layout = run.loaded(case.dtype).found.layout
    except Exception as error:
        section.error = f"cannot be loaded: {words(error)}"
        return section
    compared = (*_outputs(case, run, section.unknown), *_gradients(case, run))
    for name, stored, ask in compared:
        rule = Rule()
        try:
            rule = rule_for(name, stored, case.facts.get("tolerance_rows", []))
            verdict = ask(rule)
        except Exception as error:
            verdict = Verdict(False, float("nan"), float("nan"), words(error))
        section.rows.append(Row(name, tuple(stored.shape), rule, verdict))
    return section


def _rounded_copy(run: _Run, other: _Run) -> str | None:
    """In words how the weights of a run are those of another but for rounding; None if they are
    not."""
    dtypes = [x.stored_dtype for x in (run, other)]
    if dtypes[0] == dtypes[1]:
        return None
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
    one, two = (model_weights(x.loaded(torch.float32).model) for x in (run, other))
    if one.keys() != two.keys():
        return None
    for name, tensor in one.items():
        pair = (tensor, two[name])
        if not torch.equal(*pair) and not torch.equal(*(x.to(narrow) for x in pair)):
            return None
    word = str(narrow).removeprefix("torch.")
    return f"rounded to {word} from" if dtypes[0] == narrow else f"before rounding to {word},"


def _set_apart(case: Case, section: Section, copy: str) -> None:
    """Numbers that belong to the other set of weights, which met them, are not held against this
    one; those in the arithmetic of rounded weights are."""
    plain = [
        row
        for row in section.failed
        if row.name.startswith("grad.") or _arithmetic(case, row.name)[0] == case.dtype
    ]
    section.rows = [row for row in section.rows if row not in plain]
    names = ", ".join(row.name for row in plain[:4]) + (", ..." if len(plain) > 4 else "")
    section.left_out.append(f"{len(plain)} tensors made with the weights {copy}: {names}")
    section.rows.append(Row("weights", (), Rule(exact=True), Verdict(True, 0.0, 0.0, copy)))


Ask = Callable[[Rule], Verdict]


def _outputs(case: Case, run: _Run, unknown: list[str]) -> Iterator[tuple[str, Tensor, Ask]]:
    for name, stored in case.outputs.items():
        dtype, short = _arithmetic(case, name)
        try:
            known = run.answers(dtype).answer(short, stored) is not None
        except Exception:
            known = True  # comparing it will say what is wrong
        if not known:
            unknown.append(name)
            continue

        def ask(rule: Rule, dtype=dtype, short=short, stored=stored) -> Verdict:
            verdict = _compared(run.answers(dtype).answer(short, stored), stored, rule)
            if verdict.ok:
                return verdict
            if dtype == torch.bfloat16 and stored.is_floating_point():
                return _over_orders(run, short, stored, rule, verdict)
            answers = run.answers(dtype)
            if isinstance(answers, FlowAnswers) and (answer := answers.cached_from_stored(short)):
                again = _compared(answer, stored, rule)
                note = f"from out.prefix_embs; from the inputs {verdict.max_abs:.1e}"
                return replace(again, note=note) if again.ok else verdict
            return verdict

        yield name, stored, ask


def _compared(answer: Answer | None, stored: Tensor, rule: Rule) -> Verdict:
    assert answer is not None
    return compare(answer.ours, stored, rule, answer.where)


def _over_orders(run: _Run, short: str, stored: Tensor, rule: Rule, own: Verdict) -> Verdict:
    """The verdict of the first run, in the order of less and less rounding, that is within."""
    for name, answers in run.orders():
        answer = answers.answer(short, stored)
        if answer is not None:
            verdict = compare(answer.ours, stored, rule, answer.where)
            if verdict.ok:
                note = f"{name}; in our own bfloat16 order {own.max_abs:.1e}"
                return replace(verdict, note=note)
    return own


def _gradients(case: Case, run: _Run) -> Iterator[tuple[str, Tensor, Ask]]:
    if not case.gradients:
        return
    names = run.names
    stored = joined_twins(names, case.gradients)
    loudest = max(x.double().norm().item() for x in stored.values())
    for name, theirs in stored.items():

        def ask(rule: Rule, name=name, theirs=theirs) -> Verdict:
            resolved = Gradients(names, {}).resolve(name)
            ours = run.gradients(case.dtype)[resolved]
            verdict = compare(ours, theirs, rule)
            if not verdict.ok and case.dtype == torch.bfloat16:
                again = compare(run.gradients_as_openpi[resolved], theirs, rule)
                if again.ok:
                    own = f"in our own bfloat16 order {verdict.relative:.1e} of the norm"
                    return replace(again, note=f"rounded where openpi rounds; {own}")
            quiet = min(100 * torch.finfo(case.dtype).eps, 1e-2) * loudest
            if verdict.ok or max(ours.double().norm(), theirs.double().norm()) > quiet:
                return verdict
            exact = run.gradients(torch.float64)[resolved].norm()
            if exact > 1e-3 * theirs.double().norm():
                return verdict
            return replace(verdict, ok=True, note="zero but for rounding: 0 in float64")

        yield f"grad.{name}", theirs, ask


def _arithmetic(case: Case, name: str) -> tuple[torch.dtype, str]:
    """The arithmetic of an `out.*` tensor, and its name without what tells of it."""
    dtype, name = case.dtype, name.removeprefix("out.")
    while True:
        first, _, rest = name.partition(".")
        if not rest or first not in (*MAKERS, *DTYPES):
            return dtype, name
        dtype, name = DTYPES.get(first, dtype), rest


class _Run:
    """One set of weights in every arithmetic that is asked for, loaded once for each."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case, self.path = case, path
        self._loaded: dict[torch.dtype, Loaded] = {}
        self._answers: dict[torch.dtype, Answers] = {}
        self._grads: dict[torch.dtype, Mapping[str, Tensor]] = {}

    def loaded(self, dtype: torch.dtype) -> Loaded:
        if dtype not in self._loaded:
            self._loaded[dtype] = self._load(dtype)
        return self._loaded[dtype]

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the bulk of the weights."""
        entries = self.loaded(self.case.dtype).found.source.entries.values()
        return max(entries, key=lambda entry: entry.num_elements).dtype

    def answers(self, dtype: torch.dtype) -> Answers:
        if dtype not in self._answers:
            self._answers[dtype] = self._make(self.loaded(dtype).model)
        return self._answers[dtype]

    def gradients(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        if dtype not in self._grads:
            ours = gradients_of(self.loaded(dtype).model, self.answers(dtype).loss())
            self._grads[dtype] = Gradients(self.names, ours).theirs()
        return self._grads[dtype]

    @cached_property
    def gradients_as_openpi(self) -> Mapping[str, Tensor]:
        """In bfloat16, rounded where openpi rounds, on the way back too."""
        model = self.loaded(torch.bfloat16).model
        with rounded_as_openpi():
            ours = gradients_of(model, self._make(model).loss())
        return Gradients(self.names, ours).theirs()

    @cached_property
    def names(self) -> Found:
        """The checkpoint whose names the gradients go by: the case's first."""
        first = self.case.sources[0]
        if self.path == first:
            found = self.loaded(self.case.dtype).found
        else:
            found = inspect(first, overrides=self.case.overrides(), kind=self.case.kind)
        return named_for(found, self.case.gradients)

    def orders(self) -> Iterator[tuple[str, Answers]]:
        """Other runs of the same numbers, less and less rounded."""
        model = self.loaded(torch.bfloat16).model
        yield "rounded where openpi rounds", _Inside(self._make(model), rounded_as_openpi)
        written_out = _Inside(self._make(model), lambda: sdpa_kernel(SDPBackend.MATH))
        yield "attention written out", written_out
        yield "rounded weights in float32", self._make(self._load(torch.bfloat16).model.float())
        yield "in float32", self._make(self._load(torch.float32).model)

    def _load(self, dtype: torch.dtype) -> Loaded:
        overrides, kind = self.case.overrides(), self.case.kind
        return load_model(self.path, dtype=dtype, overrides=overrides, kind=kind)

    def _make(self, model) -> Answers:
        return (FastAnswers if self.case.family == FAST else FlowAnswers)(self.case, model)


@dataclass(frozen=True)
class _Inside:
    """Answers that are computed inside a context."""

    answers: Answers
    context: Callable[[], AbstractContextManager[object]]

    def answer(self, name: str, stored: Tensor) -> Answer | None:
        with self.context():
            return self.answers.answer(name, stored)

    def loss(self) -> Tensor:
        with self.context():
            return self.answers.loss()
