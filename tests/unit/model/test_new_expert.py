"""docs/new_expert.md is true: its YAML, composed as it stands, trains and samples."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from small_models import CONFIG, randomise, small_flow, small_observation

from pizero.agent.config import build
from pizero.model import PiZero

PAGE = (Path(__file__).parents[3] / "docs" / "new_expert.md").read_text()


@pytest.fixture
def make(tmp_path):
    """Builds the page's policy from a copy of config/ that holds its one new file."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (path,) = re.findall(r"`config/(model/\w+)\.yaml`", PAGE)
    shutil.copytree(CONFIG, tmp_path / "config")
    (tmp_path / "config" / f"{path}.yaml").write_text(block)

    def make(*overrides: str) -> PiZero:
        with initialize_config_dir(str(tmp_path / "config"), version_base="1.3"):
            model = build(compose(path, overrides=list(overrides)).model)
        return randomise(model)

    return make


def observe(model: PiZero, tokens: int = 3):
    return replace(small_observation(model), extras={"tactile": torch.randn(2, tokens, 6)})


def test_it_trains_and_samples(make):
    model = make()
    observation, flow = observe(model), small_flow(model, samples=2)
    model(observation, *flow).mean().backward()
    group = model.parameter_groups()["tactile"]
    assert {id(p) for p in group} == {
        id(p)
        for part in (model.joint.mixtures["tactile"], model.streams["tactile"])
        for p in part.parameters()
    }
    assert all(p.grad.any() for names in model.parameter_groups().values() for p in names)
    optimizer = torch.optim.AdamW(
        [p for names in model.parameter_groups().values() for p in names], lr=1e-2
    )
    first = model(observation, *flow).mean().item()
    for _ in range(20):
        optimizer.zero_grad()
        model(observation, *flow).mean().backward()
        optimizer.step()
    assert model(observation, *flow).mean().item() < first
    with torch.no_grad():
        assert model.sample(observation, flow[1][:, 0], 3).shape == (2, 4, 4)


@torch.no_grad()
def test_who_sees_the_touch(make):
    """As the page says: the actions do, pictures and words only from block 0 on."""
    for block, seen in ((1, False), (0, True)):
        model = make(f"model.streams.tactile.block={block}")
        one, other = observe(model), observe(model)
        noise = small_flow(model)[1][:, 0]
        assert not torch.allclose(model.sample(one, noise, 2), model.sample(other, noise, 2))
        start, stop = model.prefix(one).layout.span("text")
        words = [model.prefix(o).keys[-1][:, start:stop] for o in (one, other)]
        assert torch.equal(*words) != seen
        assert model.prefix(observe(model, tokens=7)).layout.length == stop + 7 + 1


def test_stopped_touch(make):
    model = make("model.stop_grad=[[action,tactile],[state,tactile]]")
    model(observe(model), *small_flow(model)).mean().backward()
    groups = model.parameter_groups()
    assert all(p.grad is None or not p.grad.any() for p in groups["tactile"])
    assert all(p.grad.any() for p in groups["vlm"])


@pytest.mark.parametrize("expert", ["vlm", "action"])
def test_shared_expert(make, expert):
    """A stream may go to an expert that is there; the page's own then gets no tokens."""
    width = {"vlm": 16, "action": 12}[expert]
    model = make(
        f"model.streams.tactile.expert={expert}",
        f"model.streams.tactile.encoder.out_features={width}",
        "~model.joint.mixtures.tactile",
    )
    model(observe(model), *small_flow(model)).mean().backward()
    assert all(p.grad.any() for names in model.parameter_groups().values() for p in names)
