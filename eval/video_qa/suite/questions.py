"""The suite's questions: eight families, two questions of each about every clip, in plain English.

Nothing but the video answers them. Options are drawn from what is equally likely, and the place of the right one takes
turns over seeds, so that neither a letter nor the most frequent answer does better than chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from namm_transfer.eval.video_qa.clips import DIRECTIONS
from namm_transfer.eval.video_qa.drawing import SHAPES
from namm_transfer.eval.video_qa.questions import LETTERS, Question
from namm_transfer.eval.video_qa.suite.clips import OBJECTS, PALETTE, QUARTERS, SIGNS, Appearance, SuiteClip

__all__ = ["FAMILIES", "PER_FAMILY", "questions_of"]

FAMILIES: tuple[str, ...] = ("colour", "shape", "count", "order", "direction", "duration", "needle", "change")
PER_FAMILY = 2
ORDINALS = ("first", "second", "third", "fourth")
QUARTER_NAMES = tuple(f"the {name} quarter" for name in (*ORDINALS[:-1], "last"))
RESPECTS = {"colour": "its colour", "shape": "its shape", "place": "its place", "size": "its size"}
_STREAM = 7


@dataclass(frozen=True)
class _Asked:
    """A question before its options are in an order: the wrong ones are all of `wrong`, or as many as there is room."""

    text: str
    truth: str
    wrong: Sequence[str]


def questions_of(clip: SuiteClip) -> tuple[Question, ...]:
    """The questions about a clip, `PER_FAMILY` of each family, family by family; a function of the clip."""
    rng = np.random.default_rng([clip.seed, _STREAM, clip.frames, round(1000 * clip.redundancy)])
    questions = []
    for family in FAMILIES:
        for number, asked in enumerate(_ASK[family](clip, rng)):
            wrong = [asked.wrong[i] for i in rng.permutation(len(asked.wrong))[: len(LETTERS) - 1]]
            place = (clip.seed + number + FAMILIES.index(family)) % (len(wrong) + 1)
            options = (*wrong[:place], asked.truth, *wrong[place:])
            questions.append(Question(family, asked.text, options, place))
    return tuple(questions)


def _colour(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    colours, shapes = [event.colour for event in clip.events], [event.shape for event in clip.events]
    for index in _two(rng, len(ORDINALS)):
        which = _which(rng, index, shapes, shapes[index])
        yield _Asked(f"What colour was the {which}?", colours[index], _wrong(rng, colours[index], colours, PALETTE))


def _shape(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    colours, shapes = [event.colour for event in clip.events], [event.shape for event in clip.events]
    for index in _two(rng, len(ORDINALS)):
        which = _which(rng, index, colours, f"{colours[index]} object")
        yield _Asked(f"What shape was the {which}?", shapes[index], _wrong(rng, shapes[index], shapes, SHAPES))


def _count(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    count = len(clip.events)
    block = next(block for block in OBJECTS[clip.frames] if count in block)
    yield _Asked("How many coloured objects appeared in the video?", str(count), _but(map(str, block), str(count)))
    before = int(rng.integers(4))
    name = clip.events[before].name
    numbers = _but(map(str, range(4)), str(before))
    yield _Asked(f"How many coloured objects appeared before the {name}?", str(before), numbers)


def _order(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    for extreme in ("first", "last"):
        chosen = sorted(rng.permutation(len(clip.events))[: len(LETTERS)])
        names = [clip.events[i].name for i in chosen]
        truth = names[0 if extreme == "first" else -1]
        yield _Asked(f"Which of these objects appeared {extreme}?", truth, _but(names, truth))


def _direction(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    for index in _two(rng, len(clip.events)):
        event = clip.events[index]
        wrong = _but(DIRECTIONS, event.direction)
        yield _Asked(f"In which direction did the {event.name} move?", event.direction, wrong)


def _duration(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    def visible(event: Appearance) -> int:
        return event.end - event.start

    for word, pick in (("longest", max), ("shortest", min)):
        truth = pick(clip.events, key=visible).name
        yield _Asked(
            f"Which of these objects was visible for the {word} time?",
            truth,
            _but((event.name for event in clip.events), truth),
        )


def _needle(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    digits = _but(map(str, range(10)), str(clip.digit))
    yield _Asked("In a single frame a large digit was shown. Which digit was it?", str(clip.digit), digits)
    yield _quarter("In which part of the video was the large digit shown?", clip, clip.needle)


def _change(clip: SuiteClip, rng: np.random.Generator) -> Iterator[_Asked]:
    truth = RESPECTS[clip.changed()]
    yield _Asked("What about the small sign at the top changed?", truth, _but((RESPECTS[k] for k in SIGNS), truth))
    yield _quarter("In which part of the video did the small sign at the top change?", clip, clip.change)


_ASK = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "order": _order,
    "direction": _direction,
    "duration": _duration,
    "needle": _needle,
    "change": _change,
}


def _quarter(text: str, clip: SuiteClip, frame: int) -> _Asked:
    truth = QUARTER_NAMES[frame * QUARTERS // clip.frames]
    return _Asked(text, truth, _but(QUARTER_NAMES, truth))


def _two(rng: np.random.Generator, count: int) -> list[int]:
    """Two different numbers below `count`."""
    return [int(i) for i in rng.permutation(count)[:PER_FAMILY]]


def _which(rng: np.random.Generator, index: int, traits: Sequence[str], name: str) -> str:
    """What a question calls an object: by its place in the order, or sometimes by a trait that no other one has."""
    if traits.count(traits[index]) == 1 and rng.random() < 0.5:
        return name
    return f"{ORDINALS[index]} object"


def _but(values: Iterable[str], truth: str) -> list[str]:
    return [value for value in values if value != truth]


def _wrong(rng: np.random.Generator, truth: str, seen: Sequence[str], known: Sequence[str]) -> list[str]:
    """Three wrong values: such as the clip shows too where there are enough, else others."""
    shown = [value for value in known if value in seen and value != truth]
    others = [value for value in known if value not in seen]
    mixed = [group[i] for group in (shown, others) for i in rng.permutation(len(group))]
    return mixed[: len(LETTERS) - 1]
