"""Many jobs on several workers, of which some may die.

    with WorkerPool(launch) as pool:
        for job, result in pool.map(jobs, request=lambda job: ("reset", {"start": job}), workers=4):
            ...

Results come in the order in which they are ready. A worker that dies is replaced and its job done
again; a job that kills its worker twice ends the work, and so does an error inside a simulator.
"""

from __future__ import annotations

import select
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from pizero.agent.env.client import EnvClient, WorkerDied

J = TypeVar("J", bound=Hashable)

_DEATHS_PER_JOB = 2
_DEATHS_IN_A_ROW = 5


class WorkerPool:
    """Workers made by `launch`, closed together."""

    def __init__(self, launch: Callable[[], EnvClient]) -> None:
        self._launch = launch
        self._idle: list[EnvClient] = []
        self._busy: dict[EnvClient, Any] = {}

    def call(self, method: str, **arguments: Any) -> Any:
        """One call, outside any `map`."""
        client = self._idle.pop() if self._idle else self._launch()
        try:
            result = client.call(method, **arguments)
        except BaseException:
            client.close()
            raise
        self._idle.append(client)
        return result

    def map(
        self,
        jobs: Iterable[J],
        *,
        request: Callable[[J], tuple[str, Mapping[str, Any]]],
        workers: int,
    ) -> Iterator[tuple[J, Any]]:
        """Yield (job, result) for every job. `request` gives a job's method and arguments."""
        waiting = deque(jobs)
        deaths: Counter[J] = Counter()
        in_a_row = 0
        while waiting or self._busy:
            while waiting and len(self._busy) < workers:
                client = self._idle.pop() if self._idle else self._launch()
                self._busy[client] = waiting.popleft()
                method, arguments = request(self._busy[client])
                try:
                    client.submit(method, **arguments)
                except WorkerDied as error:
                    in_a_row += 1
                    waiting.appendleft(self._bury(client, deaths, in_a_row, error))
            for client in select.select(list(self._busy), [], [], 1.0)[0] if self._busy else ():
                try:
                    result = client.result()
                except WorkerDied as error:
                    in_a_row += 1
                    waiting.appendleft(self._bury(client, deaths, in_a_row, error))
                    continue
                in_a_row = 0
                job = self._busy.pop(client)
                self._idle.append(client)
                yield job, result

    def close(self) -> None:
        """End all workers, busy or not."""
        for client in (*self._idle, *self._busy):
            client.close()
        self._idle, self._busy = [], {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _bury(
        self, client: EnvClient, deaths: Counter[Any], in_a_row: int, error: WorkerDied
    ) -> Any:
        """Give a dead worker's job back, or give up."""
        job = self._busy.pop(client)
        client.close()
        deaths[job] += 1
        if deaths[job] >= _DEATHS_PER_JOB:
            raise RuntimeError(
                f"{job} has killed its worker {deaths[job]} times; last: {error}"
            ) from error
        if in_a_row >= _DEATHS_IN_A_ROW:
            raise RuntimeError(f"{in_a_row} workers in a row have died; last: {error}") from error
        return job
