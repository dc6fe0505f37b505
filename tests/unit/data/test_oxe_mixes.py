"""Open X-Embodiment sets from disk, and mixtures of them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from oxe_episodes import episode, features, write_set

from pizero.data import Mix, compute_statistics
from pizero.data.oxe import MIXES, OXE_SETS, mix_weights, oxe_dataset, oxe_mix, oxe_rule, oxe_set
from pizero.data.select import Filters

SIZES = {"taco_play": 20, "kuka": 6, "gnm_dataset": 3, "bridge_dataset": 4, "berkeley_mvp": 2}
VIEWS = ("primary", "wrist")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five sets with episodes of 11 steps; only gnm_dataset has a split val."""
    folder = tmp_path_factory.mktemp("oxe")
    for name, episodes in SIZES.items():
        splits = {"train": episodes} | ({"val": 2} if name == "gnm_dataset" else {})
        write_set(folder, name, splits=splits)
    return folder


def opened(root, name, **changes):
    arguments = {"path": root / oxe_set(name).name, "split": "train[:100%]", "horizon": 3}
    arguments["cameras"] = ("primary", "secondary", "wrist")
    return oxe_dataset(name=name, **arguments | changes)


# -- one set --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_set_is_its_rule(root, name):
    data = opened(root, name)
    expected = [oxe_rule(name).function(episode(name, 11, seed=i)) for i in range(SIZES[name])]
    # Float64 is stored as float32, so waypoints computed from it differ in the last bits.
    actions, states = (
        np.concatenate([getattr(e, k) for e in expected]) for k in ("action", "state")
    )
    np.testing.assert_allclose(data.actions, actions, rtol=1e-5)
    np.testing.assert_allclose(data.states, states, rtol=1e-6)
    assert data.action_mask == oxe_set(name).action.mask
    sample = data.read(len(expected[0].action))  # the first of the second episode
    assert sample["images"].keys() == oxe_set(name).cameras.keys()
    assert all(abs(int(image.mean()) - 1) <= 1 for image in sample["images"].values())


@pytest.mark.parametrize("name", ["language_table", "bc_z", "droid", "aloha_mobile_dataset"])
def test_sets_with_keys_of_their_own(tmp_path, name):
    """Sentences of numbers, names with slashes, float64, two arms and a base."""
    data = opened(tmp_path, name, path=write_set(tmp_path, name, splits={"train": 2}))
    expected = [oxe_rule(name).function(episode(name, 11, seed=i)) for i in range(2)]
    np.testing.assert_array_equal(data.actions, np.concatenate([e.action for e in expected]))
    assert data.texts() == ["push the blue moon", "slide the star to the left"]


def test_one_folder_under_two_rules(root, tmp_path):
    with_first = opened(root, "bridge_dataset")
    without = opened(root, "bridge_orig", path=root / "bridge_dataset")
    assert (with_first.lengths[0], without.lengths[0]) == (10, 9)
    np.testing.assert_array_equal(without.actions[:9], with_first.actions[1:10])
    np.testing.assert_array_equal(without.read(0)["step"], 0)


def test_uninformative_sentences_are_emptied(root):
    assert set(opened(root, "kuka").texts()) == {""}
    assert "push the blue moon" in opened(root, "kuka", keep_text=True).texts()
    with pytest.raises(ValueError, match=r"kuka has no instruction .* expected keep_text"):
        opened(root, "kuka", skip_unlabeled=True)
    kept = opened(root, "kuka", keep_text=True, skip_unlabeled=True)
    assert kept.num_episodes == 4  # every third sentence is empty


def test_successes_only(root):
    assert opened(root, "kuka", success_only=True).num_episodes == 3
    assert opened(root, "taco_play", success_only=True).num_episodes == 20  # does not say


def test_filters_and_history(root):
    data = opened(root, "taco_play", filters=Filters(max_frames=2), frames=2, stride=2)
    assert len(data) == 40
    sample = data.read(1)
    assert sample["state"].shape == (2, 7)
    assert sample["images"]["primary"].shape == (2, 8, 8, 3)


