"""Statistics and normalisation, by their own inverse; tests/parity has openpi's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlds_demo import LENGTHS, open_demo
from safetensors.numpy import load_file

from pizero.data import Mix, Normalizer, Statistics, compute_statistics, load_statistics
from pizero.data import save_statistics as save
from pizero.data.normalize import subtract_state
from pizero.data.stats import DIALECTS

OPENPI = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_transforms"
FIXTURES = OPENPI.parent
ZERO = json.loads((FIXTURES / "open_pi_zero_transforms" / "case.json").read_text())["facts"]
VALUES = np.random.default_rng(0).normal(size=(500, 3)) * [1, 0.01, 100] + [0, 5, -3]


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_data_wider_or_narrower_than_its_statistics(kind):
    """Surplus dimensions: std 1 + epsilon for z-scores, nothing at all for quantiles."""
    statistics = load_statistics(OPENPI / "norm_stats.json")["action"]
    values = np.random.default_rng(0).normal(size=(5, 32))
    wide = Normalizer(kind=kind, statistics=statistics, min_scale=0, size=32)
    expected = values[:, 8:] * np.float64(1 if kind == "quantile" else 1.000001)
    np.testing.assert_array_equal(wide.denormalize(values)[:, 8:], expected)
    narrow = Normalizer(kind=kind, statistics=statistics, min_scale=0, size=6)
    cut = Normalizer(kind=kind, statistics=statistics.cut(6), min_scale=0)
    np.testing.assert_array_equal(narrow.normalize(values[:, :6]), cut.normalize(values[:, :6]))


@pytest.mark.parametrize("robot", ["bridge", "fractal"])
def test_open_pi_zero_bounds_on_the_way_in_and_out(robot):
    """2 (x - p01) / (p99 - p01 + 1e-8) - 1 within +-1; back without the 1e-8, the gripper as is."""
    published = ZERO["statistics"][robot]["action"]
    low, high = (np.array(published[k]) for k in ("p01", "p99"))
    rule = {"clip": 1.0, "epsilon": 1e-8, "inverse_epsilon": 0.0, "min_scale": 0.0}
    normalizer = Normalizer(
        kind="quantile",
        statistics=load_statistics({"action": {"p01": low, "p99": high}})["action"],
        mask=[True] * 6 + [False],
        **rule,
    )
    x = np.random.default_rng(0).normal(size=(9, 7)) * 0.2
    expected = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)[:, :6]
    np.testing.assert_array_equal(normalizer.normalize(x)[:, :6], expected)
    case = next(c for c in ZERO["actions"]["cases"] if c["robot"] == robot)
    model = np.array(case["model_actions"])
    back = normalizer.denormalize(model)
    np.testing.assert_allclose(
        back[:, :3], np.array(case["env_actions"])[:, :3], rtol=0, atol=1e-16
    )
    np.testing.assert_array_equal(back[:, 6], model[:, 6])


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
    with pytest.raises(ValueError, match="statistics of at least 9 dimensions, got 3"):
        statistics.cut(9)
    with pytest.raises(ValueError, match="delta_mask has 17 entries, but actions have 16"):
        subtract_state(np.zeros((4, 16)), np.zeros(16), [True] * 17)
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


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_comes_back(dialect, tmp_path):
    statistics = {"state": Statistics.of(VALUES), "action": Statistics.of(VALUES[:, :2])}
    suffix = "safetensors" if dialect == "lerobot_processor" else "json"
    path = tmp_path / f"file.{suffix}"
    save(statistics, path, dialect=dialect, dataset="bridge_orig")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary stays
    loaded = load_statistics(path)
    assert loaded.keys() == statistics.keys()
    rough = dialect == "lerobot_processor"  # float32, as there
    for name, expected in statistics.items():
        for field in DIALECTS[dialect].entries:
            got = getattr(loaded[name], field)
            np.testing.assert_allclose(got, getattr(expected, field), rtol=1e-6 if rough else 0)
        counts = dialect in ("pizero", "octo", "openvla", "lerobot")
        assert loaded[name].count == (500 if counts else 0)


def test_dialects_spell_as_their_projects_do(tmp_path):
    statistics = {"state": Statistics.of(VALUES), "action": Statistics.of(VALUES)}

    def written(dialect):
        save(statistics, tmp_path / "file.json", dialect=dialect, dataset="mine")
        return json.loads((tmp_path / "file.json").read_text())

    openpi = json.loads((OPENPI / "norm_stats.json").read_text())
    assert written("openpi").keys() == openpi.keys() == {"norm_stats"}
    for group in ("state", "actions"):
        assert written("openpi")["norm_stats"][group].keys() == openpi["norm_stats"][group].keys()
    assert set(written("giga")["norm_stats"]) == {"observation.state", "action"}
    assert set(written("octo")) == {"action", "proprio", "num_transitions"}
    assert set(written("octo")["action"]) == {"mean", "std", "min", "max", "p01", "p99"}
    assert set(written("openvla")["mine"]["proprio"]) == {"mean", "std", "min", "max", "q01", "q99"}
    assert written("lerobot")["observation.state"]["count"] == [500]
    save(statistics, tmp_path / "step.safetensors", dialect="lerobot_processor")
    names = load_file(tmp_path / "step.safetensors")
    assert {"action.q01", "observation.state.mean"} <= names.keys()


def test_half_of_the_statistics_is_enough(tmp_path):
    """open-pi-zero reads p01 and p99 only; openpi's readers want mean and std."""
    ends = {"action": {"p01": [0.0, -1.0], "p99": [1.0, 3.0]}, "proprio": {"p01": [0], "p99": [1]}}
    found = load_statistics(ends)
    assert (found["action"].size, found["state"].size) == (2, 1)
    middle = Normalizer(kind="quantile", statistics=found["action"]).denormalize(np.zeros(2))
    np.testing.assert_allclose(middle, [0.5, 1.0], atol=1e-6)
    with pytest.raises(ValueError, match=r"z_score normalization needs \['mean', 'std'\]"):
        Normalizer(kind="z_score", statistics=found["action"])
    save(found, tmp_path / "octo.json", dialect="octo")
    assert load_statistics(tmp_path / "octo.json")["action"].q99.tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"openpi files need \['mean', 'std'\], which the action"):
        save(found, tmp_path / "no.json", dialect="openpi")
    with pytest.raises(ValueError, match=r"expected a dialect of pizero, openpi.*got 'rt1'"):
        save(found, tmp_path / "no.json", dialect="rt1")
    for lonely in ({"q01": [0.0]}, {"mean": [0.0], "q99": [1.0]}, {"std": [1.0]}):
        with pytest.raises(ValueError, match="or q01 and q99 alone, got"):
            load_statistics({"action": lonely})


