"""`scripts/convert_weights.py`: checkpoints from the command line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from pizero.agent.config import build
from pizero.agent.published import build_published, pipeline_node
from pizero.agent.weights.assets import find_assets
from pizero.agent.weights.export import LAYOUTS, export
from pizero.agent.weights.folder import (
    FILES,
    has_pipeline,
    model_weights,
    own_folder,
    read_description,
)
from pizero.agent.weights.inspect import KINDS, Found, inspect
from pizero.agent.weights.load import check
from pizero.agent.weights.report import LoadReport
from pizero.data.stats import load_statistics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, or with --inspect only look; a mistake ends in one message."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        report = _run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
        return
    console.print(report.table())
    for line in report.remarks():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if not options.inspect:
        console.print(f"wrote {options.destination} ({options.to})", highlight=False)


def _run(options: argparse.Namespace) -> LoadReport:
    found = inspect(options.source, overrides=_pairs(options.set), kind=options.kind)
    if options.inspect:
        with torch.device("meta"):
            return check(model_weights(build(found.model, packages=("pizero",))), found)
    if options.destination is None:
        raise ValueError("name a folder to write, or ask for --inspect")
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.to == "pizero":
        return _to_own(found, options, dtype)
    given, pipeline = _beside(found, options)
    given = options.statistics or given
    return export(
        found,
        options.destination,
        to=options.to,
        dtype=dtype,
        pipeline=pipeline,
        statistics=load_statistics(given) if given else None,
        asset=options.asset or "robot",
    )


def _to_own(found: Found, options: argparse.Namespace, dtype: torch.dtype | None) -> LoadReport:
    folder = own_folder(options.source)
    if folder is not None and has_pipeline(folder):
        config, _ = read_description(folder)
        return export(
            found, options.destination, dtype=dtype, pipeline=config.pipeline, files=folder
        )
    assets = find_assets(found.source.path, asset=options.asset)
    whole = (options.tokenizer or assets.tokenizer) and found.kind != "paligemma"
    if not whole:
        if options.robot or options.statistics:
            raise ValueError("a whole policy needs --tokenizer too; without it, weights only")
        return export(found, options.destination, dtype=dtype)
    node = pipeline_node(
        found,
        robot=options.robot,
        statistics=options.statistics,
        tokenizer=options.tokenizer,
        action_tokenizer=options.action_tokenizer,
        asset=options.asset,
    )
    pipeline = build_published(node, found)
    with tempfile.TemporaryDirectory() as files:
        node |= dict.fromkeys(pipeline.save_assets(files))
        return export(found, options.destination, dtype=dtype, pipeline=node, files=Path(files))


def _beside(found: Found, options: argparse.Namespace) -> tuple[Path | None, Mapping[str, Any]]:
    """Statistics, and what is known of the pipeline."""
    folder = own_folder(options.source)
    if folder is not None:
        config, _ = read_description(folder)
        pipeline = OmegaConf.to_container(config.pipeline) if has_pipeline(folder) else {}
        assert isinstance(pipeline, dict)
        statistics = folder / FILES[0]
        return statistics if statistics.is_file() else None, {
            str(k): v for k, v in pipeline.items()
        }
    assets = find_assets(found.source.path, asset=options.asset)
    return assets.statistics, {} if assets.processors is None else assets.processors.node()


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    """key=value words; values are JSON where they can be."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {word!r}")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_weights.py", description="Convert a checkpoint of the pi0 family."
    )
    add = parser.add_argument
    add("source", type=Path, help="file or folder: openpi (Orbax, PyTorch), LeRobot, giga, ...")
    add("destination", type=Path, nargs="?", help="folder to write; must not exist")
    add("--to", choices=LAYOUTS, default="pizero", help="layout to write (default: pizero)")
    add("--dtype", choices=list(DTYPES), help="precision to write (default: as stored)")
    add("--kind", choices=KINDS, help="pi0_fast tells pi0-FAST from PaliGemma")
    add("--robot", help="name in config/robot, or a YAML file")
    add("--tokenizer", type=Path, help="PaliGemma's paligemma_tokenizer.model")
    add("--action-tokenizer", type=Path, help="folder of pi0-FAST's action tokenizer")
    add("--statistics", type=Path, help="statistics, of any dialect")
    add("--asset", help="whose statistics, where several robots' lie beside the weights")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="model sizes: horizon=10")
    add("--inspect", action="store_true", help="only say what the checkpoint is")
    add("--json", action="store_true", help="print the report as JSON")
    return parser
