"""LeRobot's processors, giga-models' ways, and what a config.json says, become the policy's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pizero
from pizero.agent.weights import inspect
from pizero.agent.weights.assets import find_assets
from pizero.agent.weights.command import main as convert
from pizero.agent.weights.lerobot import write_processors
from pizero.data.stats import Statistics, load_statistics, save_statistics
from pizero.data.tokenizer import train_tokenizer

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
SIZES = {"vision.num_heads": 4}
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
NAMES = ["left_joint_1", "left_joint_2", "Left_Gripper", "right_joint", "right_gripper"]
HALF = np.array([[-1.0, -2.0, 0.0, 0.5, 1.0], [1.0, 2.0, 0.5, 1.5, 3.0]])


def statistics() -> dict[str, Statistics]:
    low, high = HALF
    values = dict(mean=(low + high) / 2, std=high - low, q01=low, q99=high, min=low, max=high)
    return {
        name: Statistics(**{k: v.copy() for k, v in values.items()}) for name in ("state", "action")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """pi0 and pi0.5 as folders of LeRobot, with words for them."""
    root = tmp_path_factory.mktemp("lerobot")
    words = train_tokenizer(["open the drawer"], root / "tokenizer.model", vocab_size=300)
    save_statistics(statistics(), root / "stats.json", dialect="pizero")
    for kind in ("pi0", "pi05"):
        weights = FIXTURES / f"openpi_{kind}" / "weights.safetensors"
        given = ["--statistics", root / "stats.json", "--set", "vision.num_heads=4", "horizon=6"]
        convert(list(map(str, [weights, root / kind, "--to", "lerobot", *given])))
        shutil.copyfile(words, root / kind / "tokenizer.model")
    return {kind: root / kind for kind in ("pi0", "pi05")}


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["pi0"], tmp_path / "pi0"))


def change(path: Path, settings: Mapping[str, Any], *, step: str | None = None, add: bool = False):
    """New settings in a JSON file: its own, those of a step, or of one that is added."""
    tree = json.loads(path.read_text())
    if add:
        place = 0 if path.name == BEFORE else 1
        tree["steps"].insert(place, {"registry_name": step, "config": dict(settings)})
    elif step is None:
        tree |= settings
    else:
        (found,) = [s for s in tree["steps"] if s["registry_name"] == step]
        found["config"] |= settings
    path.write_text(json.dumps(tree))


def relative(folder: Path, **settings: Any) -> None:
    change(folder / BEFORE, settings, step="relative_actions_processor", add=True)
    enabled = {"enabled": settings["enabled"]}
    change(folder / AFTER, enabled, step="absolute_actions_processor", add=True)


def load(folder: Path, **options: Any) -> pizero.Policy:
    return pizero.load_policy(folder, overrides=SIZES, device="cpu", **options)


def act(policy: pizero.Policy, **cameras: np.ndarray | None) -> np.ndarray:
    picture = np.full((40, 56, 3), 90, np.uint8)
    images = cameras or dict.fromkeys(policy.pipeline.cameras, picture)
    state = np.linspace(-1, 1, 5)
    noise = np.random.default_rng(0).normal(size=policy.noise_shape).astype(np.float32)
    return policy.act(images=images, text="open the drawer", state=state, noise=noise, num_steps=2)


def test_relative_actions_are_added_to_the_state(folder):
    """The words that exclude a joint may stand anywhere in its name, in capitals too."""
    absolute = act(load(folder))
    relative(folder, enabled=True, exclude_joints=["gripper"], action_names=NAMES)
    policy = load(folder)
    moved = np.linspace(-1, 1, 5) * [1, 1, 0, 1, 0]
    np.testing.assert_allclose(act(policy), absolute + moved, atol=1e-6)
    assert policy.pipeline.delta_mask == (True, True, False, True, False)


@pytest.mark.parametrize(
    ("settings", "mask"),
    [
        (dict(enabled=True, exclude_joints=[], action_names=NAMES), (True,) * 5),
        (dict(enabled=True, exclude_joints=["gripper"], action_names=None), (True,) * 5),
        (dict(enabled=True, exclude_joints=["_1"], action_names=NAMES[:2]), (False, *[True] * 4)),
        (dict(enabled=False, exclude_joints=["gripper"], action_names=NAMES), ()),
    ],
)
def test_which_actions_are_relative(folder, settings, mask):
    relative(folder, **settings)
    assert find_assets(folder).processors.delta_mask == mask


def test_one_half_of_relative_actions_is_refused(folder):
    relative(folder, enabled=True, exclude_joints=[], action_names=None)
    change(folder / AFTER, {"enabled": False}, step="absolute_actions_processor")
    with pytest.raises(ValueError, match=r"enabled both or neither, got True and False"):
        load(folder)


def test_a_robot_does_not_make_actions_relative_that_lerobot_keeps(folder, tmp_path):
    """Nor does it resize or normalise in place of the processors."""
    robot = tmp_path / "robot.yaml"
    robot.write_text(
        "_target_: pizero.data.robot.Robot\nname: test\n"
        "cameras: {base_0_rgb: top, left_wrist_0_rgb: null, right_wrist_0_rgb: null}\n"
        "image_size: [40, 56]\nresize: lanczos\nstate: {state: [a, b, c, d, e]}\n"
        "action: [a, b, c, d, e]\nunits: {'?': rad}\nrotation: null\ncontrol_hz: 5.0\n"
        "horizon: 6\nreplan: 6\ndelta_mask: [true, true]\n"
        "normalization: {state: identity, action: identity}\n"
    )
    pipeline = load(folder, robot=robot).pipeline
    assert pipeline.delta_mask is None
    assert pipeline.resize == "pad_bilinear"
    high = pipeline.decode_actions(np.ones((6, 8)), np.zeros(5))[0]
    np.testing.assert_allclose(high, statistics()["action"].mean + statistics()["action"].std)


def test_cameras_have_the_names_that_come_in_and_empty_ones_do_not_matter(folder):
    expected = act(load(folder))
    new = "observation.images."
    names = {f"{new}top": f"{new}base_0_rgb", "observation.velocity": "observation.state"}
    change(folder / BEFORE, {"rename_map": names}, step="rename_observations_processor")
    config = json.loads((folder / "config.json").read_text())
    config["input_features"][f"{new}empty_camera_0"] = {"type": "VISUAL", "shape": [3, 56, 56]}
    (folder / "config.json").write_text(json.dumps(config))
    policy = load(folder)
    assert policy.pipeline.cameras == ("top", "left_wrist_0_rgb", "right_wrist_0_rgb")
    np.testing.assert_array_equal(act(policy), expected)


def test_a_step_that_would_be_left_out_is_refused(folder):
    change(folder / BEFORE, {}, step="xvla_image_scale", add=True)
    with pytest.raises(ValueError, match=r"policy_preprocessor.json has a step 'xvla_image_scale'"):
        load(folder)


def test_the_prompt_of_pi05_is_that_of_the_release(made, tmp_path):
    """Which since 0.5 holds the robot's own entries only; a folder that may be older is noted."""
    folder = Path(shutil.copytree(made["pi05"], tmp_path / "pi05"))
    assert load(folder).pipeline.prompt == "pi05"
    (note,) = inspect(folder, overrides=SIZES).notes
    assert "changes={'prompt': 'lerobot_pi05'}" in note
    change(folder / "config.json", {"use_relative_actions": False, "num_inference_steps": 5})
    assert inspect(folder, overrides=SIZES).notes == (
        "config.json acts in 5 Euler steps: num_steps=5 does here too",
    )


