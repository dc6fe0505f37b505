"""The loop over simulator workers, with real worker processes and a policy that reads the words."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from pizero.agent.driving.episodes import Episode
from pizero.agent.driving.rollout import RolloutSettings, run_episodes
from pizero.agent.env.client import EnvClient, WorkerDied
from pizero.agent.policy import keyed_noise

WORLD = "stand_in.line_world:LineWorld"
SETTINGS = RolloutSettings(pool="eval", act_steps=2, max_steps=12, steps_after_success=None, seed=0)


class Obedient:
    """Goes where the words say; its noise is visible in the second action."""

    noise_shape = (4, 4)
    noise_scale = 1.0

    def __init__(self):
        self.batches: list[int] = []

    def output_stage(self):
        return None

    def act_batch(self, observations, *, noise):
        self.batches.append(len(observations))
        chunks = noise.numpy().astype(np.float32)
        for chunk, observation in zip(chunks, observations, strict=True):
            chunk[:, 0] = -1.0 if "left" in observation["text"] else 1.0
        return chunks


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


class Latched(Obedient):
    """Its robot repeats the first action of an episode for three steps."""

    def output_stage(self):
        return Repeat()


class Repeat:
    def __init__(self):
        self.left, self.held = 3, None

    def __call__(self, actions):
        actions = actions.copy()
        for action in actions:
            self.held = action.copy() if self.held is None else self.held
            if self.left:
                self.left -= 1
                action[:] = self.held
        return actions

    def reset(self):
        raise AssertionError("a fresh stage needs no reset")


def episodes(count, *, tasks=("go-left", "go-right"), **values):
    return [
        Episode(arm="trained", weights="checkpoint", task=task, start=start, **values)
        for task in tasks
        for start in range(count)
    ]


def roll(todo, *, workers=2, settings=SETTINGS, policy=None, **options):
    policy = policy or Obedient()
    results, actions = {}, {}
    clients = [EnvClient.launch(simulator=WORLD, options=options) for _ in range(workers)]

    def keep(result, executed):
        results[result.key] = result
        actions[result.key] = executed

    try:
        timing = run_episodes(
            todo,
            workers=clients,
            policies={"checkpoint": policy},
            settings=settings,
            on_result=keep,
        )
    finally:
        for client in clients:
            client.close()
    return results, actions, timing


def test_what_a_robot_remembers_lasts_an_episode():
    """The stage sees executed actions only, two of each chunk, and starts anew each episode."""
    _, actions, _ = roll(episodes(2), policy=Latched(), workers=1)
    for executed in actions.values():
        np.testing.assert_array_equal(executed[1:3], executed[[0, 0]])
        assert not np.array_equal(executed[3], executed[0])


def test_every_episode_runs_once_and_both_rules_are_kept():
    results, actions, timing = roll(episodes(3))
    assert sorted(results) == sorted(e.key for e in episodes(3))
    for key, result in results.items():
        assert result.success == {"any": True, "end": True}
        assert result.first_success in range(4, 8)
        assert (result.steps, result.decisions) == (12, 6)
        assert actions[key].shape == (12, 4)
    assert timing.decisions == 36
    assert timing.steps == 72


def test_results_do_not_depend_on_who_shares_the_batch():
    together, shared, _ = roll(episodes(3), workers=3)
    alone, single, _ = roll(episodes(3), workers=1)
    assert {k: r.first_success for k, r in together.items()} == {
        k: r.first_success for k, r in alone.items()
    }
    for key, executed in single.items():
        np.testing.assert_array_equal(executed, shared[key])


def test_swapped_words_are_scored_on_both_goals():
    todo = episodes(2, tasks=("go-left",), text="go to the right wall", named_task="go-right")
    results, _, _ = roll(todo)
    for result in results.values():
        assert result.success == {"any": False, "end": False}
        assert result.named_success == {"any": True, "end": True}
        assert result.text == "go to the right wall"


def test_an_episode_can_stop_soon_after_success():
    settings = RolloutSettings(
        pool="eval", act_steps=1, max_steps=12, steps_after_success=1, seed=0
    )
    results, _, _ = roll(episodes(2), settings=settings)
    assert all(r.steps == r.first_success + 1 for r in results.values())
    # Told to go elsewhere, it is scored on the scene's goal as well, so it goes on.
    swapped = episodes(1, tasks=("go-left",), text="move right", named_task="go-right")
    results, _, _ = roll(swapped, settings=settings)
    assert [r.steps for r in results.values()] == [12]


def test_a_worker_without_an_episode_is_left_alone():
    """It has something to say all the same: that it has started."""
    idle, other_end = socket.socketpair()
    with idle, other_end, EnvClient.launch(simulator=WORLD, options={}) as client:
        other_end.send(b"started")
        results = []
        run_episodes(
            episodes(1, tasks=("go-left",)),
            workers=[client, idle],
            policies={"checkpoint": Obedient()},
            settings=SETTINGS,
            on_result=lambda result, actions: results.append(result),
        )
    assert len(results) == 1


def test_max_steps_cuts_the_last_chunk():
    settings = RolloutSettings(
        pool="eval", act_steps=2, max_steps=5, steps_after_success=None, seed=0
    )
    results, actions, _ = roll(episodes(1), settings=settings)
    assert {r.steps for r in results.values()} == {5}
    assert {a.shape for a in actions.values()} == {(5, 4)}


def test_a_slow_episode_blocks_nobody():
    results, _, _ = roll(episodes(6, tasks=("go-left",)), workers=2, slow_start=0)
    assert list(results)[-1] == "trained/go-left/0"


def test_a_dead_worker_is_a_clear_error():
    with pytest.raises(WorkerDied, match="died in 'reset'"):
        roll(episodes(2), workers=1, die_at_start=1)


def test_noise_is_a_function_of_its_key():
    a = keyed_noise((2, 3), 0, "push", 4, 1)
    assert torch.equal(a, keyed_noise((2, 3), 0, "push", 4, 1))
    for key in ((1, "push", 4, 1), (0, "pull", 4, 1), (0, "push", 5, 1), (0, "push", 4, 2)):
        assert not torch.equal(a, keyed_noise((2, 3), *key))
    many = torch.stack([keyed_noise((8, 8), 0, "push", i, 0) for i in range(200)])
    assert abs(many.mean()) < 0.03
    assert abs(many.std() - 1) < 0.03
