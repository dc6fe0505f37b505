"""RLDS streamed by TensorFlow: the samples of a `Mix`, in an order that tf.data makes.

    files -> episodes (rule, chunks) -> frames, still encoded -> shuffle -> decode, resize -> Sample

For comparison with pipelines of this kind, and for storage that is only quick from front to back.
A sample holds what `RldsDataset.read` gives. Which come when is up to the shuffle buffer, so a
stream cannot be resumed exactly. TensorFlow is imported when a stream begins; `pip install
pizero[rlds-tf]` brings it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pizero.data.dataset import EpisodeDataset, RldsDataset, Sample
from pizero.data.hashing import mix_bits
from pizero.data.loader import TrainLoader
from pizero.data.mix import Mix
from pizero.data.sampler import rank_samples
from pizero.data.select import parse_split
from pizero.data.standardize import Standard

EXTRA = "pizero[rlds-tf]"
RECORD = "tfds_id"


class TfMix(Mix):
    """A mix whose training samples are streamed by TensorFlow (TfLoader).

    shuffle_buffer   frames held, as they are stored, to shuffle among; shared out by weight
    read_files       files of each source that are read at once, an episode of each by turns

    The rest is as in Mix. Sizes, statistics and instructions come from the indexes, and so does
    which frames are drawn. Every source is gone through completely before it starts over.
    """

    def __init__(
        self,
        *,
        datasets: Mapping[str, EpisodeDataset],
        weights: Mapping[str, float] | None = None,
        balance: str | None = None,
        shuffle_buffer: int = 50_000,
        read_files: int = 4,
    ) -> None:
        for name, value in (("shuffle_buffer", shuffle_buffer), ("read_files", read_files)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        super().__init__(datasets=datasets, weights=weights, balance=balance)
        self.shuffle_buffer, self.read_files = shuffle_buffer, read_files
        for name, dataset in self.datasets.items():
            if not isinstance(dataset, RldsDataset):
                raise ValueError(
                    f"{name}: TensorFlow streams RLDS; expected an RldsDataset, got "
                    f"{type(dataset).__name__}"
                )
            if count := len(dataset.index.damaged):
                raise ValueError(
                    f"{name}: {dataset.index.directory} has {count} damaged records, which "
                    "TensorFlow cannot leave out; use Mix, or repair the files"
                )
        if len(found := {dataset.frames for dataset in self.datasets.values()}) > 1:
            raise ValueError(f"expected data sets of equally many frames, got {sorted(found)}")

    def samples(
        self,
        *,
        seed: int,
        image_size: tuple[int, int] | None = None,
        threads: int = 1,
        start_sample: int = 0,
        global_batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> Iterator[Sample]:
        """This rank's samples without end, each with the name of its dataset, as `read` gives them.

        They stand for the numbers that `rank_samples` gives from `start_sample` on, and a number's
        source is the one that Mix has for it. Ranks split the episodes of each source between them.
        `image_size` (height, width) resizes, by lanczos with antialiasing. Another `start_sample`
        gives another order. Raises ValueError where something cannot be read.
        """
        tf, tfds = import_tensorflow()
        slices = {
            "global_batch_size": global_batch_size,
            "rank": rank,
            "world_size": world_size,
            "accumulate": accumulate,
        }
        rank_samples(start_sample, **slices)  # refuses sizes that do not divide
        order = self.order(seed)
        cameras = [*dict.fromkeys(name for d in self.datasets.values() for name in d.cameras)]
        streams = []
        for number, (source, share) in enumerate(zip(self._sources, order.shares, strict=True)):
            dataset = self.datasets[self.names[source.dataset]]
            part = _Part(
                dataset=dataset,
                number=source.dataset,
                episodes=_share(dataset, source.episodes, rank, world_size),
                seed=int(mix_bits(seed, start_sample, rank, number) >> np.uint64(2)),
            )
            frames = part.frames(tf, tfds, cameras, self.read_files, threads)
            held = max(1, round(self.shuffle_buffer * float(share / order.shares.sum())))
            streams.append(frames.shuffle(held, seed=part.seed).repeat())

        def sources(step: np.ndarray) -> np.ndarray:
            first = start_sample + int(step) * global_batch_size
            return order(rank_samples(first, **slices).reshape(-1))[0]

        def choose(step: Any) -> Any:
            return tf.ensure_shape(tf.numpy_function(sources, [step], tf.int64), [None])

        stream = streams[0]
        if len(streams) > 1:
            choice = tf.data.Dataset.counter().map(choose).unbatch()
            stream = tf.data.Dataset.choose_from_datasets(streams, choice)
        stream = stream.map(
            lambda frame: frame | {"images": _decode_images(tf, frame["images"], image_size)},
            num_parallel_calls=threads,
        )
        stream = stream.prefetch(2 * threads).with_options(_options(tf, threads))
        return self._read(tf, stream)

    def _read(self, tf: Any, stream: Any) -> Iterator[Sample]:
        """What comes out of the stream in the form of samples."""
        failures = tf.errors.OpError  # an abandoned stream may outlive the module
        try:
            for frame in stream.as_numpy_iterator():
                name = self.names[int(frame["dataset"])]
                views = {k: v for k, v in frame["images"].items() if v.size}
                if self.datasets[name].frames == 1:
                    views = {k: v[0] for k, v in views.items()}
                yield {
                    "images": views,
                    "state": frame["state"],
                    "actions": frame["actions"],
                    "action_is_pad": frame["action_is_pad"],
                    "text": frame["text"].decode(),
                    "episode": int(frame["episode"]),
                    "step": int(frame["step"]),
                    "dataset": name,
                }
        except failures as error:
            where = ", ".join(str(d.index.directory) for d in self.datasets.values())
            first = str(error.message).split("\n")[0]
            raise ValueError(f"streaming {where}: {first}") from error


class TfLoader(TrainLoader):
    """TrainLoader over what a TfMix streams; the other arguments are TrainLoader's.

    With `num_workers` one process streams, in as many threads. A loader that starts at a later
    sample goes on with other frames than an uninterrupted one. Where pipelines resize by lanczos,
    TensorFlow does it.
    """

    def __init__(
        self,
        *,
        dataset: TfMix,
        order: str = "global",
        start_method: str | None = "spawn",  # a process that holds TensorFlow must not fork
        **arguments: Any,
    ) -> None:
        if order != "global":
            raise ValueError(
                f"a stream has an order of its own; expected order global, got {order!r}"
            )
        super().__init__(dataset=dataset, order=order, start_method=start_method, **arguments)
        self._mix = dataset

    def _batches(self, numbers: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        workers = self._options["num_workers"]
        sizes = {p.image_size if p.resize == "lanczos" else None for p in self._source.pipelines}
        samples = partial(
            self._mix.samples,
            seed=self.seed,
            image_size=sizes.pop() if len(sizes) == 1 else None,
            threads=max(1, workers),
            start_sample=self.samples,
            **self._slice,
        )
        stream = _Stream(samples, self._source.encode, numbers)
        options: dict[str, Any] = {**self._options, "num_workers": min(1, workers)}
        return DataLoader(stream, batch_size=None, **options)


class _Stream(IterableDataset):
    """Batches in the order of the stream; lives in the worker."""

    def __init__(
        self,
        samples: Callable[[], Iterator[Sample]],
        encode: Callable[[Sequence[Sample], np.ndarray], dict[str, Tensor]],
        numbers: Iterable[list[int]],
    ) -> None:
        self.samples, self.encode, self.numbers = samples, encode, numbers

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        samples = self.samples()
        for numbers in self.numbers:
            found = list(islice(samples, len(numbers)))
            yield self.encode(found, np.array(numbers)) | {"skipped": torch.tensor(0)}


def streamed(*, mix: Mix, shuffle_buffer: int = 50_000, read_files: int = 4) -> TfMix:
    """A mix that was made by something else, such as `oxe_mix`, as one that TensorFlow streams."""
    return TfMix(
        datasets=mix.datasets,
        weights=mix.weights,
        balance=mix.balance,
        shuffle_buffer=shuffle_buffer,
        read_files=read_files,
    )


def iterate(
    dataset: RldsDataset,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    shuffle_buffer: int = 10_000,
    read_files: int = 4,
    threads: int = 1,
) -> Iterator[Sample]:
    """The samples of one dataset without end, streamed by TensorFlow."""
    mix = TfMix(datasets={"data": dataset}, shuffle_buffer=shuffle_buffer, read_files=read_files)
    return mix.samples(seed=seed, image_size=image_size, threads=threads)


def import_tensorflow() -> tuple[Any, Any]:
    """TensorFlow, which leaves GPUs alone then, and tfds; ValueError where they are missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        tf, tfds = map(import_module, ("tensorflow", "tensorflow_datasets"))
    except ImportError as error:
        raise ValueError(
            f"streaming with TensorFlow needs tensorflow and tensorflow_datasets ({error}); "
            f"pip install '{EXTRA}', or use pizero.data.mix.Mix, which needs neither"
        ) from error
    tf.config.set_visible_devices([], "GPU")
    tf.get_logger().setLevel("ERROR")  # tfds calls functions that TensorFlow calls old
    return tf, tfds


