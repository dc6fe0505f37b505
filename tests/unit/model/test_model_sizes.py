"""The full-size models hold exactly the published numbers of parameters, part by part."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from small_models import compose_model

from pizero.agent.config import build
from pizero.model import PiZero

WHOLE = "model.joint.mixtures.vlm.kv_only_tail=false"
DEAD = 109_056_000  # q, o, MLP and second norm of PaliGemma's last layer, and its final norm


@cache
def full_size(name: str, *overrides: str) -> PiZero:
    with torch.device("meta"):
        return build(compose_model(name, *overrides))


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize(("name", "total"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872)])
def test_totals(name, total):
    """With the last layer whole, as openpi has it; and without what nobody reads."""
    whole, lean = full_size(name, WHOLE), full_size(name)
    assert count(whole) == total
    assert count(lean) == total - DEAD
    assert sum(p.numel() for p in whole.parameters() if not p.requires_grad) == DEAD
    assert all(p.requires_grad for p in lean.parameters())
    for model in (whole, lean):
        grouped = [p for group in model.parameter_groups().values() for p in group]
        assert len(grouped) == len(set(grouped))
        assert sum(p.numel() for p in grouped) == total - DEAD


@pytest.mark.parametrize("name", ["paligemma", "pi0_fast"])
def test_models_that_speak(name):
    model = full_size(name)
    assert count(model) == 2_923_335_408
    assert count(model.joint) == 1_981_884_416
    groups = model.parameter_groups()
    assert list(groups) == ["vision", "vlm"]
    assert sum(p.numel() for group in groups.values() for p in group) == 2_923_335_408


def test_parts_of_pi0():
    model = full_size("pi0", WHOLE)
    assert count(model.vision) == 412_442_352
    assert count(model.vision.blocks[0]) == 15_239_504
    assert count(model.projector) == 2_361_344
    assert count(model.embedding) == 526_647_296
    assert count(model.joint.mixtures["vlm"]) == 1_981_884_416
    assert count(model.joint.mixtures["vlm"].blocks[0]) == 110_104_576
    assert count(model.joint.mixtures["action"]) == 311_464_960
    assert count(model.joint.mixtures["action"].blocks[0]) == 17_303_552
    assert count(model.state_encoder, model.action_encoder, model.action_decoder) == 3_248_160


def test_parts_of_pi05():
    """37 norms with a dense layer each in place of a weight; no state token."""
    pi0, pi05 = full_size("pi0"), full_size("pi05")
    plain, adaptive = (m.joint.mixtures["action"] for m in (pi0, pi05))
    dense = 37 * (1024 * 3072 + 3072)
    assert count(adaptive) == count(plain) - 37 * 1024 + dense
    assert pi05.state_encoder is None
    assert count(pi05.joint.mixtures["vlm"]) == count(pi0.joint.mixtures["vlm"])
