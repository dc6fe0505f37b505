"""scripts/generate_text.py on a small PaliGemma as transformers saves it, and its refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import randomise, small_policy
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.paligemma import PaliGemmaConfig

from pizero.agent.speak import load_speaker, main
from pizero.agent.weights.load import load_model
from pizero.data import Tokenizer, train_tokenizer

VOCAB, PICTURE = 320, 319


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as on the Hub, with random weights."""
    folder = tmp_path_factory.mktemp("paligemma")
    config = PaliGemmaConfig(
        text_config=dict(
            model_type="gemma", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1, head_dim=8, vocab_size=VOCAB,
            pad_token_id=0, eos_token_id=1, bos_token_id=2,
        ),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=12, intermediate_size=20,
            num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
            vision_use_head=False,
        ),
        projection_dim=16, image_token_id=PICTURE,
    )  # fmt: skip
    model = randomise(PaliGemmaForConditionalGeneration(config), seed=6)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder)
    words = ["what is red", "open the drawer", "a cup on a table", "caption en"]
    train_tokenizer(words, folder / "tokenizer.model", vocab_size=VOCAB - 1)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ask(folder: Path, picture: Path, *more: str) -> None:
    words = ["--weights", str(folder), "--image", str(picture), "--prompt", "caption en"]
    main([*words, "--device", "cpu", *more])


def test_it_says_what_transformers_says(folder, picture, capsys):
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = Tokenizer(folder / "tokenizer.model")
    pixels = torch.from_numpy(np.array(Image.open(picture)))
    ids = torch.tensor([[PICTURE] * 4 + [2, *tokenizer.encode("caption en\n")]])
    said = theirs.generate(
        input_ids=ids, pixel_values=(pixels.permute(2, 0, 1) / 127.5 - 1)[None],
        attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids),
        max_new_tokens=12, do_sample=False,
    )  # fmt: skip
    expected = said[0, ids.shape[1] :].tolist()
    assert len(set(expected)) > 3
    capsys.readouterr()
    ask(folder, picture, "--max-new-tokens", "12")
    printed = capsys.readouterr()
    size = tokenizer.vocab_size  # the model is a little larger
    words = [tokenizer.decode([i]) if i < size else f"<{i}>" for i in expected]
    assert printed.out == "".join(words) + "\n"
    assert printed.err == ("" if 1 in expected else "(cut off at 12 tokens)\n")


def test_draws_follow_the_seed(folder, picture, capsys):
    said = []
    for seed in "112":
        ask(folder, picture, "--temperature", "2", "--seed", seed, "--max-new-tokens", "20")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_pictures_of_any_size_and_number(folder):
    speaker = load_speaker(folder, device="cpu")
    large = np.zeros((30, 50, 3), np.uint8)
    text, _ = speaker.say(images=[large, large], prompt="what is red", max_new_tokens=3)
    assert isinstance(text, str)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        speaker.say(images=[], prompt="", max_new_tokens=3)


def test_refusals(folder, picture, tmp_path, monkeypatch):
    monkeypatch.delenv("PIZERO_TOKENIZER", raising=False)

    def refuses(message: str, *more: str, weights: Path = folder, image: Path = picture) -> None:
        with pytest.raises(SystemExit, match=message):
            ask(weights, image, *more)

    refuses(r"error: no weights at .*nowhere", weights=tmp_path / "nowhere")
    refuses(r"error: no picture at .*nowhere\.png", image=tmp_path / "nowhere.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    refuses(r"error: .*broken\.png: expected a JPEG or PNG", image=broken)
    refuses(r"error: no tokenizer at .*words\.model", "--tokenizer", str(tmp_path / "words.model"))
    refuses(r"error: max_new_tokens must be at least 1, got 0", "--max-new-tokens", "0")
    refuses(r"error: temperature must not be negative", "--temperature", "-1")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("model.safetensors", "config.json"):
        (alone / name).symlink_to(folder / name)
    refuses(r"comes without a tokenizer: give --tokenizer", weights=alone)
    words = [
        f"{a}{b} {b}{a}" * 2 for a in ("ab", "cd", "ef", "gh") for b in ("kl", "mn", "op", "qr")
    ]
    large = train_tokenizer(words, tmp_path / "large.model", vocab_size=400)
    refuses(rf"has \d+ pieces, but the model of .* knows {VOCAB}", "--tokenizer", str(large))


def test_a_flow_policy_speaks_no_words(folder, tmp_path, monkeypatch):
    policy = small_policy("toy")
    real = load_model(folder)
    monkeypatch.setattr(
        "pizero.agent.speak.load_model",
        lambda *_, **__: type(real)(policy, real.report, real.found),
    )
    with pytest.raises(ValueError, match=r"speaks no words: expected a PaliGemma"):
        load_speaker(folder)
