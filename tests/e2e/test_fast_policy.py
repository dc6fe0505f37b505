"""pi0-FAST from data to robot: a tiny one learns a few chunks by heart and says them again."""

from __future__ import annotations

import numpy as np
import torch
from small_models import SMALL, compose_model, set_sizes

from pizero.agent.config import build
from pizero.data import FastTokenizer, PolicyPipeline, train_tokenizer

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
