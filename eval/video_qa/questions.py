"""Multiple-choice questions about a clip, the prompt that asks them, and the parser that reads the answer."""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from namm_transfer.eval.video_qa.clips import DIRECTIONS, Clip

LETTERS = "ABCD"
FAMILIES: tuple[str, ...] = ("colour", "shape", "direction", "order")
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True)
class Question:
    """A question with two to four options, exactly one of them right."""

    family: str
    text: str
    options: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.answer]

    @property
    def truth(self) -> str:
        """The right option's text."""
        return self.options[self.answer]

    def prompt(self) -> str:
        """The fixed prompt: the video, the question, its options, and the cue for the answer."""
        return f"{VIDEO_PLACEHOLDER}\n{self.suffix()}"

    def suffix(self) -> str:
        """What follows the video in the prompt."""
        options = "\n".join(f"{letter} {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{self.text}\n{options}\nAnswer:"


def all_questions(clip: Clip, rng: np.random.Generator) -> list[Question]:
    """Every question the clip can answer (20 for four events), with shuffled options."""
    events = clip.events
    names = [event.name for event in events]
    colours, shapes = [event.colour for event in events], [event.shape for event in events]
    asked: list[tuple[str, str, str, list[str]]] = []
    for event in events:
        asked.append(("colour", f"What colour was the {event.shape}?", event.colour, colours))
        asked.append(("shape", f"What shape was {event.colour}?", event.shape, shapes))
        asked.append(("direction", f"Which way did the {event.name} move?", event.direction, list(DIRECTIONS)))
    asked.append(("order", "What came first?", names[0], names))
    asked.append(("order", "What came last?", names[-1], names))
    for before, after in pairwise(names):
        # The shape named in the question is no option: it cannot follow or precede itself.
        asked.append(("order", f"What came after the {before}?", after, [n for n in names if n != before]))
        asked.append(("order", f"What came before the {after}?", before, [n for n in names if n != after]))
    questions = []
    for family, text, truth, options in asked:
        shuffled = tuple(str(option) for option in rng.permutation(options))
        questions.append(Question(family, text, shuffled, shuffled.index(truth)))
    return questions


def sample_questions(clip: Clip, rng: np.random.Generator, per_family: int) -> list[Question]:
    """`per_family` different questions of every family, in the order of `FAMILIES`."""
    pool = all_questions(clip, rng)
    chosen: list[Question] = []
    for family in FAMILIES:
        members = [question for question in pool if question.family == family]
        chosen += [members[i] for i in rng.choice(len(members), size=per_family, replace=False)]
    return chosen


def parse_answer(reply: str, options: tuple[str, ...]) -> int | None:
    """Index of the option a reply names, None when it names none or more than one.

    A reply counts when it is an option's letter ("B", "(b)", "B."), the letter before the option's text
    ("B red"), or the option's text alone, whatever the case and surrounding space. An unparsable reply is
    wrong; nothing is guessed.
    """
    words = re.findall(r"[a-z0-9]+", reply.lower())
    text = " ".join(words)
    normalised = [" ".join(re.findall(r"[a-z0-9]+", option.lower())) for option in options]
    letters = [letter.lower() for letter in LETTERS[: len(options)]]
    matches = {
        index
        for index, (letter, option) in enumerate(zip(letters, normalised, strict=True))
        if text in (letter, option, f"{letter} {option}")
    }
    return matches.pop() if len(matches) == 1 else None
