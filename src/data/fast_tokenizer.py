"""FAST: action chunks as few tokens (Pertsch et al. 2025), and back.

Each dimension's course over time becomes cosine coefficients, which are scaled, rounded and written
as a string, time-major, one character for a coefficient; byte pairs that occur together become
tokens. Files are those of the published processor (`physical-intelligence/fast`):
`processor_config.json` and `tokenizer.json`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

CONFIG, MODEL, TRANSFORMERS = "processor_config.json", "tokenizer.json", "tokenizer_config.json"
FILES = (CONFIG, MODEL, TRANSFORMERS)
NUM_BYTES = 256
FIRST_SURROGATE = 0xD800  # code points from here on are no characters
UNREADABLE = "\ufffd"  # what bytes that are no text decode to
log = logging.getLogger(__name__)


class UndecodableActions(ValueError):
    """Tokens that spell no action chunk."""


@dataclass(frozen=True)
class FastTokenizer:
    """The FAST action tokenizer; pickles as its content.

    bpe        the content of `tokenizer.json`
    scale      what coefficients are multiplied by before they are rounded
    min_token  the coefficient that character 0 stands for
    horizon, action_dim   sizes of the chunks, where they are always the same
    """

    bpe: str
    scale: float
    min_token: int
    horizon: int | None = None
    action_dim: int | None = None

    @classmethod
    def load(cls, folder: str | Path) -> FastTokenizer:
        """Read a folder of the published layout. Raises ValueError when it is none."""
        folder = Path(folder).expanduser()
        for name in (CONFIG, MODEL):
            if not (folder / name).is_file():
                raise ValueError(
                    f"no FAST tokenizer in {folder}: expected {CONFIG} and {MODEL}, found no {name}"
                )
        try:
            config = json.loads((folder / CONFIG).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
        for key in ("scale", "min_token"):
            if not isinstance(config, dict) or not isinstance(config.get(key), int | float):
                raise ValueError(f"{folder / CONFIG}: expected a number {key!r}, got {config}")
        loaded = cls(
            bpe=(folder / MODEL).read_text(),
            scale=float(config["scale"]),
            min_token=int(config["min_token"]),
            horizon=config.get("time_horizon"),
            action_dim=config.get("action_dim"),
        )
        try:
            loaded._tokenizer  # noqa: B018  # a broken file is to be found here
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{folder / MODEL} is no tokenizer: {error}") from error
        return loaded

    @classmethod
    def fit(
        cls,
        chunks: Iterable[np.ndarray],
        *,
        vocab_size: int = 1024,
        scale: float = 10.0,
        horizon: int | None = None,
        action_dim: int | None = None,
    ) -> FastTokenizer:
        """Learn the tokens of normalised action chunks [horizon action_dim], of any sizes.

        Every byte has a token, so any chunk within the range of those seen can be spelt.
        """
        library = _library()
        if vocab_size < NUM_BYTES:
            raise ValueError(f"expected vocab_size >= {NUM_BYTES}, one a byte, got {vocab_size}")
        rounded = [_coefficients(chunk, scale) for chunk in chunks]
        if not rounded:
            raise ValueError("expected at least one action chunk to fit FAST's tokens to, got none")
        low = min(int(c.min()) for c in rounded)
        bpe = library.Tokenizer(library.models.BPE())
        # No splitting into words: a chunk is one.
        bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        bpe.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator((_spell(c - low) for c in rounded), trainer=trainer)
        return cls(bpe.to_str(), float(scale), low, horizon, action_dim)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        return self._tokenizer.get_vocab_size()

    def encode(self, actions: np.ndarray) -> list[int]:
        """Token ids of normalised actions [horizon action_dim].

        Coefficients below the smallest that has a character are raised to it, as the published
        processor does, and a warning says so. Raises ValueError for what cannot be spelt.
        """
        shifted = _coefficients(actions, self.scale) - self.min_token
        if shifted.min() < 0:
            _warn_once(self.min_token)
        text = _spell(np.maximum(shifted, 0))
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(
                "the FAST tokenizer has no tokens for these actions, whose coefficients go from "
                f"{shifted.min() + self.min_token} to {shifted.max() + self.min_token}: are they "
                "normalised? Else fit a tokenizer to them"
            )
        return ids

    def decode(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        horizon: int | None = None,
        action_dim: int | None = None,
    ) -> np.ndarray:
        """Normalised actions float64 [horizon action_dim] of token ids.

        Raises UndecodableActions when they spell something else.
        """
        horizon, action_dim = horizon or self.horizon, action_dim or self.action_dim
        if horizon is None or action_dim is None:
            raise ValueError(
                "tokens do not tell the shape of their chunk: expected horizon and action_dim, got "
                f"{horizon} and {action_dim}"
            )
        ids, size = [int(i) for i in ids], self.vocab_size
        strange = [i for i in ids if not 0 <= i < size]
        if strange:
            raise UndecodableActions(
                f"{strange[0]} is no FAST token: expected ids from 0 to {size - 1}"
            )
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        if UNREADABLE in text:
            raise UndecodableActions(f"{len(ids)} FAST tokens spell bytes that are no coefficients")
        if len(text) != horizon * action_dim:
            raise UndecodableActions(
                f"{len(ids)} FAST tokens spell {len(text)} coefficients, expected "
                f"{horizon} x {action_dim} = {horizon * action_dim}"
            )
        shifted = np.array([ord(character) for character in text]).reshape(horizon, action_dim)
        return cosines(horizon).T @ ((shifted + self.min_token) / self.scale)

    def save(self, folder: str | Path) -> None:
        """Write a folder of the published layout; each file atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "action_dim": self.action_dim,
            "min_token": self.min_token,
            "processor_class": "UniversalActionProcessor",
            "scale": self.scale,
            "time_horizon": self.horizon,
            "vocab_size": self.vocab_size,
        }
        plain = {
            "clean_up_tokenization_spaces": False,
            "processor_class": "UniversalActionProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        _write(folder / MODEL, self.bpe)
        _write(folder / TRANSFORMERS, json.dumps(plain, indent=2) + "\n")
        _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        return _library().Tokenizer.from_str(self.bpe)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}


