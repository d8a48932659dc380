"""Compiled code, built when first needed: C++ on a CPU, Triton on a GPU. Everything works without it, slower.

``NAMM_TRANSFER_KERNELS=off`` in the environment does without; ``CXX`` names the compiler of the C++ code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["compiler", "cpu", "gpu"]

_SOURCE = Path(__file__).with_name("cpu.cpp")
_HEADERS = sorted(_SOURCE.parent.glob("*.h"))
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffast-math", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")
_log = logging.getLogger("namm_transfer")


@cache
def cpu() -> Any | None:
    """The operators of ``cpu.cpp`` (their signatures are at its end), or None where they cannot be built."""
    if _off():
        return None
    try:
        torch.ops.load_library(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "namm-transfer runs without its compiled CPU kernel, several times slower; it needs a C++20 compiler "
            f"(g++ or clang++, or its path in CXX). What went wrong: {said.strip()[:500]}",
            stacklevel=2,
        )
        return None
    return torch.ops.namm_transfer


@cache
def gpu() -> ModuleType | None:
    """The module ``kernels.triton``, or None where Triton cannot run."""
    if _off():
        return None
    try:
        from namm_transfer.kernels import triton

        triton.ready()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            "namm-transfer observes attention on the GPU without its Triton kernels, several times slower; they need "
            f"triton and a C compiler. What went wrong: {type(error).__name__}: {str(error).strip()[:500]}",
            stacklevel=2,
        )
        return None
    return triton


def compiler() -> str:
    """Path of a C++ compiler.

    Raises:
        OSError: none is found.
    """
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise OSError(f"no C++ compiler found (looked for {os.environ.get('CXX', 'c++')}, g++, clang++)")
    return found


def _off() -> bool:
    return os.environ.get("NAMM_TRANSFER_KERNELS", "").lower() in ("off", "0")


def _built() -> Path:
    """The shared library, from the user's cache folder if this very machine has built it before."""
    command = compiler()
    code = [file.read_bytes() for file in (_SOURCE, *_HEADERS)]
    identity = (code, torch.__version__, _FLAGS, command, _processor())
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "namm_transfer"
    library = folder / f"cpu-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    _log.warning("namm-transfer: compiling its CPU kernel, once (about 20 seconds)")
    root = Path(torch.__file__).parent
    # -fopenmp for the compiler but not for the linker: the threads are to be those of torch's own OpenMP
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch) / "cpu.o", Path(scratch) / "cpu.so"
        for step in (
            [command, *_FLAGS, "-isystem", str(root / "include"), "-c", str(_SOURCE), "-o", str(compiled)],
            [command, "-shared", str(compiled), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(linked)],
        ):
            subprocess.run(step, check=True, capture_output=True, text=True, timeout=600)
        os.replace(linked, library)  # whole or not at all, whoever else builds it meanwhile
    return library


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
