"""A trained policy as a robot uses it: pictures, a sentence and a state in, an action chunk out.

    policy = pizero.load_policy("outputs/demo/train/checkpoints/latest")
    chunk = policy.act(images={"corner": picture}, text="open the drawer", state=state)

Everything between the robot's own units and the model's (tokenising, resizing, normalising, padding
and the way back) is the pipeline's business, the same one that training used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pizero.model import PiZero, PiZeroFast
from pizero.types import Float, Observation, Tensor

if TYPE_CHECKING:
    from pizero.data.pipeline import PolicyPipeline
    from pizero.data.robot import OutputStage

log = logging.getLogger(__name__)
Array = np.ndarray | torch.Tensor
DEFAULT_NUM_STEPS = 10
LONGEST_ANSWER = 256  # tokens of pi0-FAST, as openpi has it


class Policy:
    """A model and its pipeline, ready to act.

    `num_steps` is the number of Euler steps of a decision. `noise_scale` shrinks the noise that a
    decision starts from: 1 samples the learnt distribution, 0 follows its middle, which aims better
    where there is one way to do the task. The model's weights decide the device.

    pi0-FAST spells its actions, so it needs neither noise nor steps; an answer that spells none
    raises fast_tokenizer.UndecodableActions.
    """

    def __init__(
        self,
        model: PiZero | PiZeroFast,
        pipeline: PolicyPipeline,
        *,
        num_steps: int = DEFAULT_NUM_STEPS,
        noise_scale: float = 1.0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not 0.0 <= noise_scale <= 1.0:
            raise ValueError(f"noise_scale must be in [0, 1], got {noise_scale}")
        self.noise_scale = noise_scale
        self.model = model.eval()
        self.pipeline = pipeline
        self.num_steps = num_steps
        self.device = next(model.parameters()).device

    @property
    def noise_shape(self) -> tuple[int, int]:
        """The shape of one decision's noise: the model's horizon and (padded) action_dim."""
        return (self.model.horizon, self.model.action_dim)

    def output_stage(self) -> OutputStage | None:
        """What the robot does with executed actions at the very end, fresh for an episode: a
        gripper that sticks, say. None for most."""
        robot = self.pipeline.robot
        return None if robot is None else robot.output_stage()

    def act(
        self,
        *,
        images: Mapping[str, Array | None],
        text: str | Sequence[str] | None = None,
        state: Array | Mapping[str, Array] | None = None,
        noise: Array | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        live: bool = True,
    ) -> np.ndarray:
        """The action chunk float32 [horizon action_dim] in the robot's units.

        `images` maps every camera of the policy to uint8 [height width 3] of any size, or to None
        where the robot lacks it. Arrays may be numpy's or torch's. Several sentences make a batch:
        everything else then has a first axis of that length, and so has the result.

        A policy with a robot takes that robot's names of cameras as well, and its state in parts by
        name; no text means the robot's default. `live` False: the numbers are in the form that the
        robot's data has, going in and coming out.

        Without `noise` [horizon action_dim] the start of the flow is drawn from `generator` (a CPU
        generator), or from torch's own, and scaled by `noise_scale`; given noise is used as it is.
        `num_steps` is the policy's own where it is None.
        """
        alone = text is None or isinstance(text, str)
        texts = [text] if text is None or isinstance(text, str) else text
        observations = _rows(images, texts, state, alone=alone)
        if noise is None:
            shape = (len(observations), *self.noise_shape)
            start = self.noise_scale * torch.randn(shape, generator=generator)
        else:
            start = torch.as_tensor(noise, dtype=torch.float32)
            start = start[None] if alone else start
        actions = self.act_batch(observations, noise=start, num_steps=num_steps, live=live)
        return actions[0] if alone else actions

    def act_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: Float[Tensor, "b horizon action_dim"],
        num_steps: int | None = None,
        live: bool = True,
    ) -> np.ndarray:
        """One model call for several observations: float32 [b horizon action_dim] in robot units.

        Each observation has "images", "text" and "state" as in `act`. A row depends on its own
        observation and noise only, whatever the rest of the batch, up to rounding.
        """
        expected = (len(observations), *self.noise_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(
                f"noise must have shape [batch horizon action_dim] = {list(expected)}, "
                f"got {list(noise.shape)}"
            )
        batch = self.observe(observations, live=live)
        with torch.inference_mode():
            if isinstance(self.model, PiZeroFast):
                actions = self._spelt(self.model, batch)
            else:
                steps = self.num_steps if num_steps is None else num_steps
                actions = self.model.sample(batch, noise.to(self.device), steps).cpu()
        return np.stack(
            [
                self.pipeline.decode_actions(chunk, observation["state"], live=live)
                for chunk, observation in zip(actions, observations, strict=True)
            ]
        )

    def _spelt(
        self, model: PiZeroFast, batch: Observation
    ) -> Float[Tensor, "b horizon action_dim"]:
        """The likeliest answers of pi0-FAST, read."""
        said = model.decode(batch, max_new_tokens=LONGEST_ANSWER).tokens.cpu()
        return torch.from_numpy(np.stack([self.pipeline.read_answer(tokens) for tokens in said]))

    def observe(
        self, observations: Sequence[Mapping[str, Any]], *, live: bool = True
    ) -> Observation:
        """Observations as the model takes them, checked and batched, on the model's device."""
        encoded = [self._encode(observation, live) for observation in observations]
        return self.pipeline.collate_observations(encoded).to(self.device)

    def _encode(self, observation: Mapping[str, Any], live: bool) -> dict[str, np.ndarray]:
        images, robot = observation["images"], self.pipeline.robot
        if robot is None:
            expected = {camera: (camera,) for camera in self.pipeline.cameras}
        else:
            expected = {slot: (*n, slot) for slot, n in robot.cameras.items() if n}
        known = {name for names in expected.values() for name in names}
        missing = [names[0] for names in expected.values() if not set(names) & set(images)]
        # A name that the pipeline does not know is its error to raise: it suggests the nearest.
        if missing and set(images) <= known:
            raise ValueError(
                f"no picture from camera {missing[0]!r}: the policy was trained with "
                f"{list(self.pipeline.cameras)}, got {list(images)}; pass None for a camera that "
                "is not there"
            )
        present = {camera: image for camera, image in images.items() if image is not None}
        text = observation["text"]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"the instruction must be a string, got {text!r}")
        return self.pipeline.observation(
            images=present, text=text, state=observation["state"], live=live
        )


