"""The benchmark of data: jobs read what they say, costs are those of all processes, goals count."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from bench import data, data_jobs


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run here instead of in processes of their own."""
    jobs = []

    def finish(started):
        for job in started:
            jobs.append(job)
            yield data_jobs.JOBS[job["what"]](job)

    monkeypatch.setattr(data, "_start", lambda python, job: job)
    monkeypatch.setattr(data, "_finish", finish)
    return jobs


def test_a_small_run(tmp_path, capsys, in_process):
    out = tmp_path / "data.json"
    only = ["no resize", "bicubic, 2 ranks", "windowed"]
    options = ["--size", "small", "--folder", str(tmp_path), "--out", str(out), "--only", *only]
    assert data.main(options) == 0
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {
        "no resize",
        "no resize, without pipeline",
        "bicubic, 2 ranks",
        "lanczos, windowed",
    }
    assert all(0 < row["cpu_ms"]["median"] < 50 for row in rows.values())
    assert [j["rank"] for j in in_process if j.get("world_size") == 2] == [0, 1]
    assert result["frames of the set"] > 6 * 25
    assert result["index"]["median"] > 0
    assert result["memory"]["most_mb"] > 50
    assert [g["name"] for g in result["goals"]] == [
        "no resize: CPU-ms per picture",
        "no resize, without pipeline: CPU-ms per picture",
        "resident MB in global order",
        "growth, MB in 10,000 frames",
    ]
    printed = capsys.readouterr().out
    assert "CPU-us per frame" in printed
    assert "of first" in printed


def test_a_job_in_a_process_of_its_own(tmp_path):
    sets = data.Sets(tmp_path, data.SIZES["small"])
    found = data._prepare("index", sets)
    assert found["frames"] == sets.frames("bridge")
    assert found["cpu_s"] > 0
    job = {"what": "index", "path": str(tmp_path / "nothing"), "options": {}}
    with pytest.raises(RuntimeError, match="no dataset at"):
        list(data._finish([data._start(sys.executable, job)]))


def test_seconds_and_memory_include_child_processes():
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    before, (own, _) = data_jobs.processor_seconds(), data_jobs.resident()
    with subprocess.Popen((sys.executable, "-c", busy), **pipes) as child:
        child.stdout.readline()
        assert data_jobs.processor_seconds() - before >= 0.25
        assert data_jobs.resident()[0] == pytest.approx(own, abs=20)
        child.stdin.close()
    time.sleep(0.01)
    assert data_jobs.processor_seconds() - before >= 0.25  # it has ended, and counts still


def test_growth_is_what_most_points_say():
    frames = np.arange(1, 21) * 2000
    own = 200 + frames * 2e-4
    own[[0, 1]], own[12] = 100, 150  # before all is loaded, and while the system took pages away
    found = data._memory(np.stack([frames, own, own], 1).tolist())
    assert found["growth_mb"] == pytest.approx(2.0)
    assert found["most_mb"] == pytest.approx(208)
    assert found["frames"] == 40_000


def test_a_missed_goal_fails(monkeypatch, tmp_path):
    memory = {"typical_mb": 310.0, "most_mb": 311.0, "growth_mb": 0.1, "frames": 1}
    goals = data._goals([], memory)
    assert [g["ok"] for g in goals] == [False, True]
    spread = {"median": 1.0, "iqr": 0.0}
    result = {"goals": goals, "rows": [], "absent": {"x": "no x"}, "memory": memory, "rounds": 1}
    result |= {"index": spread, "statistics": spread, "frames of the set": 3, "device": "a CPU"}
    monkeypatch.setattr(data, "run", lambda options: result)
    assert data.main(["--out", str(tmp_path / "data.json")]) == 1


def test_a_reader_without_its_package_is_left_out(tmp_path, in_process, monkeypatch, capsys):
    assert data._look_for("json", {}) == (json.__version__, None)
    arm = data.Arm("no such reader", "bridge", needs="no_such_package")
    monkeypatch.setattr(data, "ARMS", (arm,))
    out = tmp_path / "data.json"
    assert data.main(["--size", "small", "--folder", str(tmp_path), "--out", str(out)]) == 0
    why = "ModuleNotFoundError: No module named 'no_such_package'"
    result = json.loads(out.read_text())
    assert result["absent"] == {"no such reader": why}
    assert result["rows"] == []
    assert f"left out: no such reader: {why}" in capsys.readouterr().out