def test_octo_compat_of_a_set(root):
    ours, octo = opened(root, "taco_play"), opened(root, "taco_play", octo_compat=True)
    assert not np.array_equal(ours.states[:, 6], octo.states[:, 6])
    assert ours.read(9)["action_is_pad"].tolist() == [False, False, True]
    assert octo.read(9)["action_is_pad"].tolist() == [False, False, False]


def test_cameras(root):
    keys = {"scene": "observation/rgb_gripper"}
    assert opened(root, "taco_play", cameras=keys).cameras == {"scene": ["observation/rgb_gripper"]}
    with pytest.raises(ValueError, match=r"has no 'wirst'; did you mean 'wrist'\?"):
        opened(root, "taco_play", cameras=["wirst"])
    with pytest.raises(ValueError, match=r"none of the cameras \['primary'\]; it has: wrist"):
        opened(root, "berkeley_mvp", cameras=["primary"])


def test_features_of_another_set_are_an_error(root):
    with pytest.raises(ValueError, match=r"aloha_static_dataset: expected .*action_mask.*14"):
        opened(root, "aloha_static_dataset", path=root / "bridge_dataset", cameras={})
    with pytest.raises(ValueError, match=r"fractal.*_data: .* has no 'observation/natural"):
        opened(root, "fractal20220817_data", path=root / "bridge_dataset", cameras={})


# -- mixtures -------------------------------------------------------------------------------------


def mixed(root, mix, **changes) -> Mix:
    arguments = {"split": "train", "horizon": 3, "cameras": VIEWS}
    return oxe_mix(root=root, mix=mix, **arguments | changes)


def shares(mix: Mix) -> dict[str, float]:
    """Which part of many samples each set has."""
    dataset, _ = mix.locate(mix.order(0), np.arange(20_000))
    return {name: float((dataset == i).mean()) for i, name in enumerate(mix.names)}


def test_weights_count_per_frame(root):
    """Octo's `balance_weights`: weight times frames."""
    mix = mixed(root, {"taco_play": 1, "kuka": 2})
    frames = {name: len(data) for name, data in mix.datasets.items()}
    assert frames == {"taco_play": 19 * 11, "kuka": 6 * 11}  # 95 % of 20 and, rounded, of 6
    total = 19 + 2 * 6
    assert shares(mix) == pytest.approx({"taco_play": 19 / total, "kuka": 12 / total}, abs=0.01)
    plain = mixed(root, {"taco_play": 1, "kuka": 2}, balance_weights=False)
    assert shares(plain) == pytest.approx({"taco_play": 1 / 3, "kuka": 2 / 3}, abs=0.01)


def test_splits(root):
    """A split val is used where there is one, otherwise the last 5 % of train."""
    train, val = (
        mixed(root, {"taco_play": 1, "gnm_dataset": 1}, split=s) for s in ("train", "val")
    )
    episodes = {s: {n: d.num_episodes for n, d in s.datasets.items()} for s in (train, val)}
    assert episodes[train] == {"taco_play": 19, "gnm_dataset": 3}
    assert episodes[val] == {"taco_play": 1, "gnm_dataset": 2}
    assert val.datasets["taco_play"].episodes.tolist() == [19]


def test_bridge_goes_by_two_names(root):
    """OpenVLA's copy is the same folder, renamed."""
    mix = mixed(root, "openvla_bridge")
    assert mix.names == ["bridge_orig"]
    assert mix.datasets["bridge_orig"].lengths[0] == 9


def test_missing_sets(root, caplog):
    with pytest.raises(ValueError, match=r"of 11 sets, 8 are missing: fractal.*missing: skip"):
        mixed(root, "rtx")
    with caplog.at_level(logging.WARNING):
        mix = mixed(root, "rtx", missing="skip")
    assert mix.names == ["kuka", "bridge_dataset", "taco_play"]
    assert "8 of 11 sets are left out, they are not in" in caplog.text
    assert "nyu_door_opening_surprising_effectiveness" in caplog.text
    with pytest.raises(ValueError, match="of 1 sets, 1 are missing: viola"):
        mixed(root, "viola", missing="skip")
    with pytest.raises(ValueError, match="expected missing raise or skip, got 'ignore'"):
        mixed(root, "rtx", missing="ignore")


