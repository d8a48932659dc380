"""What a clip of the suite shows, read from its pixels or frame by frame, and the answers that follow from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES, coverage
from namm_transfer.eval.video_qa.questions import Question
from namm_transfer.eval.video_qa.suite.clips import SuiteClip

BAR, SIDE, RADIUS = 16, 64, 8.0
COLOURED = [name for name in COLOURS if name != "white"]
SEGMENTS = {
    # top, upper left, upper right, middle, lower left, lower right, bottom of a digit as on a clock
    (1, 1, 1, 0, 1, 1, 1): 0, (0, 0, 1, 0, 0, 1, 0): 1, (1, 0, 1, 1, 1, 0, 1): 2, (1, 0, 1, 1, 0, 1, 1): 3,
    (0, 1, 1, 1, 0, 1, 0): 4, (1, 1, 0, 1, 0, 1, 1): 5, (1, 1, 0, 1, 1, 1, 1): 6, (1, 0, 1, 0, 0, 1, 0): 7,
    (1, 1, 1, 1, 1, 1, 1): 8, (1, 1, 1, 1, 0, 1, 1): 9,
}  # fmt: skip
PLACES = [(0, 1), (1, 0), (1, 2), (2, 1), (3, 0), (3, 2), (4, 1)]
ORDINALS = ["first", "second", "third", "fourth"]


@dataclass(frozen=True)
class Seen:
    """One object: the frames in which it is there."""

    colour: str
    shape: str
    direction: str
    first: int
    visible: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Timeline:
    """What happens in a clip."""

    frames: int
    objects: list[Seen]
    needle: int
    digit: int
    change: int
    changed: str


def from_truth(clip: SuiteClip) -> Timeline:
    """Frame by frame, whatever the order of the clip's own list."""
    there = [[e for e in reversed(clip.events) if e.start <= frame < e.end] for frame in range(clip.frames)]
    assert max(map(len, there)) == 1, "one object at a time"
    objects, met = [], set()
    for frame, events in enumerate(there):
        for event in events:
            if event.name not in met:
                met.add(event.name)
                visible = sum(event in others for others in there)
                objects.append(Seen(event.colour, event.shape, event.direction, frame, visible))
    before, after = (vars(sign) for sign in clip.signs)
    (changed,) = [key for key in before if before[key] != after[key]]
    return Timeline(clip.frames, objects, clip.needle, clip.digit, clip.change, changed)


def from_pixels(frames: np.ndarray) -> Timeline:
    """Nothing but uint8 [T, S, S, 3] is looked at."""
    pixels = frames.astype(int)
    field, bar = pixels[:, BAR:], pixels[:, :BAR]
    needle = int((field.min(axis=-1) > 200).sum(axis=(1, 2)).argmax())
    counts = np.stack([_near(field, name).sum(axis=(1, 2)) for name in COLOURED])  # [colours, T]
    shown = [COLOURED[i] if counts[i, t] >= 4 else None for t, i in enumerate(counts.argmax(axis=0))]
    shown[needle] = shown[needle - 1]  # an object neither comes nor goes behind the digit
    objects = []
    for colour, group in groupby(enumerate(shown), key=lambda pair: pair[1]):
        if colour is not None:
            times = [t for t, _ in group]
            objects.append(_object(field, colour, times, needle))
    changes = np.abs(np.diff(bar, axis=0)).max(axis=(1, 2, 3)) > 0
    (change,) = np.flatnonzero(changes) + 1
    return Timeline(len(frames), objects, needle, _digit(field[needle]), int(change), _changed(bar[0], bar[-1]))


def answer(question: Question, line: Timeline) -> str:
    """The one option that is right."""
    text, names = question.text, [one.name for one in line.objects]
    named = {one.name: one for one in line.objects}
    quarters = {"first": 0, "second": 1, "third": 2, "last": 3}
    if match := re.fullmatch(r"What (colour|shape) was the (\w+)( object)?\?", text):
        trait, which, _ = match.groups()
        if which in ORDINALS:
            one = line.objects[ORDINALS.index(which)]
        else:
            (one,) = [one for one in line.objects if which in (one.colour, one.shape)]
        return getattr(one, trait)
    if text == "How many coloured objects appeared in the video?":
        return str(len(names))
    if match := re.fullmatch(r"How many coloured objects appeared before the (.*)\?", text):
        return str(sum(one.first < named[match[1]].first for one in line.objects))
    if match := re.fullmatch(r"Which of these objects appeared (first|last)\?", text):
        return {"first": min, "last": max}[match[1]](question.options, key=lambda name: named[name].first)
    if match := re.fullmatch(r"In which direction did the (.*) move\?", text):
        return named[match[1]].direction
    if match := re.fullmatch(r"Which of these objects was visible for the (longest|shortest) time\?", text):
        times = {name: named[name].visible for name in question.options}
        best = (max if match[1] == "longest" else min)(times.values())
        (right,) = [name for name, time in times.items() if time == best]
        return right
    if text == "In a single frame a large digit was shown. Which digit was it?":
        return str(line.digit)
    if text == "What about the small sign at the top changed?":
        return f"its {line.changed}"
    match = re.fullmatch(r"In which part of the video (was the large digit shown|did the small sign .* change)\?", text)
    frame = line.needle if "digit" in match[1] else line.change
    (right,) = [o for o in question.options if quarters[o.split()[1]] == int(4 * frame / line.frames)]
    return right


def _near(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.linalg.norm(pixels - np.array(COLOURS[colour]), axis=-1) < 30


def _object(field: np.ndarray, colour: str, times: list[int], needle: int) -> Seen:
    seen = [t for t in times if t != needle]
    masks = [_near(field[t], colour) for t in seen]
    centres = [np.argwhere(mask).mean(axis=0)[::-1] for mask in masks]
    (dx, dy) = centres[-1] - centres[0]
    horizontal, vertical = ("left", "right")[int(dx > 0)], ("up", "down")[int(dy > 0)]
    fullest = max(range(len(seen)), key=lambda i: masks[i].sum())
    direction = horizontal if abs(dx) > abs(dy) else vertical
    return Seen(colour, _shape(masks[fullest], centres[fullest]), direction, times[0], len(times))


def _shape(mask: np.ndarray, middle: np.ndarray) -> str:
    """The shape whose outline fits best, wherever its centre lies near the middle of the pixels."""
    offsets = np.stack(np.meshgrid(*[np.arange(-3, 3.5, 0.5)] * 2), axis=-1).reshape(-1, 2)
    best = {}
    for shape in SHAPES:
        outlines = coverage(shape, middle + 0.5 + offsets, RADIUS, SIDE)[:, : SIDE - BAR] > 0.8
        best[shape] = (outlines != mask).sum(axis=(1, 2)).min()
    return min(best, key=best.get)


def _digit(field: np.ndarray) -> int:
    lit = [field[4 + 8 * row + 4, 20 + 8 * column + 4].min() > 128 for row, column in PLACES]
    return SEGMENTS[tuple(int(one) for one in lit)]


def _changed(before: np.ndarray, after: np.ndarray) -> str:
    masks = [picture.max(axis=-1) > 40 for picture in (before, after)]
    columns = [int(np.argwhere(mask)[:, 1].mean()) // 16 for mask in masks]
    heights = [int(np.ptp(np.argwhere(mask)[:, 0])) for mask in masks]
    if columns[0] != columns[1]:
        return "place"
    if np.array_equal(*masks):
        return "colour"
    return "size" if abs(heights[0] - heights[1]) > 3 else "shape"
