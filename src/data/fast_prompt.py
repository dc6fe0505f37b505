"""pi0-FAST's text: a question that holds instruction and state, an answer that holds the actions.

    BOS `Task: open the drawer, State: 128 7;` newline   |   `Action: ` action tokens `|` EOS
    seen whole, given                                        causal, to be learnt

Action tokens take the place of words at the end of the model's vocabulary, before its last 128.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pizero.data.fast_tokenizer import FastTokenizer, UndecodableActions
from pizero.data.tokenizer import BOS, EOS, Tokenizer, state_bins

FAST = "fast"  # the pipeline's name for this prompt
CAUSAL, LOSS = "token_causal", "token_loss"
OPENING, CLOSING = "Action: ", "|"


class FastPrompt:
    """Writes questions and answers, and reads answers.

    tokenizer    words
    actions      action chunks
    vocab_size   size of the model's vocabulary, which action tokens count from the end of; None:
                 the tokenizer's own, as PaliGemma's
    skip         tokens at the very end that are left alone: PaliGemma's, for segmentation

    Raises ValueError when action tokens would take the place of those that the answer is framed by.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        actions: FastTokenizer,
        vocab_size: int | None = None,
        skip: int = 128,
    ) -> None:
        self.tokenizer, self.actions = tokenizer, actions
        self._opening = tokenizer.encode(OPENING)
        self._closing = tokenizer.encode(CLOSING)
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.vocab_size = size
        self._top = size - 1 - skip
        lowest = self._top - actions.vocab_size + 1
        framing = [i for i in (*self._opening, *self._closing, EOS) if lowest <= i <= self._top]
        if lowest < 0 or framing:
            needed = tokenizer.vocab_size + actions.vocab_size + skip
            raise ValueError(
                f"{actions.vocab_size} action tokens end at id {self._top} of a vocabulary of "
                f"{size}, where they meet the words around them; expected a model with vocab_size "
                f">= {needed}"
            )

    def question(self, text: str, state: np.ndarray) -> list[int]:
        """Token ids of an instruction and the normalised, unpadded state [d]."""
        bins = " ".join(map(str, state_bins(state).tolist()))
        return [BOS, *self.tokenizer.encode(f"Task: {_tidy(text)}, State: {bins};\n")]

    def answer(self, actions: np.ndarray) -> list[int]:
        """Token ids of normalised actions [horizon action_dim]."""
        ids = [self._top - i for i in self.actions.encode(actions)]
        return [*self._opening, *ids, *self._closing, EOS]

    def encode(
        self, text: str, state: np.ndarray, actions: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """tokens int64 [n], and bool [n] token_causal and token_loss, which mark the answer."""
        return mark(self.question(text, state), [] if actions is None else self.answer(actions))

    def read(
        self, tokens: Sequence[int] | np.ndarray, *, horizon: int, action_dim: int
    ) -> np.ndarray:
        """Normalised actions float64 [horizon action_dim] of a generated answer.

        Raises UndecodableActions when it holds none: they are never made up.
        """
        ids = [int(i) for i in tokens]
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        start = _find(self._opening, ids)
        if start is None:
            said = self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])
            raise UndecodableActions(f"the answer lacks {OPENING!r}: {said[:80]!r}")
        ids = ids[start + len(self._opening) :]
        ids = ids[: _find(self._closing, ids)]
        words = [i for i in ids if not 0 <= self._top - i < self.actions.vocab_size]
        if words:
            raise UndecodableActions(
                f"the answer has {len(words)} words among {len(ids)} action tokens, the first of "
                f"them id {words[0]}"
            )
        return self.actions.decode(
            [self._top - i for i in ids], horizon=horizon, action_dim=action_dim
        )


def mark(question: Sequence[int] | np.ndarray, answer: Sequence[int]) -> dict[str, np.ndarray]:
    """tokens int64 [n], and bool [n] token_causal and token_loss: True at the answer."""
    answered = np.arange(len(question) + len(answer)) >= len(question)
    tokens = np.array([*question, *answer], np.int64)
    return {"tokens": tokens, CAUSAL: answered, LOSS: answered.copy()}


def sentences(texts: Iterable[str]) -> list[str]:
    """What a tokenizer of one's own has to spell: these instructions as questions, and answers."""
    questions = [f"Task: {_tidy(text)}, State: 0 1 2 3 4 5 6 7 8 9;" for text in texts]
    return [*questions, f"{OPENING}{CLOSING}"]


def _tidy(text: str) -> str:
    return text.lower().strip().replace("_", " ")


def _find(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Where a part first occurs."""
    part, size = list(part), len(part)
    return next(
        (i for i in range(len(whole) - size + 1) if list(whole[i : i + size]) == part), None
    )
