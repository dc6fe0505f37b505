"""What a run learns from its data before training: statistics, a tokenizer, and a description.

Rank 0 computes them when a run begins, on the training split, and keeps them in the run folder; a
resumed run takes them from its checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pizero.agent.config import TrainConfig, build
from pizero.agent.training.distributed import Ranks
from pizero.agent.weights.folder import FILES
from pizero.data.dataset import RldsDataset
from pizero.data.mix import Mix
from pizero.data.stats import compute_statistics, load_statistics, save_statistics
from pizero.data.tokenizer import Tokenizer, train_tokenizer


def learn_from_data(
    config: TrainConfig, data: RldsDataset | Mix, ranks: Ranks, *, previous: Path | None
) -> None:
    """Put stats.json and tokenizer.model into the run folder: from `previous`, or learnt now.

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
        if given is None:
            size = config.tokenizer.vocab_size
            train_tokenizer(sentences(data), folder / "tokenizer.model", vocab_size=size)
        else:
            Tokenizer(given).save(folder / "tokenizer.model")
    ranks.barrier()


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