@dataclass(frozen=True)
class _Part:
    """What one rank reads of one source: `episodes` are positions among those chosen."""

    dataset: EpisodeDataset
    number: int  # of the dataset in the mix
    episodes: np.ndarray
    seed: int

    def frames(
        self, tf: Any, tfds: Any, cameras: Sequence[str], read_files: int, threads: int
    ) -> Any:
        """One pass over the frames, images encoded; `cameras` that it lacks are empty."""
        standardise = _Standardise(self.dataset, self.episodes)
        kinds = [tf.as_dtype(kind) for kind in standardise.OUTPUTS.values()]

        def chunks(episode: dict[str, Any], draw: Any) -> dict[str, Any]:
            inputs = [episode[RECORD], draw, *(episode[key] for key in standardise.keys)]
            found = tf.numpy_function(standardise, inputs, kinds)
            found = dict(zip(standardise.OUTPUTS, found, strict=True))
            return self._chunks(tf, cameras, episode, found)

        episodes = self._episodes(tf, tfds, standardise.keys, read_files, threads)
        draws = tf.data.Dataset.random(seed=self.seed, rerandomize_each_iteration=True)
        episodes = tf.data.Dataset.zip((episodes, draws)).map(chunks, num_parallel_calls=threads)
        # `unbatch` copies frames out. from_tensor_slices would hand out views, by which every frame
        # in the shuffle buffer keeps its whole episode in memory.
        return episodes.unbatch()

    def _episodes(
        self, tf: Any, tfds: Any, columns: Sequence[str], read_files: int, threads: int
    ) -> Any:
        """Flat columns of each episode by key, images encoded, and the name of its record."""
        directory = self.dataset.index.directory
        try:
            # tfds.builder would look the name up, for which it may ask a server.
            builder = tfds.builder_from_directory(str(directory))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{directory}: tensorflow_datasets cannot open this data set: {error}"
            ) from error
        pictures = [key for keys in self.dataset.cameras.values() for key in keys]
        steps = builder.info.features["steps"]
        leaves = {key: _leaf(steps, key) for key in dict.fromkeys((*columns, *pictures))}
        only = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(_nested(leaves))})

        class Columns(tfds.decode.PartialDecoding):
            """Parses what is needed and leaves it as it is stored."""

            def extract_features(self, features: Any) -> Any:
                return only

        stored = self.dataset.episodes[self.episodes]
        episodes = builder.as_dataset(
            split=f"{parse_split(self.dataset.split)[0]}[{stored.min()}:{stored.max() + 1}]",
            shuffle_files=True,
            decoders=Columns({}, decoders={"steps": tfds.decode.SkipDecoding()}),
            read_config=tfds.ReadConfig(
                add_tfds_id=True,
                try_autocache=False,
                shuffle_seed=self.seed,
                shuffle_reshuffle_each_iteration=True,
                interleave_cycle_length=read_files,
                interleave_block_length=1,
                num_parallel_calls_for_decode=threads,
                num_parallel_calls_for_interleave_files=threads,
                enable_ordering_guard=False,
                skip_prefetch=True,
            ),
        )

        def flat(episode: dict[str, Any]) -> dict[str, Any]:
            found = {RECORD: episode["tfds_id"]}
            for key, leaf in leaves.items():
                column = episode["steps"]
                for name in key.split("/"):
                    column = column[name]
                found[key] = column if key in pictures else leaf.decode_batch_example(column)
            return found

        return episodes.map(flat, num_parallel_calls=threads)

    def _chunks(
        self, tf: Any, cameras: Sequence[str], episode: dict[str, Any], found: dict[str, Any]
    ) -> dict[str, Any]:
        """Every frame of one episode with its history, encoded, and the actions ahead of it."""
        data = self.dataset
        state = tf.ensure_shape(found["state"], [None, data.state_dim])
        action = tf.ensure_shape(found["action"], [None, data.action_dim])
        step = tf.ensure_shape(found["step"], [None])
        length = tf.shape(action, tf.int64)[0]
        past = data.stride * tf.range(1 - data.frames, 1, dtype=tf.int64)
        past = tf.maximum(step[:, None] + past, 0)
        ahead = step[:, None] + data.stride * tf.range(data.horizon, dtype=tf.int64)
        stored = tf.gather(found["row"], past)
        choice = tf.ensure_shape(found["camera"], [None, len(data.cameras)])
        images = {name: tf.fill(tf.shape(past), "") for name in cameras}
        for i, (name, keys) in enumerate(data.cameras.items()):
            columns = tf.stack([episode[key] for key in keys], axis=1)
            chosen = tf.broadcast_to(choice[:, i : i + 1], tf.shape(past))
            images[name] = tf.gather_nd(columns, tf.stack([stored, chosen], axis=-1))
        shape = [None, data.frames]
        return {
            "images": {name: tf.ensure_shape(image, shape) for name, image in images.items()},
            "state": tf.gather(state, past),
            "actions": tf.gather(action, tf.minimum(ahead, length - 1)),
            "action_is_pad": ahead >= length + int(data.octo_compat),
            "text": tf.ensure_shape(found["text"], [None]),
            "episode": tf.fill(tf.shape(step), tf.ensure_shape(found["episode"], [])),
            "step": step,
            "dataset": tf.fill(tf.shape(step), tf.constant(self.number, tf.int64)),
        }


