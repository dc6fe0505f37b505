"""pi0-FAST's questions and answers: openpi's strings, masks, ids, and answers that say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pizero.data import Tokenizer
from pizero.data.fast_prompt import FastPrompt
from pizero.data.fast_tokenizer import FastTokenizer, UndecodableActions

CASE = Path(__file__).parents[2] / "data" / "fixtures" / "openpi_transforms" / "case.json"
STORED = json.loads(CASE.read_text())["facts"]["fast_prompt"]


class Letters:
    """A tokenizer with a token for each letter, which remembers what it was given."""

    vocab_size = 257152

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.seen.append(text)
        return [ord(c) for c in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(t) for t in tokens)


class Fixed:
    """Actions whose tokens are known."""

    vocab_size = 2048

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def encode(self, actions: np.ndarray) -> list[int]:
        return self.ids


@pytest.mark.parametrize("case", STORED["cases"], ids=["training", "acting"])
def test_openpis_strings_and_masks(case):
    letters, mapping = Letters(), STORED["action_token_mapping"]
    prompt = FastPrompt(tokenizer=letters, actions=Fixed(mapping["fast_ids"]))
    assert letters.seen == ["Action: ", "|"]
    actions = np.zeros((1, 1)) if case["with_actions"] else None
    encoded = prompt.encode(case["prompt"], np.array(case["state"]), actions)
    question, *framing = case["encode_calls"]
    assert letters.seen[2:] == [question["text"]]
    tokens = encoded["tokens"].tolist()
    expected = [2, *map(ord, question["text"])]
    if case["with_actions"]:
        assert [c["text"] for c in framing] == ["Action: ", "|"]
        expected += [*map(ord, "Action: "), *mapping["paligemma_ids"], ord("|"), 1]
    assert tokens == expected
    assert len(tokens) == case["total_length"]
    for mask, ones in (("token_causal", case["ar_ones"]), ("token_loss", case["loss_ones"])):
        assert encoded[mask].sum() == ones
        first = int(encoded[mask].argmax()) if ones else None
        assert first == case["first_ar_one"]


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
