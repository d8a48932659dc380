"""Deterministic clips of moving coloured shapes: a seed is a clip, and the clip knows its truth.

A clip is a sequence of events. In each, one shape enters at an edge, crosses the frame in one direction, and
either leaves at the far side or stops and stands still. Standing shapes and empty stretches make a quarter to
a half of the frames redundant, as in real footage.

Shape letters: T frames, S side of the square frame in pixels.
"""

from dataclasses import dataclass

import numpy as np

from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES, background, coverage, paint, to_uint8

FRAMES = 64
SIDE = 64
FPS = 16.0
EVENTS = 4
RADIUS = 10.0
MOVING_FRAMES = (8, 12)
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Seeds of the splits never meet: training draws from [TRAIN_SEEDS, ∞), the others are finite blocks below.
PACKAGED_SEEDS = 1_000
HELD_OUT_SEEDS = 10_000
TRAIN_SEEDS = 1_000_000


@dataclass(frozen=True)
class Event:
    """One shape's appearance: visible in frames [start, end), moving in [start, halt)."""

    colour: str
    shape: str
    direction: str
    start: int
    halt: int
    end: int
    lane: float
    reach: float

    @property
    def name(self) -> str:
        """What a question calls it, such as "red circle"."""
        return f"{self.colour} {self.shape}"

    def centres(self, frames: np.ndarray) -> np.ndarray:
        """Centre (x, y) in pixels at each frame number, float [T, 2]."""
        progress = np.clip((frames - self.start) / (self.halt - 1 - self.start), 0.0, 1.0)
        # Half of the shape shows in the first frame, and in the last one if it crosses the whole frame.
        along = progress * self.reach * SIDE
        dx, dy = DIRECTIONS[self.direction]
        if dx + dy < 0:
            along = SIDE - along
        lane = np.full_like(along, self.lane)
        return np.stack([along, lane] if dx else [lane, along], axis=-1)


@dataclass(frozen=True)
class Clip:
    """The ground truth of one clip; `render` gives its pixels."""

    seed: int
    events: tuple[Event, ...]
    frames: int = FRAMES

    def event_at(self, frame: int) -> Event | None:
        """The event visible in a frame, None where the frame is empty."""
        return next((event for event in self.events if event.start <= frame < event.end), None)

    def redundant_fraction(self) -> float:
        """Fraction of frames in which nothing moves."""
        moving = sum(event.halt - event.start for event in self.events)
        return 1.0 - moving / self.frames


def make_clip(seed: int) -> Clip:
    """The clip of a seed: four events with four different colours and four different shapes."""
    rng = np.random.default_rng([seed, 0])
    colours = rng.permutation(list(COLOURS))[:EVENTS]
    shapes = rng.permutation(SHAPES)[:EVENTS]
    moving = rng.integers(MOVING_FRAMES[0], MOVING_FRAMES[1] + 1, size=EVENTS)
    # What is left is still: before the first event and after each one.
    pauses = rng.multinomial(FRAMES - moving.sum(), rng.dirichlet(np.ones(EVENTS + 1)))
    events, frame = [], int(pauses[0])
    for index in range(EVENTS):
        stays = bool(rng.random() < 0.5)
        halt = frame + int(moving[index])
        after = halt + int(pauses[index + 1])
        events.append(
            Event(
                colour=str(colours[index]),
                shape=str(shapes[index]),
                direction=str(rng.choice(list(DIRECTIONS))),
                start=frame,
                halt=halt,
                end=after if stays else halt,
                lane=float(rng.uniform(RADIUS + 2, SIDE - RADIUS - 2)),
                reach=float(rng.uniform(0.6, 0.85)) if stays else 1.0,
            )
        )
        frame = after
    return Clip(seed=seed, events=tuple(events))


def render(clip: Clip, indices: np.ndarray | None = None) -> np.ndarray:
    """Pixels of a clip, uint8 [T, S, S, 3] RGB; only the frames in `indices` when given."""
    indices = np.arange(clip.frames) if indices is None else np.asarray(indices)
    frames = np.repeat(background(np.random.default_rng([clip.seed, 1]), SIDE)[None], len(indices), axis=0)
    for event in clip.events:
        visible = (indices >= event.start) & (indices < event.end)
        if visible.any():
            alpha = coverage(event.shape, event.centres(indices[visible]), RADIUS, SIDE)
            painted = frames[visible]
            paint(painted, alpha, COLOURS[event.colour])
            frames[visible] = painted
    return to_uint8(frames)
