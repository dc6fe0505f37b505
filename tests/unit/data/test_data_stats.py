"""Statistics and normalisation, against openpi's numbers and by their own inverse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import LENGTHS, open_demo
from safetensors.numpy import load_file

from pizero.data import Mix, Normalizer, Statistics, compute_statistics, load_statistics
from pizero.data import save_statistics as save
from pizero.data.stats import subtract_state

OPENPI = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_transforms"
KINDS = {"zscore": "z_score", "quantile": "quantile"}
VALUES = np.random.default_rng(0).normal(size=(500, 3)) * [1, 0.01, 100] + [0, 5, -3]


@pytest.fixture(scope="module")
def openpi():
    return load_file(OPENPI / "arrays.safetensors")


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize(("name", "key"), [("state", "state"), ("action", "actions")])
def test_openpi_normalisation(openpi, mode, name, key):
    statistics = load_statistics(OPENPI / "norm_stats.json")[name]
    normalizer = Normalizer(kind=KINDS[mode], statistics=statistics, min_scale=0)
    case = f"normalize.same_width.{mode}.{key}"
    # min_scale=0 blows the constant dimension 5 up to 1e6, hence the relative tolerance
    normalized = normalizer.normalize(openpi[f"{case}.in"])
    np.testing.assert_allclose(normalized, openpi[f"{case}.normalized"], rtol=1e-9, atol=1e-9)
    back = normalizer.denormalize(openpi[f"{case}.in"])
    np.testing.assert_allclose(back, openpi[f"{case}.unnormalized"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", KINDS)
def test_openpi_statistics_saved_wider_than_the_robot(openpi, mode):
    statistics = load_statistics(OPENPI / "norm_stats.json")["state"].cut(6)
    case = f"normalize.data_narrower_than_stats.{mode}.state"
    got = Normalizer(kind=KINDS[mode], statistics=statistics, min_scale=0).normalize(
        openpi[f"{case}.in"]
    )
    np.testing.assert_allclose(got, openpi[f"{case}.normalized"], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="statistics of at least 9 dimensions, got 6"):
        statistics.cut(9)


def test_openpi_relative_actions(openpi):
    mask = [True] * 6 + [False] + [True] * 6 + [False]
    delta = subtract_state(openpi["delta.actions"], openpi["delta.state"], mask)
    np.testing.assert_allclose(delta, openpi["delta.delta"], atol=1e-6)
    back = subtract_state(openpi["delta.actions"], openpi["delta.state"], mask, sign=1)
    np.testing.assert_allclose(back, openpi["delta.absolute"], atol=1e-6)
    with pytest.raises(ValueError, match="delta_mask has 17 entries, but actions have 16"):
        subtract_state(openpi["delta.actions"], openpi["delta.state"], [True] * 17)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("z_score", lambda y: (y.mean(0), y.std(0), 0, 1)),
        ("min_max", lambda y: (y.min(0), y.max(0), -1, 1)),
        ("quantile", lambda y: (*np.quantile(y, [0.01, 0.99], axis=0), -1, 1)),
    ],
)
def test_what_each_kind_brings_to_where(kind, check):
    statistics = Statistics.of(VALUES)
    y = Normalizer(kind=kind, statistics=statistics).normalize(VALUES)
    first, second, expected_first, expected_second = check(y)
    np.testing.assert_allclose(first, expected_first, atol=1e-3)
    np.testing.assert_allclose(second, expected_second, atol=1e-3)


@pytest.mark.parametrize("kind", ["z_score", "quantile", "min_max"])
def test_constant_dimensions_are_centred_only(kind):
    values = np.tile([3.0, -2.0, 0.0], (50, 1))
    values[:, 2] = np.linspace(0, 5e-5, 50)
    normalizer = Normalizer(kind=kind, statistics=Statistics.of(values))
    np.testing.assert_allclose(normalizer.normalize(values), 0, atol=1e-4)
    noisy = values + np.array([0.01, -0.01, 0.01])
    np.testing.assert_allclose(normalizer.normalize(noisy), [[0.01, -0.01, 0.01]] * 50, atol=1e-4)
    np.testing.assert_allclose(normalizer.denormalize(np.zeros(3))[:2], [3, -2])
    blown = Normalizer(kind=kind, statistics=Statistics.of(values), min_scale=0).normalize(noisy)
    assert np.abs(blown).max() > 100


def test_mask_and_clip():
    statistics = Statistics.of(VALUES)
    normalizer = Normalizer(
        kind="z_score", statistics=statistics, mask=[True, False, True], clip=1.0
    )
    y = normalizer.normalize(VALUES)
    np.testing.assert_array_equal(y[:, 1], np.clip(VALUES[:, 1], -1, 1))
    assert np.abs(y).max() == 1
    with pytest.raises(ValueError, match="mask has 2 entries, statistics 3 dimensions"):
        Normalizer(kind="z_score", statistics=statistics, mask=[True, False])


def test_errors_show_both_shapes_and_the_nearest_name():
    statistics = Statistics.of(VALUES)
    with pytest.raises(ValueError, match=r"expected 3 dimensions .*got values of shape \[7, 4\]"):
        Normalizer(kind="z_score", statistics=statistics).normalize(np.zeros((7, 4)))
    with pytest.raises(ValueError, match="got 'quantiles'; did you mean 'quantile'"):
        Normalizer(kind="quantiles", statistics=statistics)
    bare = Statistics(mean=np.zeros(3), std=np.ones(3))
    with pytest.raises(ValueError, match=r"quantile normalization needs \['q01', 'q99'\]"):
        Normalizer(kind="quantile", statistics=bare)
    with pytest.raises(ValueError, match=r"values \[n d\] with n > 0, got shape \[0, 3\]"):
        Statistics.of(np.zeros((0, 3)))


def test_file_round_trip_in_openpi_layout(tmp_path):
    statistics = {"state": Statistics.of(VALUES), "action": Statistics.of(VALUES[:, :2])}
    save(statistics, tmp_path / "stats.json")
    tree = json.loads((tmp_path / "stats.json").read_text())
    assert set(tree["norm_stats"]) == {"state", "actions"}
    loaded = load_statistics(tmp_path / "stats.json")
    for name, expected in statistics.items():
        assert loaded[name].count == 500
        for field in ("mean", "std", "min", "max", "q01", "q99"):
            np.testing.assert_array_equal(getattr(loaded[name], field), getattr(expected, field))
    assert load_statistics(statistics)["state"] is statistics["state"]


def test_files_of_other_projects_are_read():
    entry = {"mean": [0.0], "std": [1.0], "min": [-1.0], "max": [1.0]}
    octo = {"action": entry | {"p01": [-0.5], "p99": [0.5]}, "proprio": entry, "num_transitions": 9}
    assert load_statistics(octo)["action"].q99 == [0.5]
    assert set(load_statistics(octo)) == {"action", "state"}
    openvla = {"bridge_orig": {"action": entry | {"q01": [-0.5], "q99": [0.5]}}}
    assert load_statistics(openvla)["action"].q01 == [-0.5]


def test_missing_or_broken_files(tmp_path):
    (tmp_path / "norm.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no statistics at .*stats.json.*that folder has norm"):
        load_statistics(tmp_path / "stats.json")
    with pytest.raises(ValueError, match="expected groups 'state' and 'actions', got"):
        load_statistics(tmp_path / "norm.json")
    with pytest.raises(ValueError, match="expected mean, std and others of one length"):
        load_statistics({"state": {"mean": [0, 1], "std": [1]}})


def test_statistics_of_a_dataset_count_every_frame_once(demo):
    statistics = compute_statistics(demo)
    episodes = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert statistics["state"].count == len(demo)
    assert statistics["state"].mean[0] == pytest.approx(episodes.mean())
    assert statistics["action"].max[0] == len(LENGTHS) - 0.5
    both = compute_statistics(Mix(datasets={"a": demo, "b": demo}))
    np.testing.assert_allclose(both["action"].mean, statistics["action"].mean)


@pytest.mark.parametrize("episodes", [None, [0, 3, 6]])
def test_relative_statistics_equal_the_slow_way(demo_path, episodes):
    demo = open_demo(demo_path, episodes=episodes)
    mask = [True, True, False]
    rows = []
    for i in range(len(demo)):
        sample = demo.read(i)
        delta = subtract_state(sample["actions"], sample["state"][-1], mask)
        rows.append(delta[~sample["action_is_pad"]])
    expected = Statistics.of(np.concatenate(rows))
    got = compute_statistics(demo, delta_mask=mask)["action"]
    assert got.count == expected.count
    for field in ("mean", "std", "q01", "max"):
        np.testing.assert_allclose(getattr(got, field), getattr(expected, field), atol=1e-12)