class _Standardise:
    """What the rule makes of one episode, and which frames are drawn; numpy that tf.data calls."""

    OUTPUTS: ClassVar = {
        "episode": "int64",  # position among the chosen
        "step": "int64",  # [frames]
        "text": "string",  # [frames]
        "camera": "int64",  # [frames cameras], which of its keys a camera is taken from
        "row": "int64",  # [steps], as stored
        "state": "float32",  # [steps S]
        "action": "float32",  # [steps A]
    }

    def __init__(self, dataset: EpisodeDataset, episodes: np.ndarray) -> None:
        self.dataset = dataset
        self.keys = tuple(dict.fromkeys((*dataset.rule.keys, *dataset.text_keys)))
        index = dataset.index
        # tfds names a record by its file and its place there.
        first = np.searchsorted(index.shard, np.arange(len(index.files)))
        self.first = {Path(f).name: int(n) for f, n in zip(index.files, first, strict=True)}
        stored = dataset.episodes[episodes].tolist()
        self.chosen = dict(zip(stored, episodes.tolist(), strict=True))
        self.rows = dataset.rows

    def __call__(self, record: bytes, draw: np.int64, *values: np.ndarray) -> list[np.ndarray]:
        """The outputs; an episode that is not chosen has no frames."""
        data = self.dataset
        file, _, place = record.decode().rpartition("__")
        episode = self.chosen.get(self.first[file] + int(place), -1)
        if episode < 0:
            nothing = np.zeros((0, data.action_dim)), np.zeros((0, data.state_dim))
            return self._outputs(episode, np.zeros(0, int), [], Standard(*nothing), draw)
        columns = {k: self._column(k, v) for k, v in zip(self.keys, values, strict=True)}
        found = data.rule.function({key: columns[key] for key in data.rule.keys})
        if len(found.action) != data.lengths[episode]:
            raise ValueError(
                f"{record.decode()}: expected {data.lengths[episode]} steps as in the index, got "
                f"{len(found.action)}"
            )
        first, count = int(data.episode_starts[episode]), int(data.episode_lengths[episode])
        steps = np.arange(count)
        if not isinstance(self.rows, slice):
            steps = self.rows[first : first + count] - data.starts[episode]
        if found.text is not None:
            texts = [[str(text)] for text in found.text[steps]]
        else:
            stored = steps if found.rows is None else found.rows[steps]
            texts = [[str(columns[key][row]) for key in data.text_keys] for row in stored]
        return self._outputs(episode, steps, texts, found, draw)

    def _outputs(
        self,
        episode: int,
        steps: np.ndarray,
        texts: Sequence[Sequence[str]],
        found: Standard,
        draw: np.int64,
    ) -> list[np.ndarray]:
        data, random = self.dataset, np.random.default_rng(int(draw))
        n = len(found.action)
        state = np.zeros((n, 0)) if found.state is None else found.state
        counts = [len(keys) for keys in data.cameras.values()]
        values = {
            "episode": np.array(episode),
            "step": steps,
            "text": np.array([self._text(t, random).encode() for t in texts], object),
            "camera": random.integers(0, counts, (len(steps), len(counts))),
            "row": np.arange(n) if found.rows is None else found.rows,
            "state": state,
            "action": found.action,
        }
        numbers = {k: v for k, v in self.OUTPUTS.items() if v != "string"}
        return [values[k].astype(numbers.get(k, object)) for k in self.OUTPUTS]

    def _text(self, texts: Sequence[str], random: np.random.Generator) -> str:
        """One of the texts that are not empty."""
        texts = [text for text in texts if text.strip()] or texts
        if len(texts) < 2:
            return texts[0] if texts else ""
        return texts[int(random.integers(len(texts) - self.dataset.octo_compat))]

    def _column(self, key: str, values: np.ndarray) -> np.ndarray:
        """The column as the index has it: texts as str."""
        column = self.dataset.index.columns["steps"][key]
        if column.kind != "text":
            return values.astype(column.dtype, copy=False)
        if values.dtype == object:
            return np.array([text.decode() for text in values], object)
        return np.array(["".join(map(chr, codes)).split("\0")[0] for codes in values], object)


