"""Counters for what a piece of code does: operations, saved bytes, compilations, calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Operations that make the host wait for the device, or whose result's size depends on data.
# `lift_fresh` is a tensor made from Python numbers: on a GPU, a copy from the host.
SYNCS = {
    "lift_fresh",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "masked_select",
    "nonzero",
    "unique_dim",
}

# Operations that only describe a tensor anew, though they do not count as views.
NO_KERNEL = {"_unsafe_view", "detach", "device", "promote_types"}


class OperationCounter(TorchDispatchMode):
    """Counts operations by name; keeps views, which launch nothing, apart from kernels.

    `syncs` are operations that make the host wait: reading a value, a shape that depends on data,
    or a copy between devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        (self.views if func.is_view or name in NO_KERNEL else self.kernels)[name] += 1
        moved = (
            name in ("_to_copy", "copy_")
            and isinstance(out, torch.Tensor)
            and any(isinstance(a, torch.Tensor) and a.device != out.device for a in args)
        )
        if name in SYNCS or moved or (name.startswith("index") and _by_mask(args)):
            self.syncs[name] += 1
        return out


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage once, without the weights."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    @property
    def total(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()._cdata
        if storage not in self._weights:
            self._kept.setdefault(storage, x)  # alive, so that no other storage takes its address
        return x


class CountingBackend:
    """A backend for torch.compile that compiles nothing and counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of every call of a module while the context is open."""
    calls: list[tuple[tuple, dict]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention."""
    # The counter knows no fused attention of CPUs; unfused, it is two products, as it should be.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_operations(run: Callable[[], Any]) -> OperationCounter:
    with torch.no_grad(), OperationCounter() as counter:
        run()
    return counter


def _by_mask(args: tuple) -> bool:
    tensors = [x for a in args[1:] for x in (a if isinstance(a, (list, tuple)) else [a])]
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tensors)
