"""From YAML to typed objects: compose, resolve, check, merge into the root dataclass, build.

A primary file in `config/` names a workspace in its root `_target_`. The annotation of that
workspace's `config` argument is the dataclass which the composed tree must fit exactly, so a
misspelt key is refused wherever it was written: in a file, as `key=`, `+key=` or `++key=`. Leaves
with their own `_target_` are checked against the signature of what they name, by `build`.

Nothing here imports torch, so the command line stays quick.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class Precision(Enum):
    """Arithmetic of the forward pass; the weights that are trained are fp32 in any case."""

    auto = "auto"  # bf16 on a GPU, fp32 on a CPU
    bf16 = "bf16"
    fp32 = "fp32"


class Resume(Enum):
    """What to do when the run folder already holds checkpoints."""

    auto = "auto"  # continue; refuse if the configuration would change the result
    changed = "changed"  # continue, whatever was changed
    never = "never"  # refuse


@dataclass
class ExpertOptimConfig:
    """What differs for one expert; null keeps the common value."""

    lr: float | None = None
    weight_decay: float | None = None


@dataclass
class OptimConfig:
    """The optimizer and its parameter groups."""

    optimizer: Any  # the class, without parameters, learning rate and weight decay
    lr: float
    weight_decay: float
    decay_norms: bool  # also decay norms, biases and other vectors
    clip_norm: float | None
    experts: dict[str, ExpertOptimConfig]  # by the model's names


@dataclass
class DataConfig:
    """Training and held-out episodes, and how they are read."""

    path: str  # of the data set, or what holds several; `train` and `val` refer to it
    train: Any
    val: Any
    augment: Any
    workers: int  # reading processes per rank; 0 reads in the training process
    order: str
    window: int


@dataclass
class TokenizerConfig:
    """The SentencePiece model that is trained when the pipeline names no file."""

    vocab_size: int


@dataclass
class ActionTokenizerConfig:
    """The FAST tokenizer that is fitted when a pipeline with the prompt `fast` names none."""

    vocab_size: int
    scale: float
    chunks: int


@dataclass
class ValidateConfig:
    """Held-out episodes: how often, how many frames, and what counts as accurate."""

    every: int
    frames: int
    batch_size: int
    euler_steps: int
    answers: int  # frames whose actions pi0-FAST spells, which is slow
    thresholds: list[float]


@dataclass
class CheckpointConfig:
    """How often to save, and which checkpoints stay: the last few and every so many steps."""

    every: int
    keep_last: int
    keep_every: int | None


@dataclass
class TrainConfig:
    """Root of every config/train_*.yaml; config/train/default.yaml explains the values."""

    _target_: str
    name: str
    run_dir: str
    seed: int
    model: Any
    pipeline: Any
    pipelines: dict[str, Any] | None  # of a mix: what each data set changes in the pipeline
    data: DataConfig
    tokenizer: TokenizerConfig
    action_tokenizer: ActionTokenizerConfig
    steps: int
    batch_size: int
    micro_batch_size: int | None
    flow_samples: int
    optim: OptimConfig
    schedule: Any
    ema_decay: float | None
    freeze: list[str]
    init_from: str | None
    device: str
    precision: Precision
    compile: bool
    threads: int | None
    validate: ValidateConfig
    checkpoint: CheckpointConfig
    log_every: int
    max_minutes: float | None
    resume: Resume
    tracker: Any


def config_dir() -> Path:
    """The configuration tree: `config/` of a checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "config", package / "config"):
        if (folder / "train").is_dir():
            return folder
    raise FileNotFoundError(f"no configuration tree beside or inside {package}")


def primary_configs() -> dict[str, str]:
    """Name of each primary file -> the command in its first line."""
    files = sorted(config_dir().glob("*.yaml"))
    return {f.stem: f.read_text().split("\n", 1)[0].lstrip("# ").strip() for f in files}


def check_primary(name: str) -> None:
    """Raise ValueError, with the nearest name, where no primary file is called so."""
    known = primary_configs()
    if name.removesuffix(".yaml") not in known:
        raise ValueError(f"no config {name!r} in {config_dir()}{_nearest(name, known)}")


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The tree as Hydra composes it, for use outside `scripts/run.py`."""
    check_primary(name)
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = previous


def load_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """Compose a primary file and return its typed root."""
    return typed_root(compose_config(name, overrides))


def typed_root(config: DictConfig) -> Any:
    """Resolve a composed tree, refuse missing and unknown keys, and return its root dataclass."""
    if "_target_" not in config:
        raise ValueError("the config's root needs a _target_ that names a workspace")
    if missing := missing_keys(config):
        _fit(config, root_class(config._target_))  # a misspelt key leaves another without a value
        raise ValueError(f"these keys have no value: {', '.join(missing)}. Give them as key=value")
    config = config.copy()
    OmegaConf.resolve(config)
    merged = _fit(config, root_class(config._target_))
    if missing := missing_keys(merged):
        raise ValueError(f"these keys are not in the config: {', '.join(missing)}")
    return OmegaConf.to_object(merged)


def _fit(config: DictConfig, schema: type) -> DictConfig:
    """The tree merged into its root dataclass; ValueError where it does not fit."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, schema)) from error
    assert isinstance(merged, DictConfig)
    return merged