@pytest.mark.parametrize("key", ["min_period", "max_period"])
def test_another_period_has_to_be_meant(folder, key):
    change(folder / "config.json", {"min_period": 0.004, "max_period": 4.0})
    assert inspect(folder, overrides=SIZES).model["time_embedding"]["max_period"] == 4.0
    change(folder / "config.json", {key: 2.0})
    with pytest.raises(ValueError, match=rf"has {key} 2, but all .* trained with .* say so with"):
        inspect(folder, overrides=SIZES)
    meant = inspect(folder, overrides=SIZES | {f"time_embedding.{key}": 2.0})
    assert meant.model["time_embedding"][key] == 2.0


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_was_read_is_written_again(made, tmp_path, kind):
    """Modes, cameras, words and relative actions; by way of a folder of ours as well."""
    folder = Path(shutil.copytree(made[kind], tmp_path / "first"))
    modes = {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "QUANTILES"}
    relative(folder, enabled=True, exclude_joints=["gripper"], action_names=NAMES)
    change(folder / BEFORE, {"norm_map": modes}, step="normalizer_processor")
    change(folder / "config.json", {"tokenizer_max_length": 64, "normalization_mapping": modes})
    heads = ["--set", "vision.num_heads=4"]
    ways = {
        "own": [folder, tmp_path / "own"],
        "second": [folder, tmp_path / "second", "--to", "lerobot"],
        "third": [tmp_path / "own", tmp_path / "third", "--to", "lerobot"],
    }
    for name, arguments in ways.items():
        convert([*map(str, arguments), *(heads if name != "third" else [])])
    said = find_assets(folder).processors
    for name in ("second", "third"):
        again = find_assets(tmp_path / name).processors
        assert again.node() == said.node()
        theirs, ours = (load_statistics(p.statistics) for p in (said, again))
        assert all(np.array_equal(theirs[n].q99, ours[n].q99) for n in theirs)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("second", "third"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    expected = act(load(folder))
    np.testing.assert_array_equal(act(pizero.load_policy(tmp_path / "own", device="cpu")), expected)
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "third" / "tokenizer.model")
    np.testing.assert_array_equal(act(load(tmp_path / "third")), expected)


