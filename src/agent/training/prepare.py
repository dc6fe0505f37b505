"""What a run learns from its data before training: statistics, tokenizers, and a description.

Rank 0 computes them when a run begins, on the training split, and keeps them in the run folder; a
resumed run takes them from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from pizero.agent.checkpoint import build_pipeline
from pizero.agent.config import TrainConfig, build
from pizero.agent.training.distributed import Ranks
from pizero.agent.weights.folder import FAST_FILES, FILES
from pizero.data import fast_prompt
from pizero.data.dataset import RldsDataset
from pizero.data.fast_prompt import FAST
from pizero.data.fast_tokenizer import FastTokenizer
from pizero.data.mix import Mix
from pizero.data.stats import compute_statistics, load_statistics, save_statistics
from pizero.data.tokenizer import Tokenizer, train_tokenizer


def learn_from_data(
    config: TrainConfig, data: RldsDataset | Mix, ranks: Ranks, *, previous: Path | None
) -> None:
    """Put statistics and tokenizers into the run folder: from `previous`, or learnt now.

    A pipeline that names files of its own has them copied.
    """
    folder = Path(config.run_dir)
    if ranks.is_main and previous is not None:
        for name in FILES:
            if (previous / name).is_file():
                shutil.copyfile(previous / name, folder / name)
    elif ranks.is_main:
        node = config.pipeline.get("robot")
        robot = None if node is None else build(node, path="pipeline.robot")
        given, dataset = config.pipeline.get("statistics"), None
        if given is None and robot is not None:
            given, dataset = robot.statistics, robot.dataset
        found = (
            compute_statistics(data, delta_mask=config.pipeline.get("delta_mask"), robot=robot)
            if given is None
            else load_statistics(given, dataset=dataset)
        )
        save_statistics(found, folder / "stats.json")
        given = config.pipeline["tokenizer"]
        speaks = config.pipeline.get("prompt") == FAST
        if given is None:
            size, texts = config.tokenizer.vocab_size, sentences(data)
            texts = fast_prompt.sentences(texts) if speaks else texts
            train_tokenizer(texts, folder / "tokenizer.model", vocab_size=size)
        else:
            Tokenizer(given).save(folder / "tokenizer.model")
        if speaks:
            given = config.pipeline.get("action_tokenizer")
            found = fit_actions(config, data) if given is None else FastTokenizer.load(given)
            found.save(folder)
        else:
            # A sitting that was killed before its first checkpoint may have been of pi0-FAST.
            for name in FAST_FILES:
                (folder / name).unlink(missing_ok=True)
        build_pipeline(config.pipeline, folder).refuse_long(sentences(data))
    ranks.barrier()


def fit_actions(config: TrainConfig, data: RldsDataset | Mix) -> FastTokenizer:
    """A FAST tokenizer of the chunks that the run will learn, evenly spread over the data.

    The run folder holds statistics and words already.
    """
    folder, settings = Path(config.run_dir), config.action_tokenizer
    # The same pipeline, but for the answers, which cannot be spelt yet.
    pipeline = build(
        {**config.pipeline, "prompt": "pi0", "action_tokenizer": None},
        path="pipeline",
        statistics=folder / "stats.json",
        tokenizer=folder / "tokenizer.model",
    )
    stride = max(1, math.ceil(sum(map(len, parts(data).values())) / settings.chunks))
    chunks = (
        pipeline.encode_actions(part.read(i, images=False))
        for part in parts(data).values()
        for i in range(0, len(part), stride)
    )
    return FastTokenizer.fit(
        chunks,
        vocab_size=settings.vocab_size,
        scale=settings.scale,
        horizon=pipeline.horizon,
        action_dim=pipeline.robot_action_dim,
    )


def sentences(data: RldsDataset | Mix) -> list[str]:
    """The distinct instructions of a data set, sorted."""
    return sorted({text for part in parts(data).values() for text in part.texts()})


def describe(data: RldsDataset | Mix) -> dict[str, Any]:
    """What must not change between two sittings of one run: sizes of each data set."""
    return {
        name: {"episodes": part.num_episodes, "frames": len(part)}
        for name, part in parts(data).items()
    }


def parts(data: RldsDataset | Mix) -> dict[str, RldsDataset]:
    """The data sets of a mix by name; one alone is its own only part."""
    return dict(data.datasets) if isinstance(data, Mix) else {"data": data}
