"""Imports go one way, and the lower rooms stay light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tt_ray

PACKAGE = Path(tt_ray.__file__).parent
# From the bottom up. A part may import itself and what is on a lower level.
LEVELS = [
    {"errors"},
    {"config", "strict_yaml", "locks", "files", "plain", "texts"},
    {"experiment_file", "search", "fingerprints"},
    {"search_section"},
    {"sweep_file"},
    {"data"},
    {"model", "smoke"},
    {"training", "planning"},
    {"evaluation", "tracking", "bench"},
    {"distributed"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
WITHOUT_RAY = {part for part, level in LEVEL_OF.items() if level <= LEVEL_OF["evaluation"]} - {"tracking"}
TORCH_ONLY = {"errors", "config", "model", "training", "planning"}
TORCH_ONLY_PACKAGES = {"torch", "numpy", "safetensors", "tt_ray"}
HEAVY = [
    *("gymnasium", "minari", "mujoco", "pydantic", "yaml", "pandas", "scipy", "ray", "mlflow"),
    *("typer", "rich", "matplotlib", "h5py", "sklearn", "pyarrow", "PIL"),
]

CHILD = """
import importlib, importlib.abc, json, sys
blocked, modules, path = json.loads(sys.argv[1])
sys.path[:0] = path

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} must not be needed here")

sys.meta_path.insert(0, Refuse())
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{module}: {error}")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def sources() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def part_of(module: str) -> str:
    """`data` for `tt_ray.data.tokens`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names that `source` imports, in functions too; `from a import b` gives `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in `source`, as the module of that name, breaks the house's order."""
    part, found = part_of(module), []
    for name in sorted(imports(source, module, is_package)):
        root, target = name.partition(".")[0], part_of(name)
        if root == "tt_ray" and target in LEVEL_OF and target != part:
            if not part or LEVEL_OF[target] >= LEVEL_OF[part]:
                found.append(f"{module} imports {name}, which is not below it")
        elif part in WITHOUT_RAY and root in ("ray", "mlflow"):
            found.append(f"{module} imports {name}")
        elif part in TORCH_ONLY and root not in sys.stdlib_module_names | TORCH_ONLY_PACKAGES:
            found.append(f"{module} imports {name}, and must run with torch alone")
    return found


def import_afresh(modules: list[str], blocked: list[str], path: Path | None = None) -> set[str]:
    """Import in a new process where `blocked` cannot be imported; the top-level packages it then holds."""
    argument = json.dumps([blocked, modules, [str(path)] if path else [str(PACKAGE.parent)]])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, argument], capture_output=True, text=True, timeout=300
    )
    if child.returncode != 0:
        raise AssertionError(child.stderr.strip())
    return set(json.loads(child.stdout.splitlines()[-1]))


def modules_of(parts: set[str]) -> list[str]:
    return [module for module in sources() if part_of(module) in parts]


def test_every_part_has_a_level() -> None:
    assert {part_of(module) for module in sources()} - {""} <= LEVEL_OF.keys()
    assert set(modules_of(TORCH_ONLY)) >= {
        "tt_ray.config",
        "tt_ray.model",
        "tt_ray.training",
        "tt_ray.planning",
    }


@pytest.mark.parametrize("module", sources())
def test_imports_go_one_way(module: str) -> None:
    file = sources()[module]
    assert violations(file.read_text(encoding="utf-8"), module, file.name == "__init__.py") == []


def test_lower_rooms_do_without_ray_and_mlflow() -> None:
    assert import_afresh(modules_of(WITHOUT_RAY), blocked=[]) & {"ray", "mlflow"} == set()


def test_model_training_and_planning_need_torch_alone() -> None:
    assert import_afresh(modules_of(TORCH_ONLY), blocked=HEAVY) & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tt_ray.data.tokens", "import tt_ray.model.cache"),
        ("tt_ray.data.tokens", "from tt_ray.model import cache"),
        ("tt_ray.data.tokens", "from tt_ray import model"),
        ("tt_ray.data.tokens", "from ..model import cache"),
        ("tt_ray.data.tokens", "from .. import model"),
        ("tt_ray.data.tokens", "def late():\n    import tt_ray.cli"),
        ("tt_ray.planning.beam", "from tt_ray.training import loop"),
        ("tt_ray.evaluation.scores", "import tt_ray.tracking"),
        ("tt_ray.config", "from tt_ray.experiment_file import load_experiment"),
        ("tt_ray", "from tt_ray.config import ExperimentConfig"),
        ("tt_ray.evaluation.scores", "import ray"),
        ("tt_ray.data.tokens", "def late():\n    from mlflow.tracking import MlflowClient"),
        ("tt_ray.model.cache", "import pandas as pd"),
        ("tt_ray.training.loop", "from scipy import stats"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tt_ray.model.cache", "import torch\nimport torch.nn.functional as F\nfrom tt_ray.config import x"),
        ("tt_ray.model.cache", "from .loss import y\nfrom tt_ray.model import loss\nimport json"),
        ("tt_ray.distributed.train", "import ray\nfrom tt_ray.training.loop import fit"),
        ("tt_ray.tracking", "import mlflow\nfrom tt_ray import __version__"),
    ],
)
def test_proper_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_are_its_own() -> None:
    assert imports("from . import cache", "tt_ray.model", is_package=True) == {"tt_ray.model.cache"}
    assert imports("from .. import data", "tt_ray.model", is_package=True) == {"tt_ray.data"}


@pytest.mark.parametrize("source", ["import yaml", "import planted.deeper"])
def test_a_planted_indirect_import_is_found(tmp_path: Path, source: str) -> None:
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "deeper.py").write_text("from yaml import safe_load")
    with pytest.raises(AssertionError, match="yaml must not be needed here"):
        import_afresh(["planted"], blocked=["yaml"], path=tmp_path)
    assert "yaml" in import_afresh(["planted"], blocked=[], path=tmp_path)
