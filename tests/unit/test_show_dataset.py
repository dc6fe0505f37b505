"""The page of a data set: complete, offline, well formed; warns of planted faults and no others."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rlds_demo import FEATURES, LENGTHS, write_demo

from pizero.agent import show_dataset
from pizero.agent.report.dataset import write_dataset_report
from pizero.agent.report.dataset_checks import find
from pizero.agent.report.dataset_look import look_at
from pizero.agent.report.dataset_motion import grippers, relations
from pizero.agent.report.dataset_pictures import probe_cameras, record, spread
from pizero.agent.sources import Learning, Sources, open_configured, open_folder
from pizero.data import FeatureSpec, Mix, RldsWriter, Statistics

VOID = {"meta", "img", "br", "rect", "line", "polyline", "path", "input"}
STEPS = 40


class Balanced(HTMLParser):
    """Fails on tags that do not match, and on ids that occur twice."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()


def arm_episode(number: int) -> dict:
    """A smooth arm of x, y, an angle and a gripper; actions are the changes that follow."""
    generator = np.random.default_rng(number)
    places = np.linspace(0, 1, 9)
    moves = [
        np.interp(np.linspace(0, 1, STEPS), places, generator.normal(0, 0.02, 9)) for _ in range(3)
    ]
    action = np.zeros((STEPS, 4), np.float32)
    action[:, :3] = np.stack(moves, axis=1)
    action[:, 3] = np.arange(STEPS) < STEPS // 2 + number % 3
    state = np.zeros((STEPS, 4), np.float32)
    state[1:, :3] = np.cumsum(action[:-1, :3], axis=0)
    state[:, :3] += generator.normal(0, 0.1, 3)
    state[1:, 3] = action[:-1, 3]
    state[0, 3] = 1
    pixels = generator.integers(40, 200, (STEPS, 12, 16, 3)).astype(np.uint8)
    return {
        "observation": {"state": state, "front": pixels},
        "action": action,
        "language_instruction": f"pick up the {('cup', 'bowl', 'spoon')[number % 3]}",
    }


ARM = {
    "steps/observation/front": FeatureSpec.image(12, 16, encoding="png"),
    "steps/observation/state": FeatureSpec.tensor((4,)),
    "steps/action": FeatureSpec.tensor((4,)),
    "steps/language_instruction": FeatureSpec.text(),
    "steps/is_first": FeatureSpec.scalar("bool"),
}


def write_arm(folder: Path, *, change=None, count: int = 12) -> Path:
    """Episodes of the arm, each changed by `change(number, steps)`."""
    with RldsWriter(folder, name="arm", features=ARM, splits=("train",)) as writer:
        for number in range(count):
            steps = arm_episode(number)
            writer.add_episode("train", steps if change is None else change(number, steps))
        return writer.finish()


