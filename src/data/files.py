"""Files of descriptions: JSON that is refused when damaged, and writing that is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; ValueError with its name where it is none."""
    try:
        return parse_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def parse_json(text: str) -> Any:
    """JSON in which no key is given twice; ValueError otherwise."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file under a temporary name and rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return found
