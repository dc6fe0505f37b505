"""Many episodes at once: simulator worker processes, one batched policy, and the loop between them.

Every worker runs one episode at a time and spends most of it rendering. The loop waits on all
workers' sockets, gives the policy whatever observations have arrived as one batch, and sends each
worker the first `act_steps` actions of its chunk. Nobody waits for a slow episode.

Results do not depend on who shares a batch: the noise of a decision is a function of the seed, the
task, the start and the number of the decision, and of nothing else.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from pizero.agent.driving.episodes import Episode, EpisodeResult
from pizero.agent.policy import Policy, keyed_noise
from pizero.data.robot import OutputStage


@runtime_checkable
class Worker(Protocol):
    """What the loop needs of a simulator worker; `pizero.agent.env.client.EnvClient` has it."""

    def submit(self, method: str, /, **arguments: Any) -> None: ...
    def result(self, timeout: float | None = None) -> Any: ...
    def fileno(self) -> int: ...


@dataclass(frozen=True)
class RolloutSettings:
    """How an episode is run; all of it is part of the evaluation's protocol.

    `steps_after_success` None runs every episode to `max_steps`; a number ends it so many control
    steps after its goals have been reached.
    """

    pool: str
    act_steps: int
    max_steps: int
    steps_after_success: int | None
    seed: int


@dataclass
class RolloutTiming:
    """Where the time of an evaluation went."""

    wall_seconds: float = 0.0
    policy_seconds: float = 0.0
    batches: int = 0
    decisions: int = 0
    steps: int = 0


@dataclass
class _Running:
    """An episode under way in one worker."""

    episode: Episode
    started: float
    observation: dict[str, Any] | None = None
    text: str = ""
    steps: int = 0
    decisions: int = 0
    success: list[bool] = field(default_factory=list)
    goals: dict[str, list[bool]] = field(default_factory=dict)
    actions: list[np.ndarray] = field(default_factory=list)
    done: bool = False
    stage: OutputStage | None = None  # the robot's last step, which remembers over an episode


def run_episodes(
    episodes: Iterable[Episode],
    *,
    workers: Sequence[Worker],
    policies: Mapping[str, Policy],
    settings: RolloutSettings,
    on_result: Callable[[EpisodeResult, np.ndarray], None],
    batch_wait: float = 0.01,
    patience: float = 300.0,
) -> RolloutTiming:
    """Runs every episode and calls `on_result(result, actions [steps action_dim])` as each ends.

    `policies` maps an episode's `weights` to the policy that drives it. `batch_wait` is how long,
    in seconds, a ready observation waits for company; `patience` is how long all workers may stay
    silent before that is an error.
    """
    timing = RolloutTiming()
    queue = _Queue(episodes, num_workers=len(workers))
    running: dict[int, _Running] = {}
    started = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for index, worker in enumerate(workers):
            _start(index, workers, queue, running, policies, settings)
            # One that has nothing to do may still announce that it has started.
            if index in running:
                selector.register(worker.fileno(), selectors.EVENT_READ, data=index)
        while running:
            ready = _receive(selector, workers, running, settings, batch_wait, patience)
            for index in [i for i in ready if _is_over(running[i], settings)]:
                finished = running.pop(index)
                timing.steps += finished.steps
                on_result(_result(finished), np.concatenate(finished.actions))
                _start(index, workers, queue, running, policies, settings)
                if index not in running:
                    selector.unregister(workers[index].fileno())
            ready = [i for i in ready if i in running and running[i].observation is not None]
            for weights in dict.fromkeys(running[i].episode.weights for i in ready):
                group = [i for i in ready if running[i].episode.weights == weights]
                before = time.perf_counter()
                chunks = _decide(policies[weights], [running[i] for i in group], settings.seed)
                timing.policy_seconds += time.perf_counter() - before
                timing.batches += 1
                timing.decisions += len(group)
                for index, chunk in zip(group, chunks, strict=True):
                    _execute(running[index], workers[index], chunk, settings)
    timing.wall_seconds = time.perf_counter() - started
    return timing


class _Queue:
    """Episodes still to run. A worker keeps to one task while it can: building a scene is slow."""

    def __init__(self, episodes: Iterable[Episode], *, num_workers: int) -> None:
        self.waiting = list(episodes)
        self.task_of: list[str | None] = [None] * num_workers

    def next_for(self, worker: int) -> Episode | None:
        if not self.waiting:
            return None
        elsewhere = {t for i, t in enumerate(self.task_of) if i != worker}
        first = self.waiting[0]
        choices = [e for e in self.waiting if e.arm == first.arm]
        same = [e for e in choices if e.task == self.task_of[worker]]
        free = [e for e in choices if e.task not in elsewhere]
        episode = (same or free or choices)[0]
        self.waiting.remove(episode)
        self.task_of[worker] = episode.task
        return episode


def _start(
    index: int,
    workers: Sequence[Worker],
    queue: _Queue,
    running: dict[int, _Running],
    policies: Mapping[str, Policy],
    settings: RolloutSettings,
) -> None:
    episode = queue.next_for(index)
    if episode is None:
        return
    stage = policies[episode.weights].output_stage()
    running[index] = _Running(episode, started=time.perf_counter(), stage=stage)
    workers[index].submit(
        "reset",
        task=episode.task,
        start=episode.start,
        pool=settings.pool,
        text=episode.text,
    )


def _receive(
    selector: selectors.BaseSelector,
    workers: Sequence[Worker],
    running: dict[int, _Running],
    settings: RolloutSettings,
    batch_wait: float,
    patience: float,
) -> list[int]:
    """Waits for the first reply, then briefly for more; returns the workers that have replied.

    Half of them are company enough: while the policy thinks for one half, the other half works.
    """
    ready: list[int] = []
    wait, deadline = patience, float("inf")
    while len(ready) < len(running):
        events = selector.select(max(0.0, wait))
        if not events:
            if not ready:
                busy = ", ".join(r.episode.key for r in running.values())
                raise RuntimeError(
                    f"no simulator has answered for {patience:.0f} s; running: {busy}"
                )
            break
        for key, _ in events:
            index = key.data
            _absorb(running[index], workers[index].result(), settings)
            ready.append(index)
        deadline = min(deadline, time.perf_counter() + batch_wait)
        wait = deadline - time.perf_counter() if 2 * len(ready) < len(running) else 0.0
    return ready


def _absorb(run: _Running, reply: dict[str, Any], settings: RolloutSettings) -> None:
    """Takes in the reply to `reset` (an observation) or to `run`."""
    if "observation" not in reply:
        run.observation = reply
        run.text = run.episode.text or reply["text"]
        return
    run.observation = reply["observation"]
    flags = [bool(x) for x in reply["success"]]
    run.success += flags
    for goal, reached in reply["goals"].items():
        run.goals.setdefault(goal, []).extend(bool(x) for x in reached)
    # A simulator that ends an episode early has run fewer actions than it was sent.
    run.actions[-1] = run.actions[-1][: len(flags)]
    run.steps += len(flags)
    run.done = bool(reply["done"])


def _is_over(run: _Running, settings: RolloutSettings) -> bool:
    if run.done or run.steps >= settings.max_steps:
        return True
    if settings.steps_after_success is None:
        return False
    # An arm that names another goal is scored on both goals, so it goes on until both are reached.
    scored = [run.success]
    if run.episode.named_task is not None:
        scored.append(run.goals.get(run.episode.named_task, []))
    if not all(any(flags) for flags in scored):
        return False
    reached = max(flags.index(True) for flags in scored)
    return run.steps >= reached + 1 + settings.steps_after_success


def _decide(policy: Policy, runs: Sequence[_Running], seed: int) -> np.ndarray:
    observations, noise = [], []
    for run in runs:
        assert run.observation is not None
        observations.append(
            {
                "images": run.observation["images"],
                "state": run.observation["state"],
                # A scene may change its sentence on the way; a sentence of ours stays.
                "text": run.episode.text or run.observation["text"],
            }
        )
        key = (seed, run.episode.task, run.episode.start, run.decisions)
        noise.append(policy.noise_scale * keyed_noise(policy.noise_shape, *key))
    return policy.act_batch(observations, noise=torch.stack(noise))


def _execute(run: _Running, worker: Worker, chunk: np.ndarray, settings: RolloutSettings) -> None:
    steps = min(settings.act_steps, settings.max_steps - run.steps)
    executed = chunk[:steps] if run.stage is None else run.stage(chunk[:steps])
    actions = np.ascontiguousarray(executed, dtype=np.float32)
    run.actions.append(actions)
    run.decisions += 1
    run.observation = None
    worker.submit("run", actions=actions)


def _result(run: _Running) -> EpisodeResult:
    named = run.episode.named_task
    goals = {goal: _both_rules(flags) for goal, flags in run.goals.items()}
    return EpisodeResult(
        arm=run.episode.arm,
        task=run.episode.task,
        start=run.episode.start,
        text=run.text,
        steps=run.steps,
        decisions=run.decisions,
        success=_both_rules(run.success),
        first_success=run.success.index(True) + 1 if any(run.success) else None,
        goals=goals,
        named_task=named,
        named_success=None if named is None else goals[named],
        seconds=round(time.perf_counter() - run.started, 3),
    )


def _both_rules(flags: Sequence[bool]) -> dict[str, bool]:
    return {"any": any(flags), "end": bool(flags) and flags[-1]}
