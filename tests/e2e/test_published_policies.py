"""From published weights to actions in the robot's units, as a newcomer would go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pizero
from pizero.agent.weights.command import main as convert
from pizero.agent.weights.folder import model_weights
from pizero.data.stats import load_statistics
from pizero.data.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "data" / "fixtures"
ORBAX = FIXTURES / "openpi_orbax" / "checkpoint"
SIZES = {"vision.num_heads": 4}
NOISE = np.random.default_rng(3).normal(size=(6, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    return train_tokenizer(["put the carrot on the plate", "open the drawer"], path, vocab_size=400)


def picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def observation(dimensions: int = 7) -> dict:
    wrist = {"left_wrist_0_rgb": picture(1), "right_wrist_0_rgb": None}
    return {
        "images": {"base_0_rgb": picture(0), **wrist},
        "text": "open the drawer",
        "state": np.linspace(-1, 1, dimensions),
    }


def test_openpis_own_checkpoint_acts(tokenizer, caplog):
    """Orbax weights and the statistics beside them; nothing but the tokenizer is given."""
    caplog.set_level("INFO")
    policy = pizero.load_policy(ORBAX, tokenizer=tokenizer, overrides={"horizon": 6}, device="cpu")
    chunk = policy.act(**observation(), noise=NOISE, num_steps=4)
    assert chunk.shape == (6, 7)
    assert "174,464" in caplog.text  # what was loaded is said: the language model's parameters
    with torch.inference_mode():
        raw = policy.model.sample(policy.observe([observation()]), torch.tensor(NOISE)[None], 4)
    stats = load_statistics(ORBAX / "assets" / "toy_robot" / "norm_stats.json")["action"]
    expected = raw[0, :, :7].double().numpy() * (stats.std + 1e-6) + stats.mean
    np.testing.assert_allclose(chunk, expected, atol=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """The same checkpoint in every layout that is written, by the command line."""
    root = tmp_path_factory.mktemp("layouts")
    own, chunk = ["--tokenizer", str(tokenizer)], ["--set", "horizon=6"]
    heads, openpi = ["--set", "vision.num_heads=4"], ["--to", "openpi"]
    commands = {
        "own": [ORBAX, root / "own", *own, *chunk],
        "openpi": [ORBAX, root / "openpi", *openpi, "--asset", "toy_robot", *chunk],
        "lerobot": [root / "own", root / "lerobot", "--to", "lerobot"],
        "own again": [root / "openpi", root / "own again", *own, *heads],
        "openpi again": [root / "lerobot", root / "openpi again", *openpi, *heads],
    }
    for arguments in commands.values():
        convert(list(map(str, arguments)))
    return {name: root / name for name in commands}


def test_round_trips_are_exact(folders):
    for one, other in (("own", "own again"), ("openpi", "openpi again"), ("openpi", "lerobot")):
        same = [(folders[n] / "model.safetensors").read_bytes() for n in (one, other)]
        assert same[0] == same[1], (one, other)
    unread = [(folders[n] / "unread.safetensors").read_bytes() for n in ("own", "own again")]
    assert unread[0] == unread[1]
    original = load_file(FIXTURES / "openpi_orbax" / "weights.safetensors")
    written = load_file(folders["openpi"] / "model.safetensors")
    assert written.keys() == original.keys()
    head = "paligemma_with_expert.gemma_expert.lm_head.weight"  # read by nothing, not in JAX's tree
    assert all(torch.equal(written[n], t) for n, t in original.items() if n != head)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_every_way_between_layouts_gives_the_same_files(tmp_path, kind):
    """From the original to each layout, and from each to each."""
    sizes = ["--set", "vision.num_heads=4"]
    origin = FIXTURES / f"openpi_{kind}" / "weights.safetensors"
    layouts = ("pizero", "openpi", "lerobot")
    for to in layouts:
        convert([str(origin), str(tmp_path / to), "--to", to, *sizes, "horizon=6"])
    for one in layouts:
        for to in layouts:
            again = tmp_path / f"{one} {to}"
            given = [] if one == "pizero" else sizes
            convert([str(tmp_path / one), str(again), "--to", to, *given])
            for name in ("model.safetensors", "unread.safetensors"):
                path = tmp_path / to / name
                if path.exists():
                    assert (again / name).read_bytes() == path.read_bytes(), (one, to)
    written, original = load_file(tmp_path / "openpi" / "model.safetensors"), load_file(origin)
    assert written.keys() == original.keys()
    head = "paligemma_with_expert.gemma_expert.lm_head.weight"  # read by nothing: zeros
    assert all(torch.equal(written[n], t) for n, t in original.items() if n != head)


def test_every_layout_is_the_same_policy(folders, tokenizer):
    own = pizero.load_policy(folders["own"], device="cpu")
    expected = own.act(**observation(), noise=NOISE)
    openpi = pizero.load_policy(
        folders["openpi"], tokenizer=tokenizer, overrides=SIZES, device="cpu"
    )
    np.testing.assert_array_equal(openpi.act(**observation(), noise=NOISE), expected)
    # LeRobot's pi0 resizes and normalises a little otherwise: other pictures, epsilon 1e-8.
    lerobot = pizero.load_policy(
        folders["lerobot"], tokenizer=tokenizer, overrides=SIZES, device="cpu"
    )
    weights = model_weights(own.model)
    assert all(torch.equal(t, weights[n]) for n, t in model_weights(lerobot.model).items())
    assert lerobot.pipeline.cameras == own.pipeline.cameras
    assert lerobot.pipeline.resize == "pad_bilinear"
    np.testing.assert_allclose(lerobot.act(**observation(), noise=NOISE), expected, atol=0.3)


def test_lerobots_processors_are_files_of_their_kind(folders):
    before = json.loads((folders["lerobot"] / "policy_preprocessor.json").read_text())
    names = [step["registry_name"] for step in before["steps"]]
    assert names.index("normalizer_processor") == 5
    state = folders["lerobot"] / before["steps"][5]["state_file"]
    assert state.name == "policy_preprocessor_step_5_normalizer_processor.safetensors"
    assert {"observation.state.mean", "action.std"} <= load_file(state).keys()
    config = json.loads((folders["lerobot"] / "config.json").read_text())
    assert (config["type"], config["chunk_size"]) == ("pi0", 6)


def test_open_pi_zero_drives_its_robot(tmp_path, tokenizer):
    """A .pt file as released, bf16 and all; the robot knows its cameras, state and statistics."""
    weights = load_file(FIXTURES / "open_pi_zero" / "weights.safetensors")
    content = {"model": {f"_orig_mod.{n}": t.bfloat16() for n, t in weights.items()}}
    torch.save(content | {"cnt_update": 3, "wandb_id": "x"}, tmp_path / "step3.pt")
    policy = pizero.load_policy(
        tmp_path / "step3.pt", robot="widowx", tokenizer=tokenizer, overrides=SIZES, device="cpu"
    )
    state = np.array([0.3, 0.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.5])  # position, quaternion, opening
    chunk = policy.act(
        images={"3rd_view_camera": picture(4, 480, 640)}, text="put the carrot", state=state
    )
    assert chunk.shape == (4, 7)
    assert policy.pipeline.robot.output_stage() is not None
    low, high = (getattr(policy.pipeline.statistics["action"], q) for q in ("q01", "q99"))
    assert (chunk[:, :3] >= low[:3] - 1e-6).all()  # the model's actions are clipped to +-1
    assert (chunk[:, :3] <= high[:3] + 1e-6).all()


# -- what is missing is said ---------------------------------------------------------------------


def test_what_a_checkpoint_lacks_is_asked_for(tmp_path, tokenizer, monkeypatch):
    monkeypatch.delenv("PIZERO_TOKENIZER", raising=False)
    with pytest.raises(ValueError, match=r"comes without a tokenizer: give tokenizer="):
        pizero.load_policy(ORBAX)
    bare = tmp_path / "bare"
    shutil.copytree(ORBAX / "params", bare / "params")
    with pytest.raises(ValueError, match=r"comes without statistics: give statistics="):
        pizero.load_policy(bare, tokenizer=tokenizer)
    several = tmp_path / "several"
    shutil.copytree(ORBAX, several)
    shutil.copytree(several / "assets" / "toy_robot", several / "assets" / "other")
    with pytest.raises(ValueError, match=r"statistics of \['other', 'toy_robot'\]: choose one"):
        pizero.load_policy(several, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"no robot 'widowks' .*did you mean 'widowx'"):
        pizero.load_policy(ORBAX, tokenizer=tokenizer, robot="widowks")


def test_a_folder_of_ours_takes_nothing(folders):
    with pytest.raises(ValueError, match=r"describes itself: robot cannot be given"):
        pizero.load_policy(folders["own"], robot="droid")


def test_the_script_says_what_a_checkpoint_is_and_what_went_wrong():
    command = [sys.executable, "scripts/convert_weights.py", str(ORBAX), "--inspect"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert "(openpi_jax)" in done.stdout
    assert "174,464" in done.stdout  # parameters of the language model
    with pytest.raises(SystemExit, match="error: no checkpoint at"):
        convert([str(ORBAX.parent / "chekpoint"), "--inspect"])
    with pytest.raises(SystemExit, match="is there already; name a new folder"):
        convert([str(ORBAX), str(ORBAX), "--to", "openpi"])
