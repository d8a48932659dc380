"""An hour of video: draw it, remember it in bounded memory, kill the process, go on, and compare.

`python -P -m namm_transfer.eval.video_qa.hour out=results/hour minutes=60 frames_per_second=25 sampled=1`
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from namm_transfer.cli import plain_errors
from namm_transfer.configs.settings import from_overrides
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.video import write_mp4
from namm_transfer.eval.video_qa.clips import FRAMES, make_clip, render
from namm_transfer.files import write_atomically

COMMAND = [sys.executable, "-P", "-c", "from namm_transfer.cli import main; main()", "remember"]
SEED = 20_000
"""Of the first clip; a block of its own, apart from those of training and evaluation."""


@dataclass(frozen=True)
class HourConfig:
    """What is drawn, and how it is watched.

    Attributes:
        out: folder of the video, the memories and the report.
        minutes: length of the video.
        frames_per_second: of the video.
        sampled: frames per second that are watched.
        budget: tokens that each head keeps.
        policy: name of a policy that takes a budget.
        threads: of torch.
        kill_at: fraction of the frames after which the second run is killed.
        save_every: seconds between two saves.
    """

    out: Path
    minutes: float = 60.0
    frames_per_second: float = 25.0
    sampled: float = 1.0
    budget: int = 1024
    policy: str = "namm"
    threads: int = 2
    kill_at: float = 0.5
    save_every: float = 2.0

    def __post_init__(self) -> None:
        for name in ("minutes", "frames_per_second", "sampled", "save_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a positive number")
        if not 0 < self.kill_at < 1:
            raise ConfigError(f"kill_at is {self.kill_at!r}; expected a fraction within (0, 1)")


@dataclass(frozen=True)
class Watched:
    """One process: how long it ran, how it ended, and its resident memory in MiB with the frames it had saved."""

    seconds: float
    resident: list[tuple[int, float]]
    code: int


def draw(path: Path, frames: int, rate: float) -> None:
    """Write clips of moving shapes one after the other, until there are so many frames."""

    def chunks() -> Iterator[np.ndarray]:
        for number in range(-(-frames // FRAMES)):
            yield render(make_clip(SEED + number))[: frames - number * FRAMES]

    write_mp4(path, chunks(), rate, crf=20)


def watch(arguments: list[str], memory: Path, kill_at: int | None = None) -> Watched:
    """Run `namm-transfer remember`, note its resident memory, and kill it once it has saved so many frames."""
    start = time.monotonic()
    resident: list[tuple[int, float]] = []
    process = subprocess.Popen([*COMMAND, *arguments])
    while process.poll() is None:
        frames, held = (_frames(memory) if memory.is_file() else 0), _resident(process.pid)
        if held:
            resident.append((frames, held))
        if kill_at is not None and frames >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    return Watched(time.monotonic() - start, resident, process.returncode)


def difference(first: Path, second: Path) -> float:
    """The largest difference between two saved memories, infinite if they hold other tokens or states."""
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        if a.metadata() != b.metadata() or set(a.keys()) != set(b.keys()):
            return float("inf")
        worst = 0.0
        for key in a.keys():  # noqa: SIM118
            x, y = a.get_tensor(key), b.get_tensor(key)
            lengths = a.get_tensor(key.split(".")[0] + ".lengths")
            if x.shape != y.shape or not torch.equal(lengths, b.get_tensor(key.split(".")[0] + ".lengths")):
                return float("inf")
            if not key.endswith(".lengths"):  # places beyond a head's tokens mean nothing
                held = torch.arange(x.shape[2]) < lengths.unsqueeze(-1)
                worst = max(worst, float((x[held].double() - y[held].double()).abs().max()))
        return worst


def run(config: HourConfig) -> dict[str, Any]:
    """Draw, watch, watch again with a kill in between, compare, and write `hour.json`.

    Raises:
        DataError: a run failed, or the killed one had ended before.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    video, whole, resumed = (config.out / name for name in ("hour.mp4", "whole.safetensors", "resumed.safetensors"))
    frames = round(config.minutes * 60 * config.frames_per_second)
    if not video.is_file():
        draw(video, frames, config.frames_per_second)
    for stale in (whole, resumed):
        stale.unlink(missing_ok=True)
    settings = [str(video), f"fps={config.sampled}", f"policy={config.policy}", f"policy.budget={config.budget}"]
    settings += [f"save_every={config.save_every}", f"executor.threads={config.threads}"]
    first = watch([*settings, "--save", str(whole)], whole)
    if first.code or not whole.is_file():
        raise DataError(f"watching ended with exit code {first.code}, and {whole.name} was not saved")
    seen = _frames(whole)
    killed = watch([*settings, "--save", str(resumed)], resumed, kill_at=round(seen * config.kill_at))
    if killed.code != -signal.SIGKILL or not resumed.is_file():
        raise DataError(f"expected a kill after the first save, exit code {-signal.SIGKILL}; got {killed.code}")
    at = _frames(resumed)
    last = watch([*settings, "--resume", str(resumed)], resumed)
    if last.code:
        raise DataError(f"going on after the kill ended with exit code {last.code}")
    result = {
        "video_seconds": frames / config.frames_per_second,
        "video_frames": frames,
        "video_bytes": video.stat().st_size,
        "watched_frames": seen,
        "watched_at_kill": at,
        "policy": config.policy,
        "budget": config.budget,
        "seconds": round(first.seconds, 1),
        "memory_bytes": whole.stat().st_size,
        "resident_mib_at_frames": _at_tenths(first, seen),
        "difference": difference(whole, resumed),
        "exit_codes": [first.code, killed.code, last.code],
        "cpus": os.cpu_count(),
    }
    write_atomically(config.out / "hour.json", json.dumps(result, indent=2) + "\n")
    return result


def _resident(pid: int) -> float:
    """MiB of memory that a process holds; 0 if it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def _frames(path: Path) -> int:
    # Another process replaces the file: for torch it is opened twice, and might be another one the second time.
    with safe_open(path, "np") as file:
        return int(json.loads(file.metadata()["video"])["frames"])


def _at_tenths(watched: Watched, total: int) -> dict[str, float]:
    """Resident memory when each tenth of the frames had been watched, and its peak."""
    found = {}
    for tenth in range(1, 11):
        at = next(((frames, held) for frames, held in watched.resident if frames * 10 >= total * tenth), None)
        if at is not None:
            found[str(at[0])] = round(at[1], 1)
    return found | {"peak": round(max(held for _, held in watched.resident), 1)}


if __name__ == "__main__":
    with plain_errors():
        print(json.dumps(run(from_overrides(HourConfig, sys.argv[1:])), indent=2))