def test_what_openpis_folder_cannot_say_is_noted(folder, tmp_path, capsys):
    relative(folder, enabled=True, exclude_joints=[], action_names=None)
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"}
    change(folder / BEFORE, {"norm_map": modes}, step="normalizer_processor")
    heads = ["--set", "vision.num_heads=4"]
    convert([str(folder), str(tmp_path / "out"), "--to", "openpi", *heads])
    out = capsys.readouterr().out
    assert "note: openpi normalises the action of pi0 by z_score, this does by quantile" in out
    assert "the state of pi0" not in out
    assert "actions are relative here" in out


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ({"normalization": {"action": {"kind": "quantile", "clip": 1.0}}}, "clipped action"),
        (
            {"normalization": {"state": {"kind": "z_score", "mask": [True, False]}}},
            "a mask on state",
        ),
        (
            {"robot": {"state_maps": [{}], "normalization": {"action": "identity"}}},
            "the robot's state",
        ),
        (
            {"normalization": {"action": {"kind": "quantile", "bounds": [0.0, 1.0]}}},
            r"bounds \[0.0, 1.0\] of action",
        ),
    ],
)
def test_what_lerobots_steps_cannot_do_is_not_written(tmp_path, pipeline, words):
    model = {"vision": {"image_size": 8}, "action_dim": 8, "horizon": 6}
    with pytest.raises(ValueError, match=f"whose processors have no step for {words}"):
        write_processors(tmp_path, kind="pi0", model=model, statistics=None, pipeline=pipeline)
    assert not list(tmp_path.iterdir())