def write_lerobot(folder: Path, *, gap: float = 0.0, fps: int = 10) -> Path:
    """Two episodes of the arm as LeRobot 2.1 keeps them; `gap` seconds pass within the second."""
    features = {
        "observation.state": {"dtype": "float32", "shape": [4], "names": ["x", "y", "yaw", "jaw"]},
        "action": {"dtype": "float32", "shape": [4], "names": {"motors": ["x", "y", "yaw", "jaw"]}},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    numbers = ("frame_index", "episode_index", "index", "task_index")
    features |= {key: {"dtype": "int64", "shape": [1], "names": None} for key in numbers}
    info = {
        "codebase_version": "v2.1",
        "robot_type": "arm",
        "fps": fps,
        "total_episodes": 2,
        "total_frames": 2 * STEPS,
        "total_tasks": 1,
        "chunks_size": 1000,
        "splits": {"train": "0:2"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
    }
    meta, data = folder / "meta", folder / "data" / "chunk-000"
    meta.mkdir(parents=True)
    data.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info))
    (meta / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "pick it up"}) + "\n")
    lines, statistics = [], []
    for number in range(2):
        steps = arm_episode(number)
        times = np.arange(STEPS) / fps
        times[STEPS // 2 :] += gap * number
        columns = {
            "observation.state": steps["observation"]["state"],
            "action": steps["action"],
            "timestamp": times.astype(np.float32),
            "frame_index": np.arange(STEPS),
            "episode_index": np.full(STEPS, number),
            "index": np.arange(STEPS) + number * STEPS,
            "task_index": np.zeros(STEPS, np.int64),
        }
        table = {k: pa.array(v.tolist() if v.ndim > 1 else v) for k, v in columns.items()}
        for key in ("observation.state", "action"):
            table[key] = table[key].cast(pa.list_(pa.float32(), 4))
        pq.write_table(pa.table(table), data / f"episode_{number:06d}.parquet")
        lines.append({"episode_index": number, "tasks": ["pick it up"], "length": STEPS})
        statistics.append({"episode_index": number, "stats": {}})
    for name, rows in (("episodes", lines), ("episodes_stats", statistics)):
        (meta / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def findings(source) -> dict[str, str]:
    """Title -> details of what is found."""
    return {f.title: f.detail for f in find(look_at(source), probe_cameras(source.dataset))}


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    return open_folder(write_arm(tmp_path_factory.mktemp("arm")), fps=10, horizon=8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return open_folder(write_demo(tmp_path_factory.mktemp("demo")), horizon=4)


def check_document(html: str) -> None:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r'(points|d|x1|width|height)="[^"]*(nan|inf)', html)


# -- the page -------------------------------------------------------------------------------------


def test_page_has_the_facts(demo, tmp_path):
    page = write_dataset_report(tmp_path / "page.html", Sources("demo", (demo,)))
    html = page.read_text()
    check_document(html)
    assert f"{len(LENGTHS)} episodes of the split train" in html.replace(">", "> ")
    assert f'<div class="value">{sum(LENGTHS)}</div>' in html
    for key in FEATURES:
        assert key in html
    assert "do task 1" in html
    assert "12% of the episodes have none" in html  # episode 3 has no instruction
    assert "1 to 9 steps" in html
    assert "observation/corner, 16 x 16" in html
    assert "(guessed)" in html
    assert html.count("data:video/mp4") == 5  # that of one step has no film
    assert "<script>alert" not in html


def test_page_counts_all_that_is_missing(demo):
    found = findings(demo)
    assert found["12% of the episodes have no instruction"].startswith("1 episode.")
    share = LENGTHS[2] / sum(LENGTHS)
    assert f"Camera wrist is missing in {share:.1%} of the steps" in found
    assert "1 episode of one step" in found


def test_words_of_the_data_are_escaped(tmp_path):
    def change(number, steps):
        return steps | {"language_instruction": "<script>alert(1)</script>"}

    source = open_folder(write_arm(tmp_path / "set", change=change, count=3))
    page = write_dataset_report(tmp_path / "page.html", Sources("a <b>", (source,)))
    html = page.read_text()
    check_document(html)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_mixture_has_a_section_for_each(arm, demo, tmp_path):
    learning = Learning("config x", {}, state_dim=8, action_dim=32)
    parts = (replace(arm, learning=learning), demo)
    mix = Mix(datasets={p.name: p.dataset for p in parts}, weights={arm.name: 3, demo.name: 1})
    page = write_dataset_report(tmp_path / "mix.html", Sources("both", parts, mix), episodes=1)
    html = page.read_text()
    check_document(html)
    assert "75.0%" in html
    assert "25.0%" in html
    assert "4 + 28" in html  # padding
    passes = 0.75e6 / len(arm.dataset)
    assert f">{passes:,.0f}<" in html
    for part in parts:
        assert f"id='set-{part.name}'" in html
        assert f'href="#set-{part.name}"' in html


def test_command_line(tmp_path, capsys):
    folder = write_arm(tmp_path / "set", count=3)
    output = tmp_path / "pages" / "arm.html"
    show_dataset.main([str(folder), "--output", str(output), "--episodes", "1", "--fps", "10"])
    said = capsys.readouterr().out
    assert "state: observation/state (guessed)" in said
    check_document(output.read_text())
    assert "at 10 actions a second" in output.read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "no data set 'nowhere': expected a folder"),
        (["bridge_datset"], "did you mean 'bridge_dataset'"),
        (["{set}", "--action", "acton"], "did you mean 'action'?"),
        (["{set}", "--camera", "front"], "expected --camera NAME=KEY, got 'front'"),
        (["{set}", "--split", "trian"], "'trian'; did you mean 'train'?"),
        (["{set}", "--robot", "widowx"], "has a state of 7 entries"),
        (["{set}", "--episodes", "0"], "expected --episodes >= 1, got 0"),
        (["--config-name", "train_toy", "--action", "action"], "says which keys are read"),
        ([], "expected one data set or --config-name NAME"),
    ],
)
def test_mistakes_are_one_message(words, expected, tmp_path):
    folder = str(write_arm(tmp_path / "set", count=2))
    with pytest.raises(SystemExit) as stop:
        show_dataset.main([word.format(set=folder) for word in words])
    assert str(stop.value).startswith("error: ")
    assert expected in str(stop.value)