def test_sets_are_left_out(root):
    mix = mixed(root, {"kuka": 1, "taco_play": 1}, exclude=["kuka"], skip_unlabeled=True)
    assert mix.names == ["taco_play"]
    with pytest.raises(ValueError, match=r"the mixture 'bridge' has no 'viola'"):
        mixed(root, "bridge", exclude=["viola"])


def test_statistics_of_a_set_in_a_mixture(root):
    data = mixed(root, {"taco_play": 1}).datasets["taco_play"]
    statistics = compute_statistics(data)
    np.testing.assert_allclose(statistics["action"].mean, data.actions.mean(0), atol=1e-5)


# -- the lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXES)
def test_mixtures_name_sets(name):
    weights = mix_weights(name)
    assert weights.keys() <= OXE_SETS.keys()
    assert all(isinstance(w, float) and w > 0 for w in weights.values())
    assert all(features(s) for s in weights)


def test_sizes_and_weights_of_the_published_lists():
    sizes = {name: len(weights) for name, weights in MIXES.items()}
    assert sizes == {
        "bridge": 1,
        "fractal": 1,
        "oxe_simple": 2,
        "rtx": 11,
        "rtx_franka": 25,
        "oxe_magic_soup": 25,
        "oxe_flex_act_soup": 32,
        "oxe_full": 50,
        "openvla_bridge": 1,
        "bridge_rt_1": 2,
        "openvla_rtx": 10,
        "openvla_rtx_franka": 24,
        "openvla_magic_soup": 23,
        "oxe_magic_soup_plus": 27,
        "oxe_magic_soup_plus_minus": 25,
        "libero": 4,
    }
    # A set that is listed twice keeps its first weight.
    assert MIXES["rtx_franka"]["berkeley_cable_routing"] == 3
    assert MIXES["rtx_franka"][oxe_set("austin_buds_dataset").name] == 3
    assert MIXES["oxe_magic_soup"]["berkeley_cable_routing"] == 1
    assert MIXES["oxe_magic_soup_plus"]["droid"] == 0.06
    assert MIXES["oxe_magic_soup_plus_minus"]["fractal20220817_data"] == 1
    assert MIXES["oxe_magic_soup_plus"]["fractal20220817_data"] == 0.54087122203
    assert "bridge_dataset" not in MIXES["oxe_magic_soup_plus"]
    assert not {"uiuc_d3field", "fmb_dataset"} & MIXES["oxe_magic_soup"].keys()


def test_mixtures_of_ones_own():
    full = "nyu_rot_dataset_converted_externally_to_rlds"
    assert mix_weights({"nyu_rot_dataset": 2, "kuka": 1}) == {full: 2.0, "kuka": 1.0}
    assert mix_weights("nyu_rot_dataset") == {full: 1.0}
    assert mix_weights("bridge") == {"bridge_dataset": 1.0}  # a mixture and an older set
    for bad in ({"kuka": 0}, {"nyu_rot_dataset": 1, full: 1}):
        with pytest.raises(ValueError, match="expected each set once with a weight > 0"):
            mix_weights(bad)
    with pytest.raises(ValueError, match=r"has no 'rtx_frnka'; did you mean 'rtx_franka'\?"):
        mix_weights("rtx_frnka")


def test_the_rule_of_the_docs(root):
    page = (Path(__file__).parents[3] / "docs" / "oxe.md").read_text()
    module: dict = {"__name__": "my_robot"}
    exec(page.split("# my_robot.py\n")[1].split("```")[0], module)
    found = module["rule"]().function(episode("bridge_dataset", 4))
    expected = episode("bridge_dataset", 4)["action"]
    np.testing.assert_allclose(found.action[:, 6], 1 - expected[:, 6])
    np.testing.assert_array_equal(found.action[:, :6], expected[:, :6])


def test_the_mixtures_of_the_docs():
    page = (Path(__file__).parents[3] / "docs" / "oxe.md").read_text()
    rows = re.findall(r"^\| (`.+`) \| ([\d, ]+) \|", page, re.MULTILINE)
    listed = {
        name: int(size)
        for names, sizes in rows
        for name, size in zip(re.findall(r"`(\w+)`", names), sizes.split(", "), strict=True)
    }
    assert listed == {name: len(weights) for name, weights in MIXES.items()}
