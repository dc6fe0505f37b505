"""From any layout to any that is written: ours, openpi's PyTorch folder, LeRobot's.

Both sides are links to the same names of ours, so a conversion is one list of links followed
backwards and another forwards, tensor by tensor, in the memory of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch

from pizero.agent.weights import torch_layout
from pizero.agent.weights.inspect import Found
from pizero.agent.weights.links import Link, Links
from pizero.agent.weights.report import sum_of_squares
from pizero.agent.weights.source import Entry

# Roots of the one spelling (spelling.py) in openpi's PyTorch module, which LeRobot copied.
_PALIGEMMA = "paligemma_with_expert.paligemma."
_ROOTS = {
    "vision.": f"{_PALIGEMMA}model.vision_tower.vision_model.",
    "projector.": f"{_PALIGEMMA}model.multi_modal_projector.linear.",
    "vlm.": f"{_PALIGEMMA}model.language_model.",
    "embed.": f"{_PALIGEMMA}lm_head.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}
_EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


class OpenpiSource:
    """Any pi0 or pi0.5 as openpi's PyTorch state dict.

    `filled` lists what the original has nothing for: zeros stand there, and nothing reads them.
    """

    def __init__(self, found: Found, *, dtype: torch.dtype | None = None) -> None:
        if found.kind not in ("pi0", "pi05"):
            raise ValueError(f"openpi's PyTorch layout holds pi0 and pi0.5, not {found.kind}")
        _refuse_other_conventions(found)
        self.path, self.metadata = found.source.path, {}
        self.ours = Ours(found, dtype=dtype)
        self.links = Links(_renamed(_links(found)))
        known = {name for link in self.links.links if (name := link.ours) in self.ours.entries}
        self.filled = [
            name for name, group in self.links.by_theirs.items() if group[0].ours not in known
        ]
        mixtures = found.model["joint"]["mixtures"]
        self.entries: dict[str, Entry] = {}
        for name, group in self.links.by_theirs.items():
            like = self.ours.entries.get(group[0].ours)
            if like is None:
                bulk = self.ours.entries["joint.mixtures.vlm.blocks.0.kv_proj.weight"]
                like = Entry(_unread_shape(group[0], mixtures["vlm"]), bulk.dtype)
            self.entries[name] = Entry(_shape(group, like.shape), like.dtype)
        embedding = self.entries[f"{_PALIGEMMA}lm_head.weight"]
        head = (embedding.shape[0], mixtures["action"]["width"])
        self.entries[_EXPERT_HEAD] = Entry(head, embedding.dtype)
        self.filled.append(_EXPERT_HEAD)

    def read(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if name in self.filled:
            return torch.zeros(entry.shape, dtype=entry.dtype)
        theirs = torch.empty(entry.shape, dtype=entry.dtype)
        for link in self.links.by_theirs[name]:
            link.write(self.ours.read(link.ours), theirs)
        return theirs


class Ours:
    """Any checkpoint under our names, unread tensors included; reads what it needs when asked."""

    def __init__(self, found: Found, *, dtype: torch.dtype | None = None) -> None:
        self.path, self.metadata = found.source.path, {}
        self._found, self._dtype = found, dtype
        self._kept: dict[str, torch.Tensor] = {}
        self.squares: dict[str, float] = {}  # of the norms of what was read

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        stored, entries = self._found.source.entries, {}
        for name, links in self._found.links.by_ours.items():
            if any(link.theirs not in stored for link in links):
                continue
            shapes = [link.shape(stored[link.theirs].shape) for link in links]
            rows = sum(shape[0] for shape in shapes) if shapes[0] else 0
            shape = (rows, *shapes[0][1:]) if shapes[0] else ()
            dtypes = [stored[link.theirs].dtype for link in links]
            widest = max(dtypes, key=lambda d: d.itemsize)
            floats = widest.is_floating_point and self._dtype is not None
            entries[name] = Entry(shape, self._dtype if floats and self._dtype else widest)
        # Tensors that share a stored one follow each other, so that it is read once.
        first = {name: i for i, name in enumerate(stored)}
        order = self._found.links.by_ours
        return dict(sorted(entries.items(), key=lambda item: first[order[item[0]][0].theirs]))

    def read(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for link in self._found.links.by_ours[name]:
            part = whole if link.rows is None else whole[slice(*link.rows)]
            part.copy_(link.read(self._stored(link.theirs)))
        self.squares[name] = sum_of_squares(whole)
        return whole

    def _stored(self, name: str) -> torch.Tensor:
        """A stored tensor; stacked ones hold many of ours and are kept, no more than one's size."""
        if name not in self._kept:
            tensor = self._found.source.read(name)
            sizes = [t.nbytes for t in self._kept.values()]
            largest = max([tensor.nbytes, *sizes])
            while (
                self._kept and sum(t.nbytes for t in self._kept.values()) + tensor.nbytes > largest
            ):
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = tensor
        return self._kept[name]


