"""A policy over a recorded dataset: the numbers, the pictures and the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import LENGTHS, open_demo, write_demo
from stand_in.toy_checkpoint import write_toy_checkpoint

from pizero.agent.act import main, open_data, trained_on
from pizero.agent.driving.replay import Replay, ReplayedEpisode, replay, scores
from pizero.agent.policy import load_policy
from pizero.data.lerobot import export_episodes
from pizero.data.stats import Statistics, save_statistics
from pizero.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("data") / "demo")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("run"))


def test_every_decision_is_the_policys_own(dataset, checkpoint):
    """Replayed in batches, each chunk is what `act` gives for that frame and that noise."""
    policy = load_policy(checkpoint, device="cpu", num_steps=2, noise_scale=0.0)
    data = open_demo(dataset)
    replayed = replay(policy, data, episodes=[3, 7], every=2, batch_size=3)
    assert [e.number for e in replayed.episodes] == [3, 7]
    last = replayed.episodes[1]
    assert last.decided.tolist() == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(last.recorded[:, 1], np.arange(9) + 0.5)
    sample = data.read(int(data.episode_starts[7]) + 4)
    alone = policy.act(images=sample["images"], text=sample["text"], state=sample["state"])
    np.testing.assert_allclose(last.predicted[2], alone, atol=1e-5)
    assert [step for step, _ in last.pictures] == [0, 4, 8]


def test_errors_are_of_steps_within_the_episode():
    recorded = np.arange(10, dtype=np.float32).reshape(5, 2)
    predicted = np.stack([recorded[:3] + 1, np.concatenate((recorded[3:], [[99, 99]]))])
    episode = ReplayedEpisode(0, "go", recorded, np.array([0, 3]), predicted, ())
    errors = episode.errors
    assert np.isnan(errors[1, 2]).all()
    np.testing.assert_array_equal(errors[0], np.ones((3, 2)))
    np.testing.assert_array_equal(errors[1, :2], np.zeros((2, 2)))
    expected = recorded + np.array([[1], [1], [np.nan], [0], [0]])
    np.testing.assert_array_equal(episode.executed(2), expected)

    found = scores(Replay((episode,), 3, ("x", "y"), 0.5))
    spread = recorded.std(axis=0)
    assert found["num_decisions"] == 2
    np.testing.assert_allclose(found["mean_absolute_error"], [3 / 5, 3 / 5])
    np.testing.assert_allclose(
        found["mean_absolute_error_of_step"], [[0.5] * 2, [0.5] * 2, [1] * 2]
    )
    np.testing.assert_allclose(found["explained"], 1 - 0.6 / spread**2, rtol=1e-6)
    np.testing.assert_allclose(found["relative_error"], (0.6 / spread).mean(), rtol=1e-6)


def test_a_dimension_that_never_moves_is_left_out_of_shares():
    recorded = np.array([[0.0, 7.0], [2.0, 7.0]], np.float32)
    predicted = np.concatenate((recorded + 1, [[99, 99]]))[None]  # a step no episode reaches
    episode = ReplayedEpisode(0, "", recorded, np.array([0]), predicted, ())
    found = scores(Replay((episode,), 2, ("x", "y"), 0.5))
    assert found["explained"][1] is None
    assert found["relative_error"] == pytest.approx(1.0)
    assert found["mean_absolute_error"] == [1.0, 1.0]
    assert found["mean_absolute_error_of_step"] == [[1.0, 1.0], [1.0, 1.0]]


def test_the_command_writes_page_pictures_and_numbers(dataset, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--checkpoint", str(checkpoint), "--dataset", str(dataset), "--episodes", "3",
          "--every", "2", "--num-steps", "2", "--device", "cpu", "--out", str(out)])  # fmt: skip
    assert f"wrote {out / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["split"] == "val"
    assert metrics["cameras"] == {"corner": "observation/corner", "wrist": "observation/wrist"}
    assert np.shape(metrics["mean_absolute_error_of_step"]) == (4, 4)
    lengths = [e["steps"] for e in metrics["episodes"]]
    assert lengths == [LENGTHS[0], LENGTHS[4], LENGTHS[7]]
    assert metrics["num_decisions"] == sum(-(-n // 2) for n in lengths)
    pictures = sorted(p.name for p in out.glob("*.png"))
    assert pictures == ["episode_00000.png", "episode_00004.png", "episode_00007.png"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 6
    for words in ("Predicted beside recorded", "do task 1", "action 3", "Error by step"):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_published_checkpoint_over_a_dataset(dataset, tmp_path):
    """openpi's weights by path; cameras, words, statistics and sizes by option."""
    weights = Path(__file__).parents[1] / "data" / "fixtures" / "openpi_pi0" / "weights.safetensors"
    words = train_tokenizer(["do task 1"], tmp_path / "tokenizer.model", vocab_size=400)
    values = np.random.default_rng(0).normal(size=(9, 4))
    statistics = {name: Statistics.of(values) for name in ("state", "action")}
    save_statistics(statistics, tmp_path / "stats.json", dialect="openpi")
    out, cameras = tmp_path / "out", ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    main(["--checkpoint", str(weights), "--dataset", str(dataset), "--episodes", "1",
          "--every", "4", "--num-steps", "1", "--device", "cpu", "--out", str(out),
          "--tokenizer", str(words), "--statistics", str(tmp_path / "stats.json"),
          "--set", "horizon=6", "vision.num_heads=4",
          "--camera", *(f"{camera}=observation/corner" for camera in cameras)])  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert np.isfinite(metrics["mean_absolute_error"]).all()
    assert set(metrics["cameras"]) == {*cameras}


def test_features_are_found_named_or_refused(dataset, checkpoint, tmp_path):
    policy = load_policy(checkpoint, device="cpu")
    keys = trained_on(checkpoint)
    assert keys["cameras"] == {"corner": "observation/corner", "wrist": "observation/wrist"}
    usual = {"split": "train", "trained": {}, "given": {}}
    assert open_data(dataset, policy, **usual | {"split": "train[:2]"}).num_episodes == 2
    given = {"cameras": {"wrist": "observation/corner"}}
    one = open_data(dataset, policy, **usual | {"given": given})
    assert one.cameras == {"corner": ["observation/corner"], "wrist": ["observation/corner"]}
    given = {"cameras": {"wirst": "observation/corner"}}
    with pytest.raises(ValueError, match=r"no 'wirst'; did you mean 'wrist'\?"):
        open_data(dataset, policy, **usual | {"given": given})
    with pytest.raises(ValueError, match="actions have 1 dimensions, the policy's 4"):
        replay(policy, open_demo(dataset, action="observation/gripper"), episodes=[0], every=1)
    with pytest.raises(ValueError, match="expected every >= 1, got 0"):
        replay(policy, open_demo(dataset), episodes=[0], every=0)
    recorded = tmp_path / "recorded"  # what it was trained with has other names there
    export_episodes({"train": open_demo(dataset)}, recorded, fps=10, images="parquet")
    same = open_data(recorded, policy, **usual | {"trained": keys, "split": None})
    assert same.cameras == {
        "corner": ["observation.images.corner"],
        "wrist": ["observation.images.wrist"],
    }
    assert len(replay(policy, same, episodes=[0], every=1).episodes) == 1
    with pytest.raises(SystemExit, match="error: no data set"):
        main(["--checkpoint", str(checkpoint), "--dataset", str(tmp_path / "none")])