def test_lerobot_names_and_rate(tmp_path):
    source = open_folder(write_lerobot(tmp_path / "arm"), horizon=8)
    assert source.fps == 10
    assert source.action_names == ("x", "y", "yaw", "jaw")
    assert findings(source) == {}
    assert {r.action for r in relations(look_at(source))} == {"x", "y", "yaw"}
    page = write_dataset_report(tmp_path / "page.html", Sources("arm", (source,)))
    html = page.read_text()
    check_document(html)
    assert "LeRobot v2.1" in html
    assert "pick it up" in html


def test_gap_in_time_is_found(tmp_path):
    folder = write_lerobot(tmp_path / "arm", gap=0.35)
    with pytest.raises(ValueError, match="expected timestamp"):
        open_folder(folder)
    found = findings(open_folder(folder, horizon=8, lenient=True))
    assert "off by 3.5 steps, in episode 1 at step 20" in found["1 gap in time"]
    assert "Training would refuse these data as they are" in found


def test_training_data_of_a_configuration(toy_data, tmp_path):
    output = tmp_path / "toy.html"
    words = ["--config-name", "train_toy", f"data.path={toy_data}", "--output", str(output)]
    show_dataset.main(words)
    html = output.read_text()
    check_document(html)
    assert "config train_toy" in html  # how it normalises
    assert "reach the red square" in html


def test_mixture_of_one_pipeline_is_normalised_together(toy_data):
    """Each part's page shows what training does: statistics of both."""
    overrides = [f"data.path={toy_data}", "+data.train.datasets.held_out=${data.val}"]
    sources = open_configured("train_toy", overrides)
    first, second = (part.learning for part in sources.parts)
    assert first is not None
    assert second is not None
    assert first.origin == "all data sets together"
    assert first.statistics is not None
    assert first.statistics["action"].count == sum(len(part.dataset) for part in sources.parts)


def test_lerobot_and_rlds_in_one_configuration(toy_data, tmp_path):
    part = (
        f"{{_target_: pizero.data.lerobot.LeRobotDataset, path: {write_lerobot(tmp_path / 'arm')}, "
        "cameras: {}, state: observation.state, action: action, text: task, horizon: 8}"
    )
    overrides = [f"data.path={toy_data}", f"+data.train.datasets.arm={part}", "+pipelines.arm={}"]
    first, second = open_configured("train_toy", overrides).parts
    assert first.fps is None
    assert second.fps == 10
    assert second.state_names == ("x", "y", "yaw", "jaw")


# -- what is read ---------------------------------------------------------------------------------


def test_large_sets_are_sampled_by_whole_episodes(arm):
    look = look_at(arm, limit=200)
    assert not look.values.is_whole
    assert len(look.values.actions) <= 200
    for e, start, length in zip(
        look.values.episodes, look.values.starts, look.values.lengths, strict=True
    ):
        first = arm.dataset.episode_starts[e]
        wanted = arm.dataset.actions[first : first + length]
        np.testing.assert_array_equal(look.values.actions[start : start + length], wanted)


def test_rows_stay_inside_their_episodes(demo):
    values = look_at(demo).values
    rows = values.rows(before=1, after=2)
    np.testing.assert_array_equal(values.states[rows - 1, 0], values.states[rows, 0])
    np.testing.assert_array_equal(values.states[rows + 2, 1], values.states[rows, 1] + 2)
    assert len(rows) == sum(max(0, n - 3) for n in LENGTHS)


