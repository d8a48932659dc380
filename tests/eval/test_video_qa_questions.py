"""Questions: answers follow from the clip, the prompt is fixed to the letter, and the parser never guesses."""

from collections import Counter

import numpy as np
import pytest

from namm_transfer.eval.video_qa.clips import make_clip
from namm_transfer.eval.video_qa.evaluate import questions_of
from namm_transfer.eval.video_qa.questions import FAMILIES, all_questions, parse_answer, sample_questions

COLOUR_OPTIONS = ("red", "green", "blue", "cyan")
ORDER_OPTIONS = ("red circle", "blue square", "green ring")

PROMPTS = {
    "colour": "<video>\nWhat colour was the ring?\nA blue\nB white\nC magenta\nD orange\nAnswer:",
    "order": "<video>\nWhat came first?\nA white square\nB blue diamond\nC orange ring\nD magenta cross\nAnswer:",
}


def test_prompt_snapshot() -> None:
    questions = all_questions(make_clip(49), np.random.default_rng(49))
    first = {family: next(q for q in questions if q.family == family) for family in PROMPTS}
    assert {family: question.prompt() for family, question in first.items()} == PROMPTS


def test_every_clip_can_be_asked_twenty_questions() -> None:
    questions = all_questions(make_clip(1), np.random.default_rng(0))
    assert Counter(q.family for q in questions) == {"colour": 4, "shape": 4, "direction": 4, "order": 8}
    assert len({q.text for q in questions}) == 20


@pytest.mark.parametrize("seed", range(20))
def test_answers_follow_from_the_events(seed: int) -> None:
    clip = make_clip(seed)
    by_shape, by_colour = {e.shape: e for e in clip.events}, {e.colour: e for e in clip.events}
    names = [event.name for event in clip.events]
    for question in all_questions(clip, np.random.default_rng(seed)):
        words = question.text.rstrip("?").split()
        answer = question.options[question.answer]
        assert len(set(question.options)) == len(question.options) in (3, 4)
        if question.family == "colour":
            assert answer == by_shape[words[-1]].colour
        elif question.family == "shape":
            assert answer == by_colour[words[-1]].shape
        elif question.family == "direction":
            assert answer == by_colour[words[4]].direction
        elif words[-1] in ("first", "last"):
            assert answer == names[0 if words[-1] == "first" else -1]
        else:
            step = 1 if words[2] == "after" else -1
            asked = " ".join(words[-2:])
            assert answer == names[names.index(asked) + step]
            assert asked not in question.options


def test_sampling_is_deterministic_and_balanced() -> None:
    assert questions_of(11, 2) == questions_of(11, 2)
    chosen = sample_questions(make_clip(11), np.random.default_rng(0), per_family=3)
    assert Counter(q.family for q in chosen) == dict.fromkeys(FAMILIES, 3)
    assert len({q.text for q in chosen}) == 12


def test_letters_give_nothing_away() -> None:
    letters = Counter(q.letter for seed in range(100) for q in questions_of(seed, 1) if len(q.options) == 4)
    assert min(letters.values()) > 0.17 * sum(letters.values())


@pytest.mark.parametrize(
    ("reply", "options", "expected"),
    [
        ("B", COLOUR_OPTIONS, 1),
        (" b\n", COLOUR_OPTIONS, 1),
        ("(C)", COLOUR_OPTIONS, 2),
        ("D.", COLOUR_OPTIONS, 3),
        ("A red", COLOUR_OPTIONS, 0),
        ("A: red", COLOUR_OPTIONS, 0),
        ("Green", COLOUR_OPTIONS, 1),
        ("blue  square.", ORDER_OPTIONS, 1),
        ("C green ring", ORDER_OPTIONS, 2),
        # Not an answer: empty, no option's letter, contradictory, several, embedded in other words.
        ("", COLOUR_OPTIONS, None),
        ("?", COLOUR_OPTIONS, None),
        ("E", COLOUR_OPTIONS, None),
        ("D", ORDER_OPTIONS, None),
        ("A green", COLOUR_OPTIONS, None),
        ("A B", COLOUR_OPTIONS, None),
        ("A A", COLOUR_OPTIONS, None),
        ("red or green", COLOUR_OPTIONS, None),
        ("square", ORDER_OPTIONS, None),
        ("I think it was red", COLOUR_OPTIONS, None),
    ],
)
def test_parser(reply: str, options: tuple[str, ...], expected: int | None) -> None:
    assert parse_answer(reply, options) == expected
