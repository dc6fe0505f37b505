"""A damaged checkpoint gives an error that says what is wrong with which file, and no policy."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_files import orbax_folder, truncate

import pizero
from pizero.agent.weights import MemorySource, inspect, load_into, load_model, open_source
from pizero.agent.weights.command import main as convert
from pizero.data.tokenizer import train_tokenizer

PUBLISHED = Path(__file__).parents[1] / "data" / "fixtures" / "openpi_orbax"
SIZES = {"vision.num_heads": 4, "horizon": 6}
QUERIES = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"
FIRST = QUERIES.replace(".1.", ".0.")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """One policy as a folder of openpi's PyTorch, in Orbax and as a folder of ours."""
    root = tmp_path_factory.mktemp("good")
    words = train_tokenizer(["open the drawer"], root / "tokenizer.model", vocab_size=300)
    shutil.copytree(PUBLISHED / "checkpoint", root / "orbax")
    shutil.copyfile(words, root / "orbax" / "tokenizer.model")
    chunk = ["--set", "horizon=6"]
    convert([str(root / "orbax"), str(root / "ours"), *chunk])
    convert([str(root / "orbax"), str(root / "openpi"), "--to", "openpi", *chunk])
    shutil.copyfile(words, root / "openpi" / "tokenizer.model")
    return {name: root / name for name in ("orbax", "openpi", "ours")}


def load(kind: str, folder: Path) -> pizero.Policy:
    given = {"ours": None, "openpi": SIZES, "orbax": {"horizon": 6}}
    return pizero.load_policy(folder, overrides=given[kind], device="cpu")


@pytest.mark.parametrize("kind", ["openpi", "orbax", "ours"])
def test_undamaged_it_acts(good, kind):
    pictures = {
        c: np.zeros((56, 56, 3), dtype=np.uint8) for c in ("base_0_rgb", "left_wrist_0_rgb")
    }
    chunk = load(kind, good[kind]).act(
        images=pictures | {"right_wrist_0_rgb": None}, text="open the drawer", state=np.zeros(7)
    )
    assert chunk.shape == (6, 7)


def weights(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Damage to the tensors of model.safetensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def text(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Damage to a text file, at one place."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new, 1))

    return damage


class Code:
    """Unpickles by making a folder."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def adapter_alone(folder: Path) -> None:
    """What PEFT saves: no weights, only what is to be added to them."""
    shapes = {"lora_A": (4, 64), "lora_B": (128, 4)}
    adapter = {
        f"base_model.model.{QUERIES.replace('weight', part)}.weight": torch.zeros(shape)
        for part, shape in shapes.items()
    }
    (folder / "model.safetensors").unlink()
    save_file(adapter, folder / "adapter_model.safetensors")


def lora_without_base(folder: Path) -> None:
    """openpi's JAX leaves of an adapted einsum, its own weight lost."""
    source = open_source(folder)
    tensors = {name: source.read(name) for name in source.entries}
    einsum = "PaliGemma/llm/layers/attn/q_einsum/"
    layers, heads, width, head_dim = tensors.pop(f"{einsum}w").shape
    tensors[f"{einsum}lora_a"] = torch.zeros(layers, heads, width, 4)
    tensors[f"{einsum}lora_b"] = torch.zeros(layers, heads, 4, head_dim)
    shutil.rmtree(folder / "params")
    orbax_folder(folder / "params", tensors)


def code_in_a_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"model": tensors, "hook": Code(folder / "ran")}, folder / "model.pt")


def shorter_statistics(folder: Path) -> None:
    """Standard deviations of fewer dimensions than means."""
    (path,) = folder.rglob("norm_stats.json")
    tree = json.loads(path.read_text())
    tree["norm_stats"]["state"]["std"] = tree["norm_stats"]["state"]["std"][:5]
    path.write_text(json.dumps(tree))


def longer_statistics(folder: Path) -> None:
    """Statistics of a robot with more dimensions than the model has."""
    (path,) = folder.rglob("norm_stats.json")
    tree = json.loads(path.read_text())
    actions = tree["norm_stats"]["actions"]
    tree["norm_stats"]["actions"] = {name: (v * 2)[:9] for name, v in actions.items()}
    path.write_text(json.dumps(tree))


