"""Pixels of the suite's clips.

Shape letters: T frames, S side of the square frame in pixels.
"""

from __future__ import annotations

import numpy as np

from namm_transfer.eval.video_qa.clips import SIDE
from namm_transfer.eval.video_qa.drawing import COLOURS, background, coverage, paint, to_uint8
from namm_transfer.eval.video_qa.suite.clips import BAR, RADIUS, SuiteClip

__all__ = ["DIGITS", "DIGIT_CELL", "render"]

PLATE = 12.0
GREY, GREY_RADIUS = (120, 120, 120), 2.5
WHITE = 240.0
DIGIT_CELL = 8
DIGITS: tuple[str, ...] = (
    "### # # # # # ###", "  #   #   #   #   #", "###   # ### #   ###", "###   # ###   # ###", "# # # # ###   #   #",
    "### #   ###   # ###", "### #   ### # # ###", "###   #   #   #   #", "### # # ### # # ###", "### # # ###   # ###",
)  # fmt: skip
"""Five rows of three cells each, a blank between rows."""
_STREAM = 6


def render(clip: SuiteClip, indices: np.ndarray | None = None) -> np.ndarray:
    """Pixels of a clip, uint8 [T, S, S, 3] RGB; only the frames in `indices` when given."""
    indices = np.arange(clip.frames) if indices is None else np.asarray(indices)
    frames = np.repeat(background(np.random.default_rng([clip.seed, _STREAM]), SIDE)[None], len(indices), axis=0)
    for event in clip.events:
        shown = (indices >= event.start) & (indices < event.end)
        _paint(frames, shown, event.shape, event.centres(indices[shown]), RADIUS, COLOURS[event.colour])
    for dust in clip.dust:
        shown = (indices >= dust.start) & (indices < dust.end)
        progress = (indices[shown] - dust.start) / max(dust.end - 1 - dust.start, 1)
        first, last = np.asarray(dust.points)
        _paint(frames, shown, "circle", first + progress[:, None] * (last - first), GREY_RADIUS, GREY)
    flashed = indices == clip.needle
    frames[flashed, BAR:] = _digit(clip.digit)
    frames[:, :BAR] = PLATE
    for sign, shown in zip(clip.signs, (indices < clip.change, indices >= clip.change), strict=True):
        centre = np.array([(sign.place + 0.5) * SIDE / 4, BAR / 2])
        _paint(frames, shown, sign.shape, np.tile(centre, (shown.sum(), 1)), sign.size, COLOURS[sign.colour])
    return to_uint8(frames)


def _paint(
    frames: np.ndarray,
    shown: np.ndarray,
    shape: str,
    centres: np.ndarray,
    radius: float,
    colour: tuple[int, int, int],
) -> None:
    """Paint a shape into those frames of float [T, S, S, 3] that `shown` bool [T] names, a centre for each."""
    if shown.any():
        painted = frames[shown]
        paint(painted, coverage(shape, centres, radius, SIDE), colour)
        frames[shown] = painted


def _digit(digit: int) -> np.ndarray:
    """A picture of the digit as it fills the frame below the bar, float [S - BAR, S, 1]."""
    rows = [DIGITS[digit].ljust(19)[i : i + 3] for i in range(0, 20, 4)]
    cells = np.array([[cell == "#" for cell in row] for row in rows])
    picture = np.full((SIDE - BAR, SIDE), PLATE)
    glyph = np.kron(cells, np.ones((DIGIT_CELL, DIGIT_CELL))) * (WHITE - PLATE) + PLATE
    top, left = (picture.shape[0] - glyph.shape[0]) // 2, (SIDE - glyph.shape[1]) // 2
    picture[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return picture[..., None]
