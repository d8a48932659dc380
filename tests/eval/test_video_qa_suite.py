"""The suite: what its questions say is right is what its pixels show, and nothing but the video tells it."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namm_transfer.errors import ConfigError
from namm_transfer.eval.video import through_mp4
from namm_transfer.eval.video_qa.clips import DIRECTIONS
from namm_transfer.eval.video_qa.suite.clips import FRAMES, HELD_OUT_SEEDS, OBJECTS, SuiteClip, make_clip
from namm_transfer.eval.video_qa.suite.drawing import render
from namm_transfer.eval.video_qa.suite.questions import FAMILIES, PER_FAMILY, questions_of

from .suite_oracle import answer, from_pixels, from_truth

clips = st.builds(
    make_clip,
    seed=st.integers(HELD_OUT_SEEDS, HELD_OUT_SEEDS + 100_000),
    frames=st.sampled_from(FRAMES),
    redundancy=st.floats(0, 1),
)
WORDS = """
A Answer B C D How In What Which a about appeared at before blue change changed circle colour coloured cross cyan
diamond did digit direction down first for fourth frame green in it its large last left longest magenta many move object
objects of orange part place quarter red right ring second shape shortest shown sign single size small square the these
third time top triangle up video visible was which yellow
"""
PROMPTS = {
    "colour": "What colour was the first object?\nA magenta\nB blue\nC green\nD red",
    "shape": "What shape was the fourth object?\nA square\nB diamond\nC triangle\nD circle",
    "count": "How many coloured objects appeared in the video?\nA 9\nB 8\nC 10\nD 11",
    "order": "Which of these objects appeared first?\nA blue square\nB red ring\nC blue ring\nD blue triangle",
    "direction": "In which direction did the blue triangle move?\nA down\nB up\nC left\nD right",
    "duration": "Which of these objects was visible for the longest time?\n"
    "A blue square\nB green cross\nC blue ring\nD blue triangle",
    "needle": "In a single frame a large digit was shown. Which digit was it?\nA 8\nB 2\nC 7\nD 0",
    "change": "What about the small sign at the top changed?\nA its shape\nB its size\nC its place\nD its colour",
}
SECOND = {
    "count": "How many coloured objects appeared before the red circle?\nA 2\nB 3\nC 1\nD 0",
    "order": "Which of these objects appeared last?\nA green cross\nB green diamond\nC blue triangle\nD blue ring",
    "duration": "Which of these objects was visible for the shortest time?\n"
    "A magenta triangle\nB green diamond\nC green cross\nD blue triangle",
    "needle": "In which part of the video was the large digit shown?\n"
    "A the first quarter\nB the last quarter\nC the third quarter\nD the second quarter",
    "change": "In which part of the video did the small sign at the top change?\n"
    "A the second quarter\nB the third quarter\nC the first quarter\nD the last quarter",
}


def held_out(count: int, frames: int, redundancy: float = 0.5) -> list[SuiteClip]:
    return [make_clip(seed, frames, redundancy) for seed in range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count)]


@given(clips)
def test_every_answer_follows_from_what_happens_frame_by_frame(clip: SuiteClip) -> None:
    line = from_truth(clip)
    for question in questions_of(clip):
        assert answer(question, line) == question.truth, question.text
        assert question.options.count(question.truth) == 1 and len(set(question.options)) == 4


@settings(max_examples=12)
@given(
    st.builds(
        make_clip,
        seed=st.integers(HELD_OUT_SEEDS, HELD_OUT_SEEDS + 100_000),
        frames=st.sampled_from(FRAMES[:2]),
        redundancy=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    )
)
def test_the_pixels_show_what_the_questions_call_right(clip: SuiteClip) -> None:
    line = from_pixels(render(clip))
    assert line == from_truth(clip)
    assert [answer(question, line) for question in questions_of(clip)] == [q.truth for q in questions_of(clip)]


def test_an_mp4_still_shows_the_single_frame_and_the_change() -> None:
    (clip,) = held_out(1, 256)
    frames = render(clip)
    decoded = through_mp4(frames, 16.0)
    assert np.abs(decoded.astype(int) - frames).mean() < 4
    assert (decoded[:, 16:].min(axis=-1) > 180).sum(axis=(1, 2)).argmax() == clip.needle
    assert np.abs(np.diff(decoded[:, :16].astype(int), axis=0)).mean(axis=(1, 2, 3)).argmax() + 1 == clip.change


@given(clips)
def test_a_seed_is_a_clip_with_the_redundancy_it_was_asked_for(clip: SuiteClip) -> None:
    assert make_clip(clip.seed, clip.frames, clip.redundancy) == clip
    count = len(clip.events)
    assert count in sum(OBJECTS[clip.frames], ())
    assert all(a.end <= b.start and a.colour != b.colour for a, b in pairwise(clip.events))
    assert len({event.name for event in clip.events}) == count
    assert clip.events[0].start >= 0 and clip.events[-1].end <= clip.frames
    # every object moves for three frames at least
    most = min(clip.redundancy, 1 - 3 * count / clip.frames)
    assert clip.redundant_fraction() == pytest.approx(most, abs=2 * count / clip.frames)


@pytest.mark.parametrize("redundancy", [0.0, 0.5, 1.0])
def test_redundant_frames_repeat_the_one_before_or_show_no_object(redundancy: float) -> None:
    for clip in held_out(4, 256, redundancy):
        frames = render(clip)[:, 16:]
        repeated = np.array([np.array_equal(a, b) for a, b in pairwise(frames)])
        standing = np.zeros(clip.frames, bool)
        for event in clip.events:
            standing[event.halt : event.end] = True
        standing[[clip.needle, min(clip.needle + 1, clip.frames - 1)]] = False
        assert repeated[standing[1:]].all()
        pauses = clip.frames - sum(event.end - event.start for event in clip.events)
        repeats = sum(event.end - event.halt for event in clip.events)
        assert pauses + repeats == round(clip.redundant_fraction() * clip.frames)
        assert (pauses > 0) == (repeats > 0) == (redundancy > 0)
        assert all(d.end <= e.start or d.start >= e.end for d in clip.dust for e in clip.events)


def test_dust_is_grey_and_in_some_pauses() -> None:
    clip = next(clip for clip in held_out(20, 64, 1.0) if any(d.end - d.start > 3 for d in clip.dust))
    dust = max(clip.dust, key=lambda d: d.end - d.start)
    first, second = render(clip, np.array([dust.start, dust.end - 1]))[:, 16:].astype(int)
    moved = np.abs(first - second).max(axis=-1) > 40
    assert 0 < moved.sum() < 80
    assert np.ptp(np.maximum(first, second)[moved], axis=-1).max() < 40


@pytest.mark.parametrize("frames", FRAMES)
def test_neither_place_nor_prior_answers(frames: int) -> None:
    """A constant letter is at chance exactly, the likeliest answer to a text within what chance allows."""
    count = 400
    asked = [questions_of(clip) for clip in held_out(count, frames)]
    assert {tuple(q.family for q in questions) for questions in asked} == {
        tuple(family for family in FAMILIES for _ in range(PER_FAMILY))
    }
    for slot in range(len(asked[0])):
        assert set(Counter(questions[slot].answer for questions in asked).values()) == {count // 4}

    def kind(text: str, option: str) -> tuple[str, ...]:
        return (*text.split()[:6], option)

    offered: Counter[tuple[str, ...]] = Counter()
    right: Counter[tuple[str, ...]] = Counter()
    for questions in asked[: count // 2]:
        for q in questions:
            offered.update(kind(q.text, option) for option in q.options)
            right[kind(q.text, q.truth)] += 1
    scores = defaultdict(list)
    for questions in asked[count // 2 :]:
        for q in questions:
            rates = [right[kind(q.text, o)] / max(offered[kind(q.text, o)], 1) for o in q.options]
            scores[q.family].append(int(np.argmax(rates)) == q.answer)
    for family, hits in scores.items():
        assert np.mean(hits) < 0.25 + 3.5 * (0.25 * 0.75 / len(hits)) ** 0.5, family
    every = [hit for hits in scores.values() for hit in hits]
    assert np.mean(every) < 0.25 + 3 * (0.25 * 0.75 / len(every)) ** 0.5


def test_every_truth_occurs_about_equally_often() -> None:
    found = held_out(400, 256)
    for values, expected in [
        ([e.direction for clip in found for e in clip.events], list(DIRECTIONS)),
        ([clip.changed() for clip in found], ["colour", "shape", "place", "size"]),
        ([clip.digit for clip in found], list(range(10))),
        ([len(clip.events) for clip in found], list(range(4, 16))),
        ([clip.needle * 4 // 256 for clip in found], list(range(4))),
        ([clip.change * 4 // 256 for clip in found], list(range(4))),
    ]:
        counts = Counter(values)
        assert sorted(counts) == sorted(expected)
        mean = len(values) / len(expected)
        assert all(abs(n - mean) < 4.5 * mean**0.5 for n in counts.values()), counts


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="frames is 100; expected one of 64, 256, 1024"):
        make_clip(HELD_OUT_SEEDS, 100, 0.5)
    for bad in (-0.1, 1.1, True, "much", float("nan")):
        with pytest.raises(ConfigError, match="redundancy is .*; expected a number from 0 to 1"):
            make_clip(HELD_OUT_SEEDS, 64, bad)


def test_prompts_are_a_few_plain_words() -> None:
    words = {
        word.strip("?.,:")
        for frames in FRAMES
        for clip in held_out(60, frames)
        for question in questions_of(clip)
        for word in question.suffix().split()
    }
    assert {word for word in words if not word.isdigit()} == set(WORDS.split())


def test_prompt_snapshots() -> None:
    questions = questions_of(make_clip(HELD_OUT_SEEDS + 2, 256, 0.5))
    for offset, expected in enumerate((PROMPTS, SECOND)):
        found = {question.family: question.prompt() for question in questions[offset::PER_FAMILY]}
        for family, prompt in expected.items():
            assert found[family] == f"<video>\n{prompt}\nAnswer:"
