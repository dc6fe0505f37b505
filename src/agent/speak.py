"""Text about pictures from a PaliGemma's weights: `scripts/generate_text.py`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pizero.agent.policy import choose_device
from pizero.agent.weights import load_model
from pizero.agent.weights.assets import find_assets
from pizero.data.images import decode_image, resize_image
from pizero.data.tokenizer import BOS, Tokenizer
from pizero.model import PaliGemma
from pizero.types import Observation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER = "PIZERO_TOKENIZER"


@dataclass(frozen=True)
class Speaker:
    """A model that speaks, with its words.

    `resize` is how PaliGemma's own processor makes pictures square: stretched, bicubic.
    """

    model: PaliGemma
    tokenizer: Tokenizer
    resize: str = "bicubic"

    def say(
        self,
        *,
        images: Sequence[np.ndarray],
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[str, bool]:
        """What follows the prompt, and whether the model came to an end by itself.

        `images` are uint8 [h w 3] of any size. The prompt is followed by a newline, as PaliGemma
        was trained.
        """
        if not images:
            raise ValueError("a PaliGemma speaks about pictures: expected at least one, got none")
        size, device = self.model.vision.image_size, self.model.embedding.weight.device
        pictures = np.stack([resize_image(image, size, kind=self.resize) for image in images])
        tokens = [BOS, *self.tokenizer.encode(prompt + "\n")]
        observation = Observation(
            images=torch.from_numpy(pictures).permute(0, 3, 1, 2)[None].contiguous(),
            tokens=torch.tensor([tokens]),
        )
        said = self.model.generate(
            observation.to(device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
        )
        words = said.tokens[0, : int(said.lengths[0])].tolist()
        return self._spell(words), bool(said.ended[0])

    def _spell(self, words: Sequence[int]) -> str:
        """Text of token ids; <id> for those that the tokenizer does not know."""
        runs = groupby(words, key=lambda i: i < self.tokenizer.vocab_size)
        return "".join(
            self.tokenizer.decode(run) if known else "".join(f"<{i}>" for i in run)
            for known, run in runs
        )


def load_speaker(
    weights: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Speaker:
    """A PaliGemma from any published layout, and the tokenizer given, beside it, or in the
    environment. Raises ValueError for weights that speak no words."""
    weights = Path(weights).expanduser()
    if not weights.exists():
        raise ValueError(f"no weights at {weights}: expected a file or folder")
    given = tokenizer or find_assets(weights).tokenizer or os.environ.get(TOKENIZER)
    if not given:
        raise ValueError(
            f"{weights} comes without a tokenizer: give --tokenizer, the path of PaliGemma's "
            f"tokenizer.model, or set {TOKENIZER} to it"
        )
    words = Tokenizer(given)
    loaded = load_model(weights, device=choose_device(device), dtype=dtype, overrides=overrides)
    if not isinstance(loaded.model, PaliGemma):
        raise ValueError(
            f"{weights} is a {loaded.found.kind} policy, which speaks no words: expected a "
            "PaliGemma"
        )
    rows = loaded.model.embedding.num_embeddings
    if words.vocab_size > rows:
        raise ValueError(
            f"the tokenizer {given} has {words.vocab_size} pieces, but the model of {weights} "
            f"knows {rows}"
        )
    return Speaker(loaded.model, words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the model says; a mistake ends in one message."""
    options = _parser().parse_args(arguments)
    try:
        speaker = load_speaker(
            options.weights,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=DTYPES[options.dtype] if options.dtype else None,
        )
        text, ended = speaker.say(
            images=[_read(path) for path in options.image],
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            generator=torch.Generator().manual_seed(options.seed),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)
    if not ended:
        print(f"(cut off at {options.max_new_tokens} tokens)", file=sys.stderr)


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"no picture at {path}")
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate_text.py", description="Ask a PaliGemma about pictures."
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="file or folder, of any published layout")
    add("--image", type=Path, nargs="+", required=True, help="PNG or JPEG; several if need be")
    add("--prompt", required=True, help='such as "caption en" or "answer en what is red?"')
    add(
        "--tokenizer", type=Path, help=f"tokenizer.model (default: beside the weights, {TOKENIZER})"
    )
    add("--max-new-tokens", type=int, default=64, help="where to cut off (default: 64)")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest words")
    add("--seed", type=int, default=0, help="of the draws at a temperature (default: 0)")
    add("--dtype", choices=list(DTYPES), help="precision (default: as stored)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    return parser
