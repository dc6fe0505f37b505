"""The report: whole when all parts are there, quiet about those that are not, and offline."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from pizero.agent.driving.scores import rate
from pizero.agent.report import write_report
from pizero.agent.report.charts import Line, line_chart, sight_picture, small_multiple, smoothed

VOID = {"meta", "img", "br", "rect", "line", "polyline"}


class Balanced(HTMLParser):
    """Fails on tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()


def scores(successes, *, named=None):
    score = rate([True] * successes + [False] * (20 - successes)).to_json()
    found = {"success": score, "any": score, "end": score, "mean_steps_to_success": 31.4}
    if named is not None:
        found["named"] = rate([True] * named + [False] * (20 - named)).to_json()
    return found


def arm(*, tasks, weights="checkpoint", swap=None):
    total = next(iter(tasks.values()))
    return {**total, "weights": weights, "swap": swap, "tasks": tasks}


def results(*, scene=1, named=17):
    arms = {
        "trained": arm(tasks={"push": scores(15)}),
        "untrained": arm(tasks={"push": scores(0)}, weights="random"),
        "swapped": arm(tasks={"push": scores(scene, named=named)}, swap={"push": "pull"}),
    }
    return {
        "name": "a <b>run</b>",
        "fingerprint": "feedfacefeedface",
        "headline_arm": "trained",
        "rule": "any",
        "arms": arms,
        "sentences": {"push": ["push <it> & go"]},
        "protocol": {
            "simulator": "line",
            "simulator_version": "1",
            "pool": "eval",
            "act_steps": 2,
            "max_steps": 12,
            "steps_after_success": None,
            "seed": 0,
            "arms": {n: {**a, "starts": 20, "tasks": ["push"]} for n, a in arms.items()},
        },
        "checkpoint": {"step": 7},
        "timing": {
            "episodes": 60,
            "wall_seconds": 10.0,
            "policy_seconds": 2.0,
            "batches": 50,
            "decisions": 100,
            "steps": 200,
        },
        "model": {
            "parameters": {"vision": 1000, "action": 500},
            "segments": [
                {"name": "image", "length": 64, "block": 0, "expert": "vlm"},
                {"name": "action", "length": 4, "block": 1, "expert": "action"},
            ],
            "horizon": 4,
            "num_steps": 6,
            "noise_scale": 0.5,
        },
        "films": [
            {
                "path": "videos/a.mp4",
                "arm": "trained",
                "task": "push",
                "start": 0,
                "text": "push",
                "success": True,
                "named_task": None,
                "named_success": None,
            }
        ],
        "hardware": {"cores": 2, "memory_gb": 23.5},
        "versions": {"torch": "2"},
    }


def write_evaluation(folder, content):
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "a.mp4").write_bytes(b"film")
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text("seed: 0\n")
    frame = {
        "text": "push",
        "episode": 1,
        "step": 2,
        "picture": base64.b64encode(b"png").decode(),
        "expert": [[0.0], [0.5]],
        "predicted": [[0.1], [0.4]],
        "draws": [[[0.2], [0.3]]],
    }
    held_out = {
        "action_names": ["x"],
        "num_frames": 1,
        "mean_absolute_error": 0.25,
        "frames": [frame],
    }
    (folder / "held_out.json").write_text(json.dumps(held_out))
    return folder


