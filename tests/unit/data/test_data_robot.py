"""Robots of config/robot against the numbers of openpi and open-pi-zero, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rlds_demo import open_demo
from safetensors.numpy import load_file

from pizero.agent.config import build, config_dir
from pizero.data import PolicyPipeline, Robot, Statistics, compute_statistics
from pizero.data.maps import Affine, CrankAngle, Interval, QuaternionToEuler, Reorder
from pizero.data.robot import GripperLatch, GripperThreshold, Live

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
OPENPI = json.loads((FIXTURES / "openpi_transforms" / "case.json").read_text())["facts"]
ARRAYS = load_file(FIXTURES / "openpi_transforms" / "arrays.safetensors")
ZERO = json.loads((FIXTURES / "open_pi_zero_transforms" / "case.json").read_text())["facts"]
SIMULATED = {"bridge": "widowx", "fractal": "google_robot"}
PICTURE = np.zeros((6, 8, 3), np.uint8)


def robot_of(name: str, **changes) -> Robot:
    node = OmegaConf.to_container(OmegaConf.load(config_dir() / "robot" / f"{name}.yaml"))
    return build(node | changes, path=name)


def minimal(**changes) -> Robot:
    arguments = {
        "name": "arm",
        "cameras": {"top": "camera"},
        "state": {"state": ["a", "b"]},
        "action": ["a", "b"],
        "units": {"*": "rad"},
        "rotation": None,
        "control_hz": 10.0,
        "horizon": 4,
        "replan": 2,
        "resize": "pad",
    }
    return Robot(**(arguments | changes))


@pytest.fixture
def pipeline_of(assets):
    def make(robot: Robot, **changes) -> PolicyPipeline:
        unit = {
            "state": Statistics(q01=-np.ones(robot.state_dim), q99=np.ones(robot.state_dim)),
            "action": Statistics(q01=-np.ones(robot.action_dim), q99=np.ones(robot.action_dim)),
        }
        arguments = {
            "robot": robot,
            "image_size": [16, 16],
            "tokenizer": assets / "tokenizer.model",
            "max_tokens": 24,
            "horizon": 3,
            "action_dim": 32,
            "state_dim": 32,
            "statistics": None if robot.statistics else unit,
            "normalization": robot.normalization or {"state": "identity", "action": "identity"},
        }
        return PolicyPipeline(**(arguments | changes))

    return make


# -- openpi ---------------------------------------------------------------------------------------


def test_aloha_through_the_pipeline_with_relative_actions(pipeline_of):
    """Deltas are taken of converted actions to the converted state, as openpi orders its steps."""
    pipeline = pipeline_of(robot_of("aloha"))
    sample = {
        "images": {"base_0_rgb": PICTURE},
        "text": "x",
        "state": ARRAYS["aloha.state"],
        "actions": ARRAYS["aloha.actions"],
        "action_is_pad": np.zeros(3, bool),
    }
    encoded = pipeline.encode(sample)
    expected = ARRAYS["aloha.actions_pi"].copy()
    joints = [i for i in range(14) if i not in (6, 13)]
    expected[:, joints] -= ARRAYS["aloha.state_pi"][joints]
    np.testing.assert_allclose(encoded["actions"][:, :14], expected, atol=1e-6)
    assert (encoded["actions"][:, 14:] == 0).all()
    np.testing.assert_allclose(encoded["state"][0, :14], ARRAYS["aloha.state_pi"], atol=1e-6)
    back = pipeline.decode_actions(encoded["actions"], sample["state"])
    np.testing.assert_allclose(back, ARRAYS["aloha.actions"], atol=1e-5)


def test_aloha_cameras(pipeline_of):
    """Named by the robot, channels first; one is lacking, one is ignored, others are refused."""
    pipeline = pipeline_of(robot_of("aloha"))
    picture = np.full((3, 6, 8), 9, np.uint8)
    images = {"cam_left_wrist": picture * 2, "cam_high": picture, "cam_low": picture}
    encoded = pipeline.observation(images=images, text="x", state=np.full(14, 0.5))
    masks = OPENPI["aloha"]["image_masks"]
    assert encoded["image_mask"].tolist() == [masks[slot] for slot in pipeline.cameras]
    assert encoded["images"][:, 8, 8, 0].tolist() == [9, 18, 0]
    with pytest.raises(ValueError, match="got 'cam_hight'; did you mean 'cam_high'"):
        pipeline.observation(images={"cam_hight": picture}, text="x", state=np.zeros(14))
    both = {"cam_high": picture, "base_0_rgb": picture}
    with pytest.raises(ValueError, match=r"two pictures for camera 'base_0_rgb', 'base_0_rgb'"):
        pipeline.observation(images=both, text="x", state=np.zeros(14))


def test_droid_state_is_joined_and_the_gripper_may_be_a_number():
    robot = robot_of("droid")
    expected = OPENPI["droid"]["pi0"]["state"]
    for gripper in (0.25, [0.25]):
        parts = {"joint_position": np.arange(7.0), "gripper_position": np.array(gripper)}
        assert robot.data_state(parts, live=True).tolist() == expected
    frames = {"joint_position": np.zeros((5, 7)), "gripper_position": np.ones(5)}
    assert robot.data_state(frames, live=True).shape == (5, 8)
    with pytest.raises(ValueError, match="state of joint_position, gripper_position, got joints"):
        robot.data_state({"joints": np.zeros(7)}, live=True)
    with pytest.raises(ValueError, match=r"joint_position of 7 entries, got shape \[6\]"):
        robot.data_state(parts | {"joint_position": np.zeros(6)}, live=True)
    with pytest.raises(ValueError, match=r"state of 8 entries .*got shape \[7\]"):
        robot.data_state(np.zeros(7), live=True)


def test_libero_simulator_is_upside_down_and_speaks_quaternions():
    robot = robot_of("libero")
    half = np.sqrt(0.5)
    live = {
        "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
        "robot0_eef_quat": np.array([0.0, 0.0, half, half]),  # a quarter turn about z
        "robot0_gripper_qpos": np.array([0.04, -0.04]),
    }
    state = robot.data_state(live, live=True)
    np.testing.assert_allclose(state, [0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04, -0.04], atol=1e-12)
    assert robot.data_state(state, live=False) is state
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    turned = robot.rename_images({"agentview_image": picture}, live=True)["base_0_rgb"]
    np.testing.assert_array_equal(turned, picture[::-1, ::-1])
    assert robot.rename_images({"image": picture}, live=False)["base_0_rgb"] is picture


# -- open-pi-zero ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ZERO["proprio"]["cases"], ids=lambda c: c["robot"])
def test_simulators_state(pipeline_of, case):
    robot = robot_of(SIMULATED[case["robot"]])
    live = np.array(case["eef_pos_xyz_quat_wxyz_gripper_open"])
    raw = robot.data_state({"eef_pos": live}, live=True)
    pipeline = pipeline_of(robot)
    encoded = pipeline.observation(images={"primary": PICTURE}, text="x", state=live)
    got = encoded["state"][0, : len(raw)]
    np.testing.assert_allclose(got, case["proprio_normalized"], rtol=0, atol=1e-7)  # float32
    with pytest.raises(ValueError, match=r"a state of 7|a state of 8") as error:
        pipeline.observation(images={"primary": PICTURE}, text="x", state=live[:5], live=False)
    assert "got shape [5]" in str(error.value)


@pytest.mark.parametrize("case", ZERO["actions"]["cases"], ids=lambda c: c["robot"])
def test_simulators_actions(pipeline_of, case):
    robot = robot_of(SIMULATED[case["robot"]])
    pipeline = pipeline_of(robot, horizon=6)
    actions = pipeline.decode_actions(np.pad(case["model_actions"], ((0, 0), (0, 25))))
    assert actions.dtype == np.float32
    output = robot.output_stage()
    assert output is not None
    np.testing.assert_allclose(output(actions), case["env_actions"], rtol=0, atol=1e-7)
    output.reset()
    assert output(actions[:0]).shape == (0, 7)  # nothing executed, nothing held


def test_gripper_sticks_as_published():
    sequence = ZERO["sticky_gripper_fractal"]
    actions = np.array(sequence["in"])[:, None]
    at_once = GripperLatch(dim=0)(actions)[:, 0]
    np.testing.assert_allclose(at_once, sequence["out"], rtol=0, atol=1e-15)
    one_by_one = GripperLatch(dim=0)
    got = [one_by_one(action[None])[0, 0] for action in actions]
    np.testing.assert_array_equal(got, at_once)
    one_by_one.reset()
    assert one_by_one(actions[:1])[0, 0] == at_once[0]


def test_each_episode_has_a_gripper_of_its_own():
    robot = robot_of("google_robot")
    first, second = robot.output_stage(), robot.output_stage()
    open_, hold = np.eye(7)[[6]], np.full((1, 7), 0.5)
    assert first is not None
    assert second is not None
    assert first(open_)[0, 6] == first(hold)[0, 6] == -1
    assert second(hold)[0, 6] == 0
    assert robot_of("droid").output_stage() is None


def test_at_its_threshold_the_gripper_closes():
    assert GripperThreshold(dim=0)(np.array([[0.5], [0.51]])).tolist() == [[-1], [1]]


# -- by hand --------------------------------------------------------------------------------------


def test_ur5(pipeline_of):
    """Six joints relative to the state, the gripper not; (x - mean) / (std + 1e-6)."""
    robot = robot_of("ur5")
    both = Statistics(mean=np.full(32, 0.5), std=np.full(32, 2.0))  # saved padded, as openpi's are
    pipeline = pipeline_of(
        robot,
        statistics={"state": both, "action": both},
        normalization={"state": "z_score", "action": "z_score"},
    )
    state = {"joints": np.arange(6.0), "gripper": 0.25}
    actions = np.tile([10.0, 11, 12, 13, 14, 15, 1], (3, 1))
    joined = robot.data_state(state, live=False)
    sample = {"images": {"base_rgb": PICTURE}, "text": "x", "state": joined, "actions": actions}
    encoded = pipeline.encode(sample | {"action_is_pad": np.zeros(3, bool)})
    expected = (np.array([10, 10, 10, 10, 10, 10, 1]) - 0.5) / 2.000001
    np.testing.assert_allclose(encoded["actions"][1, :7], expected, rtol=1e-6)
    expected = (np.array([0, 1, 2, 3, 4, 5, 0.25]) - 0.5) / 2.000001
    np.testing.assert_allclose(encoded["state"][0, :7], expected, rtol=1e-6)
    assert encoded["image_mask"].tolist() == [True, False, False]
    for given in (state, joined, joined[None]):
        back = pipeline.decode_actions(encoded["actions"], given)
        np.testing.assert_allclose(back, actions, atol=1e-5)
    chunks = np.stack([encoded["actions"]] * 2)
    back = pipeline.decode_actions(torch.from_numpy(chunks), np.stack([joined, joined + 1]))
    np.testing.assert_allclose(back[0], actions, atol=1e-5)
    np.testing.assert_allclose(back[1, 0], [11, 12, 13, 14, 15, 16, 1], atol=1e-5)


def test_robofactory(pipeline_of):
    """(x - q01) / (q99 - q01): q01 becomes 0, q99 becomes 1; the first 8 of 32 come back."""
    q01, q99 = np.arange(8.0) - 4, np.arange(8.0)
    both = Statistics(q01=q01, q99=q99)
    pipeline = pipeline_of(robot_of("robofactory"), statistics={"state": both, "action": both})
    views = {name: np.full((240, 320, 3), 9, np.uint8) for name in ("side", "overhead", "wrist")}
    encoded = pipeline.observation(images=views, text="x", state=q01 + 1)
    np.testing.assert_allclose(encoded["state"][0], [0.25] * 8 + [0] * 24, rtol=1e-6)
    assert encoded["image_mask"].all()
    assert encoded["images"][0, :, 0, 0].tolist() == [0, 0] + [9] * 12 + [0, 0]
    model = np.zeros((3, 32))
    model[1, :8], model[2, :8] = 1.0, 0.5
    np.testing.assert_allclose(pipeline.decode_actions(model), [q01, q99, q01 + 2], atol=1e-6)


def test_the_example_of_the_docs(pipeline_of, tmp_path):
    """docs/robots.md's robot builds, and does what its comments say."""
    page = (Path(__file__).parents[3] / "docs" / "robots.md").read_text()
    (tmp_path / "scara.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    robot = build(OmegaConf.to_container(OmegaConf.load(tmp_path / "scara.yaml")), path="scara")
    pipeline = pipeline_of(robot)
    live = {"joints": np.array([90.0, 0, -90, 0.2]), "tool": 1.0}
    images = {"overview": PICTURE, "wrist_cam": PICTURE, "depth_preview": PICTURE}
    encoded = pipeline.observation(images=images, text="pick", state=live)
    assert encoded["image_mask"].tolist() == [True, True, False]
    expected = [np.pi / 2, 0, -np.pi / 2, -0.2, 1]
    np.testing.assert_allclose(encoded["state"][0, :5], expected, rtol=1e-6)
    stay = np.zeros((3, 32))
    stay[:, 4] = 0.6
    chunk = pipeline.decode_actions(stay, live)
    np.testing.assert_allclose(chunk[0], [90, 0, -90, 0.2, 0.6], rtol=1e-6, atol=1e-6)
    output = robot.output_stage()
    assert output is not None
    assert output(chunk)[0, 4] == 1


# -- the class ------------------------------------------------------------------------------------


def test_statistics_are_of_what_the_policy_learns(demo_path, pipeline_of):
    demo = open_demo(demo_path)
    names = ["w", "x", "y", "z"]
    robot = minimal(
        cameras={"corner": None, "wrist": None},
        state={"state": names},
        action=names,
        state_maps=[Affine(dims=[0], scale=-1.0)],
        action_maps=[Affine(dims=[0], scale=-1.0), Affine(dims=[3], scale=10.0, offset=1.0)],
        delta_mask=[True, False],
    )
    statistics = compute_statistics(demo, robot=robot)
    pipeline = pipeline_of(
        robot,
        horizon=demo.horizon,
        statistics=statistics,
        normalization={"state": "identity", "action": "identity"},
    )
    samples = [demo.read(i) for i in range(len(demo))]
    rows = [pipeline.encode(s)["actions"][~s["action_is_pad"], :4] for s in samples]
    np.testing.assert_allclose(np.concatenate(rows).mean(0), statistics["action"].mean, atol=1e-5)
    states = np.concatenate([pipeline.encode(s)["state"][:, :4] for s in samples])
    np.testing.assert_allclose(states.max(0), statistics["state"].max, atol=1e-5)
    for sample in samples[::9]:
        back = pipeline.decode_actions(pipeline.encode(sample)["actions"], sample["state"])
        np.testing.assert_allclose(back, sample["actions"], atol=1e-4)


def test_what_the_pipeline_takes_from_the_robot(pipeline_of):
    robot = minimal(delta_mask=[True], normalization={"state": "quantile", "action": "quantile"})
    pipeline = pipeline_of(robot)
    assert (pipeline.cameras, pipeline.resize, pipeline.delta_mask) == (("top",), "pad", (True,))
    other = pipeline_of(robot, cameras=["top", "side"], resize="bilinear", delta_mask=[])
    assert (other.cameras, other.resize, other.delta_mask) == (("top", "side"), "bilinear", None)
    with pytest.raises(ValueError, match="robot_action_dim is 3, but the robot's action has 2"):
        pipeline_of(robot, robot_action_dim=3)
    with pytest.raises(ValueError, match="expected normalization, got None from the pipeline"):
        pipeline_of(minimal(), normalization=None)
    with pytest.raises(ValueError, match="expected statistics, got None from the pipeline"):
        pipeline_of(robot, statistics=None)
    short = {k: Statistics(q01=np.zeros(1), q99=np.ones(1)) for k in ("state", "action")}
    with pytest.raises(ValueError, match=r"'state': expected .*of at least 2 dimensions, got 1"):
        pipeline_of(robot, statistics=short)
    assert (
        pipeline_of(minimal(default_text="wave"))
        .observation(images={"camera": PICTURE}, text=None, state=np.zeros(2))["tokens"]
        .size
    )
    with pytest.raises(ValueError, match="expected an instruction, got None"):
        pipeline.observation(images={"camera": PICTURE}, text=None, state=np.zeros(2))


def test_other_files_of_a_robot_with_several_statistics(pipeline_of, tmp_path):
    entry = {"q01": [0.0, 0.0], "q99": [1.0, 1.0]}
    tree = {name: {"action": entry, "proprio": entry} for name in ("one", "two")}
    tree["two"]["action"] = entry | {"q99": [5.0, 5.0]}
    (tmp_path / "all.json").write_text(json.dumps(tree))
    pipeline = pipeline_of(
        minimal(statistics=str(tmp_path / "all.json"), dataset="two"),
        normalization={"state": "quantile", "action": "quantile"},
    )
    np.testing.assert_allclose(pipeline.decode_actions(np.ones((3, 32))), 5.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": {}}, "robot 'arm': expected at least one camera"),
        ({"cameras": {"a": "x", "b": "x"}}, r"cameras \['x'\] are named twice"),
        ({"state": {"one": ["a"], "two": ["a"]}}, r"distinct state names, got \['a', 'a'\]"),
        ({"action": []}, r"expected distinct action names, got \[\]"),
        ({"units": {"*": "rad", "c": "m"}}, "units of 'c', but no entry is called so"),
        ({"units": {"a": "rad"}}, r"expected units of all entries, \['b'\] have none"),
        ({"rotation": "euler"}, "expected a rotation of euler_xyz.*got 'euler'"),
        ({"control_hz": 0}, "expected control_hz > 0 .* got 0, 2 and 4"),
        ({"replan": 5}, "1 <= replan <= horizon, got 10.0, 5 and 4"),
        ({"delta_mask": [True] * 3}, "delta_mask has 3 entries, states have 2 and actions 2"),
        (
            {"action_maps": [CrankAngle(dims=[0], radius=1.0, length=2.0)]},
            "action map CrankAngle has no way back",
        ),
        ({"state_maps": [Affine(dims=[2])]}, "state_maps of 2 entries: index 2 is out of bounds"),
        (
            {"live": Live(state={"s": 8}, state_maps=[QuaternionToEuler(start=3, order="wxyz")])},
            "live.state_maps give 7 entries, but 2 are named",
        ),
    ],
)
def test_mistakes_in_a_yaml(changes, message):
    with pytest.raises(ValueError, match=message):
        minimal(**changes)


