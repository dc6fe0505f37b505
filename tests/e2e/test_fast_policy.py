"""pi0-FAST from data to robot: a tiny one learns a few chunks by heart and says them again;
published weights become a policy that says what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SMALL, compose_model, randomise, set_sizes
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.paligemma import PaliGemmaConfig

import pizero
from pizero.agent.config import build
from pizero.agent.weights.command import main as convert
from pizero.data import FastTokenizer, PolicyPipeline, UndecodableActions, train_tokenizer
from pizero.model.paligemma import Generated

HORIZON, DIMS, ROOM = 6, 2, 760


def test_it_learns_to_spell_its_actions(tmp_path):
    rng = np.random.default_rng(0)
    chunks = np.cumsum(rng.uniform(-0.2, 0.2, (200, HORIZON, DIMS)), axis=1)
    FastTokenizer.fit(chunks, vocab_size=320).save(tmp_path / "fast")
    texts = ["push the button", "open the drawer", "close the door"]
    ranges = {"q01": [-1.0, -1.0], "q99": [1.0, 1.0], "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    pipeline = PolicyPipeline(
        cameras=["corner"], image_size=[8, 8], max_tokens=100, prompt="fast",
        tokenizer=train_tokenizer(texts, tmp_path / "words.model", vocab_size=300),
        action_tokenizer=tmp_path / "fast", vocab_size=ROOM,
        statistics={"norm_stats": {"state": ranges, "actions": ranges}},
        normalization={"state": "quantile", "action": "quantile"},
        horizon=HORIZON, action_dim=DIMS, state_dim=None, trim_tokens=True,
    )  # fmt: skip
    samples = [
        {
            "images": {"corner": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)},
            "text": text, "state": rng.uniform(-1, 1, 2), "actions": chunk,
            "action_is_pad": np.zeros(HORIZON, bool),
        }
        for text, chunk in zip(texts, chunks, strict=False)
    ]  # fmt: skip
    batch = pipeline.collate([pipeline.encode(s) for s in samples], [0, 1, 2])

    torch.manual_seed(0)
    sizes = {n: SMALL[n] for n in ("vision", "joint.mixtures.vlm")}
    sizes["joint.mixtures.vlm"] = {**sizes["joint.mixtures.vlm"], "width": 48, "mlp_dim": 96}
    sizes[None] = dict(vocab_size=ROOM, horizon=HORIZON, action_dim=DIMS)
    # Decoding as it was trained: openpi's gap is for openpi's weights.
    model = build(compose_model("pi0_fast", *set_sizes(sizes), "model.decode_gap=0"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        loss = model(batch.observation).mean()
        if step == 0:
            first = loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.02 < 2 < first

    asked = [
        pipeline.observation(images=s["images"], text=s["text"], state=s["state"]) for s in samples
    ]
    said = model.eval().decode(pipeline.collate_observations(asked), max_new_tokens=60)
    for sample, tokens in zip(samples, said.tokens, strict=True):
        actions = pipeline.decode_actions(pipeline.read_answer(tokens))
        assert (
            np.linalg.norm(actions - sample["actions"], axis=0).max() < 0.05 * HORIZON**0.5 + 1e-5
        )


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """What published weights come without: words, statistics, and a FAST tokenizer."""
    root = tmp_path_factory.mktemp("given")
    chunks = np.random.default_rng(0).uniform(-1, 1, (40, 5, 4))
    FastTokenizer.fit(chunks, vocab_size=280).save(root / "fast")
    # As in PaliGemma, action tokens take the place of words nobody says, here made of bdfghj.
    rng = np.random.default_rng(0)
    nonsense = ["".join(rng.choice(list("bdfghj"), 8)) for _ in range(3000)]
    train_tokenizer(nonsense, root / "words.model", vocab_size=740)
    ranges = {k: [v] * 4 for k, v in (("q01", -2.0), ("q99", 2.0), ("mean", 0.0), ("std", 1.0))}
    statistics = {"norm_stats": {"state": ranges, "actions": ranges}}
    (root / "stats.json").write_text(json.dumps(statistics))
    return {
        "tokenizer": str(root / "words.model"),
        "action_tokenizer": str(root / "fast"),
        "statistics": str(root / "stats.json"),
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A PaliGemma with random weights, as published: pi0-FAST has the same tensors."""
    folder = tmp_path_factory.mktemp("weights")
    config = PaliGemmaConfig(
        text_config=dict(
            model_type="gemma", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1, head_dim=8, vocab_size=ROOM,
        ),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=12, intermediate_size=20,
            num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
            vision_use_head=False,
        ),
        projection_dim=16, image_token_id=ROOM - 1,
    )  # fmt: skip
    randomise(PaliGemmaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def seen(dims: int = 4) -> dict:
    picture = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    images = {"base_0_rgb": picture, "base_1_rgb": None, "wrist_0_rgb": picture}
    return {"images": images, "text": "open the drawer", "state": np.linspace(-1, 1, dims)}


def says(policy: pizero.agent.policy.Policy, actions: np.ndarray, monkeypatch) -> None:
    """Let the model give an answer that spells these normalised actions."""
    tokens = torch.tensor([policy.pipeline.fast.answer(actions)])

    def decode(observation, *, max_new_tokens):
        assert max_new_tokens == 256
        assert observation.token_causal is None
        assert observation.image_mask is None  # a camera that lacks is black, not masked
        ended = torch.ones(len(tokens), dtype=torch.bool)
        return Generated(tokens, torch.tensor([tokens.shape[1]]), ended, None)

    monkeypatch.setattr(policy.model, "decode", decode)


def test_published_weights_become_a_policy(weights, given, tmp_path, monkeypatch):
    words = dict(given, kind="pi0_fast", overrides={"horizon": 5, "action_dim": 4}, device="cpu")
    policy = pizero.load_policy(weights, **words)
    with pytest.raises(UndecodableActions, match="the answer lacks 'Action: '"):
        policy.act(**seen())
    actions = np.random.default_rng(2).uniform(-1, 1, (5, 4))
    says(policy, actions, monkeypatch)
    chunk = policy.act(**seen())
    assert chunk.shape == (5, 4)
    # The statistics stretch [-1, 1] to [-2, 2].
    assert np.linalg.norm(chunk / 2 - actions, axis=0).max() < 0.05 * 5**0.5 + 1e-5

    own = tmp_path / "own"
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in given.items()]
    sizes = ["--set", "horizon=5", "action_dim=4"]
    convert([str(weights), str(own), "--kind=pi0_fast", *flags, *sizes])
    assert {"processor_config.json", "tokenizer.json"} <= {p.name for p in own.iterdir()}
    assert "tokenizer.json" in json.loads((own / "metadata.json").read_text())["files"]
    again = pizero.load_policy(own, device="cpu")
    with pytest.raises(UndecodableActions, match="the answer lacks 'Action: '"):
        again.act(**seen())
    says(again, actions, monkeypatch)
    np.testing.assert_array_equal(again.act(**seen()), chunk)


def test_what_is_missing_is_said(weights, given, monkeypatch):
    monkeypatch.delenv("PIZERO_FAST_TOKENIZER", raising=False)
    rest = {name: path for name, path in given.items() if name != "action_tokenizer"}
    with pytest.raises(
        ValueError, match=r"spells its actions: give action_tokenizer=.*, the folder"
    ):
        pizero.load_policy(weights, **rest, kind="pi0_fast", device="cpu")
