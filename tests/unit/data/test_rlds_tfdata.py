"""What a TensorFlow stream says before TensorFlow is needed, and where it is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from rlds_demo import LENGTHS, open_demo

from pizero.data import Mix
from pizero.data.rlds.tfdata import TfMix, iterate, streamed


@pytest.fixture
def without_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_a_stream_describes_itself_as_a_mix_does(demo, without_tensorflow):
    mix = TfMix(datasets={"a": demo, "b": demo}, weights={"a": 3, "b": 1})
    assert len(mix) == 2 * sum(LENGTHS)
    assert mix.shares() == {"a": 0.75, "b": 0.25}


def test_any_mix_can_be_streamed(demo):
    mix = Mix(datasets={"a": demo, "b": demo}, weights={"a": 3, "b": 1}, balance="task")
    numbers = np.arange(100)
    for ours, theirs in zip(
        mix.locate(mix.order(0), numbers),
        (stream := streamed(mix=mix)).locate(stream.order(0), numbers),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_stream_without_tensorflow_names_the_extra(demo, without_tensorflow):
    with pytest.raises(ValueError, match=r"pip install 'pizero\[rlds-tf\]'"):
        next(iterate(demo))


def test_other_data_sets_are_refused(demo):
    class Other:
        episode_starts, episode_lengths = demo.episode_starts, demo.episode_lengths
        num_episodes = demo.num_episodes

        def __len__(self) -> int:
            return len(demo)

    with pytest.raises(ValueError, match=r"b: TensorFlow streams RLDS.*got Other"):
        TfMix(datasets={"a": demo, "b": Other()})


def test_damaged_records_are_refused(demo_path, tmp_path):
    path = shutil.copytree(demo_path, tmp_path / "demo", ignore=shutil.ignore_patterns(".*"))
    file = sorted(path.glob("*train*"))[0]
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored)
    data = open_demo(path, on_error="skip")
    with pytest.raises(ValueError, match="1 damaged records, which TensorFlow cannot leave out"):
        TfMix(datasets={"demo": data})


@pytest.mark.parametrize("name", ["shuffle_buffer", "read_files"])
def test_sizes_are_at_least_one(demo, name):
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
        TfMix(datasets={"demo": demo}, **{name: 0})


def test_importing_the_stream_does_not_import_tensorflow():
    code = "import sys, pizero.data.rlds.tfdata; print('tensorflow' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
