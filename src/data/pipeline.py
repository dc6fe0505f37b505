"""Between the robot and the model: one set of transforms for training, evaluation and serving.

    sample or observation --encode--> arrays of fixed shape --collate--> Batch or Observation
    model's actions --decode_actions--> robot units

Everything it needs is the constructor's arguments and two files, so a checkpoint rebuilds it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pizero.data.images import RESIZE_KINDS, resize_image
from pizero.data.stats import (
    Normalizer,
    Statistics,
    load_statistics,
    save_statistics,
    subtract_state,
)
from pizero.data.tokenizer import PAD, PROMPTS, Tokenizer
from pizero.types import Batch, Observation

Encoded = dict[str, np.ndarray]
log = logging.getLogger(__name__)
NORMALIZER_KEYS = ("kind", "mask", "clip", "epsilon", "min_scale")


class PolicyPipeline:
    """Encodes what a robot gives and decodes what a model answers.

    cameras           names in the order the model sees them; one that a sample lacks is a black
                      image with mask False
    image_size        (height, width) of the model's images; resize is one of images.RESIZE_KINDS
    tokenizer         path of a SentencePiece file
    max_tokens        longest prompt; longer ones are cut, with a warning
    prompt            "pi0" or "pi05"
    statistics        path of a statistics file, or its content
    normalization     {"state": ..., "action": ...}: a kind, or {kind:, mask:, clip:, ...} as in
                      Normalizer
    horizon, action_dim, state_dim   the model's sizes; robot values are padded with zeros.
                      state_dim None: the model has no state input (pi0.5 puts it in the prompt)
    delta_mask        dimensions of actions that are learned relative to the present state
    frames            history per camera and state, oldest first
    robot_state_dim, robot_action_dim   cut statistics that were saved padded to a model's width
    trim_tokens       pad prompts to the longest of the batch only, instead of to max_tokens
    learn_past_end    actions past the end of an episode (the last one repeated) count in the loss
    learn_padding     dimensions beyond the robot's count in the loss, as openpi has it
    """

    def __init__(
        self,
        *,
        cameras: Sequence[str],
        image_size: Sequence[int],
        tokenizer: str | Path,
        max_tokens: int,
        statistics: str | Path | Mapping[str, Any],
        normalization: Mapping[str, str | Mapping[str, Any]],
        horizon: int,
        action_dim: int,
        state_dim: int | None,
        resize: str = "lanczos",
        prompt: str = "pi0",
        delta_mask: Sequence[bool] | None = None,
        frames: int = 1,
        robot_state_dim: int | None = None,
        robot_action_dim: int | None = None,
        trim_tokens: bool = False,
        learn_past_end: bool = False,
        learn_padding: bool = False,
    ) -> None:
        if not cameras or len(set(cameras)) != len(cameras):
            raise ValueError(f"expected distinct camera names, got {list(cameras)}")
        if len(image_size) != 2:
            raise ValueError(f"expected image_size (height, width), got {list(image_size)}")
        _expect_one_of("resize", resize, RESIZE_KINDS)
        _expect_one_of("prompt", prompt, PROMPTS)
        self.cameras = tuple(cameras)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.resize, self.prompt, self.frames = resize, prompt, frames
        self.max_tokens, self.trim_tokens = max_tokens, trim_tokens
        self.horizon, self.action_dim, self.state_dim = horizon, action_dim, state_dim
        self.delta_mask = None if delta_mask is None else tuple(delta_mask)
        self.learn_past_end, self.learn_padding = learn_past_end, learn_padding
        self.tokenizer = Tokenizer(tokenizer)
        self.statistics = load_statistics(statistics)
        for name in normalization:
            _expect_one_of("a name in normalization", name, ("action", "state"))
        cuts = {"state": robot_state_dim, "action": robot_action_dim}
        self._normalizers = {
            name: _normalizer(name, rule, self.statistics, cuts[name])
            for name, rule in normalization.items()
        }
        if "action" not in self._normalizers:
            raise ValueError(f"expected normalization of 'action', got {sorted(normalization)}")
        self._needs_state = state_dim is not None or prompt == "pi05" or delta_mask is not None
        if self._needs_state and "state" not in self._normalizers:
            raise ValueError(f"expected normalization of 'state', got {sorted(normalization)}")
        for name, width in (("state", state_dim), ("action", action_dim)):
            size = self._normalizers[name].size if name in self._normalizers else 0
            if width is not None and size > width:
                raise ValueError(
                    f"{name} statistics have {size} dimensions, but the model's {name}_dim is "
                    f"{width}; it cannot hold them"
                )
        self._tokens: dict[str, np.ndarray] = {}
        self._warned = False

    @property
    def robot_action_dim(self) -> int:
        """Dimensions of an action in robot units."""
        return self._normalizers["action"].size

    def encode(self, sample: Mapping[str, Any]) -> Encoded:
        """A dataset's sample as arrays of the model's shapes, for `collate`."""
        encoded = self.observation(
            images=sample["images"], text=sample["text"], state=sample.get("state")
        )
        actions = np.asarray(sample["actions"], np.float64)
        if actions.shape != (self.horizon, self.robot_action_dim):
            raise ValueError(
                f"expected actions of shape {[self.horizon, self.robot_action_dim]} (horizon of "
                f"the model, dimensions of the statistics), got {list(actions.shape)}"
            )
        if self.delta_mask is not None:
            actions = subtract_state(actions, self._frames(sample["state"])[-1], self.delta_mask)
        counts = np.ones((self.horizon, self.action_dim), bool)
        if not self.learn_past_end:
            counts &= ~np.asarray(sample["action_is_pad"], bool)[:, None]
        if not self.learn_padding:
            counts[:, self.robot_action_dim :] = False
        normalized = self._normalizers["action"].normalize(actions)
        encoded["actions"] = _pad_last(normalized, self.action_dim)
        encoded["action_mask"] = counts
        return encoded

    def observation(
        self, *, images: Mapping[str, np.ndarray], text: str, state: np.ndarray | None = None
    ) -> Encoded:
        """What a robot sees as arrays of the model's shapes, for `collate_observations`.

        Images are uint8 [h w 3], with history [frames h w 3]; the state [S] or [frames S].
        """
        encoded: Encoded = {}
        encoded["images"], encoded["image_mask"] = self._images(images)
        normalized = None
        if self._needs_state:
            if state is None:
                raise ValueError(
                    "this policy reads the robot's state; expected state [S], got None"
                )
            normalized = self._normalizers["state"].normalize(self._frames(state))
            if self.state_dim is not None:
                encoded["state"] = _pad_last(normalized, self.state_dim)
        encoded["tokens"] = self._prompt(text, normalized)
        return encoded

    def collate(self, encoded: Sequence[Encoded], samples: Sequence[int] | np.ndarray) -> Batch:
        """A batch of encoded samples and their global sample numbers."""
        return Batch(
            observation=self.collate_observations(encoded),
            actions=_stack(encoded, "actions"),
            action_mask=_stack(encoded, "action_mask"),
            sample=torch.from_numpy(np.array(samples, np.int64)),
        )

    def collate_observations(self, encoded: Sequence[Encoded]) -> Observation:
        """A batch of encoded observations; masks are None when nothing is missing."""
        images = _stack(encoded, "images").permute(0, 1, 4, 2, 3).contiguous()
        image_mask = _stack(encoded, "image_mask")
        lengths = [len(e["tokens"]) for e in encoded]
        width = max(lengths) if self.trim_tokens else self.max_tokens
        tokens = np.full((len(encoded), width), PAD, np.int64)
        token_mask = np.arange(width) < np.array(lengths)[:, None]
        tokens[token_mask] = np.concatenate([e["tokens"] for e in encoded])
        return Observation(
            images=images,
            tokens=torch.from_numpy(tokens),
            image_mask=None if bool(image_mask.all()) else image_mask,
            token_mask=None if bool(token_mask.all()) else torch.from_numpy(token_mask),
            state=None if self.state_dim is None else _stack(encoded, "state"),
        )

    def decode_actions(
        self, actions: np.ndarray | torch.Tensor, state: np.ndarray | None = None
    ) -> np.ndarray:
        """The model's actions [... horizon action_dim] in robot units, float32.

        `state` [... S] is the one the actions were predicted from; needed with a delta mask only.
        """
        if isinstance(actions, torch.Tensor):
            actions = actions.detach().float().cpu().numpy()
        if actions.shape[-1] != self.action_dim:
            raise ValueError(
                f"expected actions [... {self.action_dim}] as the model gives them, got shape "
                f"{list(actions.shape)}"
            )
        values = self._normalizers["action"].denormalize(actions[..., : self.robot_action_dim])
        if self.delta_mask is not None:
            if state is None:
                raise ValueError("actions are relative to the state; expected state, got None")
            present = np.asarray(state, np.float64)[..., None, :]
            values = subtract_state(values, present, self.delta_mask, sign=1)
        return values.astype(np.float32)

    def save_assets(self, folder: str | Path) -> dict[str, str]:
        """Write `stats.json` and `tokenizer.model`; the constructor arguments that name them."""
        folder = Path(folder)
        save_statistics(self.statistics, folder / "stats.json")
        self.tokenizer.save(folder / "tokenizer.model")
        return {"statistics": "stats.json", "tokenizer": "tokenizer.model"}

    def _images(self, images: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [cameras * frames, h, w, 3] and which of them are real."""
        unknown = [name for name in images if name not in self.cameras]
        if unknown or not images:
            got = repr(unknown[0]) if unknown else "no image"
            near = difflib.get_close_matches(unknown[0], self.cameras, 1) if unknown else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected images of {', '.join(self.cameras)}, got {got}{hint}")
        stacked = np.zeros((len(self.cameras), self.frames, *self.image_size, 3), np.uint8)
        for i, name in enumerate(self.cameras):
            if name not in images:
                continue
            views = np.asarray(images[name])
            views = views[None] if views.ndim == 3 else views
            if views.dtype != np.uint8 or views.ndim != 4 or views.shape[-1] != 3:
                raise ValueError(
                    f"camera {name!r}: expected uint8 [h w 3], got {views.dtype} "
                    f"{list(np.shape(images[name]))}"
                )
            if len(views) != self.frames:
                raise ValueError(
                    f"camera {name!r}: expected {self.frames} frames, got {len(views)}"
                )
            for j, view in enumerate(views):
                stacked[i, j] = resize_image(view, self.image_size, kind=self.resize)
        mask = np.repeat([name in images for name in self.cameras], self.frames)
        return stacked.reshape(-1, *self.image_size, 3), mask

    def _frames(self, state: np.ndarray) -> np.ndarray:
        """The state as float64 [frames S]."""
        state = np.asarray(state, np.float64)
        state = state[None] if state.ndim == 1 else state
        if state.ndim != 2 or len(state) != self.frames:
            raise ValueError(
                f"expected state [S] or [{self.frames} S] for {self.frames} frames, got "
                f"{list(state.shape)}"
            )
        return state

    def _prompt(self, text: str, state: np.ndarray | None) -> np.ndarray:
        if self.prompt == "pi05":
            assert state is not None
            tokens = self.tokenizer.prompt(text, format="pi05", state=state[-1])
            return self._fit(np.array(tokens, np.int64), text)
        if text not in self._tokens:
            tokens = self.tokenizer.prompt(text, format=self.prompt)
            if len(self._tokens) >= 4096:  # a cache, not a leak
                self._tokens.clear()
            self._tokens[text] = self._fit(np.array(tokens, np.int64), text)
        return self._tokens[text]

    def _fit(self, tokens: np.ndarray, text: str) -> np.ndarray:
        if len(tokens) > self.max_tokens and not self._warned:
            self._warned = True
            log.warning(
                "a prompt has %d tokens and is cut to max_tokens=%d (said once): %r",
                *(len(tokens), self.max_tokens, text),
            )
        return tokens[: self.max_tokens]


def _normalizer(
    name: str,
    rule: str | Mapping[str, Any],
    statistics: Mapping[str, Statistics],
    width: int | None,
) -> Normalizer:
    if name not in statistics:
        raise ValueError(f"expected statistics of {name!r}, got only {sorted(statistics)}")
    rule = {"kind": rule} if isinstance(rule, str) else rule
    for key in rule:
        _expect_one_of(f"a key of normalization.{name}", key, NORMALIZER_KEYS)
    if "kind" not in rule:
        raise ValueError(f"expected a kind in the normalization of {name!r}, got {sorted(rule)}")
    chosen = statistics[name] if width is None else statistics[name].cut(width)
    try:
        return Normalizer(statistics=chosen, **rule)
    except ValueError as error:
        raise ValueError(f"normalization of {name!r}: {error}") from error


def _pad_last(values: np.ndarray, width: int) -> np.ndarray:
    padded = np.zeros((*values.shape[:-1], width), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded


def _stack(encoded: Sequence[Encoded], key: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([e[key] for e in encoded]))


def _expect_one_of(what: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        near = difflib.get_close_matches(got, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected {what} to be one of {', '.join(known)}, got {got!r}{hint}")
