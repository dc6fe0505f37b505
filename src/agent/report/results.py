"""The report's account of an evaluation: headline numbers, rates by task, words, and films."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from pizero.agent.report.charts import interval_bar
from pizero.agent.report.page import key, section, table, tile

NARROW = "\N{NARROW NO-BREAK SPACE}"
MAX_VIDEO_BYTES = 12_000_000


def tiles(results: Mapping) -> str:
    """The headline number and what it is compared with."""
    arms, main = results["arms"], results["headline_arm"]
    found = [
        tile(
            _percent(arms[main]["success"]["rate"]),
            "of episodes succeeded",
            f"95 % interval {_interval(arms[main]['success'])}, "
            f"{arms[main]['success']['trials']} episodes, success {_rule_words(results['rule'])}",
            main=True,
        )
    ]
    for name, arm in arms.items():
        if name == main:
            continue
        if "named" in arm:
            found.append(
                tile(
                    _percent(arm["named"]["rate"]),
                    "did what swapped words asked for",
                    _both(arm["named"]),
                )
            )
            what = "reached the scene's goal against the words"
        else:
            untrained = arm.get("weights") == "random"
            what = "the same network before training" if untrained else name
        score = arm["success"]
        found.append(tile(_percent(score["rate"]), what, _both(score)))
    few = "" if len(found) == 4 else " few"
    return f'<div class="tiles{few}">{"".join(found)}</div>'


def success_section(results: Mapping) -> str:
    """Every task of the headline arm with its interval; other arms as thin bars below."""
    arms, main = results["arms"], results["headline_arm"]
    others = [n for n in arms if n != main and "named" not in arms[n]]
    sentences = results.get("sentences", {})
    rows = []
    for task, scores in arms[main]["tasks"].items():
        bars = interval_bar(scores["success"], style="a", label=main)
        for name in others:
            if task in arms[name]["tasks"]:
                bars += interval_bar(
                    arms[name]["tasks"][task]["success"], style="grey", label=name, height=12
                )
        steps = scores["mean_steps_to_success"]
        rows.append(
            [
                ("name", escape(task)),
                ("quiet", escape(sentences.get(task, [""])[0])),
                ("wide", bars),
                ("rate", _percent(scores["success"]["rate"])),
                ("number", _fraction(scores["success"])),
                ("number quiet", _interval(scores["success"])),
                ("number quiet", _percent(scores["end"]["rate"])),
                ("number quiet", "" if steps is None else f"{steps:.0f}"),
            ]
        )
    head = [
        *(("", t) for t in ("task", "instruction", "success rate with its 95 % interval")),
        *(("number", t) for t in ("rate", "episodes", "interval", "at the end", "steps")),
    ]
    legend = key([("a", main), *(("grey", name) for name in others)]) if others else ""
    note = (
        '<p class="note" style="margin-top:12px">An episode counts as a success if the goal holds '
        f"{_rule_words(results['rule'])}. &ldquo;At the end&rdquo; asks whether it holds at the "
        f"last step that was run; {after_words(results['protocol']['steps_after_success'])}. "
        "&ldquo;Steps&rdquo; is the mean number of control steps to the first success. Intervals "
        "are Wilson score intervals.</p>"
    )
    return section("Success by task", legend, table(head, rows), note)


def language_section(results: Mapping) -> str:
    """What happens when a scene is given another task's words."""
    arms, main = results["arms"], results["headline_arm"]
    head = [("", h) for h in ("scene", "the policy is told", "it reaches", "")]
    head += [("number", "episodes"), ("number", "interval")]
    parts = []
    for arm in (a for a in arms.values() if "named" in a):
        rows = []
        for task, scores in arm["tasks"].items():
            words = f"{escape(arm['swap'][task])}&rsquo;s words"
            own = arms[main]["tasks"].get(task)
            cases = [
                ("its own words", "the scene&rsquo;s goal", own and own["success"], "a"),
                (words, "the scene&rsquo;s goal", scores["success"], "grey"),
                (words, "what the words ask for", scores["named"], "b"),
            ]
            rows += [
                _language_row(task, told, goal, score, style)
                for told, goal, score, style in cases
                if score
            ]
        parts += [_language_words(arm, arms[main]), table(head, rows)]
    return section("Does it listen?", *parts)


