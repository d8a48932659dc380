"""Generated clips: the seed decides everything, and the truth agrees with the pixels."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from namm_transfer.errors import ConfigError
from namm_transfer.eval import video_clips
from namm_transfer.eval.video import decode
from namm_transfer.eval.video_classification import packaged as motion_packaged
from namm_transfer.eval.video_qa import packaged
from namm_transfer.eval.video_qa.clips import DIRECTIONS, EVENTS, FRAMES, MOVING_FRAMES, SIDE, make_clip, render
from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES, coverage

SEEDS = range(40)


def test_a_seed_is_a_clip() -> None:
    assert make_clip(3) == make_clip(3)
    np.testing.assert_array_equal(render(make_clip(3)), render(make_clip(3)))
    assert make_clip(3) != make_clip(4)


def test_rendering_chosen_frames_equals_choosing_rendered_frames() -> None:
    chosen = np.array([63, 0, 30])
    np.testing.assert_array_equal(render(make_clip(8), chosen), render(make_clip(8))[chosen])


@pytest.mark.parametrize("seed", SEEDS)
def test_events_follow_one_another(seed: int) -> None:
    events = make_clip(seed).events
    assert len(events) == EVENTS
    assert len({event.colour for event in events}) == len({event.shape for event in events}) == EVENTS
    assert all(a.end <= b.start for a, b in pairwise(events))
    assert events[0].start >= 0 and events[-1].end <= FRAMES
    for event in events:
        assert event.direction in DIRECTIONS and event.colour in COLOURS and event.shape in SHAPES
        assert MOVING_FRAMES[0] <= event.halt - event.start <= MOVING_FRAMES[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_show_the_truth(seed: int) -> None:
    clip = make_clip(seed)
    frames = render(clip).astype(int)
    for event in clip.events:
        middle = (event.start + event.halt) // 2
        inside = coverage(event.shape, event.centres(np.array([middle])), 10.0, SIDE)[0] == 1.0
        assert inside.any()
        np.testing.assert_array_equal(frames[middle][inside], np.broadcast_to(COLOURS[event.colour], (inside.sum(), 3)))
    empty = [index for index in range(FRAMES) if clip.event_at(index) is None]
    assert all(frames[index].max() < 90 for index in empty)


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_move_the_way_they_say(seed: int) -> None:
    clip = make_clip(seed)
    frames = render(clip).astype(int)
    still = frames.min(axis=0)
    for event in clip.events:
        lit = (frames[event.start : event.halt] - still).sum(axis=-1) > 60
        centres = [np.argwhere(mask).mean(axis=0)[::-1] for mask in lit if mask.any()]
        travelled = centres[-1] - centres[0]
        assert np.dot(travelled, DIRECTIONS[event.direction]) > SIDE / 3


def test_part_of_the_frames_is_redundant() -> None:
    for seed in SEEDS:
        clip = make_clip(seed)
        frames = render(clip)
        repeated = np.mean([np.array_equal(a, b) for a, b in pairwise(frames)])
        assert 0.2 <= clip.redundant_fraction() <= 0.5
        assert repeated >= 0.1


def test_every_value_occurs() -> None:
    events = [event for seed in range(200) for event in make_clip(seed).events]
    assert {event.colour for event in events} == set(COLOURS)
    assert {event.shape for event in events} == set(SHAPES)
    for direction in DIRECTIONS:
        assert 0.18 < np.mean([event.direction == direction for event in events]) < 0.32
    assert {event.end > event.halt for event in events} == {True, False}


@pytest.mark.parametrize("suite", [video_clips.Suite.video_qa, video_clips.Suite.video_classification])
def test_held_out_clips_are_written_with_a_manifest_that_the_task_reads(
    suite: video_clips.Suite, tmp_path: Path
) -> None:
    video_clips.main(suite, tmp_path / "clips", 2)
    modules = {"video_qa": packaged, "video_classification": motion_packaged}
    held_out, ours = modules[suite].packaged_clips(tmp_path / "clips"), modules[suite].packaged_clips()
    assert len(held_out) == 2
    assert not {clip.seed for clip in held_out} & {clip.seed for clip in ours}
    assert all(len(decode(clip.path).frames) for clip in held_out)
    with pytest.raises(ConfigError, match="--frames and --redundancy are the suite's"):
        video_clips.main(suite, tmp_path / "others", 2, frames=64)
