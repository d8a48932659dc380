"""Deterministic clips for the suite: a seed, a number of frames and a redundancy are a clip, which knows its truth.

Coloured objects appear one after the other and cross the picture, or come to a stand in it. A sign at the top changes
once in one respect, and for a single frame a digit covers everything below it. Redundancy is the fraction of the
frames in which no object moves. One half of these repeats the frame before, in which an object stands; the others are
pauses, empty or with grey dust that drifts by and is never asked about.

Shape letters: T frames, n some of them, N objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from namm_transfer.errors import ConfigError
from namm_transfer.eval.video_qa.clips import DIRECTIONS, SIDE, Event
from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES

__all__ = ["FRAMES", "HELD_OUT_SEEDS", "OBJECTS", "QUARTERS", "SIGNS", "SuiteClip", "make_clip"]

FRAMES = (64, 256, 1024)
FPS = 16.0
BAR = 16
"""Rows of pixels at the top that belong to the sign; objects move below them."""
RADIUS = 8.0
QUARTERS = 4
OBJECTS: dict[int, tuple[tuple[int, ...], ...]] = {
    64: ((4, 5, 6, 7),),
    256: ((4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
    1024: ((8, 9, 10, 11), (12, 13, 14, 15), (16, 17, 18, 19), (20, 21, 22, 23)),
}
"""How many objects a clip may have, by its frames: blocks of four, so that the options of a block say no more."""
PALETTE = tuple(colour for colour in COLOURS if colour != "white")
SIGNS: dict[str, tuple[Any, ...]] = {
    "colour": PALETTE,
    "shape": ("circle", "square", "triangle", "cross"),
    "place": (0, 1, 2, 3),
    "size": (4.0, 7.0),
}
LEAST_MOVING = 3
"""Frames that an object moves at least: fewer would not tell a direction."""
LONGEST, SHORTEST, OTHERS = 3.4, 1.0, (1.5, 2.1)
"""Relative times in sight: one object clearly the longest, one clearly the shortest."""

# Blocks of seeds that no other split has, of this suite or of the first: training draws from [TRAIN_SEEDS, ∞).
HELD_OUT_SEEDS = 100_000
TRAIN_SEEDS = 1_000_000
_STREAM = 5


@dataclass(frozen=True)
class Appearance(Event):
    """One object's time in the picture: below the bar, visible in frames [start, end), moving in [start, halt)."""

    def centres(self, frames: np.ndarray) -> np.ndarray:
        """Centre (x, y) in pixels at each frame number, float [n, 2]."""
        centres = super().centres(frames)
        centres[:, 1] = BAR + centres[:, 1] * (SIDE - BAR) / SIDE
        return centres


@dataclass(frozen=True)
class Sign:
    """What stands at the top: `place` counts from the left, `size` is a radius in pixels."""

    colour: str
    shape: str
    place: int
    size: float


@dataclass(frozen=True)
class Dust:
    """A grey dot that drifts from one point to another in frames [start, end)."""

    start: int
    end: int
    points: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class SuiteClip:
    """The ground truth of one clip.

    Attributes:
        events: objects in the order in which they appear.
        signs: the sign before and after it changes.
        change: first frame of the changed sign.
        needle: the frame that shows the digit.
    """

    seed: int
    frames: int
    redundancy: float
    events: tuple[Appearance, ...]
    dust: tuple[Dust, ...]
    signs: tuple[Sign, Sign]
    change: int
    needle: int
    digit: int

    def redundant_fraction(self) -> float:
        """Fraction of the frames in which no object moves."""
        return 1.0 - sum(event.halt - event.start for event in self.events) / self.frames

    def changed(self) -> str:
        """The one respect in which the sign changes, a key of `SIGNS`."""
        before, after = self.signs
        (name,) = (name for name in SIGNS if getattr(before, name) != getattr(after, name))
        return name


