"""The type checker of the test lane that checks shapes: array annotations, and nothing else.

`.ci/test` names `check` to jaxtyping's import hook, which applies it to every function and data
class of the package. Other annotations are pyright's business: tests pass wrong values on purpose,
to see the error, and stand-ins that only behave like what is annotated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

ARRAYS = re.compile(r"\b(Bool|Float|Int|Num|UInt8)\[")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checking those of its arguments and results that are annotated as arrays."""
    notes = function.__annotations__
    arrays = {name: note for name, note in notes.items() if ARRAYS.search(str(note))}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return beartype(function)
