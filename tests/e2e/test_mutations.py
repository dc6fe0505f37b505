"""Damaged files are noticed: none is read as other data, hangs, crashes or ends in a riddle.

python tests/e2e/mutate_data.py --count 1000
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

DRIVER = Path(__file__).with_name("mutate_data.py")
COUNT = int(os.environ.get("PIZERO_MUTATIONS", "70"))

CARELESS = """
import sys
sys.path.insert(0, {folder!r})
import mutate_data
from functools import partial
mutate_data.RldsDataset = partial(mutate_data.RldsDataset, verify=False)
mutate_data.SUBJECTS["bridge"] = mutate_data.Subject(
    mutate_data.write_bridge, mutate_data.read_bridge, modes=("raise",), checked=(".tfrecord",)
)
raise SystemExit(mutate_data.main({arguments!r}))
"""


def test_no_mutation_goes_unnoticed(tmp_path):
    endings = drive([sys.executable, str(DRIVER), *arguments(tmp_path, COUNT)], tmp_path, status=0)
    assert sum(endings.values()) == COUNT
    assert endings["clear"] > COUNT // 4
    assert set(endings) <= {"clear", "skipped", "equal", "intact", "told", "edited"}


def test_the_driver_notices_what_a_careless_reader_lets_pass(tmp_path):
    """Without checksums, TFRecords with other pictures and numbers are read as if nothing were."""
    options = arguments(tmp_path, 40, "--only", "bridge")
    code = CARELESS.format(folder=str(DRIVER.parent), arguments=options)
    endings = drive([sys.executable, "-c", code], tmp_path, status=1)
    assert endings["changed"] > 0


def arguments(folder: Path, count: int, *more: str) -> list[str]:
    out = str(folder / "outcomes.jsonl")
    return ["--count", str(count), "--seed", "11", "--out", out, *more]


def drive(command: list[str], folder: Path, *, status: int) -> Counter[str]:
    """How many mutations ended in which way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    lines = (folder / "outcomes.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["ending"] for line in lines)
