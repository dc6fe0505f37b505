"""pi0-FAST's answers, read back, and those that say nothing; openpi's strings: tests/parity."""

from __future__ import annotations

import numpy as np
import pytest

from pizero.data import Tokenizer
from pizero.data.fast_prompt import FastPrompt
from pizero.data.fast_tokenizer import FastTokenizer, UndecodableActions


@pytest.fixture(scope="module")
def fitted() -> FastTokenizer:
    rng = np.random.default_rng(0)
    return FastTokenizer.fit(rng.uniform(-1, 1, (50, 4, 2)), vocab_size=300)


@pytest.fixture
def prompt(tokenizer: Tokenizer, fitted: FastTokenizer) -> FastPrompt:
    return FastPrompt(tokenizer=tokenizer, actions=fitted, vocab_size=1024)


def test_an_answer_is_read_back(prompt, tokenizer, fitted):
    actions = np.random.default_rng(1).uniform(-0.5, 0.5, (4, 2))
    answer = prompt.answer(actions)
    assert max(answer) < 1024 - 128
    expected = fitted.decode(fitted.encode(actions), horizon=4, action_dim=2)
    for generated in (
        answer,
        [*answer, 0, 0],
        [*tokenizer.encode("well, "), *answer, 77],
        answer[:-2],
    ):
        read = prompt.read(np.array(generated), horizon=4, action_dim=2)
        assert np.array_equal(read, expected)


def test_answers_that_hold_no_actions(prompt, tokenizer):
    answer = prompt.answer(np.zeros((4, 2)))
    opening = tokenizer.encode("Action: ")
    shape = dict(horizon=4, action_dim=2)
    with pytest.raises(UndecodableActions, match=r"the answer lacks 'Action: ': 'no idea'"):
        prompt.read([*tokenizer.encode("no idea"), 1], **shape)
    with pytest.raises(UndecodableActions, match="the answer lacks"):
        prompt.read([1, *answer], **shape)
    with pytest.raises(UndecodableActions, match=r"1 words among .* action tokens, .* id 5"):
        prompt.read([*opening, 5, *answer[len(opening) :]], **shape)
    with pytest.raises(UndecodableActions, match=r"expected 5 x 2 = 10"):
        prompt.read(answer, horizon=5, action_dim=2)
    with pytest.raises(UndecodableActions, match="0 FAST tokens"):
        prompt.read(opening, **shape)


def test_action_tokens_need_room(tokenizer, fitted):
    needed = tokenizer.vocab_size + fitted.vocab_size + 128
    for size in (None, needed - 300, 300):
        with pytest.raises(ValueError, match=rf"expected a model with vocab_size >= {needed}"):
            FastPrompt(tokenizer=tokenizer, actions=fitted, vocab_size=size)
    FastPrompt(tokenizer=tokenizer, actions=fitted, vocab_size=needed)
