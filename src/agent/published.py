"""Policies from checkpoints of other projects: their weights, in the pipeline they were trained in.

The weights tell which family they are; `config/pipeline/` says how that family prepares pictures,
words and numbers, `config/robot/` what is special about the robot, and the files beside the weights
hold statistics. What nobody tells has to be given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from pizero.agent.config import build, config_dir
from pizero.agent.weights.assets import find_assets
from pizero.agent.weights.inspect import Found
from pizero.agent.weights.lerobot import Processors

if TYPE_CHECKING:
    from pizero.data.pipeline import PolicyPipeline

_TOKENIZER, _ACTION_TOKENIZER = "PIZERO_TOKENIZER", "PIZERO_FAST_TOKENIZER"
# One of giga-models' tensors, whose layers hold both experts.
_GIGA = {
    f"{wrapper}paligemma_with_expert.layers.0.self_attn.q_proj.0.weight"
    for wrapper in ("", "module.", "_orig_mod.")
}


def pipeline_node(
    found: Found,
    *,
    robot: str | Path | None = None,
    statistics: str | Path | None = None,
    tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
    asset: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The resolved pipeline node of a published checkpoint.

    `robot` is a name in config/robot or a YAML file; `statistics` and `tokenizer` are files for
    what is not beside the weights, `action_tokenizer` is the folder of pi0-FAST's, `asset` chooses
    where several robots' statistics are, and `changes` replaces arguments of the pipeline.
    """
    assets = find_assets(found.source.path, asset=asset)
    node: dict[str, Any] = _container(config_dir() / "pipeline" / f"{family(found)}.yaml")
    node["tokenizer"] = str(tokenizer or assets.tokenizer or os.environ.get(_TOKENIZER) or "")
    if not node["tokenizer"]:
        raise ValueError(
            f"{found.source.path} comes without a tokenizer: give tokenizer=..., the path of "
            f"PaliGemma's paligemma_tokenizer.model, or set {_TOKENIZER} to it"
        )
    if "action_tokenizer" in node:
        spelt = action_tokenizer or os.environ.get(_ACTION_TOKENIZER)
        if not spelt:
            raise ValueError(
                f"{found.source.path} spells its actions: give action_tokenizer=..., the folder "
                f"of physical-intelligence/fast or one of yours, or set {_ACTION_TOKENIZER} to it"
            )
        node["action_tokenizer"] = str(spelt)
    elif action_tokenizer is not None:
        raise ValueError(f"{found.source.path} is {found.kind}, which spells no actions")
    own_resize = _take(node, assets.processors, found)
    if robot is not None:
        # What belongs to the robot is the robot's to say, unless the checkpoint says it itself.
        node["robot"] = robot_node(robot)
        node["cameras"] = None
        if not own_resize:
            node["resize"] = None
        if node["robot"].get("normalization") is not None and assets.processors is None:
            node["normalization"] = None
    given = statistics or assets.statistics
    if given is not None:
        node["statistics"] = str(given)
    elif robot is None or node["robot"].get("statistics") is None:
        raise ValueError(
            f"{found.source.path} comes without statistics: give statistics=..., a file of any "
            "dialect (openpi's norm_stats.json, Octo's, OpenVLA's, LeRobot's), or a robot= that "
            "has them"
        )
    for key, value in (changes or {}).items():
        node[key] = value
    whole = OmegaConf.create({"model": found.model, "pipeline": node})
    resolved = OmegaConf.to_container(whole.pipeline, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def build_published(node: Mapping[str, Any], found: Found) -> PolicyPipeline:
    """The pipeline of a node, checked against the model it is for."""
    pipeline = build(node, path="pipeline", packages=("pizero",))
    words, rows = pipeline.tokenizer.vocab_size, found.model["vocab_size"]
    if words > rows:
        raise ValueError(
            f"the tokenizer {node['tokenizer']} has {words} pieces, but the model of "
            f"{found.source.path} knows {rows}"
        )
    return pipeline


def family(found: Found) -> str:
    """The file in config/pipeline that a checkpoint's training used."""
    if found.kind == "paligemma":
        raise ValueError(
            f"{found.source.path} is a PaliGemma: it speaks words and is no policy. Train one from "
            "it (init_from), or talk to it with scripts/generate_text.py"
        )
    forward = found.kind in ("pi0", "pi05") and not found.model["time_embedding"]["reverse"]
    return "open_pi_zero" if forward else f"openpi_{found.kind}"


def robot_node(robot: str | Path) -> dict[str, Any]:
    """A robot's YAML, by its name in config/robot or by its path."""
    if str(robot).endswith((".yaml", ".yml")):
        return _container(Path(robot))
    known = sorted(p.stem for p in (config_dir() / "robot").glob("*.yaml"))
    if str(robot) not in known:
        near = get_close_matches(str(robot), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no robot {str(robot)!r} in {known}, and no path of a YAML file{hint}")
    return _container(config_dir() / "robot" / f"{robot}.yaml")


def _take(node: dict[str, Any], processors: Processors | None, found: Found) -> bool:
    """What LeRobot's processors say, and what it and giga-models do otherwise than openpi.

    Returns whether they resize in a way of their own.
    """
    if processors is not None:
        if node["prompt"] == "fast":
            raise ValueError(
                f"{found.source.path} is a pi0-FAST of LeRobot, which asks and answers in a way of "
                "its own (a second BOS, positions without a gap): it makes no policy here. Its "
                "weights can be loaded (weights.load_model) and trained further"
            )
        node |= processors.node()
        if node["prompt"] == "pi0":
            node["prompt"] = "lerobot_pi0"  # it takes words as they are
    elif _GIGA & set(found.source.entries):
        if node["prompt"] == "pi05":
            node["prompt"] = "giga_pi05"
    else:
        return False
    node["resize"] = "pad_bilinear"
    return True


def _container(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    node = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(node, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(node).__name__}")
    return {str(key): value for key, value in node.items()}
