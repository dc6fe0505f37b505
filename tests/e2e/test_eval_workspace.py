"""A whole evaluation: checkpoint folder, simulator processes, films, results, resume, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stand_in.toy_checkpoint import SENTENCES, write_toy_checkpoint

from pizero.agent.config import load_config
from pizero.agent.driving.episodes import EpisodeLog
from pizero.agent.eval import EvalWorkspace, digest_of_weights
from pizero.data.stats import Statistics, save_statistics
from pizero.data.tokenizer import train_tokenizer

WORLD = "stand_in.line_world:LineWorld"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def evaluation(folder, checkpoint, **changes):
    config = load_config("eval_demo", [f"run_dir={folder}", f"checkpoint={checkpoint}"])
    config.env |= {"simulator": WORLD, "options": {"max_steps": 6}}
    config.device, config.num_steps, config.held_out_frames = "cpu", 1, 0
    config.film_options, config.film_height = {"size": 24}, 64
    config.arms["trained"].starts = 2
    config.arms["untrained"].starts = 1
    config.arms["untrained"].film.tasks = ["go-left"]
    config.arms["swapped"].starts = 1
    config.arms["swapped"].swap = {"go-left": "go-right", "go-right": "go-left"}
    for name, value in changes.items():
        setattr(config, name, value)
    return EvalWorkspace(config)


def outcomes(folder):
    """What was scored, without times."""
    lines = (folder / "episodes.jsonl").read_text().splitlines()[1:]
    episodes = [json.loads(line) for line in lines]
    return sorted((e["arm"], e["task"], e["start"], e["steps"], str(e["goals"])) for e in episodes)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        evaluation(folder, checkpoint).run()
    return folder


def test_results_say_what_was_measured_and_how(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["headline_arm"] == "trained"
    trials = {name: arm["success"]["trials"] for name, arm in results["arms"].items()}
    assert trials == {"trained": 4, "untrained": 2, "swapped": 2}
    assert results["arms"]["swapped"]["named"]["trials"] == 2
    assert results["timing"]["episodes"] == 8
    assert results["protocol"]["pool"] == "eval"
    assert results["protocol"]["max_steps"] == 6
    assert results["checkpoint"]["step"] == 7
    assert [s["name"] for s in results["model"]["segments"]] == ["image", "text", "state", "action"]
    lines = (finished / "episodes.jsonl").read_text().splitlines()[1:]
    swapped = {e["task"]: e["text"] for e in map(json.loads, lines) if e["arm"] == "swapped"}
    assert swapped == {"go-left": "go to the right wall", "go-right": "go to the left wall"}


def test_films_and_report(finished):
    results = json.loads((finished / "results.json").read_text())
    # Nothing succeeds, so each task shows its first failure; the untrained arm shows one task.
    shown = [(f["arm"], f["task"], f["start"]) for f in results["films"]]
    assert ("trained", "go-left", 0) in shown
    assert ("untrained", "go-right", 0) not in shown
    for film in results["films"]:
        data = (finished / film["path"]).read_bytes()
        assert data[4:8] == b"ftyp"
        assert (finished / film["path"]).with_suffix(".jpg").is_file()
    page = (finished / "report.html").read_text()
    assert page.count("<video") == len(results["films"])
    assert "http" not in page.split("</style>")[1]


def test_a_killed_evaluation_goes_on_where_it_was(finished, checkpoint, tmp_path, monkeypatch):
    append, count = EpisodeLog.append, 3

    def dies(log, result):
        if len(log.results) == count:
            raise KeyboardInterrupt
        append(log, result)

    monkeypatch.setattr(EpisodeLog, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path, checkpoint).run()
    assert len(outcomes(tmp_path)) == 3
    monkeypatch.setattr(EpisodeLog, "append", append)
    evaluation(tmp_path, checkpoint).run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["timing"]["episodes"] == 5
    assert outcomes(tmp_path) == outcomes(finished)
    evaluation(tmp_path, checkpoint, report=False).run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["timing"]["episodes"] == 0


def test_another_protocol_is_refused(finished, checkpoint):
    before = (finished / "episodes.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"act_steps: 2 there, 1 here"):
        evaluation(finished, checkpoint, act_steps=1).run()
    assert (finished / "episodes.jsonl").read_bytes() == before


def test_mistakes_are_named_before_any_episode(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"no task 'go-lefft'; did you mean 'go-left'\?"):
        evaluation(tmp_path, checkpoint, tasks=["go-lefft"]).run()
    with pytest.raises(ValueError, match=r"arms.swapped names a task .* 'go-right'"):
        evaluation(tmp_path, checkpoint, tasks=["go-left"]).run()
    with pytest.raises(ValueError, match="act_steps is 9, but a chunk has 4 steps"):
        evaluation(tmp_path, checkpoint, act_steps=9).run()
    with pytest.raises(ValueError, match="at least one arm"):
        evaluation(tmp_path, checkpoint, arms={})
    wordy = evaluation(tmp_path, checkpoint).config.env | {"options": {"also": ["words " * 30]}}
    with pytest.raises(
        ValueError, match=r"got 1 of 4 instructions with more, up to .*: 'words wor"
    ):
        evaluation(tmp_path, checkpoint, env=wordy).run()
    assert not list(tmp_path.glob("results.json"))


def test_a_published_checkpoint_drives_as_it_is(tmp_path):
    """openpi's weights, with words, statistics and cameras that the protocol tells."""
    weights = Path(__file__).parents[1] / "data" / "fixtures" / "openpi_pi0" / "weights.safetensors"
    shutil.copyfile(weights, tmp_path / "model.safetensors")
    words = train_tokenizer(SENTENCES, tmp_path / "tokenizer.model", vocab_size=400)
    values = np.random.default_rng(0).normal(size=(9, 4))
    statistics = {name: Statistics.of(values) for name in ("state", "action")}
    save_statistics(statistics, tmp_path / "stats.json")
    load = {
        "tokenizer": str(words),
        "statistics": str(tmp_path / "stats.json"),
        "overrides": {"horizon": 4, "vision.num_heads": 4},
        "changes": {"cameras": ["corner", "wrist"]},
    }
    evaluation(tmp_path / "eval", tmp_path, load=load).run()
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["checkpoint"] == {"folder": str(tmp_path), "weights": "published"}
    assert results["protocol"]["load"] == load
    assert results["timing"]["episodes"] == 8
    told = results["protocol"]["checkpoint"]
    save_statistics(statistics, tmp_path / "other.json")
    assert digest_of_weights(tmp_path) != told
    assert digest_of_weights(weights) == digest_of_weights(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        evaluation(tmp_path / "eval", tmp_path / "nowhere").run()
