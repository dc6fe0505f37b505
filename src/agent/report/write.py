"""report.html: one offline page that says what a run achieved and how it was measured.

Reads the files that training and evaluation leave in their run folders, nothing else, and leaves
out what is not there: an evaluation of a foreign checkpoint has no curves, a training run no rates.

    run = Path("outputs/demo")
    write_report(run / "report.html", evaluation=run / "eval", training=run / "train")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from pizero.agent.driving.episodes import write_atomically
from pizero.agent.report.charts import sight_picture
from pizero.agent.report.page import facts, folded, key, page, section, table
from pizero.agent.report.results import (
    after_words,
    counted,
    language_section,
    success_section,
    tiles,
    video_section,
)
from pizero.agent.report.training import chunk_section, training_section
from pizero.agent.training.progress import duration

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
        tiles(results) if results else "",
        success_section(results) if results else "",
        language_section(results) if results else "",
        video_section(results, evaluation) if results and evaluation else "",
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
            f"{counted(len(main['tasks']), 'task')}, all from starts that no demonstration was "
            "made from."
        )
    return f'<header><h1>{escape(name)}</h1><p class="lead">{escape(lead)}</p></header>'


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
        "",
        [
            ("action chunk", f"{model['horizon']} steps"),
            ("Euler steps", model["num_steps"]),
            ("initial noise", f"{model['noise_scale']:g} of unit variance"),
        ],
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
    top, columns = "", []
    if results:
        top = f'<div class="facts whole">{_protocol_facts(results)}</div>'
        checkpoint = {n: v for n, v in results["checkpoint"].items() if not isinstance(v, Mapping)}
        columns += [_named("Checkpoint", checkpoint), _speed_facts(results["timing"])]
    if phases:
        rows = [(p["name"], duration(p["seconds"])) for p in phases]
        rows.append(("all", duration(sum(p["seconds"] for p in phases))))
        memory = [(p["name"], f"{p['peak_memory_mb']:.0f} MB") for p in phases]
        columns += [facts("Time", rows), facts("Peak memory (largest process)", memory)]
    if results:
        columns += [_named("Machine", results["hardware"]), _named("Versions", results["versions"])]
    configs = "".join(
        folded(f"Configuration of {what}", (folder / "config.yaml").read_text())
        for what, folder in (("training", training), ("evaluation", evaluation))
        if folder and (folder / "config.yaml").is_file()
    )
    body = f'<div class="facts">{"".join(columns)}</div>' if columns else ""
    return section("How it was measured", top, body, configs)


def _protocol_facts(results: Mapping) -> str:
    protocol = results["protocol"]
    return facts(
        "Protocol",
        [
            ("simulator", f"{protocol['simulator']} ({protocol['simulator_version']})"),
            ("starts", f"pool {protocol['pool']!r}, the same for all arms"),
            *((f"arm {name}", _arm_words(arm)) for name, arm in protocol["arms"].items()),
            ("actions executed of a chunk", protocol["act_steps"]),
            ("longest episode", f"{protocol['max_steps']} control steps"),
            ("end", after_words(protocol["steps_after_success"])),
            ("seed", protocol["seed"]),
            ("fingerprint", results["fingerprint"]),
        ],
    )


def _speed_facts(timing: Mapping) -> str:
    if not timing["decisions"]:
        return ""
    decision = 1000 * timing["policy_seconds"] / timing["decisions"]
    return facts(
        "Speed of the evaluation",
        [
            ("episodes in this sitting", timing["episodes"]),
            ("wall time", duration(timing["wall_seconds"])),
            ("policy, a decision", f"{decision:.1f} ms"),
            ("observations in a batch", f"{timing['decisions'] / timing['batches']:.1f}"),
            ("control steps", f"{timing['steps'] / timing['wall_seconds']:.0f} a second"),
        ],
    )


def _named(title: str, values: Mapping[str, object]) -> str:
    return facts(
        title, [(n.replace("_gb", " (GB)").replace("_", " "), v) for n, v in values.items()]
    )


def _arm_words(arm: Mapping) -> str:
    words = f"{arm['starts']} starts of each of {counted(len(arm['tasks']), 'task')}"
    if arm["weights"] == "random":
        words += ", weights as before training"
    if arm.get("swap"):
        words += ", told " + ", ".join(f"{b} in {a}" for a, b in arm["swap"].items())
    return words


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
