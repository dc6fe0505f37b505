"""The facts of a case without weights: for each, what pizero makes of its inputs.

Robots are those of config/robot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from pizero.agent.config import build, config_dir
from pizero.agent.parity.rules import Rule
from pizero.agent.published import robot_node
from pizero.data import (
    FastPrompt,
    FastTokenizer,
    Normalizer,
    PolicyPipeline,
    Robot,
    Statistics,
    Tokenizer,
    load_statistics,
    resize_image,
    train_tokenizer,
)
from pizero.data.augment import ValueJitter
from pizero.data.images import parse_image
from pizero.data.normalize import make_normalizer, subtract_state
from pizero.data.robot import GripperLatch
from pizero.data.tokenizer import BOS, EOS, state_bins
from pizero.model.backbone import floats_of
from pizero.model.embed import SinusoidalTime
from pizero.model.flow import BetaTime
from pizero.model.layout import Segment, TokenLayout

ARRAYS, STATISTICS = "arrays.safetensors", "norm_stats.json"
RESIZES = {"client": "pad", "jax": "pad_antialiased", "torch": "pad_bilinear"}
SIMULATED = {"bridge": "widowx", "fractal": "google_robot"}
PICTURE = np.full((8, 8, 3), 7, np.uint8)
SEAM = -1  # follows every string that the encoder is given
DRAWS = 1_000_000

# Name, our values, stored ones, a tolerance, perhaps where to compare. The tolerance is a rule, or
# "exact", or words in the name of one that the case states.
Check = tuple[Any, ...]


class Arrays:
    """The arrays of a folder, which may be some of those that its case.json lists."""

    def __init__(self, folder: Path, listed: Iterable[str]) -> None:
        path = folder / ARRAYS
        self._held = load_file(path) if path.is_file() else {}
        self._names = sorted({*listed, *self._held})
        self.statistics = folder / STATISTICS
        self.absent: list[str] = []
        self._read: set[str] = set()

    @property
    def unread(self) -> list[str]:
        """First words of the names that nobody asked for."""
        groups = ({name.split(".")[0] for name in names} for names in (self._held, self._read))
        return sorted(set.difference(*groups))

    def get(self, *names: str) -> Iterator[list[np.ndarray]]:
        """These arrays, once; where one is absent, that is noted and nothing comes."""
        absent = [name for name in names if name not in self._held]
        self.absent += [name for name in absent if name not in self.absent]
        self._read |= {*names}
        if not absent:
            yield [self._held[name] for name in names]

    def match(self, pattern: str) -> Iterator[tuple[str, ...]]:
        """Names of this form, held or listed, with the parts that the pattern has groups for."""
        matches = (re.fullmatch(pattern, name) for name in self._names)
        return ((m[0], *m.groups()) for m in matches if m)


class Facts:
    """A method for each fact, under its name in case.json."""

    def __init__(self, facts: Mapping[str, Any], arrays: Arrays, scratch: Path) -> None:
        self._all, self._arrays, self._scratch = facts, arrays, scratch

    # -- numbers ----------------------------------------------------------------------------------

    def normalize(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        dtypes, sizes = {(c["name"], c["mode"]): c for c in fact["cases"]}, []
        pattern = r"normalize\.(\w+)\.(zscore|quantile)\.(state|actions)\.(normalized|unnormalized)"
        for name, case, mode, key, way in self._arrays.match(pattern):
            for x, stored in self._arrays.get(name.removesuffix(way) + "in", name):
                statistics = load_statistics(self._arrays.statistics)[key.removesuffix("s")]
                kind = "z_score" if mode == "zscore" else mode
                n = Normalizer(kind=kind, statistics=statistics, min_scale=0, size=x.shape[-1])
                ours = n.normalize(x) if way == "normalized" else n.denormalize(x)
                looser = (mode, way) == ("quantile", "unnormalized")
                yield name, ours, stored, "quantile.*.unnormalized" if looser else "float64"
                dtype = dtypes.get((case, mode), {}).get(f"{key}_dtype_{way}", stored.dtype)
                sizes.append((ours.itemsize, np.dtype(dtype).itemsize))
        if sizes:
            yield "normalize: bytes per number", *zip(*sizes, strict=True), "exact"

    def gaussian(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        statistics = load_statistics(self._all["statistics"]["bridge"])["action"]
        n = Normalizer(kind="z_score", statistics=statistics, epsilon=1e-8, min_scale=0)
        x = np.array(fact["in"])
        yield "gaussian.normalized", n.normalize(x), fact["normalized"], "float64"
        yield "gaussian.denormalized", n.denormalize(x), fact["denormalized"], "float64"

    def statistics(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        """Those that come with pizero's robots."""
        for name, groups in fact.items():
            theirs, ours = load_statistics(groups), load_statistics(name)
            for group in theirs:
                fields = ("mean", "std", "q01", "q99")
                x, y = ([getattr(s[group], f) for f in fields] for s in (ours, theirs))
                yield f"statistics.{name}.{group}", x, y, "exact"

    def running_stats(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for (data,) in self._arrays.get("running_stats.data"):
            ours = Statistics.of(data)
            for name in ("mean", "std", "exact_q01", "exact_q99"):
                values = getattr(ours, name.removeprefix("exact_"))
                yield f"running_stats.{name}", values, fact[name], "float64"

    def delta_actions(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        mask = fact["mask_6_-1_6_-1"]
        yield "delta_actions: mask of aloha", _robot("aloha").delta_mask, mask, "exact"
        for name, sign in (("delta.delta", -1), ("delta.absolute", 1)):
            for actions, state, stored in self._arrays.get("delta.actions", "delta.state", name):
                yield name, subtract_state(actions, state, mask, sign=sign), stored, "float32"

    def pad_to_dim(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        x, width = np.array(fact["in"]), fact["dim"]
        pipeline = self._pipeline(
            len(x), len(x), cameras=["top"], state_dim=width, action_dim=width
        )
        seen = pipeline.observation(images={"top": PICTURE}, text="x", state=x)
        yield "pad_to_dim", seen["state"][0], fact["out"], "exact"

    # -- pictures ---------------------------------------------------------------------------------

    def resize_with_pad(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        pattern = r"resize\.(\w+)\.(client|jax|torch)(?:_(uint8|float))?_(\d+)"
        for name, size, maker, dtype, side in self._arrays.match(pattern):
            for image, stored in self._arrays.get(f"resize.{size}.in", name):
                given = floats_of(torch.from_numpy(image)).numpy() if dtype == "float" else image
                ours = resize_image(given, (int(side), int(side)), kind=RESIZES[maker])
                yield name, ours, stored, f"resize {dtype or 'uint8'}"
        ours, stored = [], []
        for case in fact["cases"]:
            for (image,) in self._arrays.get("resize.{}x{}.in".format(*case["in"])):
                lit = resize_image(image, (case["out"],) * 2, kind="pad").any(axis=-1)
                ours.append([np.flatnonzero(x.any(axis=0))[[0, -1]] for x in (lit.T, lit)])
                stored.append([case["content_rows"], case["content_cols"]])
        if ours:
            yield "resize: filled rows and columns", ours, stored, "exact"
        levels = np.arange(256, dtype=np.uint8)
        ours = floats_of(torch.from_numpy(levels))
        yield "image_to_float", ours, levels / 255 * 2 - 1, "float32"

    def parse_image(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        picture = np.tile(np.array(fact["from"])[:, None], (3, 1, 2))  # channels first
        yield "parse_image", parse_image(picture)[:, 0, 0], fact["float_chw_to_uint8"], "exact"

    def image(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        levels = torch.tensor(fact["in"], dtype=torch.uint8)
        yield "image", floats_of(levels), fact["out"], "float32"

    def color_jitter(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for case in fact["cases"]:
            for pixels, stored in self._arrays.get("color.pixels", case["array"]):
                yield case["array"], _jittered(pixels, **case), stored, "float32"
        for name, contrast in self._arrays.match(r"color\.contrast_curve_(-?[\d.]+)"):
            for ramp, stored in self._arrays.get("color.value_ramp", name):
                grey = np.tile(ramp[:, None], (1, 3))
                yield name, _jittered(grey, contrast=float(contrast))[:, 0], stored, "float32"

    # -- prompts: as letters, with a seam behind every string that is encoded by itself ------------

    def digitize(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        yield "digitize", state_bins(np.array(fact["in"])), fact["out"], "exact"

    def prompt(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        lengths = []
        for i, case in enumerate(fact.get("cases", ())):
            state = None if case["state"] is None else np.array(case["state"])
            kind = "pi0" if state is None else "pi05"
            ours = _Recorder().prompt(case["prompt"], format=kind, state=state)
            yield f"prompt.{i} ({kind})", ours, _spelt(case["encode_calls"]), "exact"
            lengths.append((len(ours) - ours.count(SEAM), case["length"]))
        if lengths:
            yield "prompt: lengths", *zip(*lengths, strict=True), "exact"
        if "example" in fact:
            text = fact["example"].replace("<image>", "").removeprefix("<bos>")
            ours = _Recorder().prompt(text.removesuffix("\n"), format="open_pi_zero")
            yield "prompt.example", ours, [BOS, *map(ord, text), SEAM], "exact"

    def fast_prompt(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        mapping = fact["action_token_mapping"]
        known, size = _Known(mapping["fast_ids"]), mapping["vocab_size"]
        writer = FastPrompt(tokenizer=_Recorder(), actions=known, vocab_size=size)
        for i, case in enumerate(fact["cases"]):
            acts, calls = case["with_actions"], case["encode_calls"]
            state, actions = np.array(case["state"]), np.zeros((1, 1)) if acts else None
            encoded = writer.encode(case["prompt"], state, actions)
            ids = mapping["paligemma_ids"] if acts else []
            stored = [*_spelt(calls[:2]), *ids, *_spelt(calls[2:])]
            yield f"fast_prompt.{i}", encoded["tokens"], stored, "exact"
            kept = encoded["tokens"] != SEAM
            causal, learnt = (encoded[key][kept] for key in ("token_causal", "token_loss"))
            ours = [kept.sum(), causal.sum(), learnt.sum(), causal.argmax() if acts else -1]
            stored = [case[k] for k in ("total_length", "ar_ones", "loss_ones", "first_ar_one")]
            stored = [-1 if n is None else n for n in stored]
            yield f"fast_prompt.{i}: length, masks", ours, stored, "exact"

    # -- flow time, attention ---------------------------------------------------------------------

    def time_embedding(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for name, maker, width in self._arrays.match(r"time_embedding\.(torch|jax)_(\d+)"):
            embed = SinusoidalTime(min_period=0.004, max_period=4.0, reverse=False)
            for t, stored in self._arrays.get("time_embedding.t", name):
                ours = embed(torch.from_numpy(t), int(width))
                yield name, ours, stored, f"time_embedding {maker}"
        for case in fact.get("cases", ()):
            turn, width, longest = 2 * math.pi, case["dim"], case["max_period"]
            embed = SinusoidalTime(min_period=turn, max_period=turn * longest, reverse=False)
            ours = embed(torch.tensor(fact["t"]), width)
            yield f"time_embedding.{width}, {longest:g}", ours, case["values"], "time_embedding"

    def time_distribution(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        """A million draws of ours: their mean, and how many lie below each quantile."""
        reverse = "beta" not in fact  # openpi counts from the action to the noise
        stated = fact["analytic"] if reverse else fact["beta"]["analytic"]
        t = BetaTime().sample((DRAWS,), torch.Generator().manual_seed(0)).double().numpy()
        t = 1 - t if reverse else t
        share = np.array([float(p) for p in stated["quantiles"]])
        below = np.array([np.mean(t < x) for x in stated["quantiles"].values()])
        error, mean_error = np.sqrt(share * (1 - share) / DRAWS), t.std() / DRAWS**0.5
        name, rule = "time_distribution, in standard errors", Rule(atol=4.0)
        yield f"{name}: quantiles", below / error, share / error, rule
        yield f"{name}: mean", t.mean() / mean_error, stated["mean"] / mean_error, rule
        if "std" in stated:
            std_error = np.square(t - t.mean()).std() / (2 * t.std() * DRAWS**0.5)
            yield f"{name}: std", t.std() / std_error, stated["std"] / std_error, rule

    def attention_mask(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for i, case in enumerate(fact["cases"]):
            valid, opens = (torch.tensor(case[key]).bool()[None] for key in ("valid", "ar"))
            layout = TokenLayout(Segment("text", valid.shape[1], 0, "vlm", causal=True))
            ours = layout.mask(valid, {"text": opens})[0]
            rows = valid[0][:, None].expand_as(ours)  # nothing reads the others
            yield f"attention_mask.{i}: valid rows", ours, case["mask"], "exact", rows

    # -- robots -----------------------------------------------------------------------------------

    def aloha(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        robot = _robot("aloha")
        for x, stored in self._arrays.get("aloha.state", "aloha.state_pi"):
            ours = robot.encode_state(robot.data_state(x, live=True))
            yield "aloha.state_pi", ours, stored, "float64"
        for x, stored in self._arrays.get("aloha.actions", "aloha.actions_pi"):
            yield "aloha.actions_pi", robot.encode_actions(x), stored, "float64"
        for x, stored in self._arrays.get("aloha.actions_pi", "aloha.outputs"):
            yield "aloha.outputs", robot.decode_actions(x, live=True), stored, "float64"
        masks = fact["image_masks"]
        lacking = [name for name, there in masks.items() if not there]
        yield self._cameras("aloha", robot, masks, lacking, sent=set(masks) - set(lacking))

    def libero(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for family, masks in fact.items():
            robot = _robot("libero")
            lacking = [name for name, names in robot.cameras.items() if not names]
            yield self._cameras(f"libero.{family}", robot, masks, lacking, family=family)

    def droid(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for family, case in fact.items():
            robot, masks, zero = _robot("droid"), case["image_mask"], case["zero_image"]
            if set(masks) != set(robot.cameras):  # pi0-FAST calls them otherwise
                sent = iter([names for names in robot.cameras.values() if names])
                names = {name: None if name in zero else next(sent) for name in masks}
                robot = _robot("droid", cameras=names)
            yield self._cameras(f"droid.{family}", robot, masks, zero, family=family)
            joints, gripper = np.split(np.array(case["state"]), [7])
            parts = {"joint_position": joints, "gripper_position": gripper}
            state = robot.data_state(parts, live=True)
            yield f"droid.{family}.state", state, case["state"], "exact"

    def output_widths(self, fact: Mapping[str, int]) -> Iterator[Check]:
        ours = []
        for robot in map(_robot, fact):
            pipeline = self._pipeline(robot.state_dim, robot.action_dim, robot=robot, delta_mask=[])
            ours.append(pipeline.decode_actions(np.zeros((1, 32))).shape[-1])
        yield f"output_widths: {', '.join(fact)}", ours, list(fact.values()), "exact"

    def proprio(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for name in dict.fromkeys(case["robot"] for case in fact["cases"]):
            cases, robot = [c for c in fact["cases"] if c["robot"] == name], _robot(SIMULATED[name])
            live = np.array([c["eef_pos_xyz_quat_wxyz_gripper_open"] for c in cases])
            raw = robot.data_state({"eef_pos": live}, live=True)
            yield f"proprio.{name}: raw", raw, [c["proprio_raw"] for c in cases], "float64"
            ours = self._normalizer(robot, name, "state").normalize(raw)
            stored = [c["proprio_normalized"] for c in cases]
            yield f"proprio.{name}: normalised", ours, stored, "float64"

    def actions(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        for i, case in enumerate(fact["cases"]):
            robot = _robot(SIMULATED[case["robot"]])
            normalizer = self._normalizer(robot, case["robot"], "action")
            values = normalizer.denormalize(np.array(case["model_actions"]))
            output = robot.output_stage()
            assert output is not None
            ours = output(robot.decode_actions(values, live=True))
            yield f"actions.{i} ({case['robot']})", ours, case["env_actions"], "float64"

    def sticky_gripper_fractal(self, fact: Mapping[str, Any]) -> Iterator[Check]:
        ours = GripperLatch(dim=0)(np.array(fact["in"])[:, None])[:, 0]
        yield "sticky_gripper_fractal", ours, fact["out"], "float64"

    def _cameras(
        self,
        name: str,
        robot: Robot,
        masks: Mapping[str, bool],
        black: Sequence[str],
        sent: Iterable[str] | None = None,
        family: str = "pi0",
    ) -> Check:
        """Which cameras the model looks at and which are black, of those that the robot sends."""
        published = OmegaConf.load(config_dir() / "pipeline" / f"openpi_{family}.yaml")
        looks = OmegaConf.select(published, "black_cameras") or ()
        pipeline = self._pipeline(
            robot.state_dim, robot.action_dim, robot=robot, black_cameras=looks
        )
        names = [n for n, known in robot.cameras.items() if known] if sent is None else sent
        state = np.full(robot.live_state_dim, 0.5)
        seen = pipeline.observation(images=dict.fromkeys(names, PICTURE), text="x", state=state)
        ours = np.stack([seen["image_mask"], seen["images"].any(axis=(1, 2, 3))])
        stored = [[masks[n] for n in pipeline.cameras], [n not in black for n in pipeline.cameras]]
        return f"{name}: masks, pictures", ours, stored, "exact"

    def _pipeline(self, state: int, action: int, **changes: Any) -> PolicyPipeline:
        """A pipeline for so many entries that leaves numbers as they are."""
        widths = {"state": state, "action": action}
        arguments = {
            "image_size": PICTURE.shape[:2],
            "tokenizer": self._vocabulary,
            "max_tokens": 8,
            "horizon": 1,
            "state_dim": 32,
            "action_dim": 32,
            "normalization": dict.fromkeys(widths, "identity"),
            "statistics": {name: Statistics(mean=np.zeros(n)) for name, n in widths.items()},
        }
        return PolicyPipeline(**(arguments | changes))

    @cached_property
    def _vocabulary(self) -> Path:
        return train_tokenizer(["x"], self._scratch / "tokenizer.model", vocab_size=300)

    def _normalizer(self, robot: Robot, dataset: str, name: str) -> Normalizer:
        assert robot.normalization is not None
        statistics = load_statistics(self._all["statistics"][dataset])
        return make_normalizer(name, robot.normalization[name], statistics, None)


class _Recorder(Tokenizer):
    """A tokenizer without a vocabulary: a letter is a token, and each string ends in a seam."""

    def __init__(self) -> None:
        self.model = b""

    def encode(self, text: str) -> list[int]:
        return [*map(ord, text), SEAM]


class _Known(FastTokenizer):
    """Actions whose tokens are known."""

    vocab_size = 2048  # pyright: ignore

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def encode(self, actions: np.ndarray) -> list[int]:
        return self.ids


def _jittered(
    pixels: np.ndarray, *, brightness: float = 0, contrast: float = 0, hue: float = 0, **_: Any
) -> np.ndarray:
    """Pixels [n 3] in [0, 1] with their colours moved by so much."""
    jitter = ValueJitter(brightness=abs(brightness), contrast=abs(contrast), hue=abs(hue))
    draws = np.array([[brightness >= 0, contrast >= 0, hue >= 0, False]], float)  # ends of ranges
    image = torch.from_numpy(pixels.T[None, :, None] * np.float32(255))
    parameters = torch.from_numpy(jitter.parameters(draws, (1, len(pixels)))).float()
    return jitter(image, parameters)[0, :, 0].T.numpy() / 255


def _robot(name: str, **changes: Any) -> Robot:
    return build(robot_node(name) | changes, path=name)


def _spelt(calls: Sequence[Mapping[str, Any]]) -> list[int]:
    """Strings that an encoder was given, as _Recorder spells them."""
    spelt: list[int] = []
    for call in calls:
        spelt += [BOS] * call["add_bos"] + [*map(ord, call["text"]), SEAM] + [EOS] * call["add_eos"]
    return spelt