def test_mistakes_in_maps():
    for make, message in [
        (lambda: Affine(dims=[0], scale=0.0), "a scale that can be undone"),
        (lambda: Interval(dims=[0], source=[1, 1], target=[0, 1]), r"source \[from, to\]"),
        (lambda: Reorder(order=[0, 0]), "every dimension once"),
        (lambda: Reorder(order=[1, 0])(np.zeros(3)), r"2 dimensions to reorder, got shape \[3\]"),
        (lambda: QuaternionToEuler(start=0, order="wxzy"), "wxyz or xyzw, got 'wxzy'"),
        (
            lambda: QuaternionToEuler(start=0, order="wxyz", relative_to=np.ones((3, 3))),
            "expected a rotation matrix",
        ),
        (lambda: QuaternionToEuler(start=0, order="wxyz")(np.zeros(4)), "expected a quaternion"),
        (lambda: Live(rotate_images=45), "a multiple of 90, got 45"),
        (lambda: GripperLatch(dim=0, steps=0), "expected steps >= 1, got 0"),
        (lambda: GripperLatch(dim=0)(np.zeros(3)), r"executed actions \[n A\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_maps_come_back_and_leave_what_they_are_given():
    x = np.random.default_rng(0).normal(size=(5, 4))
    kept = x.copy()
    for step in (
        Affine(dims=[0, 3], scale=-2.0, offset=1.0),
        Interval(dims=[1], source=[-1, 3], target=[0, 1]),
        Reorder(order=[2, 0, 3, 1]),
    ):
        np.testing.assert_allclose(step.inverse(step(x)), x, atol=1e-12)
        np.testing.assert_array_equal(x, kept)
    integers = Affine(dims=[0], scale=0.5)(np.array([1, 2]))
    assert integers.tolist() == [0.5, 2]
