"""pi0-FAST through the training workspace: the same promises as for flow policies, and a run that
learns to spell its chunks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pizero
from pizero.agent.config import TrainConfig, build, load_config
from pizero.agent.train import Trainer, TrainWorkspace
from pizero.agent.training.distributed import Ranks, StopSignals
from pizero.agent.training.losses import AnswerLoss, loss_of
from pizero.agent.weights.folder import FAST_FILES, find_checkpoint
from pizero.data import FastTokenizer, RldsDataset, UndecodableActions

REPOSITORY = Path(__file__).parents[2]
QUICK = [
    "threads=1", "steps=2", "batch_size=8", "log_every=1", "checkpoint.every=1",
    "validate.every=2", "validate.frames=16", "validate.batch_size=8", "validate.answers=8",
]  # fmt: skip
CPU = torch.device("cpu")


def options(toy_data: Path, folder: Path, *more: str) -> list[str]:
    return [*QUICK, f"data.path={toy_data}", f"run_dir={folder}", *more]


def configure(toy_data: Path, folder: Path, *more: str) -> TrainConfig:
    return load_config("train_toy_fast", options(toy_data, folder, *more))


def make_trainer(config: TrainConfig) -> Trainer:
    return Trainer(config, ranks=Ranks(rank=0, world_size=1, device=CPU), signals=StopSignals())


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


@pytest.fixture(scope="module")
def finished(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, left alone."""
    folder = tmp_path_factory.mktemp("finished")
    TrainWorkspace(configure(toy_data, folder)).run()
    return folder


