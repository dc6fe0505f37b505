"""What a run learns from its data before training: statistics, tokenizers, and a description.

Rank 0 computes them when a run begins, on the training split, and keeps them in the run folder; a
resumed run takes them from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pizero.agent.checkpoint import build_pipeline, pipelines_of
from pizero.agent.config import TrainConfig, build
from pizero.agent.training.distributed import Ranks
from pizero.agent.weights.folder import FAST_FILES, FILES
from pizero.data import fast_prompt
from pizero.data.dataset import EpisodeDataset
from pizero.data.fast_prompt import FAST
from pizero.data.fast_tokenizer import FastTokenizer
from pizero.data.index import unknown_key
from pizero.data.mix import Mix
from pizero.data.stats import (
    compute_statistics,
    load_statistics,
    save_statistics,
    save_statistics_of_each,
)
from pizero.data.tokenizer import Tokenizer, train_tokenizer

Data = EpisodeDataset | Mix


def learn_from_data(
    config: TrainConfig, data: Data, held_out: Data, ranks: Ranks, *, previous: Path | None
) -> None:
    """Put statistics and tokenizers into the run folder: from `previous`, or learnt now.

    A pipeline that names files of its own has them copied. Nothing is learnt from `held_out`, but
    its instructions have to fit too.
    """
    folder = Path(config.run_dir)
    if ranks.is_main and previous is not None:
        for name in FILES:
            if (previous / name).is_file():
                shutil.copyfile(previous / name, folder / name)
    elif ranks.is_main:
        _learn_statistics(config, data, folder / "stats.json")
        given = config.pipeline["tokenizer"]
        speaks = config.pipeline.get("prompt") == FAST
        if given is None:
            size, texts = config.tokenizer.vocab_size, sentences(data)
            texts = fast_prompt.sentences(texts) if speaks else texts
            train_tokenizer(texts, folder / "tokenizer.model", vocab_size=size)
        else:
            Tokenizer(given).save(folder / "tokenizer.model")
        for name in FAST_FILES:  # of a sitting that was killed before its first checkpoint
            (folder / name).unlink(missing_ok=True)
        if speaks:
            given = config.pipeline.get("action_tokenizer")
            found = fit_actions(config, data) if given is None else FastTokenizer.load(given)
            found.save(folder)
        for name, part in by_pipeline(config, data).items():
            later = [p for n, p in parts(held_out).items() if name in (None, n)]
            texts = {*sentences(part), *(text for p in later for text in p.texts())}
            build_pipeline(config, folder, dataset=name).refuse_long(sorted(texts))
    ranks.barrier()


def by_pipeline(config: TrainConfig, data: Data) -> dict[str | None, Data]:
    """The data of each pipeline: by name where each data set has its own, else all under None."""
    own = pipelines_of(config)
    if own is None:
        return {None: data}
    if not isinstance(data, Mix):
        raise ValueError("pipelines are for the data sets of a Mix by name, got a single one")
    for name in own:
        if name not in data.datasets:
            raise unknown_key(name, data.datasets, where="the mix (in pipelines)")
    return {name: part for name, part in data.datasets.items()}


def _learn_statistics(config: TrainConfig, data: Data, path: Path) -> None:
    """Statistics of each pipeline's data: given, the robot's, or computed."""
    own = pipelines_of(config) or {}
    found = {}
    for name, part in by_pipeline(config, data).items():
        node = {**config.pipeline, **own.get(name or "", {})}
        robot = node.get("robot")
        robot = None if robot is None else build(robot, path="pipeline.robot")
        given, dataset = node.get("statistics"), None
        if given is None and robot is not None:
            given, dataset = robot.statistics, robot.dataset
        found[name] = (
            compute_statistics(part, delta_mask=node.get("delta_mask"), robot=robot)
            if given is None
            else load_statistics(given, dataset=dataset)
        )
    if None in found:
        save_statistics(found[None], path)
    else:
        save_statistics_of_each(found, path)


def fit_actions(config: TrainConfig, data: Data) -> FastTokenizer:
    """A FAST tokenizer of the chunks that the run will learn, evenly spread over the data.

    The run folder holds statistics and words already.
    """
    folder, settings = Path(config.run_dir), config.action_tokenizer
    # The same pipeline, but for the answers, which cannot be spelt yet.
    silent = {**config.pipeline, "prompt": "pi0", "action_tokenizer": None}
    pipelines = {
        name: build_pipeline(replace(config, pipeline=silent), folder, dataset=name)
        for name in by_pipeline(config, data)
    }
    widths = {name: p.robot_action_dim for name, p in pipelines.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"pi0-FAST spells actions of one width, the data sets have {widths}; give "
            "pipeline.action_tokenizer"
        )
    pipeline = next(iter(pipelines.values()))
    stride = max(1, math.ceil(sum(map(len, parts(data).values())) / settings.chunks))
    chunks = (
        pipelines.get(name, pipeline).encode_actions(part.read(i, images=False))
        for name, part in parts(data).items()
        for i in range(0, len(part), stride)
    )
    return FastTokenizer.fit(
        chunks,
        vocab_size=settings.vocab_size,
        scale=settings.scale,
        horizon=pipeline.horizon,
        action_dim=pipeline.robot_action_dim,
    )


def sentences(data: Data) -> list[str]:
    """The distinct instructions of a data set, sorted."""
    return sorted({text for part in parts(data).values() for text in part.texts()})


def describe(data: Data) -> dict[str, Any]:
    """What must not change between two sittings of one run: sizes of each data set."""
    return {
        name: {"episodes": part.num_episodes, "frames": len(part)}
        for name, part in parts(data).items()
    }


def parts(data: Data) -> dict[str, EpisodeDataset]:
    """The data sets of a mix by name; one alone is its own only part."""
    return dict(data.datasets) if isinstance(data, Mix) else {"data": data}
