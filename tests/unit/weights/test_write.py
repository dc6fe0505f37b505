"""Files written tensor by tensor are the safetensors library's, to the byte."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pizero.agent.weights.entry import Entry
from pizero.agent.weights.safetensors_file import DTYPES
from pizero.agent.weights.source import MemorySource, open_source
from pizero.agent.weights.write import write_safetensors


def write(path, tensors, **options):
    source = MemorySource(tensors)
    write_safetensors(path, source.entries, source.read, **options)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tmp_path, metadata):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{2 * i % 7}.{name}": torch.randint(0, 2, (3, i), generator=generator).to(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
    } | {"scalar": torch.tensor(2.5), "größe": torch.ones(3), 'a "name"\n': torch.ones(1)}
    save_file(tensors, tmp_path / "library.safetensors", metadata=metadata)
    write(tmp_path / "ours.safetensors", tensors, metadata=metadata)
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == (tmp_path / "library.safetensors").read_bytes()
    read = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(read[n].cpu(), t) for n, t in tensors.items() if t.dtype.itemsize > 1)
    assert open_source(tmp_path / "ours.safetensors").entries.keys() == tensors.keys()


def test_views_and_parameters(tmp_path):
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "p": torch.nn.Parameter(torch.ones(2))}
    entries = {n: Entry(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", entries, tensors.__getitem__)
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["t"], tensors["t"])
    assert torch.equal(read["p"], tensors["p"])


def test_each_tensor_is_asked_for_once_in_the_order_of_the_caller(tmp_path):
    entries = {name: Entry((4,), torch.float32) for name in "31240"}
    asked = []
    write_safetensors(
        tmp_path / "a", entries, lambda n: asked.append(n) or torch.full((4,), float(n))
    )
    assert asked == list("31240")
    assert {n: t[0].item() for n, t in load_file(tmp_path / "a").items()} == {
        str(i): i for i in range(5)
    }


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(3), r"a: expected .*shape=\(2,\).*, got .*shape=\(3,\)"),
        (torch.zeros(2).double(), r"a: expected .*torch.float32\), got .*torch.float64\)"),
    ],
)
def test_a_tensor_that_is_not_what_was_announced(tmp_path, tensor, words):
    (tmp_path / "model.safetensors").write_text("the file before")
    entries = {"a": Entry((2,), torch.float32)}
    with pytest.raises(ValueError, match=words):
        write_safetensors(tmp_path / "model.safetensors", entries, {"a": tensor}.__getitem__)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "the file before"


def test_a_dtype_the_format_lacks(tmp_path):
    entries = {"a": Entry((2,), torch.complex128)}
    with pytest.raises(ValueError, match=r"a has dtype torch.complex128, which safetensors"):
        write_safetensors(tmp_path / "a", entries, lambda _: torch.zeros(2))


def test_others_may_read_the_file(tmp_path):
    old = os.umask(0o022)
    try:
        write(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
