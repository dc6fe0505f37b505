"""Checks of how a data set was recorded: times and flags, repetitions, words, and pictures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from pizero.agent.report.dataset_findings import Finding, Inspected, counted, listed, percent
from pizero.agent.report.dataset_pictures import Probes

TIME_TOLERANCE = 0.1  # of a step


# -- time -----------------------------------------------------------------------------------------


def flags(it: Inspected) -> Iterator[Finding]:
    """`is_first` and `is_last` mark the first and the last step, and no other."""
    index = it.data.index
    columns = index.columns["steps"]
    episodes = np.asarray(it.data.episodes)
    firsts, lengths = np.asarray(index.starts)[episodes], np.asarray(index.lengths)[episodes]
    ends = firsts + lengths - 1
    for key, place, where in (("is_first", firsts, "first"), ("is_last", ends, "last")):
        if key not in columns or not len(firsts):
            continue
        flags = np.asarray(index.step_values(key)).reshape(-1) != 0
        missing = int((~flags[place]).sum())
        expected = np.zeros(len(flags), bool)
        expected[place] = True
        chosen = np.zeros(len(flags), bool)
        for start, end in zip(firsts, ends + 1, strict=True):
            chosen[start:end] = True
        extra = int((flags & chosen & ~expected).sum())
        if missing or extra:
            parts = [
                f"not set at the {where} step of {counted(missing, 'episode')}" if missing else "",
                f"set at {counted(extra, 'other step')}" if extra else "",
            ]
            yield Finding(
                "bad" if extra else "note",
                f"{key} is wrong",
                f"It is {' and '.join(p for p in parts if p)}. "
                + ("Several recordings may have been joined into one episode." if extra else
                   "An episode may have been cut off; nothing in training depends on it."),
            )  # fmt: skip


def timestamps(it: Inspected) -> Iterator[Finding]:
    """Steps of a LeRobot set are as far apart as its frames per second say."""
    index = it.data.index
    fps = index.facts.get("fps")  # others have no times, or in units of their own
    if "timestamp" not in index.columns["steps"] or not fps:
        return
    stamps = np.asarray(index.step_values("timestamp"), np.float64).reshape(-1)
    gaps, worst, place = 0, 0.0, (0, 0)
    for e, i in enumerate(np.asarray(it.data.episodes).tolist()):
        start, length = int(index.starts[i]), int(index.lengths[i])
        late = np.abs(np.diff(stamps[start : start + length]) * fps - 1)
        gaps += int((late > TIME_TOLERANCE).sum())
        if len(late) and late.max() > max(worst, TIME_TOLERANCE):
            worst, place = float(late.max()), (e, int(late.argmax()) + 1)
    if gaps:
        yield Finding(
            "bad",
            f"{counted(gaps, 'gap')} in time",
            f"Steps that are not 1/{fps:g} s apart; the largest is off by {worst:.2g} steps, in "
            f"episode {place[0]} at step {place[1]}. Actions across a gap are not what a chunk "
            "takes them for.",
        )


# -- words and pictures ---------------------------------------------------------------------------


def words(it: Inspected) -> Iterator[Finding]:
    """Every episode has an instruction, spelt in one way."""
    texts = it.look.texts
    empty = sum(not text.strip() for text in texts)
    if empty == len(texts):
        yield Finding(
            "bad",
            "No episode has an instruction",
            "A policy that is told what to do needs words; name their key with --text.",
        )
    elif empty:
        yield Finding(
            "note",
            f"{percent(empty / len(texts))} of the episodes have no instruction",
            f"{counted(empty, 'episode')}. skip_unlabeled leaves such out.",
        )
    spelt: dict[str, set[str]] = {}
    for text in set(texts):
        spelt.setdefault(" ".join(text.lower().split()).rstrip(".!"), set()).add(text)
    several = [sorted(ways) for ways in spelt.values() if len(ways) > 1]
    if several:
        yield Finding(
            "note",
            f"{counted(len(several), 'instruction')} spelt in several ways",
            "They differ in capitals, spaces or full stops only: "
            + "; ".join(" / ".join(f"“{w}”" for w in ways) for ways in several[:3]),
        )


def stored_pictures(it: Inspected) -> Iterator[Finding]:
    """Empty pictures of RLDS sets: counted over all steps, from the index alone."""
    index = it.data.index
    chosen = np.zeros(int(np.asarray(index.lengths).sum()), bool)
    for i in np.asarray(it.data.episodes).tolist():
        chosen[index.starts[i] : index.starts[i] + index.lengths[i]] = True
    for name, keys in it.data.cameras.items():
        if index.columns["steps"][keys[0]].kind != "image":
            continue
        empty = (index.step_values(keys[0])[:, 1] == 0)[chosen]
        if empty.any():
            share = float(empty.mean())
            yield Finding(
                "note",
                f"Camera {name} is missing in {percent(share)} of the steps",
                "Its pictures are empty there; the policy sees a masked black picture."
                if share < 1
                else "It has no picture at all; leave it out.",
            )


def probed_pictures(it: Inspected) -> Iterator[Finding]:
    """What was seen in pictures all over the data."""
    if problems := it.probes.problems:
        yield Finding(
            "bad",
            "Pictures that cannot be read",
            f"Of {counted(_most_frames(it.probes), 'moment')} looked at, at {len(problems)}: "
            + "; ".join(problems[:2]),
        )
    for name, probe in it.probes.cameras.items():
        there = probe.frames - probe.missing
        if there and probe.black == there:
            yield Finding("bad", f"Camera {name} is black", "In every picture looked at.")
        elif probe.black:
            yield Finding(
                "bad",
                f"Camera {name} is black at times",
                f"In {probe.black} of {counted(there, 'picture')} looked at.",
            )
        elif probe.frozen and probe.frozen >= 0.2 * probe.episodes:
            yield Finding(
                "bad",
                f"Camera {name} does not move",
                f"In {probe.frozen} of {counted(probe.episodes, 'episode')} looked at, the first, "
                "the middle and the last picture are the same.",
            )
        if len(probe.sizes) > 1:
            sizes = listed([f"{w}x{h}" for h, w in probe.sizes])
            yield Finding(
                "note",
                f"Camera {name} has pictures of several sizes",
                f"{sizes}; all are brought to the model's size.",
            )


def refused(it: Inspected) -> Iterator[Finding]:
    """Why the data could only be opened with patience."""
    for problem in it.look.source.problems:
        yield Finding("bad", "Training would refuse these data as they are", problem)


def damaged(it: Inspected) -> Iterator[Finding]:
    """Records that the index left out."""
    if damaged := it.data.index.damaged:
        yield Finding(
            "bad",
            f"{counted(len(damaged), 'record')} damaged and left out",
            "; ".join(damaged[:3]) + ("; ..." if len(damaged) > 3 else ""),
        )


def duplicates(it: Inspected) -> Iterator[Finding]:
    """Episodes that are the same, step by step."""
    data = it.data
    firsts, lengths = np.asarray(data.starts), np.asarray(data.lengths)
    if not len(firsts):
        return
    lasts = firsts + lengths - 1
    # First and last rows tell nearly all episodes apart; only the others are read whole.
    ends = [
        np.concatenate([table[rows] for table in (data.state_table, data.action_table)], axis=1)
        for rows in (firsts, lasts)
    ]
    keys = [
        (int(n), a.tobytes(), b.tobytes())
        for n, a, b in zip(lengths, ends[0], ends[1], strict=True)
    ]
    often = {key for key, count in Counter(keys).items() if count > 1}
    seen: dict[bytes, int] = {}
    pairs = []
    for e, key in enumerate(keys):
        if key not in often:
            continue
        digest = hashlib.sha256()
        for table in (data.state_table, data.action_table):
            digest.update(np.ascontiguousarray(table[firsts[e] : lasts[e] + 1]).tobytes())
        if (first := seen.setdefault(digest.digest(), e)) != e:
            pairs.append((first, e))
    if pairs:
        shown = listed([f"{b} as {a}" for a, b in pairs], most=5)
        yield Finding(
            "bad",
            f"{counted(len(pairs), 'episode')} repeated",
            f"The same states and actions step by step: episode {shown}. They count twice, and "
            "if one of a pair is held out, validation is too good.",
        )


def _most_frames(probes: Probes) -> int:
    return max((probe.frames for probe in probes.cameras.values()), default=0)
