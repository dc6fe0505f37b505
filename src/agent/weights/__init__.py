"""Published checkpoints: recognised by their tensors, loaded with nothing unaccounted for."""

from pizero.agent.weights.inspect import Found, inspect
from pizero.agent.weights.links import LeftOut, Link, Links
from pizero.agent.weights.load import Loaded, load_into, load_model
from pizero.agent.weights.report import LoadReport
from pizero.agent.weights.source import Entry, MemorySource, Source, open_source

__all__ = [
    "Entry", "Found", "LeftOut", "Link", "Links", "LoadReport", "Loaded", "MemorySource", "Source",
    "inspect", "load_into", "load_model", "open_source",
]  # fmt: skip
