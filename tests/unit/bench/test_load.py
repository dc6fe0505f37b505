"""The benchmark of loading makes checkpoints, loads each in a process, and leaves nothing."""

from __future__ import annotations

import json

from bench import load


def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(load.CASES, "openpi pi0", ("openpi", "pi0", "bf16", ("pizero",)))
    work, out = tmp_path / "work", tmp_path / "load.json"
    work.mkdir()
    options = ["--size", "small", "--cases", "openpi pi0", "--folder", str(work), "--out", str(out)]
    assert load.main(options) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["to"] == "pizero"
    assert 0.05 < row["imports_gb"] < row["peak_gb"] < row["imports_gb"] + 0.5
    assert 0 < row["raw_read_seconds"] < row["seconds"]
    assert "of disk" in capsys.readouterr().out
    assert list(work.iterdir()) == []


def test_a_small_policy_acts(tmp_path, monkeypatch):
    """The row of acting has its own time, and no goal: it may take any memory."""
    monkeypatch.setattr(load, "GOAL", 0.0)
    out = tmp_path / "load.json"
    options = ["--size", "full", "--cases", "open-pi-zero", "--jobs", "act fp32", "--out", str(out)]
    monkeypatch.setattr(load, "_measure", _small(load._measure))
    assert load.main([*options, "--folder", str(tmp_path)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["case"], row["to"]) == ("open-pi-zero", "act fp32")
    assert 0 < row["act_seconds"] < 60


def _small(measure):
    return lambda case, folder, size, jobs: measure(case, folder, "small", jobs)


def test_too_much_memory_fails(monkeypatch, tmp_path):
    row = {"of_disk": 1.3, "of_disk_with_imports": 1.4, "disk_gb": 7.0, "peak_gb": 9.8}
    row |= {"case": "x", "to": "memory", "seconds": 1.0, "raw_read_seconds": 1.0}
    result = {"size": "full", "device": "a CPU", "rows": [row]}
    monkeypatch.setattr(load, "run", lambda options: result)
    assert load.main(["--out", str(tmp_path / "load.json")]) == 1