def in_reading_order(source: OpenpiSource) -> dict[str, Entry]:
    """Its entries such that each stored tensor of the original is read once."""
    order = {name: i for i, name in enumerate(source.ours.entries)}
    links = source.links.by_theirs

    def place(name: str) -> int:
        group = links.get(name)
        return order.get(group[0].ours, len(order)) if group else len(order)

    return {name: source.entries[name] for name in sorted(source.entries, key=place)}


def _links(found: Found) -> list[Link]:
    node = found.model
    mixtures = node["joint"]["mixtures"]
    reverse = node["time_embedding"]["reverse"]
    return [
        Link("embedding.weight", "embed.weight"),
        *torch_layout.vision(node["vision"]),
        *torch_layout.mixture(mixtures["vlm"], "joint.mixtures.vlm.", "vlm."),
        *torch_layout.mixture(mixtures["action"], "joint.mixtures.action.", "expert."),
        *torch_layout.flow_heads(node, reverse=reverse, time_first=False),
    ]


def _renamed(links: list[Link]) -> list[Link]:
    def name(spelled: str) -> str:
        root = next((r for r in _ROOTS if spelled.startswith(r)), None)
        return spelled if root is None else _ROOTS[root] + spelled.removeprefix(root)

    return [replace(link, theirs=name(link.theirs)) for link in links]


def _shape(group: tuple[Link, ...], ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the stored tensor that these links fill, from the shape of the first of ours."""
    shape = list(ours)
    first = group[0]
    if first.rows is not None:
        shape[0] = first.rows[1] - first.rows[0]
    for axis, part in enumerate(first.at):
        if isinstance(part, slice) and part.stop is not None:
            stops = [link.at[axis] for link in group]
            shape[axis] = max(s.stop for s in stops if isinstance(s, slice))
    return tuple(shape)


def _unread_shape(link: Link, vlm: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor of ours that only other layouts have: in the language model's tail."""
    width, queries = vlm["width"], vlm["num_heads"] * vlm["head_dim"]
    shapes = {
        "q_proj": (queries, width),
        "o_proj": (width, queries),
        "gate_up_proj": (2 * vlm["mlp_dim"], width),
        "down_proj": (width, vlm["mlp_dim"]),
        "mlp_norm": (width,),
        "final_norm": (width,),
    }
    return shapes[link.ours.split(".")[-2]]


def _refuse_other_conventions(found: Found) -> None:
    """openpi's layout stands for openpi's conventions: other weights in it would be misread."""
    node, wrong = found.model, []
    expected = {
        "softcap": (node["joint"]["softcap"], None),
        "sig_min": (node["flow"]["sig_min"], 0),
    }
    expected["positions"] = (node["positions"]["_target_"].rsplit(".", 1)[-1], "SharedCount")
    for name, (got, want) in expected.items():
        if got != want:
            wrong.append(f"{name} {got!r} (openpi: {want!r})")
    bases = {m["rope_base"] for m in node["joint"]["mixtures"].values()}
    if bases != {10_000.0}:
        wrong.append(f"rope_base {sorted(bases)} (openpi: 10000)")
    for name, want in {"image": 0.0, "text": 0.5, "state": 0.0, "action": 0.0}.items():
        if node["scales"][name] != want:
            wrong.append(f"scales.{name} {node['scales'][name]} (openpi: {want})")
    time = node["time_embedding"]
    if (time["min_period"], time["max_period"], time["reverse"]) != (0.004, 4.0, True):
        wrong.append(
            f"time_embedding {time['min_period']}..{time['max_period']} (openpi: 0.004..4)"
        )
    if set(node["joint"]["mixtures"]) != {"vlm", "action"} or node["streams"]:
        wrong.append(f"experts {sorted(node['joint']['mixtures'])} (openpi: vlm, action)")
    if wrong:
        raise ValueError(
            f"{found.source.path} cannot be written in openpi's layout, whose programs would run "
            "it with other conventions: " + "; ".join(wrong)
        )
