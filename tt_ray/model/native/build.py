"""Compiles native code for this machine's processor, once, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  its OpenMP runtime must be loaded first, so that there is one pool of threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What a library is made of."""

    main: Path
    """The file to compile; the library has its name."""
    headers: tuple[Path, ...]


_FOLDER = Path(__file__).parent
VECTORS = _FOLDER / "vectors.h"
DECODER = Sources(
    _FOLDER / "decoder.cpp",
    (*(_FOLDER / f"{name}.h" for name in ("attention", "block", "network", "sampling")), VECTORS),
)
FLAGS = (
    "-O3",
    "-std=c++17",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)


class NativeUnavailableError(Exception):
    """Why there is no native code here, in one line."""


@functools.cache
def load_library(sources: Sources = DECODER) -> ctypes.CDLL:
    """The compiled functions of `sources`; `NativeUnavailableError` where they cannot be had.

    The library is kept in the user's cache folder, under a name that changes with the sources, the compiler
    and the processor.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler (g++ or clang++) is installed")
    path = _cache_folder() / f"{sources.main.stem}-{_fingerprint(compiler, sources)}.so"
    try:
        if not path.exists():
            _compile(compiler, sources, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path}: {error.strerror or error}") from error
    library.tt_ray_vector_bytes.restype = ctypes.c_int64
    return library


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "tt-ray"
    except RuntimeError as error:  # a user without a home
        raise NativeUnavailableError("no home folder to keep it in; set XDG_CACHE_HOME") from error


def _compile(compiler: str, sources: Sources, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        command = [compiler, *_flags(compiler), str(sources.main), "-o", temporary]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise NativeUnavailableError(f"{compiler} failed: {first}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _flags(compiler: str) -> tuple[str, ...]:
    wide = platform.machine() in ("x86_64", "AMD64")
    return (*FLAGS, "-mprefer-vector-width=512") if wide else FLAGS


def _fingerprint(compiler: str, sources: Sources) -> str:
    digest = hashlib.sha256("\0".join([*_flags(compiler), compiler, _processor()]).encode())
    for path in (sources.main, *sources.headers):
        digest.update(path.read_bytes())
    try:
        digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NativeUnavailableError(f"{compiler} does not run: {error}") from error
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What the processor can do: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