def test_a_fast_policy_of_lerobot_is_not_taken_for_openpis(tmp_path):
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.models.paligemma import PaliGemmaConfig

    language = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, vocab_size=320, model_type="gemma", pad_token_id=None,
    )  # fmt: skip
    eyes = dict(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, vision_use_head=False, model_type="siglip_vision_model",
    )  # fmt: skip
    config = PaliGemmaConfig(text_config=language, vision_config=eyes, projection_dim=16)
    PaliGemmaForConditionalGeneration(config).save_pretrained(tmp_path)
    words = train_tokenizer(["open the drawer"], tmp_path / "tokenizer.model", vocab_size=300)
    change(tmp_path / "config.json", {
        "type": "pi0_fast", "chunk_size": 7, "output_features": {"action": {"shape": [5]}},
    })  # fmt: skip
    (tmp_path / BEFORE).write_text(json.dumps({"steps": []}))
    found = inspect(tmp_path)
    assert (found.kind, found.model["horizon"], found.model["action_dim"]) == ("pi0_fast", 7, 5)
    assert not found.notes
    with pytest.raises(ValueError, match=r"a pi0-FAST of LeRobot, .* it makes no policy here"):
        pizero.load_policy(tmp_path, tokenizer=words, action_tokenizer=tmp_path)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_giga_resizes_and_counts_bins_in_its_own_way(tmp_path, kind):
    """Its tensors tell: layers that hold both experts."""
    import re

    rules = [
        (r"^paligemma_with_expert\.paligemma\.lm_head", "paligemma_with_expert.embed_tokens"),
        (r"paligemma\.model\.vision_tower\.vision_model", "vision_tower"),
        (r"paligemma\.model\.multi_modal", "multi_modal"),
    ]
    for i, root in enumerate((r"paligemma\.model\.language_model\.", r"gemma_expert\.model\.")):
        rules += [
            (root + r"norm\.", f"norms.{i}."),
            (root + r"(layers\.\d+\.self_attn\.\w_proj)", rf"\1.{i}"),
            (root + r"(layers\.\d+)\.mlp\.", rf"\1.mlps.{i}."),
            (root + r"(layers\.\d+\.\w+_layernorm)\.", rf"\1s.{i}."),
        ]
    tensors = {}
    for name, tensor in load_file(FIXTURES / f"openpi_{kind}" / "weights.safetensors").items():
        if "gemma_expert.lm_head" not in name:
            for pattern, to in rules:
                name = re.sub(pattern, to, name)
            tensors[name] = tensor
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"n_action_steps": 6, "num_steps": 10}))
    save_statistics(statistics(), tmp_path / "norm_stats.json", dialect="giga")
    train_tokenizer(["open the drawer"], tmp_path / "tokenizer.model", vocab_size=300)
    policy = load(tmp_path)
    assert policy.pipeline.resize == "pad_bilinear"
    assert policy.pipeline.prompt == {"pi0": "pi0", "pi05": "giga_pi05"}[kind]
    assert act(policy).shape == (6, 5)
    if kind == "pi05":
        text = policy.pipeline.tokenizer.decode(
            policy.pipeline.tokenizer.prompt(
                "x", format="giga_pi05", state=np.array([-1.0, 0, 0.1])
            )
        )
        assert text == "Task: x, State: -1 127 140;\nAction: "


def test_pictures_are_resized_in_floats_as_lerobot_has_it(made):
    """Its torch code: [0, 1], bilinear without antialiasing, padded, then [-1, 1]. Not rounded."""
    pipeline = load(made["pi0"]).pipeline
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    seen = pipeline.observation(
        images=dict.fromkeys(pipeline.cameras[:2], picture), text="x", state=np.zeros(5)
    )
    images = torch.from_numpy(picture).float().permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(images, (32, 56), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.pad(small, (0, 0, 12, 12)) * 2 - 1
    for got in seen["images"][:2]:
        np.testing.assert_allclose(got.transpose(2, 0, 1), expected[0], atol=1e-5)
    assert (seen["images"][2] == -1).all()
    assert seen["image_mask"].tolist() == [True, True, False]
    given = {"images": {pipeline.cameras[0]: picture}, "text": "x", "state": np.zeros(5)}
    rounded = pipeline.observation(**given, as_bytes=True)["images"]
    assert rounded.dtype == np.uint8
    exact = pipeline.observation(**given)["images"]
    assert abs((exact[0] + 1) * 127.5 - rounded[0]).max() < 0.51