def other_theta(folder: Path) -> None:
    """A configuration that contradicts what every such checkpoint was trained with."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(config))


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: truncate(folder / name)


def cut_data(folder: Path) -> None:
    truncate(max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))


# fmt: off
DAMAGES = {
    "missing key": ("openpi", weights(lambda t: t.pop(QUERIES)),
        rf"does not fit in 1 places:\n  {re.escape(QUERIES)}: missing"),
    "missing key of ours": ("ours", weights(lambda t: t.pop("action_decoder.bias")),
        r"does not fit in 1 places:\n  action_decoder.bias: missing"),
    "missing key that tells a size": ("openpi", weights(lambda t: t.pop(FIRST)),
        rf"sizes cannot be found without {re.escape(FIRST)}; nearest"),
    "extra key": ("openpi", weights(lambda t: t.update({"state_proj.scale": torch.ones(3)})),
        r"does not fit in 1 places:\n  state_proj.scale: not explained"),
    "wrong shape": ("openpi", weights(lambda t: t.update({QUERIES: t[QUERIES][:, :32].clone()})),
        rf"{re.escape(QUERIES)}: shape \[128, 32\] does not give \[128, 64\]"),
    "wrong dtype": ("openpi", weights(lambda t: t.update({QUERIES: t[QUERIES].int()})),
        rf"{re.escape(QUERIES)}: torch.int32 cannot be the numbers of"),
    "truncated safetensors": ("openpi", cut("model.safetensors"),
        r"model.safetensors is truncated: its tensors take \d+ bytes and \d+ are there"),
    "truncated Orbax": ("orbax", cut_data, r"params is incomplete or damaged at "),
    "truncated safetensors of ours": ("ours", cut("model.safetensors"), r"is truncated"),
    "theta of ours": ("ours", text("config.yaml", "rope_base: 10000.0", "rope_base: 100.0"),
        r"do not belong together: model.joint.mixtures.vlm.rope_base is 10000.0 in metadata.json "
        r"and 100.0 in config.yaml"),
    "theta beside the weights": ("openpi", other_theta,
        r"config.json has rope_theta 500, but all published .* trained with 10000; if these were"),
    "adapter without base": ("openpi", adapter_alone,
        r"adapter_model.safetensors holds LoRA adapters \(2 tensors .*merge them first"),
    "LoRA without base": ("orbax", lora_without_base,
        r"LoRA leaves .*q_einsum/lora_b'\] without .*q_einsum/w; an adapter alone is no policy"),
    "code in a pickle": ("openpi", code_in_a_pickle,
        r"model.pt is refused, and nothing in it was run: .* it names `posix.mkdir`"),
    "statistics of two lengths": ("openpi", shorter_statistics,
        r"norm_stats.json, state: expected mean, std .* of one length.* \(7,\), 'std': \(5,\)"),
    "statistics too long": ("openpi", longer_statistics,
        r"action statistics have 9 dimensions, but the model's action_dim is 8"),
    "statistics of ours": ("ours", text("stats.json", "0", "1"),
        r"do not belong together: stats.json had digest \w+ when it was saved and has \w+ now"),
    "empty folder": ("openpi", emptied, r"no checkpoint in .*expected .* found an empty folder"),
}
# fmt: on


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_policy_comes_of(good, tmp_path, damage):
    kind, hurt, words = DAMAGES[damage]
    folder = tmp_path / "checkpoint"
    shutil.copytree(good[kind], folder)
    hurt(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load(kind, folder)
    assert str(folder) in str(caught.value) or "statistics" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (folder / "ran").exists()


def test_another_theta_can_be_meant(good, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(good["openpi"], folder)
    other_theta(folder)
    bases = {f"joint.mixtures.{name}.rope_base": 500.0 for name in ("vlm", "action")}
    node = load_model(folder, overrides=SIZES | bases).found.model
    assert node["joint"]["mixtures"]["action"]["rope_base"] == 500


def test_a_model_that_is_there_stays_as_it_was(good):
    """Loading into a model checks everything before it touches anything."""
    model = load_model(good["openpi"], overrides=SIZES).model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tensors = {name: t + 1 for name, t in load_file(good["openpi"] / "model.safetensors").items()}
    del tensors[QUERIES]
    with pytest.raises(ValueError, match=r"q_proj.weight: missing"):
        load_into(model, inspect(MemorySource(tensors), overrides=SIZES))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
