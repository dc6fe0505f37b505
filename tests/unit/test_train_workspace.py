"""The training loop in process, on a dozen tiny steps."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pizero.agent.checkpoint import load_checkpoint
from pizero.agent.config import Precision, Resume, TrainConfig, load_config
from pizero.agent.train import Trainer, TrainWorkspace
from pizero.agent.training.distributed import Ranks, StopSignals
from pizero.agent.training.noise import flow_draws
from pizero.agent.weights.folder import find_checkpoint
from pizero.data.dataset import EpisodeDataset

QUICK = [
    "threads=1",
    "steps=6",
    "validate.every=3",
    "validate.frames=16",
    "validate.batch_size=8",
    "checkpoint.every=3",
    "log_every=2",
    "batch_size=8",
    "flow_samples=2",
]


def configure(toy_data: Path, folder: Path, *overrides: str) -> TrainConfig:
    options = [*QUICK, f"data.path={toy_data}", f"run_dir={folder}", *overrides]
    return load_config("train_toy", options)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(folder) / "training" / "weights.safetensors")


@pytest.fixture(scope="module")
def finished(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, left alone."""
    folder = tmp_path_factory.mktemp("finished")
    TrainWorkspace(configure(toy_data, folder)).run()
    return folder


def test_run_folder(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "run.log",
        "stats.json",
        "tokenizer.model",
    }
    steps = {p.name for p in (finished / "checkpoints").iterdir()}
    assert steps == {"latest", "step_00000003", "step_00000006"}
    assert (finished / "checkpoints" / "latest").readlink() == Path("step_00000006")
    assert (find_checkpoint(finished) / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_metrics(finished: Path) -> None:
    train = rows(finished, "train")
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "grad_norm", "lr"} <= set(row) for row in train)
    val = rows(finished, "val")
    assert [row["step"] for row in val] == [3, 6]
    accuracies = [val[0][f"accuracy_{x}"] for x in ("0.05", "0.1", "0.2", "0.3", "0.5")]
    assert accuracies == sorted(accuracies)
    assert {f"robot_l1/{i}" for i in range(4)} < set(val[0])


def test_the_loss_is_the_mean_over_real_entries(toy_data: Path, tmp_path: Path) -> None:
    config = configure(toy_data, tmp_path)
    trainer = make_trainer(config)
    batch = next(iter(trainer.loader))
    noise, times = flow_draws(
        batch.sample,
        seed=config.seed,
        flow_samples=2,
        horizon=4,
        action_dim=4,
        time_sampler=trainer.model.time_sampler,
    )
    with torch.no_grad():
        losses = trainer.model(batch.observation, batch.actions, noise, times)
    mask = batch.action_mask[:, None].expand_as(losses)
    assert 0 < mask.sum() < mask.numel()
    loss, _, _ = trainer.step(1, [batch])
    assert loss.item() == pytest.approx(losses[mask].mean().item(), rel=1e-6)


def make_trainer(config: TrainConfig) -> Trainer:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    return Trainer(config, ranks=ranks, signals=StopSignals())


def test_resumed_run_is_the_same_run(toy_data: Path, tmp_path: Path, finished: Path) -> None:
    # max_minutes=0 stops at the first look, as a signal would.
    for _ in range(5):
        TrainWorkspace(configure(toy_data, tmp_path, "max_minutes=0")).run()
    assert weights(tmp_path).keys() == weights(finished).keys()
    for name, value in weights(finished).items():
        assert torch.equal(weights(tmp_path)[name], value), name
    for kind in ("train", "val"):
        mine, whole = rows(tmp_path, kind), rows(finished, kind)
        assert [(r["step"], r["loss"]) for r in mine] == [(r["step"], r["loss"]) for r in whole]


@pytest.mark.parametrize("split", [["micro_batch_size=4"], ["micro_batch_size=1"]])
def test_any_split_of_the_batch_gives_the_same_run(
    toy_data: Path, tmp_path: Path, finished: Path, split: list[str]
) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, *split)).run()
    mine, whole = rows(tmp_path, "train"), rows(finished, "train")
    for a, b in zip(mine, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_workers_give_the_same_run(toy_data: Path, tmp_path: Path, finished: Path) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, "data.workers=1")).run()
    for name, value in weights(finished).items():
        assert torch.equal(weights(tmp_path)[name], value), name


