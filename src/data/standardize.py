"""From what a data set stores to what a policy learns: functions on whole episodes, run once.

A `Rule` names the columns it reads and turns one episode's arrays into state, action and, where a
set needs it, instruction; it may drop steps. `standardized` runs it over all episodes of an index
and keeps the result beside it, memory mapped. Images are never touched: `rows` says which stored
step each remaining one is.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pizero.data.index import ArrayFolder, Index, fingerprint, homes, make_once, write_arrays

Episode = Mapping[str, np.ndarray]  # keys of the steps -> [T ...]; texts are object arrays of str


@dataclass(frozen=True)
class Standard:
    """One episode as a policy's data: the steps that stay, and what they hold."""

    action: np.ndarray  # float32 [n A]
    state: np.ndarray | None = None  # float32 [n S]; None: no state
    text: np.ndarray | None = None  # str objects [n]; None: as the data set's text key has it
    rows: np.ndarray | None = None  # int64 [n], increasing: the steps that stay; None: all


@dataclass(frozen=True)
class Rule:
    """A standardisation: the columns it reads, and its function on one whole episode."""

    keys: tuple[str, ...]
    function: Callable[[Episode], Standard]


class Standardized(ArrayFolder):
    """All episodes of an index after a rule; arrays are over the steps that stay."""

    @property
    def state(self) -> np.ndarray:
        """float32 [steps S]."""
        return self.array("state")

    @property
    def action(self) -> np.ndarray:
        """float32 [steps A]."""
        return self.array("action")

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode that stay, int64 [episodes]; an episode may have become empty."""
        return self.array("lengths")

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode in these arrays, int64 [episodes]."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def rows(self) -> np.ndarray | None:
        """The step in the index that each row here is, int64 [steps]; None: the same."""
        return self.array("rows") if self.has_array("rows") else None

    @property
    def texts(self) -> np.ndarray | None:
        """Numbers into `strings`, int32 [steps]; None: the texts are the index's own."""
        return self.array("texts") if self.has_array("texts") else None

    @property
    def strings(self) -> list[str]:
        """The distinct texts."""
        return self.manifest["strings"]


def concatenate(*, state: Sequence[str], action: Sequence[str]) -> Rule:
    """The rule without a transform: keys joined, in order."""
    return Rule((*dict.fromkeys((*state, *action)),), partial(_join, state, action))


def standardized(index: Index, rule: Rule) -> Standardized:
    """The result of a rule for all episodes, made if there is none yet.

    A change in the module of the rule's function makes it anew. Raises ValueError where the rule
    fails or gives arrays that do not belong together, naming the episode.
    """
    for key in rule.keys:
        index.step_values(key)  # refuses what is not there
    key = fingerprint(index.folder.name, rule.keys, _source(rule.function))
    places = list(dict.fromkeys((index.folder.parent, *homes(index.directory))))
    name = f"{index.folder.name.rpartition('-')[0]}.standard-{key}"
    return Standardized(make_once(places, name, partial(_make, index, rule)))


def _join(state: Sequence[str], action: Sequence[str], episode: Episode) -> Standard:
    def joined(keys: Sequence[str]) -> np.ndarray:
        return np.concatenate(
            [episode[key].reshape(len(episode[key]), -1).astype(np.float32) for key in keys], axis=1
        )

    return Standard(joined(action), joined(state) if state else None)


def _make(index: Index, rule: Rule, folder: Path) -> None:
    actions, states, rows, texts = [], [], [], []
    lengths = np.zeros(len(index.lengths), np.int64)
    strings: dict[str, int] = {}
    for number, (start, length) in enumerate(
        zip(index.starts.tolist(), index.lengths.tolist(), strict=True)
    ):
        found = _checked(rule, _episode(index, rule.keys, start, length), length, index, number)
        n = lengths[number] = len(found.action)
        actions.append(found.action)
        states.append(np.zeros((n, 0), np.float32) if found.state is None else found.state)
        rows.append(start + (np.arange(n) if found.rows is None else found.rows))
        if found.text is not None:
            texts.append([strings.setdefault(str(t), len(strings)) for t in found.text])
    arrays = {
        "action": _concatenated(actions, np.float32),
        "state": _concatenated(states, np.float32),
        "lengths": lengths,
    }
    moved = _concatenated(rows, np.int64)
    if not np.array_equal(moved, np.arange(len(moved))):
        arrays["rows"] = moved
    if texts:
        arrays["texts"] = np.concatenate([np.array(t, np.int32) for t in texts])
    write_arrays(folder, arrays, {"strings": list(strings)})


def _episode(index: Index, keys: Sequence[str], start: int, length: int) -> Episode:
    episode = {}
    for key in keys:
        values = index.step_values(key)[start : start + length]
        if index.columns["steps"][key].kind == "text":
            values = np.array(index.texts(values), object)
        episode[key] = values
    return episode


def _checked(rule: Rule, episode: Episode, length: int, index: Index, number: int) -> Standard:
    where = f"{index.directory}: standardising episode {number} of {length} steps"
    try:
        found = rule.function(episode)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    n = len(found.action)
    rows = np.arange(n) if found.rows is None else np.asarray(found.rows)
    sizes = {"action": n, "rows": len(rows)}
    sizes |= {} if found.state is None else {"state": len(found.state)}
    sizes |= {} if found.text is None else {"text": len(found.text)}
    if len(set(sizes.values())) > 1 or (n and not 0 <= rows[0] <= rows[-1] < length):
        raise ValueError(f"{where}: expected as many of all and rows below {length}, got {sizes}")
    if (found.rows is None and n != length) or (np.diff(rows) <= 0).any():
        raise ValueError(f"{where}: steps were dropped; expected increasing rows, got {rows[:8]}")
    return found


def _concatenated(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    if not pieces:
        return np.zeros((0, 0) if dtype is np.float32 else 0, dtype)
    return np.concatenate([np.asarray(p, dtype) for p in pieces])


def _source(function: Callable) -> str:
    """What the result depends on: arguments bound to the function, and its module's source."""
    bound: list[str] = []
    while isinstance(function, partial):
        bound += [repr(function.args), repr(sorted(function.keywords.items()))]
        function = function.func
    module = inspect.getmodule(function)
    source = inspect.getsource(module) if module is not None else repr(function)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return f"{getattr(function, '__qualname__', function)} {bound} {digest}"
