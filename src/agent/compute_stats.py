"""`scripts/compute_stats.py`: exact statistics of states and actions, in any project's dialect."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pizero.agent.report.dataset_findings import constant_dimensions, counted
from pizero.agent.sources import (
    Source,
    Sources,
    add_arguments,
    dataset_splits,
    open_configured,
    open_sources,
)
from pizero.data.dataset import EpisodeDataset
from pizero.data.mix import Mix
from pizero.data.stats import (
    DIALECTS,
    Statistics,
    compute_statistics,
    save_statistics,
    save_statistics_of_each,
)

GROUPS = ("action", "state")


@dataclass(frozen=True)
class Job:
    """What one set of statistics is made from."""

    name: str
    source: Source  # for names, robot and delta mask
    data: EpisodeDataset | Mix


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, print and write; a mistake ends in one message."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(highlight=False)
    try:
        files = _run(options, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True)


def _run(options: argparse.Namespace, console: Console) -> list[Path]:
    mask = _mask(options.delta_mask)
    found = {}
    for job in _jobs(options):
        started = time.monotonic()
        delta = mask
        if delta is None and job.source.learning is not None:
            delta = job.source.learning.delta_mask
        found[job.name] = compute_statistics(job.data, delta_mask=delta, robot=job.source.robot)
        seconds = time.monotonic() - started
        _print(console, job, found[job.name], seconds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return write(found, options.output, dialect=options.dialect)


def write(
    found: Mapping[str, Mapping[str, Statistics]], output: Path, *, dialect: str = "pizero"
) -> list[Path]:
    """One file; where a dialect cannot hold several data sets in one, a file for each."""
    if len(found) == 1:
        ((name, statistics),) = found.items()
        save_statistics(statistics, output, dialect=dialect, dataset=name)
        return [output]
    if dialect == "pizero":
        save_statistics_of_each(found, output)
        return [output]
    files = []
    for name, statistics in found.items():
        files.append(output.with_stem(f"{output.stem}-{name.replace('/', '-')}"))
        save_statistics(statistics, files[-1], dialect=dialect, dataset=name)
    return files


def _jobs(options: argparse.Namespace) -> list[Job]:
    sources = open_sources(options)
    if options.all_splits:
        return _of_all_splits(options, sources)
    if options.together and sources.mix is not None:
        return [Job(sources.title, sources.parts[0], sources.mix)]
    return [Job(part.name, part, part.dataset) for part in sources.parts]


def _of_all_splits(options: argparse.Namespace, sources: Sources) -> list[Job]:
    """The same data sets with all their splits, or with the validation data of a configuration."""
    if options.split is not None or options.together or options.root is not None:
        raise ValueError("--all-splits goes with a data set or a configuration alone, without "
                         "--split, --together and --root")  # fmt: skip
    if options.config_name is not None:
        others = open_configured(options.config_name, options.words, role="val").parts
        pieces = {p.name: {"train": p.dataset} for p in sources.parts}
        for part, source in zip(others, sources.parts, strict=False):
            pieces[source.name]["val"] = part.dataset
        return [Job(p.name, p, Mix(datasets=pieces[p.name])) for p in sources.parts]
    (part,) = sources.parts
    datasets = {}
    for split in dataset_splits(part.dataset):
        options.split = split
        datasets[split] = open_sources(options).parts[0].dataset
    return [Job(part.name, part, Mix(datasets=datasets))]


def _print(
    console: Console, job: Job, statistics: Mapping[str, Statistics], seconds: float
) -> None:
    source = job.source
    for group in GROUPS:
        if group not in statistics:
            continue
        found, names = statistics[group], getattr(source, f"{group}_names")
        title = f"{job.name}: {group}, {found.count:,} values"
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("", no_wrap=True)
        columns = ("mean", "std", "min", "q01", "q99", "max")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        odd = constant_dimensions(found)
        for i, name in enumerate(names):
            numbers = [f"{np.asarray(getattr(found, column))[i]:.4g}" for column in columns]
            table.add_row(name, *numbers, style="yellow" if i in odd else None)
        console.print(table)
        for i, way in odd.items():
            console.print(
                f"[yellow]warning:[/] {group} dimension {i} ({names[i]}) is {_words(way)}"
            )
    frames = len(job.data)
    rate = f", {seconds * 1e6 / frames:.2f} s per million" if frames >= 10_000 else ""
    console.print(f"{job.name}: {counted(frames, 'frame')} in {seconds:.2f} s{rate}")


def _words(way: str) -> str:
    if way == "q01 = q99":
        return "the same in 98 % of the frames (q01 = q99): quantile normalisation only centres it"
    return f"{way}: normalisation only centres it"


def _mask(words: Sequence[str] | None) -> list[bool] | None:
    """From words such as `true true false`, `1 1 0` or one `6*true,false`."""
    if words is None:
        return None
    known = {"true": True, "1": True, "false": False, "0": False}
    mask: list[bool] = []
    for word in ",".join(words).replace(" ", ",").lower().split(","):
        count, star, value = word.rpartition("*")
        if value not in known or (star and not count.isdigit()):
            raise ValueError(
                f"expected --delta-mask true or false for each dimension, as in 6*true,false; got "
                f"{word!r}"
            )
        mask += [known[value]] * (int(count) if star else 1)
    return mask if any(mask) else []  # none, even where the robot has some


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compute_stats.py",
        description="Exact mean, std, min, max, q01, q99 of states and actions; no image is read.",
    )
    add_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file to write")
    add("--dialect", choices=sorted(DIALECTS), default="pizero", help="(default: pizero)")
    add(
        "--delta-mask",
        nargs="+",
        metavar="BOOL",
        help="actions that are learnt relative to the state, as in 6*true,false (default: the "
        "robot's or the configuration's)",
    )
    add("--all-splits", action="store_true", help="with held-out episodes, as Octo has it")
    add("--together", action="store_true", help="one set of statistics for a whole mixture")
    return parser
