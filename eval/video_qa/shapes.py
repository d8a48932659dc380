"""The lessons of the packaged video LLM: the first suite's clips and questions as training material.

Shape letters: B clips, T frames.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from namm_transfer.eval.video_qa.batches import CELL_COVERAGE, CELLS
from namm_transfer.eval.video_qa.clips import (
    DIRECTIONS,
    EVENTS,
    FRAMES,
    RADIUS,
    SIDE,
    TRAIN_SEEDS,
    Clip,
    Event,
    make_clip,
    render,
)
from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES, coverage
from namm_transfer.eval.video_qa.host import TOKENS_PER_FRAME, WORDS
from namm_transfer.eval.video_qa.questions import Question, all_questions

COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
SHAPE_INDEX = {name: index for index, name in enumerate(SHAPES)}
DIRECTION_INDEX = {name: index for index, name in enumerate(DIRECTIONS)}


class Shapes:
    """Four shapes in 64 frames; a frame is told in one token."""

    words: ClassVar[Sequence[str]] = WORDS
    looks: ClassVar[Mapping[str, Sequence[str]]] = {"colour": tuple(COLOURS), "shape": SHAPES}
    shown: ClassVar[Sequence[int]] = (64, 32, 16, 8, 4, 2, 1)
    # "Nothing there" is the last class of each.
    classes: ClassVar[Mapping[str, int]] = {
        "colour": len(COLOURS) + 1,
        "shape": len(SHAPES) + 1,
        "direction": len(DIRECTIONS) + 1,
        "previous": len(COLOURS) + 1,
        "count": EVENTS + 1,
    }

    def clips(self, rng: np.random.Generator, count: int, frames: int) -> list[Clip]:
        return [make_clip(int(seed)) for seed in rng.integers(TRAIN_SEEDS, 2**40, size=count)]

    def questions(self, rng: np.random.Generator, clip: Clip, count: int) -> list[Question]:
        pool = all_questions(clip, rng)
        return [pool[i] for i in rng.permutation(len(pool))[:count]]

    def frames(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Evenly spaced, with a random offset."""
        step = FRAMES // count
        return np.arange(count) * step + rng.integers(step)

    def moment(self, rng: np.random.Generator, clip: Clip) -> np.ndarray:
        return rng.integers(clip.frames, size=1)

    def frame_truth(self, clips: list[Clip], frames: np.ndarray) -> dict[str, torch.Tensor]:
        nothing = {key: size - 1 for key, size in self.classes.items()} | {"count": 0, "cell": CELLS**2}
        truth = {key: np.full((len(clips), len(frames)), value) for key, value in nothing.items()}
        for row, clip in enumerate(clips):
            for number, event in enumerate(clip.events):
                begun, visible = frames >= event.start, (frames >= event.start) & (frames < event.end)
                truth["count"][row, begun] = number + 1
                truth["colour"][row, visible] = COLOUR_INDEX[event.colour]
                truth["shape"][row, visible] = SHAPE_INDEX[event.shape]
                truth["direction"][row, visible] = DIRECTION_INDEX[event.direction]
                if number:
                    truth["previous"][row, begun] = COLOUR_INDEX[clip.events[number - 1].colour]
                truth["cell"][row, visible] = main_cells(event, frames[visible])
        # at the visual token of its cell, or the frame's first
        truth["place"] = np.arange(len(frames)) * TOKENS_PER_FRAME + truth["cell"] % TOKENS_PER_FRAME
        return {key: torch.from_numpy(value) for key, value in truth.items()}

    def cell_truth(self, clip: Clip, frames: np.ndarray) -> dict[str, torch.Tensor]:
        colour, shape = (np.full((len(frames), CELLS**2), len(self.looks[key])) for key in ("colour", "shape"))
        for event in clip.events:
            covered = covered_cells(event, frames, RADIUS)
            colour[covered] = COLOUR_INDEX[event.colour]
            shape[covered] = SHAPE_INDEX[event.shape]
        cell = np.where(shape < len(SHAPES), np.arange(CELLS**2), CELLS**2)
        return {key: torch.from_numpy(value) for key, value in {"colour": colour, "shape": shape, "cell": cell}.items()}

    def render(self, clip: Clip, frames: np.ndarray | None = None) -> np.ndarray:
        return render(clip, frames)


def main_cells(event: Event, frames: np.ndarray) -> np.ndarray:
    """The cell of the object's centre at each frame, int64 [T]."""
    cells = np.clip(event.centres(frames) * CELLS / SIDE, 0, CELLS - 1).astype(int)
    found: np.ndarray = cells[:, 1] * CELLS + cells[:, 0]
    return found


def covered_cells(event: Event, frames: np.ndarray, radius: float) -> np.ndarray:
    """Which cells of the frame show the object, bool [T, 16]: it covers at least `CELL_COVERAGE` of them."""
    covered = np.zeros((len(frames), CELLS**2), dtype=bool)
    visible = (frames >= event.start) & (frames < event.end)
    if visible.any():
        alpha = coverage(event.shape, event.centres(frames[visible]), radius, SIDE)
        side = SIDE // CELLS
        shares = alpha.reshape(-1, CELLS, side, CELLS, side).mean(axis=(2, 4)).reshape(-1, CELLS**2)
        covered[visible] = shares >= CELL_COVERAGE
    return covered
