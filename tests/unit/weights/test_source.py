"""Every container of tensors gives what was put in, and damaged ones are refused by name."""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights_files import orbax_folder, truncate

from pizero.agent.weights.entry import Entry
from pizero.agent.weights.source import MemorySource, open_source

TENSORS = {
    "norm.weight": torch.arange(5, dtype=torch.float32) / 3,
    "embed": torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "blocks.0.q": torch.arange(24, dtype=torch.float16).reshape(2, 3, 4),
    "step": torch.tensor(19296),
    "mask": torch.tensor([[True, False], [False, True]]),
    "nothing": torch.zeros(0, 3),
}


PUBLISHED = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_orbax"


class Code:
    """Unpickles by running a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def assert_holds(source, tensors=TENSORS):
    assert dict(source.entries) == {
        name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert read.is_contiguous()
        read.zero_()
        assert torch.equal(source.read(name), tensor), "reading gives tensors of one's own"


def test_one_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        source = open_source(path)
        assert_holds(source)
        assert source.path == tmp_path / "model.safetensors"
        assert source.metadata == {"format": "pt"}


def write_shards(folder: Path) -> Path:
    names = sorted(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:3], "part/model-2.safetensors": names[3:]}
    (folder / "part").mkdir(parents=True)
    for i, (shard, inside) in enumerate(shards.items()):
        save_file({n: TENSORS[n] for n in inside}, folder / shard, metadata={f"shard{i}": "here"})
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {n: shard for shard, inside in shards.items() for n in inside}})
    )
    return index


def test_sharded_safetensors(tmp_path):
    index = write_shards(tmp_path)
    for path in (tmp_path, index):
        source = open_source(path)
        assert_holds(source)
        assert source.metadata == {"shard0": "here", "shard1": "here"}


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "part/model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 shards .* are missing: part/model-2.safet"):
        open_source(tmp_path)


def test_an_index_that_disagrees_with_its_shards(tmp_path):
    index = write_shards(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["lost"] = content["weight_map"].pop("step")
    index.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"lost is not in part/model-2.*; step is not in the index"
    ):
        open_source(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no readable `weight_map`"):
        open_source(tmp_path)


def test_torch_files_in_shards(tmp_path):
    """As diffusers and older transformers keep them; giga-models' training does."""
    names = sorted(TENSORS)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, inside in shards.items():
        torch.save({n: TENSORS[n] for n in inside}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    where = {n: shard for shard, inside in shards.items() for n in inside}
    index.write_text(json.dumps({"weight_map": where}))
    for path in (tmp_path, index):
        assert_holds(open_source(path))
    index.write_text(json.dumps({"weight_map": {**where, "lost": "pytorch_model-1.bin"}}))
    with pytest.raises(ValueError, match=r"disagree: lost is not in pytorch_model-1.bin"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 shards .* are missing: pytorch_model-2.bin"):
        open_source(tmp_path)
    save_file({n: t.clone() for n, t in TENSORS.items()}, tmp_path / "model.safetensors")
    assert open_source(tmp_path).path.name == "model.safetensors"


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
def test_torch_files(tmp_path, key):
    path = tmp_path / "step19296.pt"
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    training = {"cnt_update": 19296, "action_optimizer": moments, "wandb_id": None}
    torch.save(TENSORS if key is None else {**training, key: TENSORS}, path)
    source = open_source(path)
    assert_holds(source)
    assert source.path == path
    assert source.metadata == {}
    assert_holds(open_source(tmp_path))


def test_torch_files_from_a_gpu_and_of_parameters_and_views(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    large = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": large.T,
        "column": large[:, 2],
        "row": large[2],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "empty": large[2:2],
    }
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(tensors, path)
    source = open_source(path)
    assert_holds(source, {name: t.detach() for name, t in tensors.items()})
    assert all(source.read(name).device.type == "cpu" for name in tensors)


def test_weights_in_memory():
    assert_holds(MemorySource(TENSORS))
    read = MemorySource({"w": torch.ones(2, 3, requires_grad=True).T}).read("w")
    assert not read.requires_grad
    assert read.is_contiguous()


@pytest.mark.parametrize("database", [True, False], ids=["ocdbt", "folders"])
@pytest.mark.parametrize("version", [2, 3], ids=["zarr", "zarr3"])
def test_orbax(tmp_path, database, version):
    tensors = {
        "a/b": TENSORS["embed"],
        "a/value/kernel": torch.randn(5, 6),
        "step": TENSORS["step"],
    }
    params = orbax_folder(tmp_path / "7" / "params", tensors, database=database, version=version)
    (tmp_path / "7" / "train_state").mkdir()
    for path in (params, tmp_path / "7"):
        source = open_source(path)
        assert_holds(source, tensors)
        assert source.path == params


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint/params", "checkpoint_no_value"])
def test_numbers_that_openpi_saved(folder):
    facts = json.loads((PUBLISHED / "case.json").read_text())["checkpoint_facts"]
    source = open_source(PUBLISHED / folder)
    assert {n: list(e.shape) for n, e in source.entries.items()} == facts["leaf_shapes"]
    for name, expected in facts["leaf_sum_and_sum_of_squares_of_the_float32_values"].items():
        assert source.entries[name].dtype == torch.float32
        values = source.read(name).double()
        assert [values.sum(), values.square().sum()] == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_names_of_orbax_keep_what_is_not_a_wrapping(tmp_path):
    tensors = {"params/a": torch.ones(2), "b/value": torch.ones(3)}
    orbax_folder(tmp_path, tensors, root=False, leaf=False)
    assert_holds(open_source(tmp_path), tensors)


def test_orbax_without_tensorstore(tmp_path, monkeypatch):
    orbax_folder(tmp_path, {"a": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs tensorstore: pip install 'pizero\[orbax"):
        open_source(tmp_path)


def test_a_truncated_orbax_file(tmp_path):
    params = orbax_folder(tmp_path, {"a": torch.randn(50, 60), "b": torch.randn(5)})
    data = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    truncate(data)
    with pytest.raises(ValueError, match=r"incomplete or damaged at a: "):
        open_source(tmp_path).read("a")


@pytest.mark.parametrize("database", [True, False], ids=["ocdbt", "folders"])
def test_a_lost_orbax_file(tmp_path, database):
    params = orbax_folder(
        tmp_path, {"a": torch.randn(50, 60), "b": torch.ones(5)}, database=database
    )
    data = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.unlink()
    with pytest.raises(ValueError, match="incomplete or damaged at a: "):
        open_source(tmp_path).read("a")


def test_an_orbax_array_that_was_never_written(tmp_path):
    params = orbax_folder(tmp_path, {"a": torch.ones(2)})
    tree = json.loads((params / "_METADATA").read_text())
    leaf = next(iter(tree["tree_metadata"].values()))
    other = json.loads(json.dumps(leaf))
    other["key_metadata"][1]["key"] = "b"
    tree["tree_metadata"]["('params', 'b', 'value')"] = other
    (params / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="incomplete or damaged at b: "):
        open_source(tmp_path)
    truncate(params / "_METADATA")
    with pytest.raises(ValueError, match="_METADATA is truncated or no tree of Orbax"):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_safetensors_file(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    truncate(path, keep)
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        open_source(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    source = open_source(path)
    truncate(path, -1)
    with pytest.raises(ValueError, match=r"is truncated: .* bytes expected at"):
        [source.read(name) for name in TENSORS]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS .* `git lfs pull`"),
        ((5).to_bytes(8, "little") + b"nojs}", "header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((2).to_bytes(8, "little") + b"{}" + b"more", "4 bytes follow its last tensor"),
        (b'(\0\0\0\0\0\0\0{"a":{"dtype":"F4","shape":[2]}}        ', "damaged at a: .*F4"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_source(tmp_path)


def test_a_header_whose_sizes_disagree(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"at a: \[2\] F32 takes 8 bytes, not those from 0 to 4"):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 2, 100, -1])
def test_a_truncated_torch_file(tmp_path, keep):
    torch.save({"model": TENSORS}, tmp_path / "model.pt")
    truncate(tmp_path / "model.pt", keep)
    with pytest.raises(ValueError, match=r"model.pt .*truncated"):
        open_source(tmp_path)


def test_pickles_with_code_are_refused_and_not_run(tmp_path):
    witness = tmp_path / "ran"
    path = tmp_path / "model.pt"
    torch.save({"model": TENSORS, "hook": Code(witness)}, path)
    with pytest.raises(ValueError, match=r"model.pt is refused, .* it names `(posix|nt).mkdir`"):
        open_source(path)
    path.write_bytes(pickle.dumps(Code(witness)))
    with pytest.raises(ValueError, match="a bare pickle, which is not opened as it can run code"):
        open_source(path)
    assert not witness.exists()


def test_a_pickled_module_is_no_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"names `torch.nn.modules.linear.Linear`"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": TENSORS, "step": 3}, r"of model, state_dict, .*found weights \(dict\), step"),
        ({"model": {}}, "Looked at `model`; found nothing in it"),
        ([1, 2], "holds a list, expected a dictionary"),
    ],
)
def test_torch_files_without_weights(tmp_path, content, words):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=words):
        open_source(tmp_path)


def test_folders_with_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .* found an empty folder"):
        open_source(tmp_path)
    (tmp_path / "29999").mkdir()
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ValueError, match=r"found 29999/, weights.onnx"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"weights.onnx is of no known kind: expected"):
        open_source(tmp_path / "weights.onnx")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent: expected"):
        open_source(tmp_path / "absent")


def test_folders_with_several_checkpoints(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    torch.save(TENSORS, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"several checkpoints, name the one to read: a.pt, b.pt"):
        open_source(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_holds(open_source(tmp_path))  # the .pt files are an optimizer's and the like
    orbax_folder(tmp_path / "params", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"name the one to read: model.safetensors, params"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_what_was_read_does_not_stay_in_memory(tmp_path, kind):
    path = tmp_path / f"model.{kind}"
    # Larger than what malloc keeps for itself when it is freed.
    tensors = {str(i): torch.from_numpy(np.full(10**7, i, dtype=np.float32)) for i in range(6)}
    torch.save(tensors, path) if kind == "pt" else save_file(tensors, path)
    total = sum(t.nbytes for t in tensors.values())
    del tensors
    source = open_source(path)
    before = _resident()
    for name in source.entries:
        assert source.read(name)[0] == int(name)
    assert _resident() - before < total / 4


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
