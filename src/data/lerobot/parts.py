"""The files of a LeRobot set that is being written: tables and videos, of bounded size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pizero.data.lerobot.encode import VideoEncoder

CHUNK = 1000  # files in a folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


class TableFiles:
    """Parquet files of one template; each table is a row group, none is split."""

    def __init__(self, folder: Path, template: str, *, largest: int) -> None:
        self.folder, self.template, self.largest = folder, template, largest
        self.count = 0  # files that are whole
        self._writer: pq.ParquetWriter | None = None
        self._file: Any = None

    @property
    def paths(self) -> list[Path]:
        """The files that are whole."""
        return [self._path(number) for number in range(self.count)]

    def write(self, table: pa.Table) -> None:
        """Append a table to file `count`."""
        if self._writer is None:
            path = self._path(self.count)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._writer = _open(self._file, table.schema)
        self._writer.write_table(table)
        if self._file.tell() >= self.largest:
            self.close()

    def close(self) -> None:
        """Finish the file that is open."""
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer, self.count = None, self.count + 1

    def _path(self, number: int) -> Path:
        return self.folder / numbered(self.template, number)


class VideoFiles:
    """The video files of one camera, each of several whole episodes."""

    def __init__(self, folder: Path, key: str, *, largest: int, options: Mapping[str, Any]) -> None:
        self.folder, self.key, self.largest, self.options = folder, key, largest, options
        self.count = 0  # files that are whole
        self._encoder: VideoEncoder | None = None

    @property
    def first(self) -> Path:
        """The path of the first file."""
        return self.folder / numbered(VIDEO_PATH, 0, video_key=self.key)

    @property
    def frames(self) -> int:
        """Frames in file `count` so far."""
        return 0 if self._encoder is None else self._encoder.frames

    def add(self, image: np.ndarray) -> None:
        """Append a frame, uint8 [h w 3], to file `count`."""
        if self._encoder is None:
            path = self.folder / numbered(VIDEO_PATH, self.count, video_key=self.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = image.shape[:2]
            self._encoder = VideoEncoder(path, height=height, width=width, **self.options)
        self._encoder.add(image)

    def end_episode(self) -> None:
        """Begin another file for the next episode if this one is large."""
        if self._encoder is not None and self._encoder.bytes >= self.largest:
            self.close()

    def close(self) -> None:
        """Finish the file that is open."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder, self.count = None, self.count + 1


def numbered(template: str, file: int, **values: str) -> str:
    """The path of a set's file, counted over all folders."""
    return template.format(chunk_index=file // CHUNK, file_index=file % CHUNK, **values)


def write_table(path: Path, table: pa.Table) -> None:
    """One parquet file of one table."""
    with _open(path, table.schema) as writer:
        writer.write_table(table)


def with_types(table: pa.Table) -> pa.Table:
    """The table with its columns' types in the words of the `datasets` library."""

    def words(kind: pa.DataType) -> dict[str, Any]:
        if pa.types.is_struct(kind):
            return {"_type": "Image"}
        if pa.types.is_fixed_size_list(kind):
            return {
                "feature": words(kind.value_type),
                "length": kind.list_size,
                "_type": "Sequence",
            }
        return {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}

    features = {field.name: words(field.type) for field in table.schema}
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """The texts as the index of a pandas table, which is where LeRobot looks for them."""

    def column(name: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
        types = {"pandas_type": pandas_type, "numpy_type": numpy_type}
        return {"name": name, "field_name": name, **types, "metadata": None}

    numbers, texts = pa.array(list(tasks.values()), pa.int64()), pa.array(list(tasks), pa.string())
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": None,
    }
    table = pa.table({"task_index": numbers, "task": texts})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _open(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, schema, compression="snappy", write_page_checksum=True)
