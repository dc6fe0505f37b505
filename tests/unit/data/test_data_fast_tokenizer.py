"""FAST's tokens: there and back, against scipy and transformers, from files, and refusals."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pizero.data.fast_tokenizer import FastTokenizer, UndecodableActions, cosines

CHECKS = settings(max_examples=50, deadline=None, derandomize=True)


def smooth(count: int, horizon: int = 8, dims: int = 3, seed: int = 0) -> np.ndarray:
    """Chunks like a robot's: slow courses with little noise, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    start, slope = rng.uniform(-0.7, 0.7, (2, count, 1, dims))
    time = np.linspace(0, 1, horizon)[None, :, None]
    noise = 0.02 * rng.standard_normal((count, horizon, dims))
    return np.clip(start + 0.4 * slope * time + noise, -1, 1)


@pytest.fixture(scope="module")
def fitted() -> FastTokenizer:
    # With wild chunks among them, so that the range is wide enough for any chunk in [-1, 1].
    wild = np.random.default_rng(1).choice([-1.0, 1.0], (40, 8, 3))
    edge = np.broadcast_to(np.array([-1.0, 1.0])[:, None, None], (2, 8, 3))
    return FastTokenizer.fit([*smooth(300), *wild, *edge], vocab_size=512)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the published code writes one, and the words of its tokenizer."""
    chunks = [*smooth(200), *np.random.default_rng(1).uniform(-1, 1, (50, 8, 3))]
    rounded = [np.around(scipy.fft.dct(c, axis=0, norm="ortho") * 10).astype(int) for c in chunks]
    low, high = min(c.min() for c in rounded), max(c.max() for c in rounded)
    bpe = ByteLevelBPETokenizer()
    trainer = BpeTrainer(
        vocab_size=400, min_frequency=2, show_progress=False, special_tokens=[],
        initial_alphabet=[chr(i) for i in range(high - low + 1)], max_token_length=10000,
    )  # fmt: skip
    texts = ["".join(map(chr, (c - low).flatten())) for c in rounded]
    bpe._tokenizer.train_from_iterator(texts, trainer=trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    folder = tmp_path_factory.mktemp("published")
    words.save_pretrained(folder)
    config = {
        "action_dim": None, "auto_map": {"AutoProcessor": "processing.Universal"},
        "min_token": int(low), "processor_class": "UniversalActionProcessor", "scale": 10,
        "time_horizon": None, "vocab_size": 400,
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder, words, int(low)


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_the_cosine_transform_is_scipys(steps):
    x = np.random.default_rng(0).standard_normal((steps, 5))
    expected = scipy.fft.dct(x, axis=0, norm="ortho")
    np.testing.assert_allclose(cosines(steps) @ x, expected, atol=1e-12)
    np.testing.assert_allclose(cosines(steps).T @ expected, x, atol=1e-12)


@given(st.integers(0, 10**6), st.booleans())
@CHECKS
def test_decoding_undoes_encoding_up_to_rounding(fitted, seed, wild):
    rng = np.random.default_rng(seed)
    actions = rng.choice([-1.0, 1.0], (8, 3)) if wild else smooth(1, seed=seed)[0]
    actions[:, 0] = rng.uniform(-1, 1)  # one that stands still
    ids = fitted.encode(actions)
    assert all(0 <= i < fitted.vocab_size for i in ids)
    decoded = fitted.decode(ids, horizon=8, action_dim=3)
    # Rounding moves a coefficient by up to 0.05, and the transform keeps lengths.
    assert np.linalg.norm(decoded - actions, axis=0).max() <= 0.05 * np.sqrt(8) + 1e-9
    assert fitted.encode(decoded) == ids


def test_tokens_are_fewer_than_numbers(fitted):
    lengths = [len(fitted.encode(chunk)) for chunk in smooth(50, seed=9)]
    assert np.mean(lengths) < 0.7 * 8 * 3


def test_the_published_files_give_the_published_ids(published):
    folder, words, low = published
    ours = FastTokenizer.load(folder)
    assert (ours.scale, ours.min_token, ours.vocab_size) == (10.0, low, len(words))
    for chunk in smooth(30, seed=3):
        coefficients = np.around(scipy.fft.dct(chunk, axis=0, norm="ortho") * 10)
        text = "".join(map(chr, np.maximum(coefficients.flatten() - low, 0).astype(int)))
        ids = words(text)["input_ids"]
        assert ours.encode(chunk) == ids
        back = np.array([ord(c) for c in words.decode(ids)]).reshape(8, 3) + low
        expected = scipy.fft.idct(back / 10, axis=0, norm="ortho")
        decoded = ours.decode(ids, horizon=8, action_dim=3)
        np.testing.assert_allclose(decoded, expected, atol=1e-12)


def test_saved_files_are_read_by_us_and_by_transformers(fitted, tmp_path):
    fitted.save(tmp_path / "fast")
    again = FastTokenizer.load(tmp_path / "fast")
    assert again == fitted
    assert sorted(p.name for p in (tmp_path / "fast").iterdir()) == [
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "fast")
    chunk = smooth(1, seed=5)[0]
    coefficients = np.around(scipy.fft.dct(chunk, axis=0, norm="ortho") * 10).astype(int)
    text = "".join(map(chr, coefficients.flatten() - fitted.min_token))
    assert words(text)["input_ids"] == again.encode(chunk)
    assert words.decode(again.encode(chunk)) == text


def test_fitting_is_reproducible_and_pickles():
    chunks = smooth(60)
    first = FastTokenizer.fit(chunks, vocab_size=300, horizon=8, action_dim=3)
    assert FastTokenizer.fit(chunks, vocab_size=300, horizon=8, action_dim=3) == first
    ids = first.encode(chunks[0])
    copy = pickle.loads(pickle.dumps(first))
    assert copy.encode(chunks[0]) == ids
    assert np.array_equal(copy.decode(ids), first.decode(ids))


def test_what_is_undecodable_is_said(fitted):
    ids = fitted.encode(smooth(1)[0])
    shape = dict(horizon=8, action_dim=3)
    with pytest.raises(UndecodableActions, match=r"spell 24 coefficients, expected 9 x 3 = 27"):
        fitted.decode(ids, horizon=9, action_dim=3)
    with pytest.raises(UndecodableActions, match=r"0 FAST tokens spell 0 coefficients"):
        fitted.decode([], **shape)
    with pytest.raises(UndecodableActions, match=r"512 is no FAST token: .* from 0 to 511"):
        fitted.decode([*ids, 512], **shape)
    with pytest.raises(ValueError, match=r"expected horizon and action_dim, got None and None"):
        fitted.decode(ids)
    # The token of a byte that begins no character.
    vocabulary = json.loads(fitted.bpe)["model"]["vocab"]
    lone = vocabulary["ÿ"]
    with pytest.raises(UndecodableActions, match=r"24 FAST tokens spell bytes"):
        fitted.decode([lone] * 24, **shape)


def test_what_cannot_be_spelt_is_refused(fitted, published, caplog):
    with pytest.raises(
        ValueError, match=r"expected actions \[horizon action_dim\], got shape \[3\]"
    ):
        fitted.encode(np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        fitted.encode(np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match=r"less than 55296: are the actions normalised\?"):
        fitted.encode(np.full((8, 3), 1e5))
    # A published vocabulary holds the bytes that its data had, and drops others without a word.
    with pytest.raises(ValueError, match=r"has no tokens for these actions.*are they normalised"):
        FastTokenizer.load(published[0]).encode(np.full((8, 3), 500.0))
    ids = fitted.encode(np.full((8, 3), -3.0))
    lowest = fitted.decode(ids, horizon=8, action_dim=3)
    assert "coefficients below" in caplog.text
    assert lowest.min() >= fitted.min_token / 10
    with pytest.raises(ValueError, match="at least one action chunk"):
        FastTokenizer.fit([])
    with pytest.raises(ValueError, match=r"vocab_size >= 256, one a byte, got 100"):
        FastTokenizer.fit(smooth(2), vocab_size=100)


def test_broken_folders(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"found no processor_config\.json"):
        FastTokenizer.load(tmp_path)
    fitted.save(tmp_path)
    config = tmp_path / "processor_config.json"
    config.write_text('{"scale": 10}')
    with pytest.raises(ValueError, match="expected a number 'min_token'"):
        FastTokenizer.load(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        FastTokenizer.load(tmp_path)
    fitted.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        FastTokenizer.load(tmp_path)


def test_the_library_is_an_extra(fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'pizero\[fast\]'"):
        pickle.loads(pickle.dumps(fitted)).encode(smooth(1)[0])
