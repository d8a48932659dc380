"""Deterministic clips of one coloured shape whose motion is the class: a seed is a clip.

No single frame tells the class; only the path over time does. Clips begin and end with still frames of random
number, and the shape's colour, form, size, place and speed say nothing about the class.

Shape letters: T frames, S side of the square frame in pixels.
"""

from dataclasses import dataclass

import numpy as np

from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES, background, coverage, paint, to_uint8

FRAMES = 32
SIDE = 64
FPS = 16.0
MOTIONS: tuple[str, ...] = (
    "left", "right", "up", "down", "clockwise", "counterclockwise", "bouncing", "still",
)  # fmt: skip

# Seeds of the splits never meet: training draws from [TRAIN_SEEDS, ∞), the others are finite blocks below.
PACKAGED_SEEDS = 1_000
HELD_OUT_SEEDS = 10_000
TRAIN_SEEDS = 1_000_000


@dataclass(frozen=True)
class MotionClip:
    """The ground truth of one clip; `render` gives its pixels."""

    seed: int
    motion: str
    colour: str
    shape: str
    radius: float
    path: np.ndarray
    """Centre (x, y) in pixels at each frame, float [T, 2]."""

    @property
    def label(self) -> int:
        """Class number: place in `MOTIONS`."""
        return MOTIONS.index(self.motion)


def make_clip(seed: int) -> MotionClip:
    """The clip of a seed; classes take turns over seeds, so that any block of seeds is balanced."""
    rng = np.random.default_rng([seed, 2])
    motion = MOTIONS[seed % len(MOTIONS)]
    radius = float(rng.uniform(7.0, 10.0))
    first, last = rng.integers(0, 5), FRAMES - 1 - rng.integers(0, 5)
    progress = np.clip((np.arange(FRAMES) - first) / (last - first), 0.0, 1.0)
    offsets = _offsets(motion, progress, rng)
    # The path lies anywhere in the frame, as long as the shape stays in sight.
    low, high = radius - offsets.min(axis=0), SIDE - radius - offsets.max(axis=0)
    path = offsets + rng.uniform(np.minimum(low, high), np.maximum(low, high))
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    return MotionClip(seed, motion, colour, shape, radius, path)


def render(clip: MotionClip) -> np.ndarray:
    """Pixels of a clip, uint8 [T, S, S, 3] RGB."""
    frames = np.repeat(background(np.random.default_rng([clip.seed, 3]), SIDE)[None], FRAMES, axis=0)
    paint(frames, coverage(clip.shape, clip.path, clip.radius, SIDE), COLOURS[clip.colour])
    return to_uint8(frames)


def _offsets(motion: str, progress: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Path relative to any origin, float [T, 2]; y grows downwards."""
    if motion == "still":
        return np.zeros((len(progress), 2))
    if motion in ("clockwise", "counterclockwise"):
        turn = 2 * np.pi * rng.uniform(0.8, 1.4) * progress * (1 if motion == "clockwise" else -1)
        phase = rng.uniform(0, 2 * np.pi)
        return rng.uniform(11.0, 18.0) * np.stack([np.cos(phase + turn), np.sin(phase + turn)], axis=-1)
    if motion == "bouncing":
        hops = rng.integers(2, 4)
        height = rng.uniform(20.0, 36.0) * np.abs(np.cos(np.pi * hops * progress))
        return np.stack([np.zeros_like(height), -height], axis=-1)
    distance = rng.uniform(24.0, 42.0) * progress
    direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
    return distance[:, None] * np.asarray(direction)
