"""Nothing that is read can run: no pickles, no code from text, no shell, in any file of the package.

One file reads pickles of others, `READS_PICKLES`: with a reader that says itself what a name stands for, and
with torch's restricted one. What these make of hostile files is tested in `model/test_inert.py`.
"""

import ast
from pathlib import Path

import pytest

import tt_ray

PACKAGE = Path(tt_ray.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "jsonpickle"}
SAFE_CALLS = {"np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}
"""Calls that must say this, since their defaults have changed before."""
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "subprocess.getoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("torch.load", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle", "np.loads", "runpy.run_path"),
    *("Tuner.restore", "tune.Tuner.restore", "h5py.is_hdf5"),
}
OPENS_HDF5 = {"data/d4rl_file.py", "data/minari_writer.py"}
"""What may open HDF5 files: the reader that runs in a process apart, and the writer of new ones."""
READS_MINARI = {"data/minari_episodes.py"}
READS_PICKLES = {"model/inert.py"}
IMPORTS_BY_NAME = {
    "data/limited.py": "readers of the package, in a process apart",
    "planning/objectives.py": "objectives, module:name, of the user's own path",
    "evaluation/environments.py": "environments, module:EnvId, of the user's own path",
    "evaluation/mazes.py": "packages that it names itself",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def findings(source: str, name: str) -> list[str]:
    """What in the source of the file `name` could run what it reads."""
    found = []
    tree, pickles = ast.parse(source), name in READS_PICKLES
    allowed = restricted_bases(tree) if pickles else set()
    for node in ast.walk(tree):
        names: list[str] = []
        renamed = isinstance(node, ast.Import) and any(alias.asname for alias in node.names)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        if not (pickles and isinstance(node, ast.Import) and names == ["pickle"] and not renamed):
            found += [f"imports {part}" for part in names if MODULES & set(part.split("."))]
        if isinstance(node, ast.Attribute | ast.Name) and MODULES & set(dotted(node).split(".")):
            found += [] if node in allowed else [f"uses {dotted(node)}"]
        if isinstance(node, ast.Call):
            found += _call(node, name)
    return found


def restricted_bases(tree: ast.Module) -> set[ast.AST]:
    """`pickle.Unpickler`, where it is the base of a class that looks names up in a way of its own."""
    return {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(item, ast.FunctionDef) and item.name == "find_class" for item in node.body)
        for base in node.bases
        if dotted(base) == "pickle.Unpickler"
        for part in ast.walk(base)
    }


def _call(node: ast.Call, name: str) -> list[str]:
    called = dotted(node.func)
    said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
    found = []
    weights = called == "torch.load" and said.get("weights_only") is True and name in READS_PICKLES
    if (called in CALLS and not weights) or (
        called.endswith((".get_episodes", ".iterate_episodes")) and name not in READS_MINARI
    ):
        found.append(f"calls {called}")
    if called in SAFE_CALLS and said.get(SAFE_CALLS[called][0], "unsaid") is not SAFE_CALLS[called][1]:
        found.append(f"calls {called} without {SAFE_CALLS[called][0]}=False")
    if "shell" in said and said["shell"] is not False:
        found.append(f"calls {called} with a shell")
    if called.endswith("import_module") and name not in IMPORTS_BY_NAME:
        found.append("imports a module by name")
    if called == "h5py.File" and name not in OPENS_HDF5:
        found.append("opens HDF5 files in this process")
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_nothing_that_is_read_can_run(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    assert findings(file.read_text(encoding="utf-8"), name) == []


def test_the_exceptions_are_needed() -> None:
    named = {*OPENS_HDF5, *READS_MINARI, *READS_PICKLES, *IMPORTS_BY_NAME}
    assert {name for name in named if not findings((PACKAGE / name).read_text(), "another.py")} == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray\nray.cloudpickle.loads(x)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=unknown)",
        "import yaml\nyaml.load(f)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import subprocess\nsubprocess.run(x, shell=unknown)",
        "eval(x)",
        "import importlib\nimportlib.import_module(x)",
        "from ray import tune\ntune.Tuner.restore(path)",
        "import h5py\nh5py.File(path)",
        "storage.get_episodes(range(3))",
    ],
)
def test_a_planted_fault_is_found(source: str) -> None:
    assert findings(source, "planted.py") != []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle\npickle.Unpickler(f).load()",
        "import pickle\nclass Reader(pickle.Unpickler):\n    pass",
        "import pickle\nclass Reader(pickle._Unpickler):\n    def find_class(self): ...",
        "import pickle as innocent",
        "from pickle import loads",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=chosen)",
    ],
)
def test_the_reader_of_pickles_may_read_them_in_two_ways_only(source: str) -> None:
    assert findings(source, "model/inert.py") != []