def _language_row(
    task: str, told: str, goal: str, score: Mapping, style: str
) -> list[tuple[str, str]]:
    return [
        ("name", escape(task)),
        ("close", told),
        ("close", goal),
        ("wide", interval_bar(score, style=style)),
        ("number", _fraction(score)),
        ("number quiet", _interval(score)),
    ]


def _language_words(arm: Mapping, main: Mapping) -> str:
    tasks = " and ".join(escape(t) for t in arm["tasks"])
    own = [main["tasks"][t]["success"] for t in arm["tasks"] if t in main["tasks"]]
    scene, named = arm["success"], arm["named"]
    if named["low"] > scene["high"]:
        verdict = "So the words decide what is done."
    elif scene["low"] > named["high"]:
        verdict = "So the words are largely ignored: the policy does what the scene suggests."
    else:
        verdict = (
            "With this many episodes the two cannot be told apart: the words do not clearly decide."
        )
    right = (
        f"Told the sentence that belongs to the scene, the policy reached its goal in "
        f"{sum(s['successes'] for s in own)} of {sum(s['trials'] for s in own)} episodes. "
        if own
        else ""
    )
    return (
        f'<p class="lead">{tasks} are set up in the same way; only the sentence says which one is '
        f"meant. {right}Told the other task's sentence in the same starts, it reached the scene's "
        f"own goal in {_fraction(scene)} and did what the words asked for in {_fraction(named)}. "
        f"<strong>{verdict}</strong> A policy that looks only at the picture would do the same "
        "whatever it is told.</p>"
    )


def video_section(results: Mapping, folder: Path) -> str:
    """The films, as many as fit."""
    figures: dict[str, list[str]] = {}
    left = MAX_VIDEO_BYTES
    for film in results.get("films", []):
        path = folder / film["path"]
        if not path.is_file() or path.stat().st_size > left:
            continue
        left -= path.stat().st_size
        figures.setdefault(film["arm"], []).append(_figure(film, path))
    parts = [
        f'<h3>{escape(arm)}</h3><div class="videos">{"".join(items)}</div>'
        for arm, items in figures.items()
    ]
    lead = (
        "The first successes and the first failures in order of the start number, filmed by "
        "replaying the recorded actions; nothing was picked by eye. Left the scene, right what the "
        "policy sees of it. The frame turns green "
        "once the goal is reached. A click stops a film."
    )
    return section("Episodes", *parts, lead=lead)


def _figure(film: Mapping, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    still = path.with_suffix(".jpg")
    poster = f'poster="{_picture(still)}" ' if still.is_file() else ""
    mark = (
        '<span class="mark good">success</span>'
        if film["success"]
        else '<span class="mark bad">failure</span>'
    )
    named = ""
    if film.get("named_success") is not None:
        did = "did" if film["named_success"] else "did not do"
        named = f"; {did} what the words asked ({escape(film['named_task'])})"
        mark = "scene's goal: " + mark
    return (
        f'<figure><video controls loop muted playsinline preload="none" {poster}'
        f'src="data:video/mp4;base64,{data}"></video><figcaption>{escape(film["task"])}, start '
        f"{film['start']}: {mark}{named}</figcaption></figure>"
    )


def _picture(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def _rule_words(rule: str) -> str:
    return "at some step of the episode" if rule == "any" else "at the last step of the episode"


def after_words(steps: int | None) -> str:
    """When an episode ends, in words."""
    if steps is None:
        return "every episode runs its full length"
    if steps == 0:
        return "an episode ends with its first success"
    return f"an episode ends {counted(steps, 'step')} after its first success"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}{NARROW}%"


def _interval(score: Mapping) -> str:
    return f"{100 * score['low']:.0f}–{100 * score['high']:.0f}{NARROW}%"  # noqa: RUF001


def _both(score: Mapping) -> str:
    return f"{_fraction(score)}, {_interval(score)}"


def _fraction(score: Mapping) -> str:
    return f"{score['successes']} of {score['trials']}"


def counted(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number} {what}{'' if number == 1 else 's'}"
