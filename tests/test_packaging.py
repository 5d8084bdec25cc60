"""What `pip install phema-dist` brings: what it pulls, what an import loads, and what a wheel holds."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import phema_dist

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = {"torch", "numpy", "fsspec", "safetensors", "xxhash", "tenacity", "tqdm"}
# Extras, and what is slow: each is imported where it is used, or not at all.
UNUSED = {
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "lightning",
    "pytorch_lightning", "transformers", "accelerate", "matplotlib", "PIL", "sklearn", "s3fs", "aiobotocore", "obstore",
    "ema_pytorch", "posthoc_ema",
}  # fmt: skip


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}


def test_installing_pulls_nothing_that_is_optional() -> None:
    assert names(PYPROJECT["project"]["dependencies"]) == NEEDED
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {"s3", "plot", "lightning", "transformers"} <= extras.keys()
    assert not NEEDED & names([requirement for extra in extras.values() for requirement in extra])


@pytest.mark.parametrize(
    ("code", "also"),
    [
        ("dir(phema_dist)", set[str]()),
        ("phema_dist.PostHocEMA, phema_dist.synthesize, phema_dist.plan, phema_dist.sweep", {"fsspec", "xxhash"}),
    ],
    ids=["the package", "what most people use"],
)
def test_importing_loads_nothing_that_is_not_used(code: str, also: set[str]) -> None:
    """What it costs is told by benchmarks/imports.py."""
    told = f"import sys, torch; was = set(sys.modules); import phema_dist; {code}; print(*sys.modules.keys() - was)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, cwd="/")
    loaded = set(done.stdout.split())
    assert not {name for name in loaded if any(f"{name}.".startswith(f"{unused}.") for unused in UNUSED)}
    others = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"phema_dist", "torch"}
    assert others >= also
    assert others <= also | NEEDED | {"_remote_module_non_scriptable"}
    assert also or loaded <= {"phema_dist", "__future__", "importlib"}


def test_the_command_is_there() -> None:
    (command,) = entry_points(group="console_scripts", name="phema")
    assert command.value == PYPROJECT["project"]["scripts"]["phema"] == "phema_dist.cli:main"
    assert callable(command.load())


def test_the_version_stands_in_one_place() -> None:
    assert version("phema-dist") == phema_dist.__version__
    assert PYPROJECT["project"]["dynamic"] == ["version"]


def test_a_wheel_holds_the_package_only() -> None:
    """And all of it: hatch takes what lies in this folder, so that no list of it can be forgotten."""
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["phema_dist"]}
    files = [path for path in (ROOT / "phema_dist").rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    assert {path.suffix for path in files} == {".py", ".typed"}