def test_share_outside_is_that_of_the_formula(arm):
    look = look_at(arm)
    actions = arm.dataset.actions
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    quantile = next(s for s in look.scalings if s.label == "quantile").parts["action"]
    outside = ((actions < low - 1e-5) | (actions > high + 1e-5)).mean(axis=0)
    np.testing.assert_allclose(quantile.outside, outside, atol=2 / len(actions))
    assert all(sum(counts) == len(actions) for counts in quantile.counts)


def test_deltas_are_drawn_from_the_whole_chunk(demo):
    """State [e t 0 0], action = state + 0.5: the difference is 0.5 plus how far ahead it is."""
    mask = (True, True, False, False)
    learning = Learning("x", {"state": "min_max", "action": "min_max"}, delta_mask=mask)
    learnt = look_at(replace(demo, learning=learning)).learnt["action"]
    np.testing.assert_allclose(learnt.min[:2], [0.5, 0.5])
    np.testing.assert_allclose(learnt.max[:2], [0.5, 0.5 + demo.dataset.horizon - 1])


def test_spread():
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 50, 99]
    assert spread(1, 3) == [0]


def test_films_keep_to_their_size(arm):
    whole = record(arm.dataset, 0, fps=10, max_bytes=10**6)
    assert whole.film is not None
    assert whole.steps[0] == 0
    assert whole.steps[-1] == STEPS - 1
    small = record(arm.dataset, 0, fps=10, max_bytes=100)
    assert small.film is None
    assert len(small.strips["front"]) == len(small.steps)


def test_data_without_state_words_and_pictures(tmp_path):
    features = {"steps/action": FeatureSpec.tensor((2,))}
    with RldsWriter(tmp_path / "set", name="bare", features=features, splits=("train",)) as writer:
        for number in range(3):
            writer.add_episode("train", {"action": arm_episode(number)["action"][:, :2]})
        source = open_folder(writer.finish())
    assert list(findings(source)) == ["No episode has an instruction"]
    page = write_dataset_report(tmp_path / "page.html", Sources("bare", (source,)))
    html = page.read_text()
    check_document(html)
    assert "no numbers of state and 2 of action" in html


