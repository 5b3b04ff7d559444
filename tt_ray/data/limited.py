"""Reading files of others in a process of its own, which may crash, hang or grow without harm to this one.

HDF5 is read by a C library that damaged or hostile files can crash, and Arrow likewise. So no such file is
opened here: a child process reads it under limits of memory, CPU time and file size, knows none of this
process's environment but what an interpreter needs, and hands back plain arrays. Once it reads an HDF5 file
it can open no other: neither one that this one points to, nor a plug-in for an odd compression.
"""

from __future__ import annotations

import codecs
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.errors import UserError

Arrays = dict[str, NDArray[Any]]

CPU_SECONDS = 60
"""CPU time of a child, and one more second for each `BYTES_PER_SECOND` of the files that it reads."""
BYTES_PER_SECOND = 1 << 20
PATIENCE = 20
"""Wall-clock time of a child, in multiples of its CPU time: the machine may be busy, or the disk slow."""
MEMORY_BYTES = 2 << 30
"""Memory of a child beyond what an idle one has, and `GROWTH` times the size of the files that it reads."""
GROWTH = 20

_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "SYSTEMROOT")
_REFUSED = 1  # the child's exit code when it says why


def read_apart(reader: str, path: Path, **arguments: Any) -> Arrays:
    """What a reader makes of a file, or of all files in a folder.

    `reader` is `module:function`, a function of a path and keyword arguments that returns `Arrays`;
    `arguments` are JSON data.

    Raises:
        UserError: what the reader says, or that it crashed, or what it took more than its share of.
    """
    size = _size(path)
    seconds = CPU_SECONDS + size // BYTES_PER_SECOND
    request = {
        "reader": reader,
        "path": str(path),
        "arguments": arguments,
        "seconds": seconds,
        "memory": MEMORY_BYTES + GROWTH * size,
    }
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-m", __name__, json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=complaints,
                env=_environment(),
                timeout=PATIENCE * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{path}: not read after {PATIENCE * seconds} s: it is damaged") from None
        output.seek(0)
        if child.returncode in (0, _REFUSED):
            with suppress(ValueError, TypeError, EOFError, OSError, MemoryError):
                return _received(output)
        raise UserError(f"{path}: {_fate(child.returncode, request, complaints)}")


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _environment() -> dict[str, str]:
    """What the child's interpreter needs to find the same modules; no secrets."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    folders = [folder or os.getcwd() for folder in sys.path]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(folders),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _received(output: IO[bytes]) -> Arrays:
    """The arrays that the child has written; what it said where it refused."""
    head = json.loads(output.readline(1 << 20))
    if "refused" in head:
        raise UserError(" ".join(str(head["refused"]).split()))
    return {str(name): np.load(output, allow_pickle=False) for name in head["arrays"]}


def _fate(code: int, request: Mapping[str, Any], complaints: IO[bytes]) -> str:
    """How a child has ended that said nothing."""
    if code == -signal.SIGXCPU:
        return (
            f"not read after {request['seconds']} s of CPU time: it is damaged, or far larger than it looks"
        )
    if code == -signal.SIGXFSZ:
        return "it holds far more than it looks: it is damaged"
    if code == -signal.SIGKILL:
        return "reading it was stopped by the system, as when memory runs out"
    if code < 0:
        with suppress(ValueError):
            return f"reading it crashes ({signal.Signals(-code).name}): it is damaged"
    complaints.seek(0)
    last = complaints.read(1 << 20).decode(errors="replace").strip().splitlines()[-1:]
    return f"it cannot be read: {''.join(last) or f'the reader ended with code {code}'}"


def main(text: str) -> int:
    """What the child does: read as the request says, and write the arrays to what was standard output."""
    request = json.loads(text)
    module, _, name = request["reader"].partition(":")
    read: Callable[..., Arrays] = getattr(importlib.import_module(module), name)
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what a library prints must not get among the arrays
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and then ends in another error
        _limit(request["seconds"], request["memory"])
        try:
            arrays = read(Path(request["path"]), **request["arguments"])
            output.write(json.dumps({"arrays": list(arrays)}).encode() + b"\n")
            for array in arrays.values():
                np.save(output, array, allow_pickle=False)
        except MemoryError:
            problem = f"{request['path']}: reading it needs more than {request['memory'] >> 20} MiB of memory"
        except UserError as error:
            problem = str(error)
        except Exception as error:  # whatever the libraries raise of a damaged file
            problem = f"{request['path']}: it cannot be read: {type(error).__name__}: {error}"
        else:
            return 0
        output.seek(0)
        output.truncate()
        output.write(json.dumps({"refused": problem}).encode() + b"\n")
    return _REFUSED


def _limit(seconds: int, memory: int) -> None:
    """Bound what this process may take from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: memory that is reserved but not used is not known
        mapped = 1 << 30
    for kind, limit in (
        (resource.RLIMIT_CPU, spent + seconds),
        (resource.RLIMIT_AS, mapped + memory),
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # a lower limit is in force already
            resource.setrlimit(kind, (limit, limit + (kind == resource.RLIMIT_CPU)))


def allow_files(count: int) -> None:
    """Let this process open no more than `count` files on top of those that are open."""
    for name in ("ascii", "latin-1", "unicode_escape"):
        codecs.lookup(name)  # Python opens a file for each when it is first needed
    probe = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + count, probe + count))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