@pytest.fixture(scope="module")
def learnt(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns three episodes by heart and is asked about them."""
    folder = tmp_path_factory.mktemp("learnt")
    few = "'train[:3]'"
    more = [
        f"data.train.datasets.demonstrations.split={few}", f"data.val.split={few}", "steps=120",
        "batch_size=12", "ema_decay=0.9", "validate.every=60", "validate.frames=24",
        "validate.answers=24", "checkpoint.every=120", "log_every=20",
    ]  # fmt: skip
    TrainWorkspace(configure(toy_data, folder, *more)).run()
    return folder


def test_it_learns_to_spell_its_chunks(learnt: Path) -> None:
    losses = [row["loss"] for row in rows(learnt, "train")]
    assert losses[0] > 5
    assert np.mean(losses[-10:]) < 0.1
    _, last = rows(learnt, "val")
    assert last["loss"] < 0.1
    assert last["undecodable"] < 0.05
    assert last["action_l1"] < 0.05
    assert last["accuracy_0.2"] > 0.85
    assert max(last[f"robot_l1/{i}"] for i in range(4)) < 0.02
    assert "Share of answers that spell no actions" in (learnt / "report.html").read_text()


def test_its_checkpoint_acts(learnt: Path, toy_data: Path) -> None:
    policy = pizero.load_policy(learnt, device="cpu")
    data = RldsDataset(
        path=toy_data, split="train[:3]", horizon=4, action="action",
        cameras={"corner": "observation/corner", "wrist": "observation/wrist"},
        state="observation/state", text="language_instruction",
    )  # fmt: skip
    errors, unread = [], 0
    for i in range(0, len(data), 3):
        sample = data.read(i)
        try:
            chunk = policy.act(
                images=sample["images"], text=sample["text"], state=sample["state"][0]
            )
        except UndecodableActions:
            unread += 1
            continue
        errors.append(np.abs(chunk - sample["actions"])[~sample["action_is_pad"]].mean())
    assert unread <= 1
    assert np.mean(errors) < 0.03


def test_run_folder(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    learnt = {"stats.json", "tokenizer.model", *FAST_FILES}
    assert (
        names == {"checkpoints", "config.yaml", "metrics.jsonl", "report.html", "run.log"} | learnt
    )
    saved = find_checkpoint(finished)
    metadata = json.loads((saved / "metadata.json").read_text())
    assert set(metadata["files"]) == learnt
    for name in learnt:
        assert (saved / name).read_bytes() == (finished / name).read_bytes()


def test_nothing_readable_has_no_error(finished: Path) -> None:
    """After two steps nothing is spelt; half of the frames are decoded, all have a loss."""
    (row,) = rows(finished, "val")
    assert row["undecodable"] == 1
    assert row["accuracy_0.5"] == 0
    assert not {name for name in row if name == "action_l1" or name.startswith("robot_l1")}
    assert 5 < row["loss"] < 8


def test_resumed_run_is_the_same_run(toy_data: Path, tmp_path: Path, finished: Path) -> None:
    # max_minutes=0 stops at the first look, as a signal would.
    for _ in range(3):
        TrainWorkspace(configure(toy_data, tmp_path, "max_minutes=0", "data.workers=1")).run()
    assert "going on from step 1" in (tmp_path / "run.log").read_text()
    for part in ("model.safetensors", "training/weights.safetensors"):
        mine, whole = (load_file(find_checkpoint(f) / part) for f in (tmp_path, finished))
        assert mine.keys() == whole.keys()
        assert [name for name, value in whole.items() if not torch.equal(mine[name], value)] == []
    assert rows(tmp_path, "val") == rows(finished, "val")


def test_any_split_of_the_batch_gives_the_same_run(
    toy_data: Path, tmp_path: Path, finished: Path
) -> None:
    """Passes are as long as their longest answer, and passes of one row need no mask."""
    TrainWorkspace(configure(toy_data, tmp_path, "micro_batch_size=1")).run()
    for mine, whole in zip(rows(tmp_path, "train"), rows(finished, "train"), strict=True):
        assert mine["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_two_ranks_give_the_run_of_one(toy_data: Path, tmp_path: Path, finished: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(REPOSITORY / "scripts" / "run.py")
    done = subprocess.run(
        [
            *torchrun, "--nproc-per-node=2", script, "--config-name=train_toy_fast",
            *options(toy_data, tmp_path, "micro_batch_size=2"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("train", "val"):
        for mine, whole in zip(rows(tmp_path, kind), rows(finished, kind), strict=True):
            assert mine.keys() == whole.keys()
            both = [{k: v for k, v in r.items() if "second" not in k} for r in (mine, whole)]
            assert both[0].pop("kind") == both[1].pop("kind")
            assert both[0] == pytest.approx(both[1], rel=1e-4)


def test_the_loss_is_the_mean_over_rows_with_an_answer(toy_data: Path, tmp_path: Path) -> None:
    """A question that fills max_tokens leaves no room for one."""
    trainer = make_trainer(configure(toy_data, tmp_path))
    batch = next(iter(trainer.loader))
    batch.observation.token_loss[2:] = False
    assert trainer.loss.counted(batch).tolist() == [True, True] + [False] * 6
    assert trainer.loss.entries(batch) == 2
    with torch.no_grad():
        losses = trainer.model(batch.observation)
    loss, _, _ = trainer.step(1, [batch])
    assert loss.item() == pytest.approx(losses[:2].mean().item(), rel=1e-6)


def test_validation_asks_what_a_robot_would(learnt: Path, toy_data: Path) -> None:
    """The question cut out of a training batch is answered as the question alone."""
    policy = pizero.load_policy(learnt, device="cpu")
    data = RldsDataset(
        path=toy_data, split="val", horizon=4, action="action",
        cameras={"corner": "observation/corner", "wrist": "observation/wrist"},
        state="observation/state", text="language_instruction",
    )  # fmt: skip
    samples = [data.read(i) for i in (0, 9, 20)]
    whole = policy.pipeline.collate([policy.pipeline.encode(s) for s in samples], [0, 1, 2])
    asked = policy.observe(
        [{"images": s["images"], "text": s["text"], "state": s["state"][0]} for s in samples]
    )
    cut = policy.model.question(whole.observation)
    assert (asked.token_mask is None) or asked.token_mask.sum() == cut.token_mask.sum()
    assert not (cut.tokens[:, asked.tokens.shape[1] :]).any()
    said = policy.model.decode(cut, max_new_tokens=40).tokens
    assert torch.equal(said, policy.model.decode(asked, max_new_tokens=40).tokens)


def test_given_action_tokens_are_copied(toy_data: Path, tmp_path: Path) -> None:
    given, folder = tmp_path / "given", tmp_path / "run"
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, 4, 4))
    FastTokenizer.fit(chunks, vocab_size=300, scale=5.0).save(given)
    trainer = make_trainer(configure(toy_data, folder, f"pipeline.action_tokenizer={given}"))
    assert trainer.pipeline.fast.actions == FastTokenizer.load(given)
    assert (folder / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()


def test_action_tokens_are_fitted_to_what_is_learnt(toy_data: Path, tmp_path: Path) -> None:
    more = ["action_tokenizer.vocab_size=280", "action_tokenizer.scale=4"]
    trainer = make_trainer(configure(toy_data, tmp_path / "all", *more))
    fast, pipeline = trainer.pipeline.fast.actions, trainer.pipeline
    assert (fast.vocab_size, fast.scale) == (280, 4.0)
    assert (fast.horizon, fast.action_dim) == (4, 4)
    data = build(trainer.config.data.train, path="data").datasets["demonstrations"]
    chunks = [pipeline.encode_actions(data.read(i)) for i in range(len(data))]
    assert fast == FastTokenizer.fit(chunks, vocab_size=280, scale=4.0, horizon=4, action_dim=4)
    few = make_trainer(configure(toy_data, tmp_path / "few", *more, "action_tokenizer.chunks=20"))
    assert few.pipeline.fast.actions == FastTokenizer.fit(
        chunks[::10], vocab_size=280, scale=4.0, horizon=4, action_dim=4
    )


def test_a_sitting_that_was_killed_leaves_no_action_tokens(toy_data: Path, tmp_path: Path) -> None:
    make_trainer(configure(toy_data, tmp_path))
    make_trainer(configure(toy_data, tmp_path))
    make_trainer(load_config("train_toy", options(toy_data, tmp_path)))
    assert not {p.name for p in tmp_path.iterdir()} & set(FAST_FILES)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("train_toy", ["pipeline=metaworld_fast", "model.vocab_size=1500"],
         "'fast' is for PiZeroFast, which needs it: got PiZero and pipeline.prompt='fast'"),
        ("train_toy_fast", ["pipeline=metaworld", "pipeline.state_dim=null"],
         "got PiZeroFast and pipeline.prompt='pi0'"),
        ("train_toy_fast", ["model.vocab_size=700"],
         r"where they meet the words around them; expected a model with vocab_size >= \d+"),
        ("train_toy_fast", ["pipeline.vocab_size=800"],
         "the tokenizer has 800 pieces, but model.vocab_size is 768"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(
    toy_data: Path, tmp_path: Path, name: str, more: list[str], message: str
) -> None:
    config = load_config(name, options(toy_data, tmp_path, *more))
    with pytest.raises(ValueError, match=message):
        make_trainer(config)


def test_another_model_has_no_loss(toy_data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(configure(toy_data, tmp_path))
    assert isinstance(trainer.loss, AnswerLoss)
    with pytest.raises(ValueError, match="expected a PiZero or PiZeroFast to train, got Linear"):
        loss_of(torch.nn.Linear(1, 1), trainer.pipeline, trainer.config)


def test_bf16_autocast(toy_data: Path, tmp_path: Path) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, "precision=bf16")).run()
    assert all(5 < row["loss"] < 8 for row in rows(tmp_path, "train") + rows(tmp_path, "val"))
