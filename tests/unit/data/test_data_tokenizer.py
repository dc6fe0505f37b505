"""Prompts, and the trained tokenizer against SentencePiece itself."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece

from pizero.data import Tokenizer, train_tokenizer
from pizero.data.tokenizer import BOS, EOS, PAD, UNK

FIXTURES = Path(__file__).parents[2] / "data" / "fixtures"
ZERO = json.loads((FIXTURES / "open_pi_zero_transforms" / "case.json").read_text())["facts"]


def test_prompts_that_take_the_text_as_it_is(tokenizer):
    """open-pi-zero: BOS, text, newline in one string; LeRobot adds the newline where it lacks."""
    published = ZERO["prompt"]["example"].removeprefix("<image>" * 3)
    text = published.removeprefix("<bos>").removesuffix("\n")
    assert text == "Put the carrot, on_Plate"
    expected = [BOS, *tokenizer.encode(text + "\n")]
    assert tokenizer.prompt(text, format="open_pi_zero") == expected
    assert tokenizer.prompt(text, format="lerobot_pi0") == expected
    assert tokenizer.prompt(text + "\n", format="lerobot_pi0") == expected
    twice = tokenizer.prompt(text + "\n", format="open_pi_zero")
    assert tokenizer.decode(twice) == text + "\n\n"
    assert tokenizer.decode(tokenizer.prompt("  a_b ", format="lerobot_pi0")) == "  a_b \n"


def test_special_tokens_are_gemmas(assets, tokenizer):
    processor = sentencepiece.SentencePieceProcessor(str(assets / "tokenizer.model"))
    ids = (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id())
    assert ids == (PAD, EOS, BOS, UNK) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == processor.vocab_size()
    text = "do task 1, then_ ünseen 猫\nand 42"
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert UNK not in tokenizer.encode(text)
    assert len(tokenizer.encode("\n")) == 1


def test_training_is_deterministic_and_known_words_are_short(tmp_path):
    sentences = ["open the drawer", "close the drawer", "turn the faucet left"]
    one = train_tokenizer(sentences, tmp_path / "one.model", vocab_size=400)
    two = train_tokenizer(sentences[::-1] * 2, tmp_path / "two.model", vocab_size=400)
    assert one.read_bytes() == two.read_bytes()
    tokens = Tokenizer(one).prompt(" open_the drawer\n", format="pi0")
    assert len(tokens) == 5  # BOS, three words, newline


def test_pickles_and_saves_itself(tokenizer, tmp_path):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("do task 1") == tokenizer.encode("do task 1")
    tokenizer.save(tmp_path / "copy.model")
    assert Tokenizer(tmp_path / "copy.model").model == tokenizer.model


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*none.model: expected a SentencePiece"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(
        ValueError, match=r"prompt format to be one of pi0, .*got 'pi1'; did you mean 'pi0'"
    ):
        tokenizer.prompt("x", format="pi1")
    with pytest.raises(ValueError, match=r"the pi05 prompt holds the state; .* got None"):
        tokenizer.prompt("x", format="pi05")
    with pytest.raises(ValueError, match="at least one sentence"):
        train_tokenizer([" ", ""], tmp_path / "t.model")
    with pytest.raises(ValueError, match="expected vocab_size >= 300"):
        train_tokenizer(["a"], tmp_path / "t.model", vocab_size=100)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn"]),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"Gemma's special tokens \(BOS 2, EOS 1\), got BOS 1"):
        Tokenizer(tmp_path / "plain.model")
