"""A policy beside the expert: chunks predicted at moments of episodes that training never saw."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pizero.agent.driving.video import scaled
from pizero.agent.policy import Policy, keyed_noise
from pizero.agent.training.prepare import parts
from pizero.data.dataset import EpisodeDataset
from pizero.data.mix import Mix

BATCH = 32
PICTURE_HEIGHT = 128


def compare_with_expert(
    policy: Policy,
    data: EpisodeDataset | Mix,
    *,
    num_frames: int,
    num_shown: int = 4,
    num_draws: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean absolute error over `num_frames` evenly spread frames, and a few frames in full.

    Errors are in the robot's units, over steps that lie within the episode, of the chunks that the
    policy would execute. The frames shown differ in their instruction where they can; they come
    with that chunk ("predicted") and with `num_draws` from the full noise ("draws").
    """
    samples = _spread(data, num_frames)
    errors = []
    for first in range(0, len(samples), BATCH):
        group = samples[first : first + BATCH]
        keys = [(seed, first + i, 0) for i in range(len(group))]
        chunks = _predict(policy, group, keys, scale=policy.noise_scale)
        for sample, chunk in zip(group, chunks, strict=True):
            errors.append(np.abs(chunk - sample["actions"])[~sample["action_is_pad"]])
    shown = []
    for number in _different_texts(samples, num_shown):
        sample = samples[number]
        keys = [(seed, number, draw) for draw in range(num_draws)]
        executed = _predict(policy, [sample], keys[:1], scale=policy.noise_scale)[0]
        draws = _predict(policy, [sample] * num_draws, keys, scale=1.0)
        inside = int((~sample["action_is_pad"]).sum())
        shown.append(
            {
                "text": sample["text"],
                "episode": int(sample["episode"]),
                "step": int(sample["step"]),
                "picture": _png(sample["images"]),
                "expert": sample["actions"][:inside].tolist(),
                "predicted": executed[:inside].tolist(),
                "draws": [chunk[:inside].tolist() for chunk in draws],
            }
        )
    error = np.concatenate(errors)
    return {
        "num_frames": len(samples),
        "mean_absolute_error": float(error.mean()),
        "error_of_dimension": error.mean(axis=0).tolist(),
        "action_names": [f"action {i}" for i in range(error.shape[1])],
        "frames": shown,
    }


def _spread(data: EpisodeDataset | Mix, count: int) -> list[dict[str, Any]]:
    """Evenly spaced frames of all parts together, without the very last step of an episode."""
    frames = [(part, i) for part in parts(data).values() for i in range(len(part))]
    numbers = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    samples = [part.read(i) for part, i in (frames[n] for n in numbers)]
    return [s for s in samples if not s["action_is_pad"][1:2].any()]


def _different_texts(samples: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    texts = [sample["text"] for sample in samples]
    firsts = [texts.index(text) for text in dict.fromkeys(texts)]
    picked = np.linspace(0, len(firsts) - 1, min(count, len(firsts))).round().astype(int)
    return [firsts[i] for i in dict.fromkeys(picked.tolist())]


def _predict(
    policy: Policy,
    samples: Sequence[Mapping[str, Any]],
    keys: Sequence[tuple[int, int, int]],
    *,
    scale: float,
) -> np.ndarray:
    noise = scale * torch.stack([keyed_noise(policy.noise_shape, *key) for key in keys])
    known = policy.pipeline.cameras
    observations = [
        {
            "images": {camera: sample["images"].get(camera) for camera in known},
            "text": sample["text"],
            "state": sample.get("state"),
        }
        for sample in samples
    ]
    return policy.act_batch(observations, noise=noise, live=False)


def _png(images: Mapping[str, np.ndarray]) -> str:
    """The newest picture of every camera side by side, as base64."""
    newest = [image if image.ndim == 3 else image[-1] for image in images.values()]
    row = np.concatenate([scaled(image, height=PICTURE_HEIGHT) for image in newest], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