@lru_cache(maxsize=16)
def cosines(steps: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II) [frequency, step]; its inverse is its transpose."""
    step, frequency = np.arange(steps), np.arange(steps)[:, None]
    matrix = np.cos(np.pi * frequency * (2 * step + 1) / (2 * steps)) * np.sqrt(2 / steps)
    matrix[0] *= np.sqrt(0.5)
    matrix.setflags(write=False)
    return matrix


def _coefficients(actions: np.ndarray, scale: float) -> np.ndarray:
    """Scaled, rounded coefficients int64 [frequency action_dim] of [horizon action_dim]."""
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 2 or not actions.size:
        raise ValueError(f"expected actions [horizon action_dim], got shape {list(actions.shape)}")
    if not np.isfinite(actions).all():
        raise ValueError("actions hold numbers that are not finite")
    return np.rint(cosines(len(actions)) @ actions * scale).astype(np.int64)


def _spell(shifted: np.ndarray) -> str:
    if shifted.max() >= FIRST_SURROGATE:
        raise ValueError(
            f"coefficients span {shifted.max()}, expected less than {FIRST_SURROGATE}: are the "
            "actions normalised?"
        )
    return "".join(map(chr, shifted.flatten().tolist()))


@lru_cache(maxsize=16)
def _warn_once(min_token: int) -> None:
    log.warning(
        "actions have coefficients below %d, the smallest that this FAST tokenizer can spell; they "
        "are raised to it (said once)",
        min_token,
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "the FAST action tokenizer needs the tokenizers library: pip install 'pizero[fast]'"
        ) from error
    return tokenizers


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
