"""Between the robot and the model: one set of transforms for training, evaluation and serving.

    sample or observation --encode--> arrays of fixed shape --collate--> Batch or Observation
    model's actions --decode_actions--> robot units

Everything it needs is the constructor's arguments and two files, so a checkpoint rebuilds it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from pizero.data.fast_prompt import CAUSAL, FAST, LOSS, FastPrompt, mark
from pizero.data.fast_tokenizer import FastTokenizer
from pizero.data.images import RESIZE_KINDS, parse_image, resize_image
from pizero.data.normalize import expect_one_of, make_normalizer, subtract_state
from pizero.data.robot import Robot
from pizero.data.stats import load_statistics, save_statistics
from pizero.data.tokenizer import PAD, PROMPTS, WITH_STATE, Tokenizer
from pizero.types import Batch, Observation

Encoded = dict[str, np.ndarray]
log = logging.getLogger(__name__)
_T = TypeVar("_T")
State = np.ndarray | Mapping[str, np.ndarray]  # of a robot with several parts: by name
IN_FLOATS = ("pad_antialiased", "pad_bilinear")  # the originals' models resize so, in floats


class PolicyPipeline:
    """Encodes what a robot gives and decodes what a model answers.

    robot             what is special about the robot (robot.Robot). With one, `cameras`, `resize`,
                      `statistics`, `normalization` and `delta_mask` may be left to it, by None
    cameras           names in the order the model sees them; one that a sample lacks is a black
                      image with mask False
    black_cameras     those of them that the model looks at even where they are lacking, or "all"
                      (pi0-FAST)
    image_size        (height, width) of the model's images; resize is one of images.RESIZE_KINDS,
                      None without a robot: lanczos
    tokenizer         path of a SentencePiece file
    max_tokens        longest prompt; longer ones are refused, or cut with a warning where
                      `cut_prompts`, as published policies do
    prompt            one of tokenizer.PROMPTS, or "fast": actions are text too (fast_prompt)
    action_tokenizer  folder of the FAST tokenizer, for that prompt
    vocab_size        the model's, whose end action tokens take; None: the tokenizer's, as PaliGemma
    statistics        path of a statistics file, or its content
    normalization     {"state": ..., "action": ...}: a kind, or {kind:, mask:, clip:, ...} as in
                      Normalizer
    horizon, action_dim, state_dim   the model's sizes; robot values are padded with zeros.
                      state_dim None: the model has no state input (pi0.5 puts it in the prompt)
    delta_mask        dimensions of actions that are learned relative to the present state; []:
                      none, even where the robot has some
    frames            history per camera and state, oldest first
    robot_state_dim, robot_action_dim   cut statistics that were saved padded to a model's width
    trim_tokens       pad prompts to the longest of the batch only, instead of to max_tokens
    learn_past_end    actions past the end of an episode (the last one repeated) count in the loss
    learn_padding     dimensions beyond the robot's count in the loss, as openpi has it
    """

    def __init__(
        self,
        *,
        image_size: Sequence[int],
        tokenizer: str | Path,
        max_tokens: int,
        horizon: int,
        action_dim: int,
        state_dim: int | None,
        robot: Robot | None = None,
        cameras: Sequence[str] | None = None,
        black_cameras: Sequence[str] | Literal["all"] = (),
        statistics: str | Path | Mapping[str, Any] | None = None,
        normalization: Mapping[str, str | Mapping[str, Any]] | None = None,
        resize: str | None = None,
        prompt: str = "pi0",
        action_tokenizer: str | Path | None = None,
        vocab_size: int | None = None,
        delta_mask: Sequence[bool] | None = None,
        frames: int = 1,
        robot_state_dim: int | None = None,
        robot_action_dim: int | None = None,
        trim_tokens: bool = False,
        cut_prompts: bool = False,
        learn_past_end: bool = False,
        learn_padding: bool = False,
    ) -> None:
        self.robot, dataset = robot, None
        if robot is not None:
            cameras = list(robot.cameras) if cameras is None else cameras
            normalization = robot.normalization if normalization is None else normalization
            delta_mask = robot.delta_mask if delta_mask is None else delta_mask
            resize = robot.resize if resize is None else resize
            if statistics is None:
                statistics, dataset = robot.statistics, robot.dataset
            robot_state_dim = _agreed("state", robot_state_dim, robot.state_dim)
            robot_action_dim = _agreed("action", robot_action_dim, robot.action_dim)
        resize = "lanczos" if resize is None else resize
        cameras = _needed("cameras", cameras)
        normalization = _needed("normalization", normalization)
        if not cameras or len(set(cameras)) != len(cameras):
            raise ValueError(f"expected distinct camera names, got {list(cameras)}")
        black_cameras = cameras if black_cameras == "all" else black_cameras
        for name in black_cameras:
            expect_one_of("a name in black_cameras", name, tuple(cameras))
        if len(image_size) != 2:
            raise ValueError(f"expected image_size (height, width), got {list(image_size)}")
        expect_one_of("resize", resize, RESIZE_KINDS)
        expect_one_of("prompt", prompt, (*PROMPTS, FAST))
        if (prompt == FAST) != (action_tokenizer is not None):
            raise ValueError(
                f"the prompt {FAST!r} and an action_tokenizer belong together, got prompt "
                f"{prompt!r} and action_tokenizer {action_tokenizer!r}"
            )
        self.cameras, self.black_cameras = tuple(cameras), tuple(black_cameras)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.resize, self.prompt, self.frames = resize, prompt, frames
        self.max_tokens, self.trim_tokens, self.cut_prompts = max_tokens, trim_tokens, cut_prompts
        self.horizon, self.action_dim, self.state_dim = horizon, action_dim, state_dim
        self.delta_mask = tuple(delta_mask) if delta_mask else None
        self.learn_past_end, self.learn_padding = learn_past_end, learn_padding
        self.tokenizer = Tokenizer(tokenizer)
        self.fast: FastPrompt | None = None
        if action_tokenizer is not None:
            self.fast = FastPrompt(
                tokenizer=self.tokenizer,
                actions=FastTokenizer.load(action_tokenizer),
                vocab_size=vocab_size,
            )
        self.statistics = load_statistics(_needed("statistics", statistics), dataset=dataset)
        for name in normalization:
            expect_one_of("a name in normalization", name, ("action", "state"))
        cuts = {"state": robot_state_dim, "action": robot_action_dim}
        self._normalizers = {
            name: make_normalizer(name, rule, self.statistics, cuts[name])
            for name, rule in normalization.items()
        }
        if "action" not in self._normalizers:
            raise ValueError(f"expected normalization of 'action', got {sorted(normalization)}")
        self._needs_state = (
            state_dim is not None or prompt in (*WITH_STATE, FAST) or self.delta_mask is not None
        )
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
    def vocab_size(self) -> int:
        """How many tokens a model has to embed, those of actions included."""
        return max(self.tokenizer.vocab_size, 0 if self.fast is None else self.fast.vocab_size)

    @property
    def robot_action_dim(self) -> int:
        """Dimensions of an action in robot units."""
        return self._normalizers["action"].size

    @property
    def robot_state_dim(self) -> int:
        """Entries of the state that `observation` takes; 0 where the policy reads none."""
        if self.robot is not None:
            return self.robot.live_state_dim
        return self._normalizers["state"].size if self._needs_state else 0

    def encode(self, sample: Mapping[str, Any]) -> Encoded:
        """A dataset's sample as arrays of the model's shapes, for `collate`."""
        encoded = self.observation(
            images=sample["images"],
            text=sample["text"],
            state=sample.get("state"),
            live=False,
            as_bytes=True,
        )
        normalized = self.encode_actions(sample)
        counts = np.ones((self.horizon, self.action_dim), bool)
        if not self.learn_past_end:
            counts &= ~np.asarray(sample["action_is_pad"], bool)[:, None]
        if not self.learn_padding:
            counts[:, self.robot_action_dim :] = False
        encoded["actions"] = _pad_last(normalized, self.action_dim)
        encoded["action_mask"] = counts
        if self.fast is not None:
            question, answer = encoded["tokens"], self.fast.answer(normalized)
            for name, values in mark(question, answer).items():
                encoded[name] = self._fit(values, sample["text"])
        return encoded

    def refuse_long(self, texts: Iterable[str]) -> None:
        """Raises ValueError if an instruction is too long and may not be cut.

        Where the state is part of the prompt, one of zeros stands for it.
        """
        if self.cut_prompts:
            return
        state = np.zeros((1, self._normalizers["state"].size)) if self._needs_state else None
        lengths = {text: len(self._spelt(text, state)) for text in texts}
        if too_long := [text for text, length in lengths.items() if length > self.max_tokens]:
            longest = max(too_long, key=lengths.__getitem__)
            raise ValueError(
                f"expected prompts of at most max_tokens={self.max_tokens} tokens, got "
                f"{len(too_long)} of {len(lengths)} instructions with more, up to "
                f"{lengths[longest]}: {_shortened(longest)!r}; the pipeline needs "
                f"max_tokens={lengths[longest]}, or cut_prompts"
            )

    def encode_actions(self, sample: Mapping[str, Any]) -> np.ndarray:
        """A sample's actions as they are learnt, not padded: [horizon robot_action_dim].

        The sample needs no images.
        """
        actions = np.asarray(sample["actions"], np.float64)
        if actions.shape != (self.horizon, self.robot_action_dim):
            raise ValueError(
                f"expected actions of shape {[self.horizon, self.robot_action_dim]} (horizon of "
                f"the model, dimensions of the statistics), got {list(actions.shape)}"
            )
        if self.robot is not None:
            actions = self.robot.encode_actions(actions)
        if self.delta_mask is not None:
            state = self._policy_state(sample["state"], live=False)
            actions = subtract_state(actions, self._frames(state)[-1], self.delta_mask)
        return self._normalizers["action"].normalize(actions)

    def observation(
        self,
        *,
        images: Mapping[str, np.ndarray],
        text: str | None,
        state: State | None = None,
        live: bool = True,
        as_bytes: bool = False,
    ) -> Encoded:
        """What a robot sees as arrays of the model's shapes, for `collate_observations`.

        Images are uint8 [h w 3], or what else images.parse_image takes, with history
        [frames ...]; the state is [S] or [frames S], or its parts by name. `live` False: they come
        from a data set of the robot, which may not speak as the robot does. Pictures resized
        IN_FLOATS stay floats in [-1, 1] unless they are asked for `as_bytes`, as training has them.
        """
        if text is None:
            text = None if self.robot is None else self.robot.default_text
            if text is None:
                raise ValueError("expected an instruction, got None")
        encoded: Encoded = {}
        encoded["images"], encoded["image_mask"] = self._images(images, live, as_bytes)
        normalized = None
        if self._needs_state:
            if state is None:
                raise ValueError(
                    "this policy reads the robot's state; expected state [S], got None"
                )
            present = self._frames(self._policy_state(state, live))
            width = self._normalizers["state"].size
            if present.shape[-1] != width:
                raise ValueError(
                    f"expected a state of {width} numbers, as in the statistics, got "
                    f"{present.shape[-1]}"
                )
            normalized = self._normalizers["state"].normalize(present)
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
        images = np.stack([np.moveaxis(e["images"], -1, 1) for e in encoded])
        image_mask = _stack(encoded, "image_mask")
        lengths = [len(e["tokens"]) for e in encoded]
        width = max(lengths) if self.trim_tokens else self.max_tokens
        tokens = np.full((len(encoded), width), PAD, np.int64)
        token_mask = np.arange(width) < np.array(lengths)[:, None]
        tokens[token_mask] = np.concatenate([e["tokens"] for e in encoded])
        causal = learnt = None
        if self.fast is not None and CAUSAL in encoded[0]:
            causal, learnt = np.zeros((2, *tokens.shape), bool)
            causal[token_mask] = np.concatenate([e[CAUSAL] for e in encoded])
            learnt[token_mask] = np.concatenate([e[LOSS] for e in encoded])
        return Observation(
            images=torch.from_numpy(images),
            tokens=torch.from_numpy(tokens),
            image_mask=None if bool(image_mask.all()) else image_mask,
            token_mask=None if bool(token_mask.all()) else torch.from_numpy(token_mask),
            state=None if self.state_dim is None else _stack(encoded, "state"),
            token_causal=None if causal is None else torch.from_numpy(causal),
            token_loss=None if learnt is None else torch.from_numpy(learnt),
        )

    def read_answer(self, tokens: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """The chunk float32 [horizon action_dim] that generated tokens spell, for decode_actions.

        Raises fast_tokenizer.UndecodableActions when they spell none.
        """
        if self.fast is None:
            raise ValueError(
                f"answers are read with the prompt {FAST!r}, this one is {self.prompt!r}"
            )
        ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens
        actions = self.fast.read(ids, horizon=self.horizon, action_dim=self.robot_action_dim)
        return _pad_last(actions, self.action_dim)

    def decode_actions(
        self,
        actions: np.ndarray | torch.Tensor,
        state: State | None = None,
        *,
        live: bool = True,
    ) -> np.ndarray:
        """The model's actions [... horizon action_dim] in robot units, float32.

        `state` [... S] (or [... frames S]: the last counts) is the one the actions were predicted
        from; needed with a delta mask only. `live` False: as the robot's data has them.
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
            present = np.asarray(self._policy_state(state, live), np.float64)
            if 1 < present.ndim == values.ndim:
                present = present[..., -1, :]
            values = subtract_state(values, present[..., None, :], self.delta_mask, sign=1)
        if self.robot is not None:
            values = self.robot.decode_actions(values, live=live)
        return values.astype(np.float32)

    def save_assets(self, folder: str | Path) -> dict[str, str]:
        """Write `stats.json` and `tokenizer.model`; the constructor arguments that name them.

        The FAST tokenizer's files, if there is one, lie in the same folder.
        """
        folder = Path(folder)
        save_statistics(self.statistics, folder / "stats.json")
        self.tokenizer.save(folder / "tokenizer.model")
        names = {"statistics": "stats.json", "tokenizer": "tokenizer.model"}
        if self.fast is not None:
            self.fast.actions.save(folder)
            names["action_tokenizer"] = "."
        return names

    def _images(
        self, images: Mapping[str, np.ndarray], live: bool, as_bytes: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """[cameras * frames, h, w, 3] and which of them the model looks at."""
        views = {name: _parsed(name, image) for name, image in images.items()}
        if self.robot is not None:
            views = self.robot.rename_images(views, live=live)
        unknown = [name for name in views if name not in self.cameras]
        if unknown or not views:
            got = repr(unknown[0]) if unknown else "no image"
            near = difflib.get_close_matches(unknown[0], self.cameras, 1) if unknown else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected images of {', '.join(self.cameras)}, got {got}{hint}")
        # In memory channels first, as they go to the model: collating them is a plain copy.
        exact = self.resize in IN_FLOATS and not as_bytes
        planes = np.zeros((len(self.cameras), self.frames, 3, *self.image_size), np.uint8)
        planes = np.full(planes.shape, -1, np.float32) if exact else planes
        stacked = np.moveaxis(planes, 2, -1)
        for i, name in enumerate(self.cameras):
            if name not in views:
                continue
            if len(views[name]) != self.frames:
                raise ValueError(
                    f"camera {name!r}: expected {self.frames} frames, got {len(views[name])}"
                )
            for j, view in enumerate(views[name]):
                view = view.astype(np.float32) / np.float32(127.5) - 1 if exact else view
                stacked[i, j] = resize_image(view, self.image_size, kind=self.resize)
        seen = {*views, *self.black_cameras}
        mask = np.repeat([name in seen for name in self.cameras], self.frames)
        return stacked.reshape(-1, *self.image_size, 3), mask

    def _policy_state(self, state: State, live: bool) -> np.ndarray:
        """The state as it is normalised, [S] or [frames S]."""
        if self.robot is not None:
            return self.robot.encode_state(self.robot.data_state(state, live=live))
        if isinstance(state, Mapping):
            raise ValueError(f"expected state [S], got parts {sorted(state)} and no robot to join")
        return state

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
        if self._prompt_has_state:
            return self._fit(self._spelt(text, state), text)
        if text not in self._tokens:
            if len(self._tokens) >= 4096:  # a cache, not a leak
                self._tokens.clear()
            self._tokens[text] = self._fit(self._spelt(text, None), text)
        return self._tokens[text]

    @property
    def _prompt_has_state(self) -> bool:
        return self.fast is not None or self.prompt in WITH_STATE

    def _spelt(self, text: str, state: np.ndarray | None) -> np.ndarray:
        """The prompt's tokens, however many; `state` is normalised, [frames S]."""
        if not self._prompt_has_state:
            return np.array(self.tokenizer.prompt(text, format=self.prompt), np.int64)
        assert state is not None
        present = state[-1]
        if self.fast is not None:
            return np.array(self.fast.question(text, present), np.int64)
        if self.prompt == "lerobot_pi05":  # the state is padded to the width of the actions
            present = np.pad(present, (0, self.action_dim - len(present)))
        return np.array(self.tokenizer.prompt(text, format=self.prompt, state=present), np.int64)

    def _fit(self, tokens: np.ndarray, text: str) -> np.ndarray:
        if len(tokens) > self.max_tokens:
            if not self.cut_prompts:
                raise ValueError(
                    f"expected a prompt of at most max_tokens={self.max_tokens} tokens, got "
                    f"{len(tokens)}: {_shortened(text)!r}; raise max_tokens, or set cut_prompts"
                )
            if not self._warned:
                self._warned = True
                log.warning(
                    "a prompt has %d tokens and is cut to max_tokens=%d (said once): %r",
                    *(len(tokens), self.max_tokens, text),
                )
        return tokens[: self.max_tokens]


def _parsed(name: str, image: np.ndarray) -> np.ndarray:
    """uint8 [frames h w 3]."""
    try:
        views = parse_image(image)
    except ValueError as error:
        raise ValueError(f"camera {name!r}: {error}") from error
    return views[None] if views.ndim == 3 else views


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _agreed(name: str, given: int | None, robots: int) -> int:
    if given not in (None, robots):
        raise ValueError(f"robot_{name}_dim is {given}, but the robot's {name} has {robots}")
    return robots


def _needed(name: str, value: _T | None) -> _T:
    if value is None:
        raise ValueError(f"expected {name}, got None from the pipeline and from its robot")
    return value


def _pad_last(values: np.ndarray, width: int) -> np.ndarray:
    padded = np.zeros((*values.shape[:-1], width), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded


def _stack(encoded: Sequence[Encoded], key: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([e[key] for e in encoded]))
