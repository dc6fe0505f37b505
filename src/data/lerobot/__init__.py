"""LeRobot data sets: versions 2.0, 2.1 and 3.0 read in place, 3.0 written."""

from __future__ import annotations

try:
    import av  # noqa: F401
    import pyarrow  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"reading LeRobot sets needs {error.name}: pip install 'pizero[lerobot]'", name=error.name
    ) from error

from pizero.data.lerobot.dataset import LeRobotDataset
from pizero.data.lerobot.export import export_episodes
from pizero.data.lerobot.writer import LeRobotWriter

__all__ = ["LeRobotDataset", "LeRobotWriter", "export_episodes"]