def root_class(target: str) -> type:
    """The dataclass that a workspace takes as `config`."""
    schema = get_type_hints(locate(target).__init__).get("config")
    if not (isinstance(schema, type) and is_dataclass(schema)):
        raise ValueError(f"{target} must take one argument `config` annotated with a dataclass")
    return schema


def missing_keys(config: DictConfig) -> list[str]:
    """Dotted names of all keys that are still `???`, in order."""
    return sorted(OmegaConf.missing_keys(config))


def to_yaml(config: Any) -> str:
    """A typed root as the YAML text that composes to it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def build(
    node: Any, *, path: str = "", packages: Sequence[str] | None = None, **arguments: Any
) -> Any:
    """Make the object a `_target_` node describes; `arguments` are live objects it cannot hold.

    Keys are compared with the signature first, in the node and all nodes below it. `packages`
    limits what may be named, for configuration that came with a file from elsewhere. A `_partial_`
    node gives a `functools.partial`. An argument given here replaces the node's.
    """
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not (isinstance(node, Mapping) and "_target_" in node):
        raise ValueError(f"{path or 'config'} must be a mapping with a _target_, got {node!r}")
    node = {key: value for key, value in node.items() if key not in arguments}
    for where, target in iter_targets(node, path):
        name = target["_target_"]
        if packages is not None and name.split(".")[0] not in packages:
            raise ValueError(
                f"{where}: _target_ {name!r} is outside {sorted(packages)}; if you trust "
                "where this configuration comes from, pass its package too"
            )
        bind(target, where, given=arguments if target is node else ())
    wants_partial = node.pop("_partial_", False)
    try:
        # Live objects stay outside OmegaConf, which would turn dataclasses into configs.
        make = instantiate(OmegaConf.create(node), _convert_="all", _partial_=True)
        make = partial(make, **arguments)
        return make if wants_partial else make()
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else None
        raise ValueError(f"{path or node['_target_']}: {cause or error}") from error


def iter_targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_` in a plain tree, with its dotted path; outermost first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path or "config", node
        for key, value in node.items():
            yield from iter_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from iter_targets(value, f"{path}[{i}]")


def bind(node: Mapping[str, Any], path: str, given: Sequence[str] | Mapping[str, Any] = ()) -> None:
    """Check a node's keys against the signature of its target.

    `given` are arguments that will come later; a `_partial_` node may leave any out.
    """
    target = node["_target_"]
    parameters = inspect.signature(locate(target, path)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    keys = {k for k in node if k not in ("_target_", "_partial_", "_recursive_", "_convert_")}
    for key in sorted(keys | set(given)):
        if key not in named and not open_ended:
            raise ValueError(f"{path}: {target} has no argument {key!r}{_nearest(key, named)}")
    required = [n for n in named if parameters[n].default is inspect.Parameter.empty]
    lacking = [n for n in required if n not in keys and n not in given]
    if lacking and not node.get("_partial_", False):
        raise ValueError(f"{path}: {target} also needs {', '.join(lacking)}")


def locate(target: str, path: str = "_target_") -> Any:
    """The class or function with this dotted name; names the nearest one if there is none."""
    names = target.split(".")
    found: Any = None
    try:
        found = importlib.import_module(names[0])
        for i, name in enumerate(names[1:], start=2):
            if not hasattr(found, name):
                importlib.import_module(".".join(names[:i]))
            found = getattr(found, name)
        return found
    except ModuleNotFoundError as error:
        if not target.startswith(str(error.name)):
            raise ValueError(f"{path}: {target} needs the package {error.name}") from error
        name = str(error.name).rsplit(".", 1)[-1]
        known = [n for n in dir(found) if not n.startswith("_")] if "." in str(error.name) else []
        raise ValueError(f"{path}: cannot find {target!r}{_nearest(name, known)}") from error


def _nearest(name: str, candidates: Any) -> str:
    names = [str(c) for c in candidates]
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(names))}" if 0 < len(names) <= 30 else ""


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    """One line for a merge error: the full key, and the nearest key that exists."""
    message = str(error).split("\n", 1)[0]
    key = str(error.full_key or error.key or "")
    if error.object_type is not None and is_dataclass(error.object_type):
        schema = error.object_type
    known = [f.name for f in fields(schema)]
    leaf = key.rsplit(".", 1)[-1]
    if leaf in known:
        return f"config key {key!r}: {message}"
    return f"config has no key {key!r}{_nearest(leaf, known)}"
