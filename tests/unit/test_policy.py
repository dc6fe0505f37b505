"""A policy built from a checkpoint folder alone, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_in.toy_checkpoint import write_toy_checkpoint

import pizero
from pizero.agent.policy import Policy, keyed_noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def policy(folder):
    return pizero.load_policy(folder, device="cpu", num_steps=3)


def observation(seed, *, text="move right", cameras=("corner", "wrist"), size=16):
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 256, size=(len(cameras), size, size, 3), dtype=np.uint8)
    return {
        "images": dict(zip(cameras, pictures, strict=True)),
        "text": text,
        "state": random.normal(size=4).astype(np.float32),
    }


def test_a_chunk_in_robot_units(policy):
    chunk = policy.act(**observation(0), generator=torch.Generator().manual_seed(1))
    assert chunk.shape == (4, 4)
    assert chunk.dtype == np.float32
    again = policy.act(**observation(0), generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(chunk, again)
    other = policy.act(**observation(0), generator=torch.Generator().manual_seed(2))
    assert not np.array_equal(chunk, other)
    # The statistics put actions around 1 with a deviation near 3, far from the model's own units.
    noise = torch.zeros(policy.noise_shape)
    encoded = policy.observe([observation(0)])
    with torch.inference_mode():
        raw = policy.model.sample(encoded, noise[None], 3)[0].numpy()
    statistics = policy.pipeline.statistics["action"]
    expected = raw * statistics.std + statistics.mean
    np.testing.assert_allclose(policy.act(**observation(0), noise=noise), expected, atol=1e-4)


def test_several_sentences_are_a_batch(policy):
    """Arrays of numpy and torch, noise of either, and a number of steps of one's own."""
    rows = [observation(i) for i in range(3)]
    noise = torch.stack([keyed_noise(policy.noise_shape, i) for i in range(3)])
    cameras = {c: np.stack([o["images"][c] for o in rows]) for c in ("corner", "wrist")}
    states = np.stack([o["state"] for o in rows])
    texts = [o["text"] for o in rows]
    together = policy.act(images=cameras, text=texts, state=states, noise=noise.numpy())
    assert together.shape == (3, 4, 4)
    alone = [policy.act(**o, noise=n) for o, n in zip(rows, noise, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)
    tensors = {c: torch.from_numpy(v) for c, v in cameras.items()}
    again = policy.act(images=tensors, text=texts, state=torch.from_numpy(states), noise=noise)
    np.testing.assert_array_equal(again, together)
    one_step = policy.act(**rows[0], noise=noise[0], num_steps=1)
    assert not np.allclose(one_step, together[0], atol=1e-3)
    with pytest.raises(ValueError, match=r"3 sentences make a batch of 3, but state has shape \[2"):
        policy.act(images=cameras, text=texts, state=states[:2])


def test_a_row_does_not_depend_on_its_batch(policy):
    texts = ("move right", "go to the left wall", "go", "go to the right wall")
    observations = [observation(i, text=text) for i, text in enumerate(texts)]
    noise = torch.stack([keyed_noise(policy.noise_shape, i) for i in range(4)])
    together = policy.act_batch(observations, noise=noise)
    alone = [policy.act(**o, noise=n) for o, n in zip(observations, noise, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)
    backwards = policy.act_batch(observations[::-1], noise=noise.flip(0))[::-1]
    np.testing.assert_allclose(together, backwards, atol=2e-5)


def test_random_weights_are_those_before_training(folder, policy):
    baseline = pizero.load_policy(folder, device="cpu", weights="random", seed=0)
    trained = dict(policy.model.named_parameters())
    # This checkpoint was never trained: seed 0 is how it began, seed 1 is another network.
    assert all(torch.equal(p, trained[n]) for n, p in baseline.model.named_parameters())
    state = torch.get_rng_state()
    other = pizero.load_policy(folder, device="cpu", weights="random", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert not all(torch.equal(p, trained[n]) for n, p in other.model.named_parameters())


def test_wrong_cameras(policy):
    with pytest.raises(ValueError, match=r"got 'corne'; did you mean 'corner'\?"):
        policy.act(**observation(0, cameras=("corne", "wrist")))
    with pytest.raises(ValueError, match=r"no picture from camera 'wrist'.*pass None"):
        policy.act(**observation(0, cameras=("corner",)))
    absent = observation(0)
    absent["images"]["wrist"] = None
    assert policy.act(**absent).shape == (4, 4)
    floats = observation(0)
    floats["images"]["wrist"] = np.full((16, 16, 3), 2.0, dtype=np.float32)
    with pytest.raises(ValueError, match=r"camera 'wrist': .* floats in \[0, 1\], got 2"):
        policy.act(**floats)


def test_wrong_state_text_noise_and_steps(policy):
    wrong = observation(0) | {"state": np.zeros(5, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        policy.act(**wrong)
    with pytest.raises(ValueError, match="expected an instruction, got None"):
        policy.act(**observation(0) | {"text": None})
    with pytest.raises(ValueError, match=r"= \[1, 4, 4\], got \[1, 3, 4\]"):
        policy.act(**observation(0), noise=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        Policy(policy.model, policy.pipeline, num_steps=0)
    with pytest.raises(ValueError, match=r"noise_scale must be in \[0, 1\], got 2"):
        Policy(policy.model, policy.pipeline, noise_scale=2)


def test_without_noise_every_decision_is_the_same(policy):
    still = Policy(policy.model, policy.pipeline, num_steps=3, noise_scale=0.0)
    zeros = policy.act(**observation(0), noise=torch.zeros(policy.noise_shape))
    np.testing.assert_array_equal(still.act(**observation(0)), zeros)
    assert np.abs(policy.act(**observation(0)) - zeros).max() > 1e-3


def test_wrong_folder_and_weights(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*; found an empty folder"):
        pizero.load_policy(tmp_path)
    with pytest.raises(ValueError, match="'checkpoint' or 'random', got 'best'"):
        pizero.load_policy(folder, weights="best")