def write_training(folder):
    folder.mkdir()
    rows = [
        {"step": s, "kind": "train", "loss": 2.0 / s, "lr": 1e-3, "grad_norm": 1.0}
        for s in range(1, 1001)
    ]
    rows.append({"step": 500, "kind": "val", "loss": 0.1, "action_l1": 0.2, "accuracy_0.1": 0.3})
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 1001, "ki')
    return folder


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_whole_report(tmp_path):
    page = write_report(
        tmp_path / "report.html",
        evaluation=write_evaluation(tmp_path / "eval", results()),
        training=write_training(tmp_path / "train"),
        phases=[{"name": "train", "seconds": 61, "peak_memory_mb": 500.0}],
    ).read_text()
    assert headings(page) == [
        "Success by task",
        "Does it listen?",
        "Episodes",
        "Training",
        "Predicted and expert actions",
        "The model",
        "How it was measured",
    ]
    assert "a &lt;b&gt;run&lt;/b&gt;" in page
    assert "push &lt;it&gt; &amp; go" in page
    assert f"data:video/mp4;base64,{base64.b64encode(b'film').decode()}" in page
    assert "1 min 01 s" in page
    assert "15 of 20" in page
    assert "53–89" in page  # noqa: RUF001 - the Wilson interval of 15 of 20
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_only_what_is_there(tmp_path):
    training = write_training(tmp_path / "train")
    page = write_report(tmp_path / "a.html", training=training).read_text()
    assert headings(page) == ["Training"]
    (tmp_path / "eval").mkdir()
    bare = {k: v for k, v in results().items() if k not in ("model", "films", "sentences")}
    del bare["arms"]["swapped"], bare["arms"]["untrained"]
    (tmp_path / "eval" / "results.json").write_text(json.dumps(bare))
    page = write_report(tmp_path / "b.html", evaluation=tmp_path / "eval").read_text()
    assert headings(page) == ["Success by task", "How it was measured"]
    with pytest.raises(ValueError, match=r"no results.json in None and no metrics.jsonl in"):
        write_report(tmp_path / "c.html", training=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("scene", "named", "verdict"),
    [
        (1, 17, "the words decide what is done"),
        (17, 1, "the words are largely ignored"),
        (9, 10, "the words do not clearly decide"),
    ],
)
def test_the_verdict_on_swapped_words_follows_the_intervals(tmp_path, scene, named, verdict):
    folder = write_evaluation(tmp_path / "eval", results(scene=scene, named=named))
    assert verdict in write_report(tmp_path / "report.html", evaluation=folder).read_text()


def test_films_stop_where_the_page_would_grow_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("pizero.agent.report.results.MAX_VIDEO_BYTES", 3)
    folder = write_evaluation(tmp_path / "eval", results())
    page = write_report(tmp_path / "report.html", evaluation=folder).read_text()
    assert "<video" not in page


@pytest.mark.parametrize("high", [0.11, 0.41, 0.52, 0.85, 1.3, 1.7, 4.2])
def test_little_charts_have_a_scale(high):
    """One number alone would say where an axis is, and not how long."""
    chart = small_multiple([Line("", [0, 1], [0, high])], title="", low=-0.95 * high, high=high)
    numbers = re.findall(r'class="tiny"[^>]*>([^<]+)<', chart)
    assert 2 <= len(numbers) <= 6


def test_axes_have_round_numbers():
    chart = line_chart([Line("", [0, 1000], [0.0, 1e-3])], title="rate")
    ticks = re.findall(r'class="tick"[^>]*>([^<]*)<', chart)
    assert {"2.5e-4", "5e-4", "0", "500", "1000"} <= set(ticks)
    log = line_chart([Line("", [1, 2], [0.01, 1.0])], title="loss", log_y=True)
    assert {"0.01", "0.1", "1"} <= set(re.findall(r'class="tick"[^>]*>([^<]*)<', log))
    assert line_chart([Line("", [], [])], title="none") == ""
    flat = line_chart([Line("", [1], [float("nan")])], title="nan")
    assert flat == ""


def test_smoothing_keeps_a_constant_and_its_length():
    assert smoothed([3.0] * 50, span=10) == pytest.approx([3.0] * 50)
    assert smoothed([0.0, 1.0], span=1)[1] > 0.5


def test_the_picture_of_sight_is_the_rule():
    segments = results()["model"]["segments"]
    picture = sight_picture(segments, styles={"vlm": "a", "action": "b"})
    said = re.findall(r"<title>(.*?)</title>", picture)
    assert said == [
        "image sees image",
        "image does not see action",
        "action sees image",
        "action sees action",
    ]
