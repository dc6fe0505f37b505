"""The comparison with the expert: exact on a policy whose answer is known."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from rlds_demo import open_demo, write_demo

from pizero.agent.driving.held_out import compare_with_expert


class OffByOne:
    """Predicts the demo's actions (state + 0.5, repeated) plus one, and shows its noise."""

    noise_shape = (2, 4)
    noise_scale = 0.0

    class pipeline:
        cameras = ("corner", "wrist")

    def act_batch(self, observations, *, noise, live):
        assert not live  # the numbers are the data set's
        states = np.stack([o["state"][-1] for o in observations])
        chunks = states[:, None] + 1.5 + noise.numpy()
        chunks[:, 1, 1] += 1.0  # the demo's second state entry counts the steps
        return chunks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_demo(write_demo(tmp_path_factory.mktemp("data")), horizon=2)


def test_error_is_that_of_the_executed_chunk(data):
    found = compare_with_expert(OffByOne(), data, num_frames=20, num_shown=2, num_draws=3)
    assert found["mean_absolute_error"] == pytest.approx(1.0)
    assert found["error_of_dimension"] == pytest.approx([1.0] * 4)
    assert len(found["frames"]) == 2
    texts = {frame["text"] for frame in found["frames"]}
    assert len(texts) == 2
    for frame in found["frames"]:
        assert np.subtract(frame["predicted"], frame["expert"]) == pytest.approx(1.0)
        assert len(frame["draws"]) == 3
        assert frame["draws"][0] != frame["draws"][1]
        picture = Image.open(io.BytesIO(base64.b64decode(frame["picture"])))
        assert picture.height == 128


def test_no_frame_whose_chunk_is_all_padding_but_one(data):
    found = compare_with_expert(OffByOne(), data, num_frames=1000, num_shown=1)
    # 8 episodes of 37 frames together; the last step of each has nothing after it.
    assert found["num_frames"] == 37 - 8
