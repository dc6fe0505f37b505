"""Do the same to many files, in this process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from pizero.data.progress import watched

_T = TypeVar("_T")
_S = TypeVar("_S")


class Workers:
    """`workers(function, items, what=...)` yields the results in order; 0 processes: done here.

    The processes start with the first use and end with the `with` block.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __call__(
        self, function: Callable[[_T], _S], items: Sequence[_T], *, what: str
    ) -> Iterator[_S]:
        if self.count and len(items) > 1:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"))
            results = self._pool.map(
                function, items, chunksize=max(1, len(items) // (8 * self.count))
            )
        else:
            results = map(function, items)
        try:
            yield from watched(results, total=len(items), what=what)
        except BrokenProcessPool as error:
            raise ValueError(
                f"{what}: a process ended early, for want of memory or because the script lacks "
                "`if __name__ == '__main__':` around what it does (index_workers=0 needs neither)"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
