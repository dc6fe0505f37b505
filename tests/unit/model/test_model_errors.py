"""A user's mistakes are refused with what was expected, what was got, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import compose_model, small_flow, small_observation, small_policy

from pizero.agent.config import build
from pizero.model import ConvTower, JointModel, Mixture, Segment, SigLIP, TokenLayout
from pizero.model.norm import AdaRMSNorm

SIZES = dict(width=8, depth=1, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)


def mixture(**changes) -> Mixture:
    return Mixture(**{**SIZES, **changes})


def refuse(message: str, make, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=message):
        make(*args, **kwargs)


def test_layout():
    a, b = Segment("a", 1, 1, "x"), Segment("b", 1, 0, "x")
    refuse(r"segment names must differ, got \['a', 'a'\]", TokenLayout, a, a)
    refuse("segment 'b' has block 0 but follows 'a' with block 1", TokenLayout, a, b)
    layout = TokenLayout(Segment("state", 1, 0, "x"), Segment("action", 1, 1, "x"))
    refuse("no segment 'stat' in the layout; did you mean 'state'", layout.span, "stat")
    refuse(r"no segment 'q' in the layout; known: \['state', 'action'\]", layout.span, "q")
    refuse("segment names must differ", lambda: layout + layout)


def test_mixture():
    heads = dict(num_heads=3, num_kv_heads=2)
    refuse("num_heads must be a multiple of num_kv_heads, got 3 and 2", mixture, **heads)
    refuse("head_dim must be even to rotate halves, got 5", mixture, head_dim=5)
    tail = mixture(kv_only_tail=True)
    refuse("kv_only_tail has no output to finish", tail.finish, torch.zeros(1, 1, 8))


def test_adaptive_norm():
    refuse(
        "needs the modulation of a flow time", AdaRMSNorm(4, cond_dim=4), torch.zeros(1, 1, 4), None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(depth=2), "mixture 'b' has depth 2 but 'a' has 1"),
        (dict(num_heads=4), "mixture 'b' has num_heads 4 but 'a' has 2"),
        (dict(num_kv_heads=2), "mixture 'b' has num_kv_heads 2 but 'a' has 1"),
        (dict(head_dim=8), "mixture 'b' has head_dim 8 but 'a' has 4; all mixtures share"),
    ],
)
def test_mixtures_that_cannot_meet(changes, message):
    refuse(message, JointModel, {"a": mixture(), "b": mixture(**changes)})


def test_no_mixture():
    refuse("a joint model needs at least one mixture", JointModel, {})


def test_tokens_of_a_joint_model():
    model = JointModel({"a": mixture(), "tail": mixture(kv_only_tail=True)})
    positions = torch.zeros(1, 2, dtype=torch.long)

    def run(tokens, *segments, **kwargs):
        model(tokens, TokenLayout(*segments), positions=positions, **kwargs)

    x = torch.zeros(1, 2, 8)
    hint = "segment 's' names expert 'tial'; did you mean 'tail'"
    refuse(hint, run, {}, Segment("s", 2, 0, "tial"))
    here = Segment("s", 2, 0, "a")
    refuse(r"no tokens for segment 's'; got \['t'\]", run, {"t": x}, here)
    long = Segment("s", 3, 0, "a")
    refuse(r"segment 's' expects tokens \[b 3 8\], got \(2, 8\)", run, {"s": x}, long)
    tail = Segment("s", 2, 0, "tail")
    refuse("'s' cannot be read: expert 'tail' was built with kv_only_tail", run, {"s": x}, tail)


def test_vision():
    refuse("image_size 9 is not a multiple of patch_size 2", SigLIP, image_size=9, patch_size=2)
    refuse("width 10 is not a multiple of num_heads 4", SigLIP, width=10, num_heads=4)
    refuse("image_size 8x12 must be a multiple of 8", ConvTower, image_size=(8, 12), widths=[2] * 3)
    tower = ConvTower(image_size=(8, 4), widths=[2])
    turned = torch.zeros(1, 3, 4, 8)
    refuse(r"expects images of \(8, 4\) \(height, width\), got \(4, 8\)", tower, turned)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vlm=vml", "no mixture 'vml'; did you mean 'vlm'"),
        ("action=acton", "no mixture 'acton'; did you mean 'action'"),
        ("joint.mixtures.action.width=13", "'action' needs an even width .*, got 13"),
        ("joint.mixtures.action.cond_dim=12", "which would make its state depend"),
        ("joint.mixtures.action.cond_dim=8", "cond_dim 8, .* embedded in its width, 12"),
        ("joint.mixtures.vlm.cond_dim=16", "'vlm' has adaptive norms .* reaches 'action' alone"),
        ("stop_grad=[[action,imge]]", r"\['action', 'imge'\] .*did you mean 'image'"),
    ],
)
def test_policy(override, message):
    extra = ["+model.vlm=vlm", "+model.action=action"]
    refuse(message, lambda: build(compose_model("toy", *extra, f"model.{override}")))


STREAM = (
    "+model.streams.touch={_target_: pizero.model.Stream, expert: EXPERT, block: 0, "
    "encoder: {_target_: torch.nn.Linear, in_features: 2, out_features: 12}}"
)


def test_streams():
    shared = STREAM.replace("EXPERT", "action")
    wrong = compose_model("toy", STREAM.replace("EXPERT", "vml"))
    refuse("no mixture 'vml'; did you mean 'vlm'", build, wrong)
    adaptive = ["model.state_dim=null", "model.joint.mixtures.action.cond_dim=12"]
    timed = compose_model("toy", shared, *adaptive)
    refuse("adaptive norms, which would make its touch depend", build, timed)
    model = small_policy("toy", shared)
    observation = small_observation(model)
    refuse(r"lacks the stream 'touch'; known: \[\]", model.prefix, observation)
    other = replace(observation, extras={"tuch": torch.zeros(2, 1, 2)})
    refuse("lacks the stream 'touch'; did you mean 'tuch'", model.prefix, other)


def test_observation_and_steps():
    model = small_policy("toy")
    observation, (_, noise, _) = small_observation(model), small_flow(model)
    nothing = replace(observation, state=None)
    refuse(r"expects a state \[b frames 4\], got None", model.prefix, nothing)
    short = replace(observation, state=torch.zeros(2, 1, 3))
    refuse(r"expects a state \[b frames 4\], got \(2, 1, 3\)", model.prefix, short)
    refuse("num_steps must be at least 1, got 0", model.sample, observation, noise[:, 0], 0)