def test_without_pyav_there_are_strips(arm, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    shown = record(arm.dataset, 0, fps=10, max_bytes=10**6)
    assert shown.film is None
    assert all(picture for picture in shown.strips["front"])


# -- what is found --------------------------------------------------------------------------------


def test_clean_data_have_no_findings(arm):
    assert findings(arm) == {}


def test_relations_of_changes_and_targets(tmp_path, arm):
    found = {r.action: r for r in relations(look_at(arm))}
    assert set(found) == {"action 0", "action 1", "action 2"}
    assert all(r.kind == "change" and r.lag == 1 for r in found.values())
    assert all(abs(r.gain - 1) < 0.01 and r.correlation > 0.99 for r in found.values())

    def change(number, steps):
        state = steps["observation"]["state"]
        action = np.array(steps["action"])
        action[:-2, :3] = state[2:, :3]  # where it will be two steps later
        action[-2:, :3] = state[-1, :3]
        return steps | {"action": action}

    source = open_folder(write_arm(tmp_path, change=change))
    found = relations(look_at(source))
    assert [(r.kind, r.lag) for r in found] == [("target", 2)] * 3


def test_grippers_are_known_by_their_values(arm):
    found = {g.group: g for g in grippers(look_at(arm))}
    assert found["action"].is_binary
    assert found["action"].start == 1.0
    assert found["action"].changes == 1.0
    assert 0.4 < found["action"].share_low < 0.6


def planted(what: str, number: int, steps: dict) -> dict:
    """A fault in some or all of the episodes."""
    state, action = (np.array(x) for x in (steps["observation"]["state"], steps["action"]))
    picture = np.array(steps["observation"]["front"])
    text = steps["language_instruction"]
    extra = {}
    if what == "nan" and number == 2:
        state[5, 1] = np.nan
    elif what == "constant":
        action[:, 1] = 0.25
    elif what == "nearly constant":
        state[:, 0] = 1 + 1e-6 * state[:, 0]
    elif what == "quantiles":
        action[:, 3] = 0
        action[7, 3] = number < 3
    elif what == "outlier" and number == 4:
        action[3, 0] = 90
    elif what == "scaled":
        action[:, :3] *= 30
    elif what == "late":
        action[2:, :3] = action[:-2, :3]
        action[:2, :3] = 0
    elif what == "slow":
        state[4:, :3] = state[:-4, :3]
        state[:4, :3] = state[4, :3]
    elif what == "gripper":
        state[:, 3] = 1 - state[:, 3]
    elif what == "wrapped":
        state[:, 2] = (np.linspace(2, 5, STEPS) + number / 10 + np.pi) % (2 * np.pi) - np.pi
    elif what == "jump" and number == 6:
        state[20:, 0] += 3
    elif what == "flags" and number == 1:
        extra["is_first"] = np.arange(STEPS) % 20 == 0
    elif what == "repeated" and number == 7:
        return arm_episode(3)
    elif what == "unlabeled" and number < 3:
        text = " "
    elif what == "spelt" and number % 2:
        text = text.capitalize() + "."
    elif what == "black":
        picture[:] = 0
    elif what == "frozen":
        picture[:] = picture[:1]
    elif what == "resting":
        state[10:] = state[10]
    return {
        "observation": {"state": state, "front": picture},
        "action": action,
        "language_instruction": text,
    } | extra


@pytest.mark.parametrize(
    ("what", "title"),
    [
        ("nan", "NaN or infinite values in state"),
        ("constant", "Action never changes: action 1"),
        ("nearly constant", "State hardly changes: state 0"),
        ("quantiles", "Action hardly changes: action 3"),
        ("outlier", "A few action values are enormous after normalisation"),
        ("scaled", "Actions are about 30 times the changes of the state that follow"),
        ("late", "Actions seem to come after what they cause"),
        ("slow", "The state follows actions 5 steps (0.5 s) later"),
        ("gripper", "State and action of action 3 run opposite ways"),
        ("wrapped", "Angles wrap around: state 2"),
        ("jump", "The state jumps: state 0"),
        ("flags", "is_first is wrong"),
        ("repeated", "1 episode repeated"),
        ("unlabeled", "25% of the episodes have no instruction"),
        ("spelt", "3 instructions spelt in several ways"),
        ("black", "Camera front is black"),
        ("frozen", "Camera front does not move"),
        ("resting", "The robot rests in 74% of the steps"),
    ],
)
def test_planted_fault_is_found(what, title, tmp_path):
    folder = write_arm(tmp_path, change=lambda number, steps: planted(what, number, steps))
    found = findings(open_folder(folder, fps=10, horizon=8))
    assert title in found


def test_statistics_of_other_data_are_noticed(arm):
    narrow = Statistics.of(arm.dataset.actions[:, :] * 0.3)
    rules = {"state": "z_score", "action": {"kind": "quantile", "clip": 1.0}}
    states = Statistics.of(arm.dataset.states)
    learning = Learning("robot x", rules, {"state": states, "action": narrow}, "x.json")
    found = findings(replace(arm, learning=learning))
    detail = found["Many normalised action values lie outside [-1, 1]"]
    assert "are cut off by clipping: action 0" in detail


def test_short_episodes_are_counted_against_the_chunk(tmp_path):
    found = findings(open_folder(write_arm(tmp_path, count=3), horizon=STEPS + 1))
    assert "All episodes are shorter than a chunk" in found


def test_damaged_pictures_do_not_stop_the_page(tmp_path):
    def change(number, steps):
        steps["observation"]["front"] = [b"\x89PNG no picture"] * STEPS
        return steps

    source = open_folder(write_arm(tmp_path / "set", change=change, count=2))
    assert "Pictures that cannot be read" in findings(source)
    page = write_dataset_report(tmp_path / "page.html", Sources("x", (source,)))
    check_document(page.read_text())


def test_damaged_records_are_shown_as_such(tmp_path):
    folder = write_arm(tmp_path, count=4)
    (shard,) = folder.glob("*.tfrecord*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="offset"):
        open_folder(folder)
    source = open_folder(folder, lenient=True)
    found = findings(source)
    assert "1 record damaged and left out" in found
    assert "Training would refuse these data as they are" in found
