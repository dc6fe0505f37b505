"""report.html: one offline page that says what a run achieved and how it was measured.

Reads the files that training and evaluation leave in their run folders, nothing else, and leaves
out what is not there: an evaluation of a foreign checkpoint has no curves, a training run no rates.

    run = Path("outputs/demo")
    write_report(run / "report.html", evaluation=run / "eval", training=run / "train")
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from pizero.agent.episodes import write_atomically
from pizero.agent.report_charts import interval_bar, sight_picture
from pizero.agent.report_page import facts, folded, key, page, section, table, tile
from pizero.agent.report_training import chunk_section, training_section

NARROW = "\N{NARROW NO-BREAK SPACE}"
MAX_VIDEO_BYTES = 12_000_000
ARM_COLOURS = ("a", "grey", "b", "c", "d")
EXPERT_COLOURS = ("a", "c", "b", "d", "grey")


def write_report(
    output: Path,
    *,
    evaluation: Path | None = None,
    training: Path | None = None,
    phases: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
) -> Path:
    """Writes the page and returns its path.

    `phases` are {"name", "seconds", "peak_memory_mb"} of what led here, if it was timed.
    """
    results = _json(evaluation, "results.json")
    held_out = _json(evaluation, "held_out.json")
    metrics = _lines(training, "metrics.jsonl")
    if not (results or metrics):
        raise ValueError(
            f"nothing to report: there is no results.json in {evaluation} and no metrics.jsonl in "
            f"{training}"
        )
    name = title or (results["name"] if results else training.name if training else "run")
    parts = [
        _header(name, results),
        _tiles(results) if results else "",
        _success_section(results) if results else "",
        _language_section(results) if results else "",
        _video_section(results, evaluation) if results and evaluation else "",
        training_section(metrics),
        chunk_section(held_out),
        _model_section(results.get("model")) if results else "",
        _protocol_section(results, phases, evaluation, training),
        f"<footer>Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by pizero.</footer>",
    ]
    write_atomically(output, page(title=name, parts=parts))
    return output


def _header(name: str, results: Mapping | None) -> str:
    lead = ""
    if results:
        main = results["arms"][results["headline_arm"]]
        score = main["success"]
        lead = (
            f"The policy completed {score['successes']} of {score['trials']} episodes of "
            f"{_count(len(main['tasks']), 'task')}, all from starts that no demonstration was made "
            "from."
        )
    return f'<header><h1>{escape(name)}</h1><p class="lead">{escape(lead)}</p></header>'


def _tiles(results: Mapping) -> str:
    arms, main = results["arms"], results["headline_arm"]
    tiles = [
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
            tiles.append(
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
        tiles.append(tile(_percent(score["rate"]), what, _both(score)))
    few = "" if len(tiles) == 4 else " few"
    return f'<div class="tiles{few}">{"".join(tiles)}</div>'


def _success_section(results: Mapping) -> str:
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
        f"last step that was run; {_after_words(results['protocol']['steps_after_success'])}. "
        "&ldquo;Steps&rdquo; is the mean number of control steps to the first success. Intervals "
        "are Wilson score intervals.</p>"
    )
    return section("Success by task", legend, table(head, rows), note)


def _language_section(results: Mapping) -> str:
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


def _video_section(results: Mapping, folder: Path) -> str:
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
        "policy sees of it. The frame turns green once the goal is reached."
    )
    return section("Episodes", *parts, lead=lead)


def _figure(film: Mapping, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
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
        '<figure><video controls loop muted playsinline preload="metadata" '
        f'src="data:video/mp4;base64,{data}"></video><figcaption>{escape(film["task"])}, start '
        f"{film['start']}: {mark}{named}</figcaption></figure>"
    )


def _model_section(model: Mapping | None) -> str:
    if not model:
        return ""
    experts = list(dict.fromkeys(s["expert"] for s in model["segments"]))
    styles = {e: EXPERT_COLOURS[i % len(EXPERT_COLOURS)] for i, e in enumerate(experts)}
    total = sum(model["parameters"].values())
    rows = [
        [("name", escape(name)), ("number", f"{count:,}"), ("number quiet", f"{count / total:.1%}")]
        for name, count in model["parameters"].items()
    ]
    rows.append([("name", "all"), ("number", f"<strong>{total:,}</strong>"), ("number quiet", "")])
    counts = table([("", "part"), ("number", "parameters"), ("number", "share")], rows)
    size = facts(
        "", [("action chunk", f"{model['horizon']} steps"), ("Euler steps", model["num_steps"])]
    )
    picture = sight_picture(model["segments"], styles=styles) + key(
        (styles[e], f"expert {e}") for e in experts
    )
    lead = (
        "Tokens of every kind run through an expert with weights of its own and meet in attention. "
        "A filled cell means that the row may look at the column."
    )
    return section(
        "The model",
        f'<div class="pair"><div>{picture}</div><div>{counts}{size}</div></div>',
        lead=lead,
    )


def _protocol_section(
    results: Mapping | None,
    phases: Sequence[Mapping],
    evaluation: Path | None,
    training: Path | None,
) -> str:
    columns = []
    if results:
        protocol, timing = results["protocol"], results["timing"]
        columns.append(
            facts(
                "Protocol",
                [
                    ("simulator", f"{protocol['simulator']} {protocol['simulator_version']}"),
                    ("starts", f"pool {protocol['pool']!r}, the same for all arms"),
                    *((f"arm {name}", _arm_words(arm)) for name, arm in protocol["arms"].items()),
                    ("actions executed per chunk", protocol["act_steps"]),
                    ("longest episode", f"{protocol['max_steps']} control steps"),
                    ("end", _after_words(protocol["steps_after_success"])),
                    ("seed", protocol["seed"]),
                    ("fingerprint", results["fingerprint"]),
                ],
            )
        )
        checkpoint = results["checkpoint"]
        columns.append(
            facts(
                "Checkpoint",
                [
                    (n.replace("_", " "), v)
                    for n, v in checkpoint.items()
                    if not isinstance(v, Mapping)
                ],
            )
        )
        if timing.get("decisions"):
            columns.append(
                facts(
                    "Speed of the evaluation",
                    [
                        ("episodes in this session", timing["episodes"]),
                        ("wall time", _duration(timing["wall_seconds"])),
                        (
                            "policy, a decision",
                            f"{1000 * timing['policy_seconds'] / timing['decisions']:.1f} ms",
                        ),
                        (
                            "observations in a batch",
                            f"{timing['decisions'] / timing['batches']:.1f}",
                        ),
                        (
                            "control steps",
                            f"{timing['steps'] / timing['wall_seconds']:.0f} a second",
                        ),
                    ],
                )
            )
    if phases:
        rows = [(p["name"], _duration(p["seconds"])) for p in phases]
        rows.append(("all", _duration(sum(p["seconds"] for p in phases))))
        columns.append(facts("Time", rows))
        columns.append(
            facts(
                "Peak memory (largest process)",
                [(p["name"], f"{p['peak_memory_mb']:.0f} MB") for p in phases],
            )
        )
    if results:
        columns.append(facts("Machine", results["hardware"].items()))
        columns.append(facts("Versions", results["versions"].items()))
    configs = "".join(
        folded(f"Configuration of {what}", (folder / "config.yaml").read_text())
        for what, folder in (("training", training), ("evaluation", evaluation))
        if folder and (folder / "config.yaml").is_file()
    )
    return section("How it was measured", f'<div class="facts">{"".join(columns)}</div>', configs)


def _arm_words(arm: Mapping) -> str:
    words = f"{arm['starts']} starts of each of {_count(len(arm['tasks']), 'task')}"
    if arm["weights"] == "random":
        words += ", weights as before training"
    if arm.get("swap"):
        words += ", told " + ", ".join(f"{b} in {a}" for a, b in arm["swap"].items())
    return words


def _after_words(steps: int | None) -> str:
    if steps is None:
        return "every episode runs its full length"
    if steps == 0:
        return "an episode ends with its first success"
    return f"an episode ends {_count(steps, 'step')} after its first success"


def _rule_words(rule: str) -> str:
    return "at some step of the episode" if rule == "any" else "at the last step of the episode"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}{NARROW}%"


def _interval(score: Mapping) -> str:
    return f"{100 * score['low']:.0f}–{100 * score['high']:.0f}{NARROW}%"  # noqa: RUF001


def _fraction(score: Mapping) -> str:
    return f"{score['successes']} of {score['trials']}"


def _both(score: Mapping) -> str:
    return f"{_fraction(score)}, {_interval(score)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _json(folder: Path | None, name: str) -> dict[str, Any] | None:
    path = folder / name if folder else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def _lines(folder: Path | None, name: str) -> list[dict[str, Any]]:
    path = folder / name if folder else None
    if not (path and path.is_file()):
        return []
    lines = path.read_text().splitlines()
    # A run that is still going, or was killed, may end in half a line.
    return [json.loads(line) for line in lines if line.endswith("}")]