def make_clip(seed: int, frames: int, redundancy: float) -> SuiteClip:
    """The clip of a seed.

    With much redundancy in a short clip its objects still move for `LEAST_MOVING` frames each: `redundant_fraction`
    says what came of it.

    Raises:
        ConfigError: no such number of frames, or a redundancy outside of 0 to 1.
    """
    if isinstance(frames, bool) or frames not in FRAMES:
        raise ConfigError(f"frames is {frames!r}; expected one of {', '.join(map(str, FRAMES))}")
    if isinstance(redundancy, bool) or not isinstance(redundancy, int | float) or not 0 <= redundancy <= 1:
        raise ConfigError(f"redundancy is {redundancy!r}; expected a number from 0 to 1")
    rng = np.random.default_rng([seed, _STREAM, frames, round(1000 * redundancy)])
    blocks = OBJECTS[frames]
    count = int(rng.choice(blocks[rng.integers(len(blocks))]))
    moving = max(LEAST_MOVING * count, round((1 - redundancy) * frames))
    pauses = (frames - moving) // 2
    events = _events(rng, count, frames - pauses, moving, rng.multinomial(pauses, rng.dirichlet(np.ones(count + 1))))
    inner = [e for event in events for e in (event.start, event.end - 1)]  # where an object comes and goes is shown
    needle = _moment(rng, frames, margin=1, taken=inner)
    change = _moment(rng, frames, margin=frames // 16, taken=[needle])
    before = Sign(
        str(rng.choice(PALETTE)),
        str(rng.choice(SIGNS["shape"])),
        int(rng.integers(4)),
        float(rng.choice(SIGNS["size"])),
    )
    name = str(rng.choice(list(SIGNS)))
    others = [value for value in SIGNS[name] if value != getattr(before, name)]
    after = replace(before, **{name: others[rng.integers(len(others))]})
    return SuiteClip(
        seed=seed,
        frames=frames,
        redundancy=float(redundancy),
        events=events,
        dust=_dust(rng, events, frames),
        signs=(before, after),
        change=change,
        needle=needle,
        digit=int(rng.integers(10)),
    )


def _events(
    rng: np.random.Generator, count: int, visible: int, moving: int, pauses: np.ndarray
) -> tuple[Appearance, ...]:
    """N objects, in sight for so many frames in all, with so many frames of pause before, between and behind them."""
    weights = rng.permutation([LONGEST, SHORTEST, *rng.uniform(*OTHERS, size=count - 2)])
    lengths = _shares(visible, weights)
    events, frame = [], int(pauses[0])
    for (colour, shape), length, pause in zip(_names(rng, count), lengths, pauses[1:], strict=True):
        moves = min(length, max(LEAST_MOVING, round(length * moving / visible)))
        events.append(
            Appearance(
                colour=colour,
                shape=shape,
                direction=str(rng.choice(list(DIRECTIONS))),
                start=frame,
                halt=frame + moves,
                end=frame + length,
                lane=float(rng.uniform(RADIUS + 4, SIDE - RADIUS - 4)),
                reach=1.0 if moves == length else float(rng.uniform(0.5, 0.8)),
            )
        )
        frame += length + int(pause)
    return tuple(events)


def _shares(total: int, weights: np.ndarray) -> list[int]:
    """Split a total by weights into whole parts of at least `LEAST_MOVING`."""
    exact = weights / weights.sum() * total
    parts = np.maximum(LEAST_MOVING, np.floor(exact)).astype(int)
    longest = int(weights.argmax())
    parts[longest] += total - parts.sum()  # what rounding leaves makes the longest longer
    return [int(part) for part in parts]


def _names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """N different pairs of colour and shape; neighbours differ in colour."""
    left = [(colour, shape) for colour in PALETTE for shape in SHAPES]
    left = [left[i] for i in rng.permutation(len(left))]
    names: list[tuple[str, str]] = []
    while len(names) < count:
        name = next(one for one in left if not names or one[0] != names[-1][0])
        left.remove(name)
        names.append(name)
    return names


def _moment(rng: np.random.Generator, frames: int, *, margin: int, taken: list[int]) -> int:
    """A frame in a random quarter, at least `margin` from both ends of the clip, and none of those taken."""
    quarter = rng.integers(QUARTERS) * frames // QUARTERS + np.arange(frames // QUARTERS)
    return int(rng.choice([f for f in quarter if margin <= f < frames - margin and f not in taken]))


def _dust(rng: np.random.Generator, events: tuple[Appearance, ...], frames: int) -> tuple[Dust, ...]:
    """Dust in about half of the pauses."""
    ends, starts = [0, *(event.end for event in events)], [*(event.start for event in events), frames]
    found = []
    for start, end in zip(ends, starts, strict=True):
        points = rng.uniform((4, BAR + 4), (SIDE - 4, SIDE - 4), size=(2, 2)).tolist()
        if rng.random() < 0.5 and end > start:
            found.append(Dust(start, end, (tuple(points[0]), tuple(points[1]))))
    return tuple(found)
