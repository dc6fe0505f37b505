"""`pizero-run` and `scripts/run.py`: the one door to every workspace.

Hydra composes, `typed_root` checks, and the workspace named by the root `_target_` runs. Hydra
makes no folders and no log files: the run folder is the workspace's affair, one folder per run
however many ranks. A mistake in the configuration ends in one readable message; HYDRA_FULL_ERROR=1
shows the traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pizero.agent.config import (
    check_primary,
    config_dir,
    locate,
    primary_configs,
    typed_root,
)

USAGE = """\
usage: {program} --config-name=NAME [key=value ...]

Runs the workspace that config/NAME.yaml describes. Any key can be changed: steps=100,
optim.lr=3e-4, model=demo (another file of the group config/model). Under torchrun every process
joins the run.

  --cfg job            print the composed configuration and stop (--resolve fills in references)
  --info defaults-tree print which file contributed what
  -m                   run once for each of several values, key=1,2,3 (not under torchrun)
  --config-dir DIR     a folder of your own configs, searched after this one: {folder}

configs and their commands:
{configs}
"""


NAME_FLAGS = ("--config-name", "-cn")
FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Run the workspace named on the command line."""
    arguments = sys.argv[1:]
    named = any(a.startswith(NAME_FLAGS) for a in arguments)
    hydra_only = any(
        a.startswith(("--hydra-help", "--version", "--shell", "-sc")) for a in arguments
    )
    if not named and not hydra_only:
        wants_help = bool({"--help", "-h"} & set(arguments))
        print(usage(), file=sys.stdout if wants_help else sys.stderr)
        sys.exit(0 if wants_help else "error: --config-name=NAME is needed")
    if not any(a.startswith(("--config-dir", "-cd", "--config-path", "-cp")) for a in arguments):
        try:
            for name in named_configs(arguments):
                check_primary(name)
        except ValueError as error:
            sys.exit(message(error))
    sys.argv[1:] = with_quiet_hydra(arguments)
    # Without this Hydra prints what it refuses itself, in several lines, and leaves.
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"

    def start(composed: DictConfig) -> None:
        _restore(before)
        run(composed)

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()))(start)()
    except (HydraException, OmegaConfBaseException) as error:
        _restore(before)
        if before == "1":
            raise
        sys.exit(f"error: {explained(error)}")


def named_configs(arguments: list[str]) -> list[str]:
    """What --config-name says, in either way of writing it."""
    names = []
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in NAME_FLAGS:
            names.append(following)
        elif flag.startswith(NAME_FLAGS):
            names.append(flag.partition("=")[2])
    return names


def explained(error: Exception) -> str:
    """What Hydra refuses, in one line with the nearest name (it would offer to add the new one)."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"config has no {option!r} in the group {group!r}{nearest(option, error.options)}"
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        known = [str(k) for k in cause.parent_node if k not in ("hydra", "_target_")]
        hint = nearest(str(cause.key), known) or f"; +{cause.full_key}=... adds it"
        return f"config has no key {cause.full_key!r}{hint}"
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the nearest of the names that are known, or all of them."""
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def run(composed: DictConfig) -> None:
    """Check a composed configuration and run its workspace."""
    try:
        config = typed_root(composed)
        locate(config._target_)(config).run()
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        sys.exit(message(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")


def message(error: Exception) -> str:
    """One line for a mistake the user can mend; with the place in the code for anything else."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if isinstance(error, (ValueError, FileNotFoundError, FileExistsError)):
        return f"{rank}error: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{rank}error: {type(error).__name__}: {error}\n"
        f"  at {frame.filename}:{frame.lineno} in {frame.name}; HYDRA_FULL_ERROR=1 shows more"
    )


def _restore(before: str | None) -> None:
    """Put HYDRA_FULL_ERROR back, which processes that a workspace starts would inherit."""
    os.environ.pop(FULL_ERROR, None)
    if before is not None:
        os.environ[FULL_ERROR] = before


def usage() -> str:
    """The help text, with every primary config and the command in its first line."""
    configs = "\n".join(f"  {name:24} {command}" for name, command in primary_configs().items())
    return USAGE.format(
        program=os.path.basename(sys.argv[0]), folder=config_dir(), configs=configs
    ).rstrip()


def with_quiet_hydra(arguments: list[str]) -> list[str]:
    """The command line with the overrides that keep Hydra from writing folders and logs."""
    quiet = [
        "hydra.run.dir=.",
        "hydra.sweep.dir=.",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    given = {a.lstrip("+").split("=", 1)[0] for a in arguments}
    quiet = [q for q in quiet if q.split("=", 1)[0] not in given]
    # argparse wants overrides in one piece, so ours go where the first of the user's stands.
    at = next((i for i, a in enumerate(arguments) if is_override(a)), len(arguments))
    return [*arguments[:at], *quiet, *arguments[at:]]


def is_override(argument: str) -> bool:
    """Whether an argument changes the configuration: key=value, +key=value, ~key."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
