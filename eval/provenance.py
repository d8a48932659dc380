"""Where results come from: revision, versions, hardware in general words, and digests of what was run."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import namm_transfer
from namm_transfer.errors import DataError
from namm_transfer.files import write_atomically

__all__ = ["digest", "provenance", "record"]

PACKAGES = (
    "torch", "transformers", "timm", "peft", "gymnasium", "mujoco", "decord", "decord2", "numpy", "cma", "scipy",
)  # fmt: skip


def record(path: Path, inputs: Mapping[str, str], seed: int) -> None:
    """Add a start of the run to `path` (JSON), the first before any unit is evaluated.

    Raises:
        DataError: the run was begun with other weights or videos.
    """
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    known = {name: was for start in starts for name, was in start["inputs"].items()}  # a run may have grown
    for name, was in known.items():
        if inputs.get(name) != was:
            raise DataError(
                f"{path.parent} was begun with another {name} (it was {was}, now {inputs.get(name)}); "
                "its results cannot be mixed with new ones: choose another folder with out=..."
            )
    starts.append(provenance(inputs, seed))
    write_atomically(path, json.dumps({"starts": starts}, indent=2) + "\n")


def provenance(inputs: Mapping[str, str], seed: int) -> dict[str, Any]:
    """All that is worth knowing about one start; no path of the machine, no name of it."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "inputs": dict(inputs),
        "revision": git_revision(),
        "python": platform.python_version(),
        "versions": versions(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str]:
    """Version of the toolkit and of every installed package that a result may depend on."""
    found = {}
    for name in ("namm-transfer", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Kind of processor, cores this process may use, memory in GiB, accelerator, threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def git_revision() -> dict[str, Any] | None:
    """Commit, and whether files differ from it; None outside a checkout of this project."""
    root = Path(namm_transfer.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installation below somebody else's repository must not report that one's revision.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed_files": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 over a file, or over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(file.relative_to(path).as_posix().encode() if path.is_dir() else b"")
            total.update(file.read_bytes())
    return total.hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
