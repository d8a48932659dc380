"""The suite's clips and questions as training material for a video LLM.

A frame is told in two tokens: what its sign looks like, and what is shown below it.

Shape letters: B clips, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from namm_transfer.eval.video_qa.batches import CELLS, IGNORED
from namm_transfer.eval.video_qa.clips import DIRECTIONS
from namm_transfer.eval.video_qa.drawing import SHAPES
from namm_transfer.eval.video_qa.host import TOKENS_PER_FRAME
from namm_transfer.eval.video_qa.questions import Question
from namm_transfer.eval.video_qa.shapes import covered_cells, main_cells
from namm_transfer.eval.video_qa.suite.clips import (
    FRAMES,
    OBJECTS,
    PALETTE,
    QUARTERS,
    RADIUS,
    SIGNS,
    TRAIN_SEEDS,
    SuiteClip,
    make_clip,
)
from namm_transfer.eval.video_qa.suite.drawing import render
from namm_transfer.eval.video_qa.suite.questions import ORDINALS, RESPECTS, questions_of

__all__ = ["Suite"]

MOST = max(OBJECTS[FRAMES[-1]][-1])
MOST_REDUNDANT = 0.95
SIGHT, SIGHTS = 32, 24
"""How long the present object has been in sight is told in such parts of the clip, up to so many of them."""
NEEDLES = 0.2
"""Fraction of the single frames that show a digit."""
DIGITS = tuple(str(digit) for digit in range(10))
_SIGN, _SHOWN = 0, 1
_QUESTION_WORDS = (
    "What", "Which", "which", "How", "In", "many", "colour", "shape", "was", "the", "object", "objects",
    "coloured", "appeared", "in", "video", "before", "of", "these", "direction", "did", "move", "visible", "for",
    "longest", "shortest", "time", "a", "single", "frame", "large", "digit", "shown", "it", "part", "about",
    "small", "sign", "at", "top", "changed", "change", ".", "quarter", "last",
)  # fmt: skip


class Suite:
    """Clips of any redundancy, and questions of all eight families."""

    shown: ClassVar[Sequence[int]] = FRAMES

    looks: ClassVar[Mapping[str, Sequence[str]]] = {
        "colour": PALETTE,
        "shape": SHAPES,
        "digit": DIGITS,
        "size": ("small", "large"),
    }
    words: ClassVar[Sequence[str]] = tuple(
        dict.fromkeys(
            [*_QUESTION_WORDS, *ORDINALS, *DIRECTIONS, *(word for name in RESPECTS.values() for word in name.split())]
            + [word for words in looks.values() for word in words]
            + [str(count) for blocks in OBJECTS.values() for block in blocks for count in block]
        )
    )
    # "Nothing of it" is the last class of each, but for counts.
    classes: ClassVar[Mapping[str, int]] = {
        "colour": len(PALETTE) + 1,
        "shape": len(SHAPES) + 1,
        "digit": len(DIGITS) + 1,
        "direction": len(DIRECTIONS) + 1,
        "previous": len(PALETTE) + 1,
        "count": MOST + 1,
        "sight": SIGHTS + 1,
        "needle": len(DIGITS) + 1,
        "needle_quarter": QUARTERS + 1,
        "changed": len(SIGNS) + 1,
        "change_quarter": QUARTERS + 1,
    }

    def clips(self, rng: np.random.Generator, count: int, frames: int) -> list[SuiteClip]:
        seeds = rng.integers(TRAIN_SEEDS, 2**40, size=count)
        redundancies = rng.uniform(0, MOST_REDUNDANT, size=count)
        return [make_clip(int(seed), frames, float(r)) for seed, r in zip(seeds, redundancies, strict=True)]

    def questions(self, rng: np.random.Generator, clip: SuiteClip, count: int) -> list[Question]:
        pool = questions_of(clip)
        return [pool[i] for i in rng.permutation(len(pool))[:count]]

    def frames(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """All of them: to leave out any might leave out the digit."""
        return np.arange(count)

    def moment(self, rng: np.random.Generator, clip: SuiteClip) -> np.ndarray:
        return np.array([clip.needle]) if rng.random() < NEEDLES else rng.integers(clip.frames, size=1)

    def render(self, clip: SuiteClip, frames: np.ndarray | None = None) -> np.ndarray:
        return render(clip, frames)

    def frame_truth(self, clips: list[SuiteClip], frames: np.ndarray) -> dict[str, torch.Tensor]:
        told = [_told(clip, frames, self.classes) for clip in clips]
        truth = {key: np.stack([one[key] for one in told]) for key in told[0]}  # [B, T, 2]
        # at the visual token of its cell; what has none, at the first below the sign
        cells = np.where(truth["cell"] < CELLS**2, truth["cell"], CELLS)
        truth["place"] = np.arange(len(frames))[:, None] * TOKENS_PER_FRAME + cells
        return {key: torch.from_numpy(value.reshape(len(clips), -1)) for key, value in truth.items()}

    def cell_truth(self, clip: SuiteClip, frames: np.ndarray) -> dict[str, torch.Tensor]:
        truth = {key: np.full((len(frames), CELLS**2), len(words)) for key, words in self.looks.items()}
        for event in clip.events:
            covered = covered_cells(event, frames, RADIUS)
            truth["colour"][covered], truth["shape"][covered] = _names(event)
        flashed = frames == clip.needle
        for key in truth:
            truth[key][flashed] = clip.digit if key == "digit" else len(self.looks[key])
            truth[key][:, :CELLS] = len(self.looks[key])
        for sign, shown in zip(clip.signs, (frames < clip.change, frames >= clip.change), strict=True):
            for key, value in _sign(sign).items():
                truth[key][shown, sign.place] = value
        something = np.any([truth[key] < len(words) for key, words in self.looks.items()], axis=0)
        truth["cell"] = np.where(something, np.arange(CELLS**2), CELLS**2)
        return {key: torch.from_numpy(value) for key, value in truth.items()}


def _told(clip: SuiteClip, frames: np.ndarray, classes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """What is true at the two tokens of each frame, int64 [T, 2]."""
    nothing = {key: size - 1 for key, size in classes.items()} | {"count": 0, "cell": CELLS**2}
    nothing["size"] = len(SIGNS["size"])
    truth = {key: np.full((len(frames), 2), value) for key, value in nothing.items()}
    for number, event in enumerate(clip.events):
        begun, visible = frames >= event.start, (frames >= event.start) & (frames < event.end)
        truth["count"][begun, _SHOWN] = number + 1
        truth["colour"][visible, _SHOWN], truth["shape"][visible, _SHOWN] = _names(event)
        truth["direction"][visible, _SHOWN] = list(DIRECTIONS).index(event.direction)
        truth["sight"][visible, _SHOWN] = np.minimum((frames[visible] - event.start) * SIGHT // clip.frames, SIGHTS - 1)
        # below the sign, whatever of an object that enters is still behind it
        truth["cell"][visible, _SHOWN] = np.maximum(main_cells(event, frames[visible]), CELLS)
        if number:
            truth["previous"][begun, _SHOWN] = PALETTE.index(clip.events[number - 1].colour)
    seen, flashed = frames >= clip.needle, frames == clip.needle
    for key in ("colour", "shape", "direction", "sight"):
        truth[key][flashed, _SHOWN] = nothing[key]
    truth["digit"][flashed, _SHOWN], truth["cell"][flashed, _SHOWN] = clip.digit, CELLS
    truth["needle"][seen, _SHOWN] = clip.digit
    truth["needle_quarter"][seen, _SHOWN] = clip.needle * QUARTERS // clip.frames
    changed = frames >= clip.change
    for sign, shown in zip(clip.signs, (~changed, changed), strict=True):
        truth["cell"][shown, _SIGN] = sign.place
        for key, value in _sign(sign).items():
            truth[key][shown, _SIGN] = value
    truth["changed"][changed, _SIGN] = list(SIGNS).index(clip.changed())
    truth["change_quarter"][changed, _SIGN] = clip.change * QUARTERS // clip.frames
    for key in ("direction", "previous", "count", "sight", "needle", "needle_quarter"):
        truth[key][:, _SIGN] = IGNORED
    for key in ("changed", "change_quarter"):
        truth[key][:, _SHOWN] = IGNORED
    return truth


def _names(thing: Any) -> tuple[int, int]:
    """Classes of the colour and of the shape of an object or a sign."""
    return PALETTE.index(thing.colour), SHAPES.index(thing.shape)


def _sign(sign: Any) -> dict[str, int]:
    """What a sign looks like, as classes."""
    colour, shape = _names(sign)
    return {"colour": colour, "shape": shape, "size": SIGNS["size"].index(sign.size)}
