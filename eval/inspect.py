"""Pictures of a memory: which patches of which frames each layer and head retained, and the counts behind it.

A task on episodes is handed over to `offline_rl.inspect_episode`.

Shape letters: L layers, K KV heads, T frames, U steps in time (frames, or tubelets of several frames), h, w patches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from namm_transfer.errors import ConfigError
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.inspect_page import write_page
from namm_transfer.eval.lighting import lit, write_lit_mp4
from namm_transfer.eval.offline_rl.inspect_episode import inspect_episode
from namm_transfer.eval.provenance import digest, record
from namm_transfer.eval.rl_tasks import Episodes
from namm_transfer.eval.video import DecodedVideo
from namm_transfer.eval.workers import build_policy, build_task
from namm_transfer.files import write_atomically
from namm_transfer.policies import Policy

__all__ = ["Inspectable", "inspect", "picture"]


@runtime_checkable
class Inspectable(Protocol):
    """A task on clips whose memory can be laid over their frames."""

    name: str

    def inputs(self) -> Mapping[str, str]:
        """As of a task."""
        ...

    def clip_path(self, number: int) -> Path:
        """File of a packaged clip."""
        ...

    def watch(self, path: Path) -> DecodedVideo:
        """What the host is shown of a file."""
        ...

    def retained(self, frames: np.ndarray, policy: Policy) -> np.ndarray:
        """Which patches of a video uint8 [T, H, W, 3] are retained after it was read: bool [L, K, U, h, w]."""
        ...


def inspect(config: Mapping[str, Any], out: Path, console: Console) -> Path:
    """Run one clip or episode under one policy; write `retained` as png, mp4, html and json, and provenance, to `out`.

    Raises:
        ConfigError: a task without clips and episodes, or settings out of range.
        VideoError: the clip cannot be decoded.
    """
    use_executor(config.get("executor", {}))
    task, policy = build_task(config["task"]), build_policy(config["policy"])
    if isinstance(task, Episodes):
        return inspect_episode(config, task, policy, out, console)
    if not isinstance(task, Inspectable):
        raise ConfigError(f"{task.name} has no clips to inspect: choose a task on videos or on episodes")
    clip = config["clip"]
    if isinstance(clip, bool) or not isinstance(clip, int | str):
        raise ConfigError(f"clip is {clip!r}; expected the number of a packaged clip, or the path of a file")
    path = task.clip_path(clip) if isinstance(clip, int) else Path(clip)
    video = task.watch(path)
    frames = video.frames
    shown = config["frames"]
    if isinstance(shown, bool) or not isinstance(shown, int) or not 1 <= shown <= len(frames):
        raise ConfigError(
            f"frames is {shown!r}; expected an integer from 1 to {len(frames)}, the frames of {path.name}"
        )
    out.mkdir(parents=True, exist_ok=True)
    shown_file = {} if isinstance(clip, int) else {"clips": digest(path)}
    record(out / "provenance.json", {**task.inputs(), **shown_file}, config["seed"])
    retained = task.retained(frames, policy)
    counts = {
        "clip": path.name,
        "task": task.name,
        "policy": policy.describe(),
        "visual_tokens": int(np.prod(retained.shape[2:])),
        "retained": int(retained.sum()),
        "kept_fraction": float(retained.mean()),
        "retained_by_layer_and_head": retained.sum(axis=(2, 3, 4)).tolist(),
        "retained_by_layer_and_time_step": retained.sum(axis=(1, 3, 4)).tolist(),
    }
    write_atomically(out / "retained.json", json.dumps(counts, indent=2) + "\n")
    title = f"{path.name}, {policy.name}: {retained.mean():.1%} of the visual tokens retained"
    picture(frames, retained, shown, title, out / "retained.png")
    write_lit_mp4(out / "retained.mp4", frames, retained, _rate(video.timestamps))
    write_page(out / "retained.html", frames, video.timestamps, retained, title)
    for layer, part in enumerate(retained):
        console.print(
            f"layer {layer}: {part.mean():6.1%} retained, by head {np.round(part.mean((1, 2, 3)), 3).tolist()}"
        )
    console.print(f"written: {out / 'retained'}.png, .mp4, .html and .json")
    return out


def _rate(timestamps: np.ndarray) -> float:
    """Frames a second on the average, of times [T] in seconds; at least 1, so that the picture lasts no longer than
    the frames have to tell."""
    span = float(timestamps[-1] - timestamps[0])
    return max(1.0, (len(timestamps) - 1) / span) if span > 0 else 1.0


def picture(frames: np.ndarray, retained: np.ndarray, shown: int, title: str, path: Path) -> None:
    """Layers below each other, frames beside each other; retained patches are lit, evicted ones dimmed.

    Args:
        frames: uint8 [T, H, W, 3].
        retained: bool [L, K, U, h, w].
        shown: how many frames, evenly spaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, _, steps = retained.shape[:3]
    chosen = np.linspace(0, len(frames) - 1, shown).round().astype(int)
    figure = Figure(figsize=(1.1 * shown + 0.8, 1.15 * (layers + 1) + 0.5), layout="constrained")
    grid = FigureCanvasAgg(figure).figure.subplots(layers + 1, shown, squeeze=False)
    figure.suptitle(title, fontsize="medium")
    for column, frame in enumerate(chosen):
        grid[0, column].imshow(frames[frame])
        grid[0, column].set_title(f"frame {frame}", fontsize="x-small")
        for layer in range(layers):
            share = retained[layer, :, frame * steps // len(frames)].mean(axis=0)  # [h, w]
            grid[layer + 1, column].imshow(lit(frames[frame][None], share[None])[0])
    for row, axes in enumerate(grid):
        axes[0].set_ylabel("clip" if row == 0 else f"layer {row - 1}", fontsize="x-small")
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=110)
