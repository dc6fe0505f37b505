"""Rules that give tokens their rotary positions; published model families differ here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pizero.model.layout import TokenLayout
from pizero.types import Bool, Int, Tensor


@dataclass(frozen=True)
class SharedCount:
    """One running count over the real tokens of all experts (openpi, LeRobot).

    Padding and absent cameras take no position, so dropping them changes nothing.
    """

    start: int = 0

    def __call__(
        self,
        layout: TokenLayout,
        *,
        valid: Bool[Tensor, "b s"] | None,
        past: TokenLayout | None,
        past_valid: Bool[Tensor, "b p"] | None,
        device: torch.device,
    ) -> Int[Tensor, "_ s"]:
        if past is None:
            offset = torch.zeros(1, 1, dtype=torch.long, device=device)
        elif past_valid is None:
            offset = torch.full((1, 1), past.length, device=device)
        else:
            offset = past_valid.sum(dim=1, keepdim=True)
        if valid is None:
            count = torch.arange(layout.length, device=device)[None]
        else:
            count = valid.cumsum(dim=1) - 1
        return self.start + offset + count


@dataclass(frozen=True)
class PerExpertIndex:
    """Every expert counts its own tokens, padding included (open-pi-zero, which starts at 1)."""

    start: int = 1

    def __call__(
        self,
        layout: TokenLayout,
        *,
        valid: Bool[Tensor, "b s"] | None,
        past: TokenLayout | None,
        past_valid: Bool[Tensor, "b p"] | None,
        device: torch.device,
    ) -> Int[Tensor, "1 s"]:
        counts: dict[str, int] = {}
        for s in past.segments if past else ():
            counts[s.expert] = counts.get(s.expert, 0) + s.length
        runs = []
        for s in layout.segments:
            first = counts.get(s.expert, 0)
            counts[s.expert] = first + s.length
            runs.append(torch.arange(first, first + s.length, device=device))
        return self.start + torch.cat(runs)[None]


PositionRule = SharedCount | PerExpertIndex
