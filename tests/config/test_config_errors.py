"""Mistakes in a configuration are refused wherever they are made, naming the nearest right key."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pizero.agent.config import (
    TrainConfig,
    build,
    compose_config,
    load_config,
    missing_keys,
    to_yaml,
    typed_root,
)
from pizero.agent.run import explained
from pizero.agent.weights.folder import differences


class Part:
    """Something to build."""

    def __init__(self, *, width: int, names: list[str] | None = None, inner: Any = None) -> None:
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.width, self.names, self.inner = width, names, inner


@dataclass(frozen=True)
class Live:
    """A dataclass instance, which OmegaConf would turn into a config."""

    numbers: list[int] = field(default_factory=list)


PART = f"{__name__}.Part"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> str:
    import sys

    monkeypatch.setitem(sys.modules, "a_user_package", sys.modules[__name__])
    return "a_user_package.Part"


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_misspelt_override(prefix: str) -> None:
    with pytest.raises(Exception, match=r"checkpoint") as caught:
        load_config("train_toy", [f"{prefix}checkpoint.evry=3"])
    if prefix:
        assert "no key 'checkpoint.evry'; did you mean 'every'" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.evry=3", "no key 'checkpoint.evry'; did you mean 'every'?"),
        ("chekpoint.every=3", "no key 'chekpoint'; did you mean 'checkpoint'?"),
        ("model.joint.mixtures.vlm.widht=3", "no key 'model.joint.mixtures.vlm.widht'; did you"),
        ("modle=toy", "no key 'modle'; did you mean 'model'?"),
        ("model=tooy", "no 'tooy' in the group 'model'; did you mean 'toy'?"),
        ("model=zebra", "no 'zebra' in the group 'model'; known: demo, metaworld"),
        ("tokenizer.zebra=3", "no key 'tokenizer.zebra'; known: vocab_size"),
        ("optim.experts.vlm.lr=3", "no key 'optim.experts.vlm'; +optim.experts.vlm=... adds it"),
        ("~modell", "'modell' does not exist"),
        ("steps=[1", "no viable alternative at input '[1'"),
    ],
)
def test_what_hydra_refuses_is_one_line(override: str, message: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose_config("train_toy", [override])
    said = explained(caught.value)
    assert message in said
    assert "\n" not in said


def test_misspelt_key_in_a_file() -> None:
    config = compose_config("train_toy")
    OmegaConf.set_struct(config, False)
    config.optim.wieght_decay = 0.1
    with pytest.raises(
        ValueError, match=r"no key 'optim.wieght_decay'; did you mean 'weight_decay'"
    ):
        typed_root(config)


def test_misspelt_key_that_must_be_given() -> None:
    """Told as what it is, rather than as the value that is now missing."""
    config = compose_config("train_toy")
    OmegaConf.set_struct(config, False)
    config.stepps, config.steps = config.steps, "???"
    with pytest.raises(ValueError, match="no key 'stepps'; did you mean 'steps'"):
        typed_root(config)


def test_misspelt_root_key() -> None:
    with pytest.raises(ValueError, match="no key 'batchsize'; did you mean 'batch_size'"):
        load_config("train_toy", ["+batchsize=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=many", "config key 'steps'.*many.*Integer"),
        ("steps=1.5", "config key 'steps'.*1.5.*Integer"),
        ("precision=fp16", "config key 'precision'.*fp16"),
        ("freeze=vision", "config key 'freeze'|freeze"),
    ],
)
def test_wrong_type(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("train_toy", [override])


def test_missing_value() -> None:
    with pytest.raises(ValueError, match=r"no value: name, steps\. Give them as key=value"):
        load_config("train_toy", ["steps=???", "name=???"])
    assert missing_keys(OmegaConf.create({"a": "???", "b": {"c": "???", "d": 1}})) == ["a", "b.c"]


def test_unknown_config_name() -> None:
    with pytest.raises(ValueError, match=r"no config 'train_tyo'.*did you mean 'train_toy'"):
        compose_config("train_tyo")


def test_unknown_workspace() -> None:
    with pytest.raises(
        ValueError, match=r"cannot find .*TrainWorkspce.*did you mean 'TrainWorkspace'"
    ):
        load_config("train_toy", ["_target_=pizero.agent.train.TrainWorkspce"])


def test_target_that_is_no_workspace() -> None:
    with pytest.raises(ValueError, match="`config` annotated with a dataclass"):
        load_config("train_toy", ["_target_=pizero.agent.training.distributed.StopSignals"])


def test_typed_root_and_its_yaml_agree() -> None:
    config = load_config("train_toy", ["+optim.experts.vlm.lr=1e-4", "precision=bf16"])
    assert isinstance(config, TrainConfig)
    assert config.optim.experts["vlm"].lr == 1e-4
    again = typed_root(OmegaConf.create(to_yaml(config)))
    assert again == config


def test_build_gives_plain_containers(part: str) -> None:
    made = build({"_target_": part, "width": 3, "names": ["a"], "inner": {"b": [1]}})
    assert type(made.names) is list
    assert type(made.inner) is dict
    assert type(made.inner["b"]) is list


def test_build_takes_live_objects_as_they_are(part: str) -> None:
    live = Live([1])
    assert build({"_target_": part, "width": 3, "inner": None}, inner=live).inner is live


def test_build_partial(part: str) -> None:
    made = build({"_target_": part, "_partial_": True, "names": []})
    assert isinstance(made, partial)
    assert made(width=2).width == 2


def test_build_nested(part: str) -> None:
    inner = {"_target_": part, "width": 2}
    assert build({"_target_": part, "width": 3, "inner": inner}).inner.width == 2


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"widht": 3}, "model: a_user_package.Part has no argument 'widht'; did you mean 'width'"),
        ({}, "model: a_user_package.Part also needs width"),
        ({"width": 0}, "model: width must be positive, got 0"),
        (
            {"width": 1, "inner": {"x": {"_target_": "a_user_package.Part", "wide": 1}}},
            "model.inner.x: a_user_package.Part has no argument 'wide'; did you mean 'width'",
        ),
        (
            {"_target_": "a_user_package.Partt", "width": 1},
            r"model: cannot find 'a_user_package.Partt'; did you mean 'Part'",
        ),
    ],
)
def test_build_refuses(part: str, node: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"_target_": part, **node}, path="model")


def test_build_refuses_what_is_no_node() -> None:
    with pytest.raises(ValueError, match="model must be a mapping with a _target_, got 3"):
        build(3, path="model")


def test_build_keeps_to_the_given_packages(part: str) -> None:
    node = {"_target_": "pizero.data.augment.Augmentation"}
    assert build(node, packages=("pizero",))
    with pytest.raises(ValueError, match=r"'a_user_package.Part' is outside \['pizero'\]"):
        build({**node, "colour_only": [{"_target_": part, "width": 1}]}, packages=("pizero",))


def test_differences_have_dotted_keys_and_both_values() -> None:
    old = {"a": 1, "b": {"c": [1], "d": 2}, "gone": 1}
    new = {"a": 1, "b": {"c": [2], "d": 2}, "come": 2}
    assert differences(old, new) == [("b.c", [1], [2]), ("gone", 1, None), ("come", None, 2)]
    assert differences(old, old) == []


def test_compose_leaves_hydra_as_it_was(tmp_path: Path) -> None:
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    compose_config("train_toy")
    assert GlobalHydra.instance().hydra is before
