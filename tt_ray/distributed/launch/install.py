"""Make the pinned environment on a host, unless it is there. Run by its path, with any Python from 3.11 on.

TT_RAY_VENV     where it is to be
TT_RAY_EXTRAS   optional parts of the package, such as optuna,postgres
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

EXTRAS = "optuna,postgres,mazes"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LIST = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name']}))"
)


def main() -> None:
    """Leave a complete environment as it is, without asking the network; make or mend it else."""
    if sys.version_info < (3, 11):  # noqa: UP036  # hosts may have any
        sys.exit(
            f"TT_RAY_PYTHON: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}"
        )
    tree = Path(__file__).resolve().parents[3]
    venv = Path(os.environ["TT_RAY_VENV"])
    extras = os.environ.get("TT_RAY_EXTRAS", EXTRAS)
    if not (faults := _faults(venv, tree, extras)):
        print(f"environment {venv} has the pinned versions")
        return
    print(f"installing into {venv}: {faults[0]}", flush=True)
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w") as lock:  # hosts may share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _faults(venv, tree, extras):
            _install(venv, tree, extras)
    if faults := _faults(venv, tree, extras):
        sys.exit(f"environment {venv} is not what constraints.txt says: {'; '.join(faults[:3])}")


def faults_of(installed: Mapping[str, str], wanted: Iterable[str], pins: Mapping[str, str]) -> list[str]:
    """What an environment lacks: `wanted` names, and packages that are not of the pinned version.

    A version's local part, as in 2.9.0+cpu, does not count.
    """
    have = {normal(name): version.partition("+")[0] for name, version in installed.items()}
    missing = [f"{name} is missing" for name in wanted if normal(name) not in have]
    other = [
        f"{name} is {have[normal(name)]}, not {version}"
        for name, version in pins.items()
        if have.get(normal(name), version) != version
    ]
    return missing + other


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted_names(pyproject: str, extras: str) -> list[str]:
    """The packages that a pyproject.toml names, with those of `extras`, and itself."""
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    lines = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        lines += project["optional-dependencies"][extra]
    return [project["name"], *(match[0] for line in lines if (match := _NAME.match(line)))]


def pinned(constraints: str) -> dict[str, str]:
    """Versions by name, out of a constraints.txt."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in constraints.splitlines())
    return {name: version for name, equals, version in (line.partition("==") for line in lines) if equals}


def _faults(venv: Path, tree: Path, extras: str) -> list[str]:
    python = venv / "bin" / "python"
    if not python.exists():
        return ["it is not there"]
    listed = subprocess.run([python, "-I", "-c", _LIST], capture_output=True, text=True, check=False)
    if listed.returncode:
        return ["its Python does not run"]
    wanted = wanted_names((tree / "pyproject.toml").read_text(), extras)
    return faults_of(json.loads(listed.stdout), wanted, pinned((tree / "constraints.txt").read_text()))


def _install(venv: Path, tree: Path, extras: str) -> None:
    """The package itself comes last, so that an installation that was cut short is seen to be one."""
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if not (venv / "bin" / "pip").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    target = f"{tree}[{extras}]" if extras else str(tree)
    done = subprocess.run([*pip, "-c", str(tree / "constraints.txt"), "-e", target], check=False)
    if done.returncode:
        sys.exit(f"pip could not install into {venv}; what it said stands above")


if __name__ == "__main__":
    main()
