"""Named tensors from any file or folder that a checkpoint comes in, one at a time.

A source knows names, shapes and dtypes as they are stored and nothing about models: what the names
mean is the business of the layouts. Loading through a source needs the memory of the model and of
one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pizero.agent.weights.entry import Entry
from pizero.agent.weights.orbax import METADATA, OrbaxSource
from pizero.agent.weights.safetensors_file import SafetensorsSource
from pizero.agent.weights.shards import SAFETENSORS_INDEX, TORCH_INDEX
from pizero.agent.weights.torch_file import TorchSource
from pizero.types import Tensor

__all__ = ["Entry", "MemorySource", "Source", "open_source"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
EXPECTED = (
    "a checkpoint or run folder of pizero, a .safetensors file or a *.safetensors.index.json with "
    "its shards, a .pt, .pth or .bin file of torch.save or a *.bin.index.json, or an Orbax folder "
    "(with _METADATA, or with params/ that has it)"
)


class Source(Protocol):
    """Where the tensors of a checkpoint come from."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Shape and dtype by name, as stored."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What safetensors files say of themselves; empty for other formats."""
        ...

    def read(self, name: str) -> Tensor:
        """A new tensor that owns its memory, in the stored dtype."""
        ...


class MemorySource:
    """Tensors that are in memory already, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor], *, path: Path = Path("memory")) -> None:
        self.path = path
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self.metadata: dict[str, str] = {}
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().to("cpu", copy=True).contiguous()


def open_source(path: str | Path) -> Source:
    """The tensors at `path`: a file, or a folder with exactly one set of weights in it."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected {EXPECTED}")
    if path.name.endswith((".safetensors", SAFETENSORS_INDEX)):
        return SafetensorsSource(path)
    if path.name.endswith((*TORCH_SUFFIXES, TORCH_INDEX)):
        return TorchSource(path)
    raise ValueError(f"{path} is of no known kind: expected {EXPECTED}")


def _open_folder(folder: Path) -> Source:
    candidates: list[tuple[Path, Callable[[Path], Source]]] = []
    if (folder / "model.safetensors").is_file():
        candidates.append((folder / "model.safetensors", SafetensorsSource))
    indices = sorted(folder.glob(f"*{SAFETENSORS_INDEX}"))
    candidates += [(index, SafetensorsSource) for index in indices]
    candidates += [
        (inner, OrbaxSource)
        for inner in (folder, folder / "params")
        if (inner / METADATA).is_file()
    ]
    if not candidates:  # only without safetensors: some keep both
        candidates = [(index, TorchSource) for index in sorted(folder.glob(f"*{TORCH_INDEX}"))]
    if not candidates:
        # Weights under a name of their own: only without the usual ones, beside which lie the
        # tensors of processors (LeRobot) and optimizers (openpi).
        files = sorted(p for p in folder.iterdir() if p.is_file())
        candidates = [(p, SafetensorsSource) for p in files if p.suffix == ".safetensors"]
        candidates += [(p, TorchSource) for p in files if p.suffix in TORCH_SUFFIXES]
    if len(candidates) > 1:
        raise ValueError(
            f"{folder} holds several checkpoints, name the one to read: "
            + ", ".join(str(p.relative_to(folder)) for p, _ in candidates)
        )
    if not candidates:
        names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
        found = ", ".join(names[:20]) + ", ..." * (len(names) > 20) if names else "an empty folder"
        raise ValueError(f"no checkpoint in {folder}: expected {EXPECTED}; found {found}")
    found, kind = candidates[0]
    return kind(found)
