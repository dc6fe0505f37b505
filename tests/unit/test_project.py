"""The project holds together: packages, lock, wheel, import promises, nothing of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED_EXTRAS = ("metaworld", "report", "test", "tracking")

ONLY = """
import sys
from importlib.abc import MetaPathFinder

class Only(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ALLOWED and not top.startswith("__"):
            raise ModuleNotFoundError(f"{name} is not allowed here", name=name)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that sees the repository only as the installed package."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def modules_of(folder: str) -> list[str]:
    """Import names of the package's files below `src/<folder>`."""
    files = sorted((ROOT / "src" / folder).rglob("*.py"))
    parts = [file.relative_to(ROOT / "src").with_suffix("").parts for file in files]
    return [".".join(("pizero", *part)).removesuffix(".__init__") for part in parts]


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


# --- packages -------------------------------------------------------------------------------------


def test_package_list_equals_tree():
    """A package left out imports in the checkout, and is missing from the wheel."""
    folders = [file.parent.relative_to(ROOT / "src") for file in ROOT.glob("src/**/__init__.py")]
    found = {".".join(("pizero", *folder.parts)) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"pizero.config"}


def test_every_folder_with_code_is_a_package():
    folders = {file.parent for file in ROOT.glob("src/**/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_the_code_and_the_configuration(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("src", "config"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    code = {f"pizero/{file.relative_to(tree / 'src')}" for file in tree.glob("src/**/*.py")}
    kinds = ("yaml", "json")
    found = [file for kind in kinds for file in tree.glob(f"config/**/*.{kind}")]
    data = {f"pizero/{file.relative_to(tree)}" for file in found}
    assert {file.suffix for file in found} == {f".{kind}" for kind in kinds}
    data |= {f"pizero/{file.relative_to(tree / 'src')}" for file in tree.glob("src/**/*.json")}
    assert inside == code | data


def test_importing_src_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-c", "import src"], cwd=ROOT, capture_output=True, text=True
    )
    assert re.search(r"called 'pizero', not 'src'.*pip install -e", done.stderr)


# --- what an import brings with it ----------------------------------------------------------------


def test_model_needs_torch_and_einops_only():
    """torch may load its own dependencies while the model is imported; nothing else may come."""
    of_torch = "filelock fsspec jinja2 markupsafe mpmath networkx sympy typing_extensions"
    allowed = {"torch", "einops", "pizero", *of_torch.split()}
    imports = "\n".join(f"import {name}" for name in modules_of("model"))
    done = python(
        f"import torch\nALLOWED = {allowed}\n{ONLY}\nsys.meta_path.insert(0, Only())\n{imports}\n"
        "from pizero.model import JointModel, Mixture, TokenLayout"
    )
    assert done.returncode == 0, done.stderr


def test_the_import_blocker_blocks():
    done = python(f"ALLOWED = set()\n{ONLY}\nsys.meta_path.insert(0, Only())\nimport einops")
    assert "einops is not allowed here" in done.stderr


def test_importing_pizero_is_light():
    code = "import sys, pizero; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "hydra"} & set(re.findall(r"'(\w+)'", done.stdout))


@pytest.mark.parametrize("module", modules_of("agent/env"))
def test_simulator_side_is_free_of_torch(module):
    done = python(f"import sys, {module}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_help_comes_without_torch():
    """Help is wanted in half a second, and torch alone takes longer than that to import."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "scripts/run.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--config-name" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pizero.agent.run" in imported
    assert "torch" not in imported


# --- the lock -------------------------------------------------------------------------------------


def locked_names() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", LOCK, re.MULTILINE))


def test_lock_covers_what_the_project_asks_for():
    asked = list(PROJECT["project"]["dependencies"])
    for extra in LOCKED_EXTRAS:
        asked += PROJECT["project"]["optional-dependencies"][extra]
    names = {canonicalize_name(Requirement(line).name) for line in asked} - {"torch"}
    assert sorted(names - locked_names()) == [], "run `make lock`"


def test_lock_leaves_the_accelerator_stack_and_tensorflow_out():
    unwanted = re.compile(r"torch|triton|nvidia-.*|cuda-.*|tensorflow(-cpu)?|jax(lib)?")
    assert [name for name in locked_names() if unwanted.fullmatch(name)] == []


def test_lock_pins_every_file_by_hash_and_names_no_index():
    entries = re.split(r"^(?=[a-z0-9-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert re.findall(r"://|--(?:extra-)?index|--find-links|\bfile:", LOCK) == []


# --- nothing of one machine -----------------------------------------------------------------------


def test_no_registry_host_and_no_path_of_a_machine():
    """An index is each user's own setting, and a path of one machine breaks on the next."""
    # In a process of its own: importing pip turns off the distutils that Inductor needs.
    names = (
        "from pip._internal.models.index import PyPI, TestPyPI as Test;"
        "print(PyPI.netloc, PyPI.file_storage_domain, Test.netloc, Test.file_storage_domain)"
    )
    asked = subprocess.run(
        [sys.executable, "-c", names], capture_output=True, text=True, check=True
    )
    hosts = asked.stdout.split()
    assert len(hosts) == 4
    folders = [str(folder) + "/" for folder in (ROOT, Path.home()) if len(folder.parts) > 1]
    unwanted = re.compile("|".join([*map(re.escape, hosts + folders), r"/(?:home|Users)/\w+/"]))
    files = tracked_files()
    assert len(files) > 20
    hits = []
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="replace")
        hits += [f"{file.relative_to(ROOT)}: {hit.group()}" for hit in unwanted.finditer(text)]
    assert hits == []


def test_no_lock_of_another_tool_is_tracked():
    assert "uv.lock" not in {file.name for file in tracked_files()}
