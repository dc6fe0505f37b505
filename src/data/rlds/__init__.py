"""RLDS on disk: TFRecord files of episodes, indexed once and read by random access."""

from __future__ import annotations

from pizero.data.index import Index
from pizero.data.rlds.index import open_index
from pizero.data.rlds.spec import DatasetSpec, FeatureSpec
from pizero.data.rlds.tfrecord import CorruptRecordError, FileReader
from pizero.data.rlds.writer import RldsWriter

__all__ = [
    "CorruptRecordError",
    "DatasetSpec",
    "FeatureSpec",
    "FileReader",
    "Index",
    "RldsWriter",
    "open_index",
]
