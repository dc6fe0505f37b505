"""Text to tokens with SentencePiece, and the prompt formats of the pi0 family.

Any SentencePiece file with Gemma's special tokens works: the PaliGemma one, or a small one trained
on a few sentences with `train_tokenizer`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from pizero.data.normalize import expect_one_of

PAD, EOS, BOS, UNK = 0, 1, 2, 3
PROMPTS = ("pi0", "pi05", "open_pi_zero", "lerobot_pi0", "lerobot_pi05", "giga_pi05")
WITH_STATE = ("pi05", "lerobot_pi05", "giga_pi05")  # their prompts hold the normalised state


class Tokenizer:
    """A SentencePiece model in memory; pickles as its bytes."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"no tokenizer at {path}: expected a SentencePiece model, such as PaliGemma's or "
                "one made by train_tokenizer"
            )
        self.model = path.read_bytes()
        if self._processor.bos_id() != BOS or self._processor.eos_id() != EOS:
            raise ValueError(
                f"{path}: expected Gemma's special tokens (BOS {BOS}, EOS {EOS}), got BOS "
                f"{self._processor.bos_id()}, EOS {self._processor.eos_id()}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces; token ids are below it."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it is, without BOS or EOS."""
        return self._processor.encode(text, out_type=int)

    def decode(self, tokens: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; special tokens vanish."""
        return self._processor.decode([int(t) for t in tokens])

    def prompt(self, text: str, *, format: str, state: np.ndarray | None = None) -> list[int]:
        """Token ids of an instruction as the policy reads it.

        pi0           BOS text newline
        pi05          BOS `Task: text, State: 128 7;` newline `Action: `, with the normalised state
        open_pi_zero  BOS text newline, the text as it was given
        lerobot_pi0   BOS text newline, the text as it was given, no newline after another
        lerobot_pi05  pi05 with a state [d] that is padded to the model's width, as LeRobot had it
                      before 0.5
        giga_pi05     pi05, but what lies on the edge of two bins is in the lower one

        `pi0` and `pi05` tidy the text up first (`clean`).
        """
        expect_one_of("the prompt format", format, PROMPTS)
        if format in WITH_STATE:
            if state is None:
                raise ValueError(
                    f"the {format} prompt holds the state; expected state [d], got None"
                )
            bins = state_bins(state, lower=format == "giga_pi05")
            bins = " ".join(map(str, bins.tolist()))
            return [BOS, *self.encode(f"Task: {clean(text)}, State: {bins};\nAction: ")]
        if format == "pi0":
            return [BOS, *self.encode(clean(text)), *self.encode("\n")]
        if format == "lerobot_pi0" and text.endswith("\n"):
            return [BOS, *self.encode(text)]
        return [BOS, *self.encode(text + "\n")]  # one string: pieces may span several newlines

    def save(self, path: str | Path) -> None:
        """Write the model file atomically."""
        _write(Path(path), self.model)

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __getstate__(self) -> dict[str, bytes]:
        return {"model": self.model}


def clean(text: str) -> str:
    """An instruction as PaliGemma-style prompts spell it: stripped, `_` and newlines as spaces."""
    return text.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: np.ndarray, *, lower: bool = False) -> np.ndarray:
    """int64 [d]: which of 256 bins over [-1, 1] holds each entry; below -1 gives -1, as openpi.

    An edge belongs to the bin above it; with `lower`, as giga-models has it, to the one below.
    """
    return np.digitize(state, np.linspace(-1, 1, 257)[:-1], right=lower) - 1


def train_tokenizer(sentences: Iterable[str], path: str | Path, *, vocab_size: int = 512) -> Path:
    """Train a small tokenizer that spells like Gemma's: byte fallback, Gemma's special tokens.

    `vocab_size` is an upper bound; few sentences need few pieces. Unseen words fall apart into
    bytes, so any text can be encoded.
    """
    sentences = sorted({clean(s) for s in sentences} - {""})
    if not sentences:
        raise ValueError("expected at least one sentence to train a tokenizer on, got none")
    if vocab_size < 300:
        raise ValueError(f"expected vocab_size >= 300 (256 bytes and specials), got {vocab_size}")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=stream,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    _write(Path(path), stream.getvalue())
    return Path(path)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