def _share(dataset: EpisodeDataset, episodes: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """A rank's consecutive part of the episodes, with about as many frames as the others'."""
    ends = np.cumsum(dataset.episode_lengths[episodes])
    centers = ends - dataset.episode_lengths[episodes] / 2
    owner = np.minimum(centers * world_size // max(int(ends[-1]), 1), world_size - 1)
    mine = episodes[owner == rank]
    if not dataset.episode_lengths[mine].sum():
        raise ValueError(
            f"{dataset.index.directory}: {len(episodes)} episodes of {dataset.split!r} do not go "
            f"round {world_size} ranks; use Mix, which shares out frames, or fewer ranks"
        )
    return mine


def _decode_images(
    tf: Any, images: Mapping[str, Any], size: tuple[int, int] | None
) -> dict[str, Any]:
    """Encoded images [frames] as uint8 [frames h w 3]; no pixels where one is empty."""

    def decode(encoded: Any) -> Any:
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        image.set_shape([None, None, 3])
        if size is None:
            return image
        # The weights of lanczos overshoot, and a plain cast would wrap round.
        image = tf.image.resize(image, size, method="lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    def decode_all(encoded: Any) -> Any:
        return tf.stack([decode(one) for one in tf.unstack(encoded)])

    decoded = {}
    for name, encoded in images.items():
        missing = tf.reduce_any(tf.equal(encoded, ""))
        empty = tf.zeros([encoded.shape[0], 0, 0, 3], tf.uint8)
        decoded[name] = tf.cond(missing, lambda e=empty: e, lambda e=encoded: decode_all(e))
    return decoded


def _options(tf: Any, threads: int) -> Any:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # it would spend whatever memory there is on reading ahead
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return options


def _leaf(feature: Any, key: str) -> Any:
    """The feature of a flat key."""
    for name in key.split("/"):
        feature = feature[name]
    return feature


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
