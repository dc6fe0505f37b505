"""Every file under config/: it composes, binds to real code, and says in line one what it is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from pizero.agent.config import (
    bind,
    build,
    compose_config,
    config_dir,
    iter_targets,
    load_config,
    locate,
    primary_configs,
)
from pizero.data import Statistics, load_statistics, train_tokenizer

TREE = config_dir()
PRIMARIES = sorted(p.stem for p in TREE.glob("*.yaml"))
STATISTICS = sorted(p.relative_to(TREE) for p in TREE.glob("robot/statistics/*.json"))
GROUP_FILES = sorted(p.relative_to(TREE) for p in TREE.glob("*/**/*.yaml"))


def first_line(path: Path) -> str:
    return (TREE / path).read_text().split("\n", 1)[0]


def command_of(name: str) -> list[str]:
    return shlex.split(primary_configs()[name])


def overrides_of(name: str) -> list[str]:
    """The key=value words of the command that the file's first line gives."""
    return [w for w in command_of(name) if "=" in w and not w.startswith("-")]


def test_every_file_is_looked_at() -> None:
    on_disk = {p.relative_to(TREE) for p in TREE.rglob("*") if p.is_file()} - {Path("README.md")}
    looked_at = {Path(f"{name}.yaml") for name in PRIMARIES} | set(GROUP_FILES)
    looked_at |= set(STATISTICS)
    assert looked_at == on_disk
    assert len(PRIMARIES) >= 4
    assert len(GROUP_FILES) >= 10


@pytest.mark.parametrize("name", PRIMARIES)
def test_primary_composes_completely_by_its_own_command(name: str) -> None:
    assert f"--config-name={name}" in command_of(name)
    load_config(name, overrides_of(name))


@pytest.mark.parametrize("name", PRIMARIES)
def test_every_target_of_a_primary_binds(name: str) -> None:
    config = compose_config(name, overrides_of(name))
    OmegaConf.resolve(config)
    nodes = OmegaConf.to_container(config)
    assert isinstance(nodes, dict)
    root = nodes.pop("_target_")
    assert hasattr(locate(root), "run")
    found = list(iter_targets(nodes))
    assert found or not name.startswith("train")
    for path, node in found:
        bind(node, path)


@pytest.mark.parametrize("path", GROUP_FILES, ids=str)
def test_group_file_names_what_it_configures_and_fits_it(path: Path) -> None:
    line = first_line(path)
    assert line.startswith("# ")
    locate(line[2:].split()[0].rstrip(":,"))
    group = "/".join(path.parts[:-1])
    for where, node in iter_targets(compose_group(group, path.stem)):
        if node["_target_"] != "???":
            bind({**node, "_partial_": True}, where)


@pytest.mark.parametrize("path", [p for p in GROUP_FILES if p.parts[0] == "model"], ids=str)
def test_model_builds_on_meta(path: Path) -> None:
    node = compose_group("model", path.stem)["model"]
    with torch.device("meta"):
        model = build(node, path="model")
    groups = model.parameter_groups()
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("path", STATISTICS, ids=str)
def test_published_statistics_are_read_by_name(path: Path) -> None:
    assert load_statistics(path.stem).keys() == {"action", "state"}


@pytest.mark.parametrize("path", [p for p in GROUP_FILES if p.parts[0] == "robot"], ids=str)
def test_robot_builds_and_completes_a_pipeline(path: Path, tmp_path: Path) -> None:
    """A robot that is complete in itself, and one whose model brings the normalisation."""
    robot = compose_group("robot", path.stem)["robot"]
    entries = [
        Statistics(*(np.full(n, v) for v in (0.0, 1.0, -2.0, 2.0, -1.0, 1.0)))
        for n in (sum(map(len, robot["state"].values())), len(robot["action"]))
    ]
    train_tokenizer(["open the drawer"], tmp_path / "t.model")
    node = {
        "_target_": "pizero.data.PolicyPipeline",
        "robot": robot,
        "image_size": [14, 14],
        "tokenizer": str(tmp_path / "t.model"),
        "max_tokens": 8,
        "horizon": 2,
        "action_dim": 32,
        "state_dim": 32,
    }
    if robot.get("normalization") is None:
        node["normalization"] = {"state": "z_score", "action": "z_score"}
    statistics = dict(zip(("state", "action"), entries, strict=True))
    given = {} if robot.get("statistics") else {"statistics": statistics}
    pipeline = build(node, path="pipeline", **given)
    pictures = {slot: np.zeros((9, 12, 3), np.uint8) for slot in pipeline.cameras[:1]}
    state = np.full(pipeline.robot_state_dim, 0.5)
    encoded = pipeline.observation(images=pictures, text="open", state=state)
    assert encoded["state"].shape == (1, 32)
    actions = pipeline.decode_actions(np.zeros((2, 32)), state)
    assert actions.shape == (2, pipeline.robot_action_dim)


@pytest.mark.parametrize("path", [p for p in GROUP_FILES if p.parts[0] == "augment"], ids=str)
def test_recipe_builds_for_the_cameras_of_a_pipeline(path: Path) -> None:
    node = compose_group("augment", path.stem)["augment"]
    recipe = build(node, path="augment", cameras=["base_0_rgb", "left_wrist_0_rgb"])
    assert recipe.colour_only == (() if path.stem in ("openvla", "shift") else (1,))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    result = recipe(images, seed=0, samples=np.arange(4))
    assert not torch.equal(result, images)
    assert result.dtype == images.dtype


@pytest.mark.parametrize("name", ["train_bridge", "train_demo"])
def test_another_recipe_is_chosen_on_the_command_line(name: str) -> None:
    words = ["augment@data.augment=octo", "data.augment.alike=steps"]
    config = load_config(name, [*overrides_of(name), *words])
    recipe = build(config.data.augment, path="data.augment", cameras=["primary", "wrist"])
    assert (len(recipe.steps), recipe.alike, recipe.colour_only) == (5, "steps", (1,))


def test_a_robot_is_added_to_a_pipeline_on_the_command_line() -> None:
    config = load_config(
        "train_bridge", ["+robot@pipeline.robot=widowx", *overrides_of("train_bridge")]
    )
    robot = build(config.pipeline["robot"], path="pipeline.robot")
    assert (robot.name, robot.horizon) == ("widowx", config.model["horizon"])


def test_pi0_fast_takes_the_place_of_a_flow_policy() -> None:
    """docs/fast.md: the same primary file, another model and a pipeline that writes answers."""
    words = ["model=pi0_fast", "pipeline=bridge_fast", "model.decode_gap=0"]
    config = load_config("train_bridge", [*overrides_of("train_bridge"), *words])
    assert (config.pipeline["horizon"], config.pipeline["vocab_size"]) == (4, 257152)
    for part in ("model", "pipeline"):
        for path, node in iter_targets(getattr(config, part), part):
            bind(node, path)


def test_primary_files_are_short() -> None:
    for name in PRIMARIES:
        assert len((TREE / f"{name}.yaml").read_text().splitlines()) <= 60, name


def compose_group(group: str, option: str) -> dict[str, Any]:
    """One group file with its own defaults list, references to elsewhere left as they are."""
    with initialize_config_dir(str(TREE), version_base="1.3"):
        config = compose(overrides=[f"+{group}={option}"])
    assert isinstance(config, DictConfig)
    nodes = OmegaConf.to_container(config)
    assert isinstance(nodes, dict)
    return nodes