def test_masks_of_openvla_hold_unless_another_is_given(tmp_path):
    entry = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False]}
    found = load_statistics({"bridge": {"action": entry, "num_transitions": 7}})["action"]
    assert found.count == 7
    left = Normalizer(kind="quantile", statistics=found).normalize(np.array([1.0, 5.0]))
    np.testing.assert_allclose(left, [1, 5], rtol=1e-5)
    both = Normalizer(kind="quantile", statistics=found, mask=[True, True])
    assert both.normalize(np.array([1.0, 5.0]))[1] > 8
    for dialect in ("pizero", "openvla"):
        save({"action": found}, tmp_path / "a.json", dialect=dialect)
        assert load_statistics(tmp_path / "a.json")["action"].mask.tolist() == [True, False]
    with pytest.raises(ValueError, match="the mask has 3 entries"):
        load_statistics({"action": entry | {"mask": [True] * 3}})


def test_a_file_with_several_data_sets():
    entry = {"action": {"mean": [0.0], "std": [1.0]}}
    tree = {"norm_stats": {"bridge": entry, "fractal": {"action": {"mean": [2.0], "std": [1.0]}}}}
    assert load_statistics(tree, dataset="fractal")["action"].mean == [2.0]
    with pytest.raises(ValueError, match="holds statistics of bridge, fractal; name one"):
        load_statistics(tree)
    with pytest.raises(ValueError, match="a data set of bridge, fractal, got 'droid'"):
        load_statistics(tree, dataset="droid")


