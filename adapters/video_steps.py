"""A video's frames as a host takes them: step by step, where a step is what becomes tokens together.

Shape letters: n steps of a batch, C channels, S sides of a frame in pixels, P patches of a step, D values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from namm_transfer.errors import ConfigError

__all__ = [
    "FrameLayout",
    "Marks",
    "Steps",
    "TimedMarks",
    "check_steps",
    "fixed_marks",
    "read_frames",
    "read_patches",
    "settled_marks",
    "steps_marks",
]

Marks = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids before and after a step."""
TimedMarks = Callable[[float], Sequence[Sequence[int]]]
"""Marks as a function of a step's time in seconds."""


@dataclass(frozen=True)
class FrameLayout:
    """How a host makes tokens of frames; found by asking it.

    Attributes:
        pixels: the model's input, "pixel_values_videos" or "pixel_values".
        batched: its pixels have a first axis of rows.
        frame: shape of one frame's pixels, (C, S, S); on a grid, of one step's patches, (P, D).
        tokens: tokens of a step.
        closing: tokens that the host puts behind a video's last frame.
        marks: token ids before and after each step; None if they are told by its time.
        grid: patches of a step in height and width; None where tokens are numbered one after the other.
        step: frames of a step: one, or on a grid of time, height and width as many as the host merges.
        seconds: between two steps of a grid.
    """

    pixels: str
    batched: bool
    frame: tuple[int, ...]
    tokens: int
    closing: int
    marks: Marks | None
    grid: tuple[int, int] | None = None
    step: int = 1
    seconds: float = 1.0

    @property
    def kind(self) -> str:
        """What the host takes frames for: "video" or "image"."""
        return "video" if self.pixels.endswith("_videos") else "image"

    @property
    def one_grid(self) -> bool:
        """The whole video is one grid; otherwise each step is one of its own, with text between them."""
        return self.grid is not None and self.marks is not None and not any(self.marks)

    def thw(self, steps: int) -> Tensor:
        """``video_grid_thw`` [1, 3] of so many steps on a grid."""
        height, width = self.grid or (0, 0)
        return torch.tensor([[steps, height, width]])

    @classmethod
    def from_plain(cls, settings: Mapping[str, Any]) -> FrameLayout:
        """Of the values that ``dataclasses.asdict`` and JSON made of one."""
        marks, grid = settings["marks"], settings.get("grid")
        tuples = {
            "frame": tuple(settings["frame"]),
            "marks": None if marks is None else fixed_marks(marks),
            "grid": None if grid is None else tuple(grid),
        }
        return cls(**{**settings, **tuples})


@dataclass(frozen=True)
class Steps:
    """A batch of frames: pixels [n, C, S, S], or patches [n, P, D] of a ``grid`` (height, width) a step."""

    pixels: Tensor
    grid: tuple[int, int] | None = None
    seconds: float = 1.0


def read_frames(batch: Any) -> Steps:
    """Frames as pixel values [n, C, S, S] or [1, n, C, S, S].

    Raises:
        ConfigError: it is something else.
    """
    pixels = batch[0] if isinstance(batch, Tensor) and batch.ndim == 5 and len(batch) == 1 else batch
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
        got = f"{pixels.dtype} {list(pixels.shape)}" if hasattr(pixels, "shape") else type(pixels).__name__
        raise ConfigError(f"a batch must be pixel values, a float tensor [n, C, S, S]; got {got}; see preprocess")
    return Steps(pixels)


def read_patches(batch: Any) -> Steps:
    """Frames as a video processor made patches of them: `pixel_values_videos`, `video_grid_thw`, and, where the
    positions in time depend on it, `second_per_grid_ts` (1, as the models assume, where it is missing).

    Raises:
        ConfigError: it is not the processor's output for one video.
    """
    told = batch if isinstance(batch, Mapping) else {}
    patches, grid, seconds = (told.get(x) for x in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"))
    if not isinstance(patches, Tensor) or patches.ndim != 2 or grid is None:
        raise ConfigError(
            "a batch must be what the model's video processor makes of its frames, pixel_values_videos [patches, D] "
            f"with video_grid_thw [1, 3]; got {sorted(told) or type(batch).__name__}; see preprocess"
        )
    grid = torch.as_tensor(grid)
    if grid.shape != (1, 3) or int(grid.prod()) != len(patches):
        raise ConfigError(f"video_grid_thw must be of one video of {len(patches)} patches; got {grid.tolist()}")
    count, height, width = grid[0].tolist()
    apart = 1.0 if seconds is None else float(torch.as_tensor(seconds, dtype=torch.float64).flatten()[0])
    return Steps(patches.view(count, height * width, -1), (height, width), apart)


def fixed_marks(marks: Sequence[Sequence[int]]) -> Marks:
    """Marks that are the same for every step, as plain numbers."""
    before, after = marks
    return tuple(map(int, before)), tuple(map(int, after))


def steps_marks(marks: Marks | TimedMarks, times: Sequence[float], step: int, count: int) -> list[Marks]:
    """Marks of each of ``count`` steps; a function is asked with the time in the middle of a step's frames.

    Raises:
        ConfigError: a function, and no times.
    """
    if not callable(marks):
        return [marks] * count
    if not len(times):
        raise ConfigError("marks is a function of the time: batches must be pairs of frames and their timestamps")
    parts = [[float(time) for time in times[i : i + step]] for i in range(0, len(times), step)]
    return [fixed_marks(marks((part[0] + part[-1]) / 2)) for part in parts]


def settled_marks(layout: FrameLayout, marks: Marks | TimedMarks) -> Marks | TimedMarks:
    """The marks of a video that goes on, where these were given.

    Raises:
        ConfigError: others than those that the first frame settled.
    """
    if callable(marks) and layout.marks is None:
        return marks
    if layout.marks is None:
        raise ConfigError("the marks of this video are a function of the time: pass it again to go on")
    if callable(marks) or any(marks):
        raise ConfigError(f"marks are settled with the first frame: {layout.marks}; leave them out to go on")
    return layout.marks


def check_steps(layout: FrameLayout, steps: Steps, seen: int, told: int) -> None:
    """Refuse a batch that does not go on where ``seen`` frames stopped; ``told`` of its frames have a timestamp.

    Raises:
        ConfigError: frames of another shape or rate, or no whole steps.
    """
    shape, number = tuple(steps.pixels.shape[1:]), len(steps.pixels)
    if (shape, steps.grid) != (layout.frame, layout.grid):
        raise ConfigError(
            f"this video's frames are of shape {layout.grid or layout.frame}, but a batch came with "
            f"{steps.grid or shape}"
        )
    if steps.seconds != layout.seconds:
        raise ConfigError(f"this video's steps are {layout.seconds} s apart, but those of a batch {steps.seconds} s")
    if seen % layout.step:
        raise ConfigError(
            f"only the last batch may end within a step of {layout.step} frames; {seen} came before this one"
        )
    if told and -(-told // layout.step) != number:
        raise ConfigError(f"a batch of {number} steps of {layout.step} frames came with {told} timestamps")