def test_signal_saves_and_leaves(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def step_then_signal(self: Trainer, number: int, batches: Any) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    TrainWorkspace(configure(toy_data, tmp_path)).run()
    assert find_checkpoint(tmp_path).name == "step_00000002"
    assert "stopped at step 2 by SIGUSR1" in (tmp_path / "run.log").read_text()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_finished_run_has_nothing_to_do(
    toy_data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    TrainWorkspace(configure(toy_data, finished)).run()
    assert "all its 6 steps" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_configuration_is_refused_with_both_values(toy_data: Path, finished: Path) -> None:
    before = (finished / "config.yaml").read_bytes()
    config = configure(toy_data, finished, "optim.lr=0.5", "log_every=1")
    with pytest.raises(ValueError, match=r"step 6.*another.*\n  optim.lr: 0.001 then, 0.5 now\n"):
        TrainWorkspace(config).run()
    with pytest.raises(ValueError, match="already holds a run at step 6, and resume=never"):
        TrainWorkspace(configure(toy_data, finished, "resume=never")).run()
    assert (finished / "config.yaml").read_bytes() == before


def test_changed_configuration_on_request(toy_data: Path, tmp_path: Path) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, "steps=2")).run()
    config = configure(toy_data, tmp_path, "steps=4")
    config.resume = Resume.changed
    TrainWorkspace(config).run()
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3, 4]


def test_other_data_is_refused(toy_data: Path, tmp_path: Path) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, "steps=2")).run()
    metadata = find_checkpoint(tmp_path) / "metadata.json"
    text = json.loads(metadata.read_text())
    text["data"]["train"]["demonstrations"]["frames"] = 5
    metadata.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"train.demonstrations.frames: 5 then, 192 now"):
        TrainWorkspace(configure(toy_data, tmp_path, "steps=2")).run()


def test_keep_policy(toy_data: Path, tmp_path: Path) -> None:
    keep = ["checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3"]
    TrainWorkspace(configure(toy_data, tmp_path, "steps=8", *keep)).run()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == [f"step_{n:08d}" for n in (3, 6, 7, 8)]


def test_frozen_weights_stay(toy_data: Path, tmp_path: Path) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, "freeze=[vision.*]")).run()
    trainer = make_trainer(configure(toy_data, tmp_path / "fresh"))
    _, model, _, _ = load_checkpoint(tmp_path)
    changed = {
        name: not torch.equal(new, old)
        for (name, new), (_, old) in zip(
            model.named_parameters(), trainer.model.named_parameters(), strict=True
        )
    }
    assert not any(moved for name, moved in changed.items() if name.startswith("vision."))
    assert changed["action_decoder.weight"]
    assert not any(name.startswith("vision.") for name in weights(tmp_path))


def test_starting_from_other_weights(toy_data: Path, tmp_path: Path, finished: Path) -> None:
    trainer = make_trainer(configure(toy_data, tmp_path, f"init_from={finished}"))
    _, model, _, _ = load_checkpoint(finished)
    for (name, new), (_, old) in zip(
        trainer.model.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(new, old), name


def test_without_an_average_the_weights_themselves_are_saved(
    toy_data: Path, tmp_path: Path
) -> None:
    TrainWorkspace(configure(toy_data, tmp_path, "ema_decay=null", "steps=2")).run()
    folder = find_checkpoint(tmp_path)
    assert not (folder / "training" / "weights.safetensors").exists()
    assert json.loads((folder / "metadata.json").read_text())["weights"] == "raw"


def test_bf16_autocast_trains_fp32_weights(toy_data: Path, tmp_path: Path) -> None:
    config = configure(toy_data, tmp_path, "steps=2")
    config.precision = Precision.bf16
    TrainWorkspace(config).run()
    assert {t.dtype for t in weights(tmp_path).values()} == {torch.float32}
    assert all(0 < row["loss"] < 10 for row in rows(tmp_path, "train"))


def test_loss_that_is_not_a_number_stops_the_run(toy_data: Path, tmp_path: Path) -> None:
    config = configure(toy_data, tmp_path, "optim.lr=1e30", "schedule.warmup=0")
    config.optim.clip_norm = None
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d"):
        TrainWorkspace(config).run()
    assert "ended by" in (tmp_path / "run.log").read_text()


def test_tokenizer_larger_than_the_vocabulary(toy_data: Path, tmp_path: Path) -> None:
    config = configure(toy_data, tmp_path, "model.vocab_size=300", "tokenizer.vocab_size=320")
    with pytest.raises(
        ValueError, match=r"the tokenizer has .* pieces, but model.vocab_size is 300"
    ):
        TrainWorkspace(config).run()


def test_an_instruction_that_does_not_fit(toy_data: Path, tmp_path: Path) -> None:
    config = configure(toy_data, tmp_path, "pipeline.max_tokens=2")
    with pytest.raises(
        ValueError, match=r"at most max_tokens=2 tokens, got .* instructions with more"
    ):
        TrainWorkspace(config).run()


def test_a_held_out_instruction_that_does_not_fit(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the first step, not at the first validation."""
    texts, long = EpisodeDataset.texts, "a word or two " * 9
    config = configure(toy_data, tmp_path)
    held_out = config.data.val["split"]
    monkeypatch.setattr(
        EpisodeDataset,
        "texts",
        lambda self: [*texts(self), long] if self.split == held_out else texts(self),
    )
    with pytest.raises(ValueError, match=r"got 1 of .*'a word or two"):
        TrainWorkspace(config).run()