def test_lerobot_files(tmp_path):
    """Pictures and bookkeeping beside the vectors; v2.1 has statistics of episodes only."""
    parts = [VALUES[:100], VALUES[100:]]
    episodes = [Statistics.of(part) for part in parts]
    fields = ("mean", "std", "min", "max")
    lines = [
        {
            "episode_index": i,
            "stats": {
                "action": {k: getattr(e, k).tolist() for k in fields} | {"count": [e.count]},
                "observation.images.top": {"mean": [[[0.5]]] * 3, "std": [[[0.1]]] * 3},
                "timestamp": {"mean": [1.0], "std": [0.5]},
            },
        }
        for i, e in enumerate(episodes)
    ]
    (tmp_path / "episodes_stats.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    expected = Statistics.of(VALUES)
    whole = load_statistics(tmp_path / "episodes_stats.jsonl")
    assert whole.keys() == {"action"}
    assert whole["action"].count == 500
    for field in fields:
        got = getattr(whole["action"], field)
        np.testing.assert_allclose(got, getattr(expected, field), rtol=1e-9)
    assert load_statistics(lines[0]["stats"])["action"].count == 100


@pytest.mark.parametrize("name", ["bridge", "fractal"])
def test_published_statistics_come_along(name):
    found = load_statistics(name)
    for group, key in (("action", "action"), ("state", "proprio")):
        for theirs, ours in (("mean", "mean"), ("std", "std"), ("p01", "q01"), ("p99", "q99")):
            expected = ZERO["statistics"][name][key][theirs]
            assert getattr(found[group], ours).tolist() == expected
    assert found["action"].count == {"bridge": 2195527, "fractal": 3786400}[name]
    with pytest.raises(ValueError, match="expected a JSON file or one of bridge, fractal"):
        load_statistics("bridg")


def test_bounds_other_than_one():
    statistics = Statistics.of(VALUES)
    y = Normalizer(kind="min_max", statistics=statistics, bounds=[0, 1], epsilon=0).normalize(
        VALUES
    )
    np.testing.assert_allclose((y.min(0), y.max(0)), [[0] * 3, [1] * 3], atol=1e-12)
    constant = Statistics(q01=np.array([2.0]), q99=np.array([2.0]))
    middle = Normalizer(kind="quantile", statistics=constant, bounds=[0, 1])
    assert middle.normalize(np.array([2.0])) == [0.5]
    assert middle.denormalize(np.array([0.5])) == [2.0]
    with pytest.raises(ValueError, match=r"bounds \[low, high\] with low < high, got \[1, 0\]"):
        Normalizer(kind="quantile", statistics=constant, bounds=[1, 0])


def test_missing_or_broken_files(tmp_path):
    (tmp_path / "norm.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no statistics at .*stats.json.*that folder has norm"):
        load_statistics(tmp_path / "stats.json")
    with pytest.raises(ValueError, match="expected groups 'state' and 'actions', got"):
        load_statistics(tmp_path / "norm.json")
    with pytest.raises(ValueError, match="more than one group of 'action', 'actions' is one"):
        load_statistics({"action": {"mean": [0], "std": [1]}, "actions": {"mean": [0], "std": [1]}})
    with pytest.raises(ValueError, match=r"expected vectors \[d\], got"):
        load_statistics({"action": {"mean": [[0]], "std": [[1]]}})
    (tmp_path / "broken.json").write_text('{"norm_')
    with pytest.raises(ValueError, match=r"broken.json: expected JSON, got Unterminated"):
        load_statistics(tmp_path / "broken.json")
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