def load_policy(
    path: str | Path,
    *,
    robot: str | Path | None = None,
    statistics: str | Path | None = None,
    tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
    asset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    kind: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    num_steps: int = DEFAULT_NUM_STEPS,
    noise_scale: float = 1.0,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    packages: Sequence[str] = ("pizero",),
) -> Policy:
    """The policy of a checkpoint: a folder of ours, which needs nothing else, or a published one.

    A folder trained on a mix whose data sets have pipelines of their own needs `asset`, the name of
    one of them.

    Published checkpoints (openpi in either form, LeRobot, giga-models, open-pi-zero, transformers'
    pi0) say less of themselves: `robot`, `statistics`, `tokenizer`, `action_tokenizer` and `asset`
    are what lies elsewhere (see `published.pipeline_node`), `overrides` are sizes that leave no
    trace in weights ({"horizon": 10}), `changes` arguments of the pipeline to replace, and `kind`
    "pi0_fast" tells pi0-FAST from PaliGemma.

    `dtype` None keeps the precision that is stored. `weights="random"` gives the model as it was
    before training (drawn from `seed`): the baseline that shows what training was worth. A folder's
    configuration may name classes from `packages` only; add your own if you trust the folder.
    """
    from pizero.agent.checkpoint import load_checkpoint
    from pizero.agent.config import build
    from pizero.agent.published import build_published, pipeline_node
    from pizero.agent.weights import inspect, load_model
    from pizero.agent.weights.folder import has_pipeline

    if weights not in ("checkpoint", "random"):
        raise ValueError(f"weights must be 'checkpoint' or 'random', got {weights!r}")
    device = choose_device(device)
    given = dict(
        robot=robot, statistics=statistics, tokenizer=tokenizer, asset=asset,
        action_tokenizer=action_tokenizer, overrides=overrides, changes=changes, kind=kind,
    )  # fmt: skip
    if has_pipeline(path):
        del given["asset"]
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{path} describes itself: {', '.join(named)} cannot be given")
        config, model, pipeline, _ = load_checkpoint(
            path, device=device, dtype=dtype, packages=packages, dataset=asset
        )
        architecture = config.model
    else:
        # The pipeline first: what it lacks is known at once, weights take a while.
        found = inspect(path, overrides=overrides, kind=kind)
        node = pipeline_node(
            found,
            robot=robot,
            statistics=statistics,
            tokenizer=tokenizer,
            action_tokenizer=action_tokenizer,
            asset=asset,
            changes=changes,
        )
        pipeline = build_published(node, found)
        loaded = load_model(found, device=device, dtype=dtype)
        model, architecture = loaded.model, found.model
        log.info("%s", loaded.report)
        for note in loaded.report.notes:
            log.warning("%s: %s", path, note)
    if weights == "random":
        # Building a model draws from torch's generator, which is the caller's.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(architecture, path="model", packages=packages).to(device)
    return Policy(model, pipeline, num_steps=num_steps, noise_scale=noise_scale)


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for; None or "auto" is the GPU if there is one."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def keyed_noise(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Gaussian noise that is a function of its key alone, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def _rows(
    images: Mapping[str, Array | None],
    texts: Sequence[str | None],
    state: Array | Mapping[str, Array] | None,
    *,
    alone: bool,
) -> list[dict[str, Any]]:
    """A batch's rows, from arrays with a first axis of its length (none where `alone`)."""

    def split(name: str, array: Array | None) -> Sequence[np.ndarray | None]:
        if array is None:
            return [None] * len(texts)
        rows = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
        rows = np.asarray(rows)[None] if alone else np.asarray(rows)
        if len(rows) != len(texts):
            raise ValueError(
                f"{len(texts)} sentences make a batch of {len(texts)}, but {name} has shape "
                f"{list(rows.shape)}"
            )
        return list(rows)

    pictures = {camera: split(f"camera {camera!r}", views) for camera, views in images.items()}
    states: Sequence[Any]
    if isinstance(state, Mapping):
        parts = {name: split(f"state {name!r}", part) for name, part in state.items()}
        states = [{name: part[i] for name, part in parts.items()} for i in range(len(texts))]
    else:
        states = split("state", state)
    return [
        {"images": {c: views[i] for c, views in pictures.items()}, "text": t, "state": states[i]}
        for i, t in enumerate(texts)
    ]
