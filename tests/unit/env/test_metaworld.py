"""Metaworld itself: the same start is the same episode, and what the pictures show."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from omegaconf import OmegaConf

from pizero.agent.config import config_dir
from pizero.agent.env.client import EnvClient
from pizero.agent.env.rendering import choose_gl

pytestmark = pytest.mark.simulator

OPTIONS = OmegaConf.to_container(OmegaConf.load(config_dir() / "env" / "metaworld.yaml"))["options"]
FAUCETS = ("faucet-open", "faucet-close")
TASKS = ["push", "pick-place", "button-press", *FAUCETS]


def launch():
    return EnvClient.launch(simulator="metaworld", options=OPTIONS | {"tasks": TASKS})


@pytest.fixture(scope="module")
def env():
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("Metaworld is not installed")
    try:
        choose_gl({})
    except RuntimeError as error:
        pytest.skip(str(error))
    with launch() as env:
        yield env


def same(first, second):
    np.testing.assert_array_equal(first["state"], second["state"])
    assert first["images"].keys() == second["images"].keys()
    for name, image in first["images"].items():
        np.testing.assert_array_equal(image, second["images"][name])


def wander(env, start, **options):
    """A rollout with pictures at its end."""
    env.call("reset", task="push", start=start, pool="eval")
    actions = np.random.default_rng(start).uniform(-1, 1, (6, 4)).astype(np.float32)
    return env.call("run", actions=actions, **options)


def test_describe(env):
    world = env.call("describe")
    assert list(world["tasks"]) == TASKS
    assert [world["tasks"][task]["group"] for task in FAUCETS] == ["faucet", "faucet"]
    assert world["cameras"] == ["corner", "wrist"]
    assert (world["state_dim"], world["action_dim"]) == (4, 4)
    assert (world["control_hz"], world["max_steps"]) == (20.0, 100)


def test_a_rollout_is_the_same_after_others_and_in_a_fresh_process(env):
    first = wander(env, 3)
    wander(env, 4)
    again = wander(env, 3)
    same(first["observation"], again["observation"])
    with launch() as fresh:
        same(first["observation"], wander(fresh, 3)["observation"])


def test_the_first_picture_is_this_episodes_own(env):
    """Not the previous one's, whichever task that was: doing nothing hardly changes the view."""
    for start, task in enumerate(TASKS * 2):
        first = env.call("reset", task=task, start=start)["images"]
        later = env.call("run", actions=np.zeros((1, 4), np.float32))["observation"]["images"]
        for name, image in first.items():
            moved = np.abs(image.astype(int) - later[name]).max(axis=-1) > 60
            assert moved.mean() < 0.05


def test_starts_differ_also_between_pools(env):
    pictures = {
        env.call("reset", task="push", start=start, pool=pool)["images"]["corner"].tobytes()
        for pool in ("demo", "eval")
        for start in range(8)
    }
    assert len(pictures) == 16


def test_one_faucet_for_both_tasks(env):
    for start in range(3):
        opened, closed = (
            env.call("reset", task=task, start=start, pool="eval") for task in FAUCETS
        )
        same(opened, closed)
        assert opened["text"] != closed["text"]


@pytest.mark.parametrize(("task", "other"), [FAUCETS, FAUCETS[::-1]])
def test_both_goals_of_the_faucet_are_told_whatever_the_task(env, task, other):
    """The recorded labels replay to the same end; played in the other task they reach that goal."""
    played = env.call("demonstrate", task=task, start=1, hold=2)
    assert played["success"]
    labels = played["steps"]["action"]
    for scene in (task, other):
        env.call("reset", task=scene, start=1)
        result = env.call("run", actions=labels)
        assert result["goals"][task][-1]
        assert not result["goals"][other].any()
        np.testing.assert_array_equal(result["success"], result["goals"][scene])


@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed_and_what_is_recorded_fits_together(env, task):
    successes = 0
    for start in range(3):
        played = env.call("demonstrate", task=task, start=start, noise=0.35, displace=True, hold=3)
        steps = played["steps"]
        length = len(steps["action"])
        assert steps["images"]["wrist"].shape == (length, 64, 64, 3)
        assert steps["state"].shape == (length, 4)
        assert np.abs(steps["action"]).max() <= 1.0
        successes += played["success"]
    assert successes >= 2


def test_noise_is_executed_but_not_recorded(env):
    quiet, noisy = (
        env.call("demonstrate", task="button-press", start=2, noise=noise)["steps"]
        for noise in (0.0, 0.5)
    )
    np.testing.assert_array_equal(quiet["action"][0], noisy["action"][0])
    assert np.abs(quiet["state"][1] - noisy["state"][1]).max() > 1e-3


def test_time_is_up_after_max_steps(env):
    env.call("reset", task="push", start=0)
    result = env.call("run", actions=np.zeros((98, 4), np.float32))
    assert (result["steps"], result["done"]) == (98, False)
    result = env.call("run", actions=np.zeros((5, 4), np.float32), film=True)
    assert (result["steps"], result["done"]) == (100, True)
    assert result["success"].shape == (2,)
    assert [frame.shape for frame in result["film"]] == [(OPTIONS["film_size"],) * 2 + (3,)] * 2
    with pytest.raises(ValueError, match="over after 100 control steps: reset first"):
        env.call("run", actions=np.zeros((1, 4), np.float32))


def test_bad_actions_are_refused(env):
    env.call("reset", task="push", start=0)
    with pytest.raises(ValueError, match=r"actions must be \[n, 4\], got \[4\]"):
        env.call("run", actions=np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="finite"):
        env.call("run", actions=np.full((1, 4), np.nan, np.float32))


def colour(picture, test):
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return test(red, green, blue)


def test_puck_goal_and_arm_are_in_the_picture_and_upright(env):
    yellow = lambda r, g, b: (r > 120) & (g > 100) & (b < 60)  # noqa: E731
    green = lambda r, g, b: (g > 90) & (r < 60) & (b < 60)  # noqa: E731
    arm = lambda r, g, b: (r < 90) & (b > r + 3) & (b < 110)  # noqa: E731
    for start in range(5):
        picture = env.call("reset", task="push", start=start, pool="eval")["images"]["corner"]
        puck, goal, robot = (colour(picture, test) for test in (yellow, green, arm))
        assert puck.sum() >= 6
        assert goal.sum() >= 4
        assert robot.sum() >= 100
        assert np.nonzero(robot)[0].mean() < np.nonzero(puck)[0].mean()
    faucet = env.call("reset", task="faucet-open", start=0)["images"]["corner"]
    assert not colour(faucet, green).any()
