"""The suite as a task on a tiny host: real files, chosen families, and settings that are checked."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from namm_transfer import policy
from namm_transfer.configs import composed
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval import video_clips
from namm_transfer.eval.inspect import inspect
from namm_transfer.eval.results import RunFolder
from namm_transfer.eval.transfer import transfer
from namm_transfer.eval.video import decode
from namm_transfer.eval.video_qa.backbone import load_language
from namm_transfer.eval.video_qa.suite.clips import FRAMES, TRAIN_SEEDS, make_clip
from namm_transfer.eval.video_qa.suite.files import HELD_OUT, write_clips
from namm_transfer.eval.video_qa.suite.questions import FAMILIES
from namm_transfer.eval.video_qa.suite.task import SuiteQA
from namm_transfer.eval.workers import build_task

pytestmark = pytest.mark.filterwarnings("ignore:.*read alike to the host", "ignore:.*the host was made for")


@pytest.fixture
def suite(tiny_hosts: Path) -> SuiteQA:
    model = {"path": str(tiny_hosts / "video_llm"), "device": "cpu", "update_interval": 256}
    return SuiteQA("suite", model, "drawn", 2, 8)


def test_a_few_questions_cover_the_families(suite: SuiteQA) -> None:
    units = suite.units(0)
    assert len(units) == 16 and Counter(unit.cluster for unit in units) == {"100000": 8, "100001": 8}
    outcomes = list(suite.evaluate(units[:8], policy("h2o", budget=0.25), 0))
    assert [o.detail["family"] for o in outcomes] == list(FAMILIES)
    assert all(o.kept_at_updates == pytest.approx(0.25, abs=0.01) and o.score in (0.0, 1.0) for o in outcomes)
    (alone,) = suite.evaluate(units[3:4], policy("h2o", budget=0.25), 0)
    assert alone == outcomes[3]


def test_what_the_host_cannot_read_is_told(suite: SuiteQA) -> None:
    with pytest.warns(UserWarning, match=r"of 32 questions \d+ have options that read alike to the host"):
        list(suite.evaluate(suite.units(0)[:1], policy("full"), 0))
    long = replace(suite, frames=1024, clips=1, questions=1)
    with pytest.warns(UserWarning, match="1024 frames are 16384 tokens, but the host was made for 4096"):
        next(iter(long.evaluate(long.units(0), policy("full"), 0)))


@pytest.mark.filterwarnings("error:.*the host was trained on")
def test_a_host_that_was_trained_on_other_lengths_is_told() -> None:
    suite = asked_of_the_packaged_host(1)
    next(iter(suite.evaluate(suite.units(0)[:1], policy("full"), 0)))
    longer = replace(suite, frames=256)
    with pytest.warns(UserWarning, match="clips of 256 frames, but the host was trained on clips of 64: what it"):
        next(iter(longer.evaluate(longer.units(0)[:1], policy("full"), 0)))


def test_only_the_clips_that_are_asked_for_are_drawn(suite: SuiteQA) -> None:
    folder = suite.clip_path(1).parent
    assert [path.name for path in folder.iterdir()] == ["100001.mp4"]
    assert len(decode(suite.clip_path(1)).frames) == 64
    assert not list(replace(suite, frames=256).clip_path(0).parent.glob("100001.mp4"))


def test_chosen_families_are_asked_alone(suite: SuiteQA) -> None:
    chosen = replace(suite, families=["needle", "count"], questions=4, clips=1)
    questions = next(iter(chosen._clips.values())).questions
    assert Counter(question.family for question in questions) == {"count": 2, "needle": 2}
    assert len(chosen.units(0)) == 4
    with pytest.raises(ConfigError, match="questions is 5; expected an integer from 1 to 4"):
        replace(chosen, questions=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 100}, "frames is 100; expected one of 64, 256, 1024"),
        ({"redundancy": 2}, "redundancy is 2; expected a number from 0 to 1"),
        ({"families": []}, "families is"),
        ({"families": "colour"}, "families is 'colour'; expected some of colour, shape"),
        ({"families": ["color"]}, "expected some of"),
        ({"clips": 0}, "clips is 0; expected an integer from 1"),
    ],
)
def test_bad_settings_are_refused(suite: SuiteQA, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(suite, **change)


def test_clips_of_a_folder_are_those_that_are_drawn(suite: SuiteQA, tmp_path: Path) -> None:
    video_clips.main(video_clips.Suite.video_qa_suite, tmp_path / "clips", 2, frames=64, redundancy=0.5)
    read = replace(suite, videos=str(tmp_path / "clips"))
    assert read.units(0) == suite.units(0)
    for number in range(2):
        assert read.clip_path(number).read_bytes() == suite.clip_path(number).read_bytes()
    assert [c.questions for c in read._clips.values()] == [c.questions for c in suite._clips.values()]
    entry = json.loads((tmp_path / "clips" / "manifest.json").read_text())["clips"][0]
    assert entry["digit"] == make_clip(HELD_OUT[0], 64, 0.5).digit and len(entry["events"]) >= 4
    with pytest.raises(ConfigError, match=r"clips of \(frames, redundancy\) \[\(64, 0.5\)\]; asked for \(256, 0.5\)"):
        replace(read, frames=256)
    with pytest.raises(ConfigError, match="clips is 3; expected an integer from 1 to 2"):
        replace(read, clips=3)
    with pytest.raises(DataError, match="is not a manifest of the suite's clips"):
        replace(suite, videos=str(Path(video_clips.__file__).parent / "assets" / "videos" / "qa"))


def test_seeds_outside_of_the_held_out_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outside of the held-out block 100000 to 999999"):
        write_clips(tmp_path, [TRAIN_SEEDS], 64, 0.5)
    with pytest.raises(ConfigError, match="need --frames and --redundancy"):
        video_clips.main(video_clips.Suite.video_qa_suite, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_is_part_of_the_inputs(suite: SuiteQA) -> None:
    inputs = suite.inputs()
    assert inputs == replace(suite).inputs() and set(inputs) == {"host", "clips"}
    assert inputs["clips"] != replace(suite, redundancy=0.6).inputs()["clips"]


@pytest.mark.parametrize("frames", FRAMES)
def test_every_length_is_read_whole(suite: SuiteQA, frames: int) -> None:
    long = replace(suite, frames=frames, clips=1, questions=1, families=["needle"], redundancy=0.9)
    (outcome,) = long.evaluate(long.units(0), policy("streaming", budget=64), 0)
    assert 16 * frames < outcome.tokens_seen < 16 * frames + 100
    assert outcome.detail["family"] == "needle"


def asked_of_the_packaged_host(clips: int, *settings: str, task: str = "video_qa/suite") -> SuiteQA:
    suite: SuiteQA = build_task(composed("eval", [f"task={task}", f"task.clips={clips}", *settings])["task"])
    return suite


@pytest.mark.filterwarnings("error:.*read alike to the host", "error:.*the host was trained on")
def test_the_packaged_host_answers_every_family() -> None:
    suite = asked_of_the_packaged_host(6)
    outcomes = list(suite.evaluate(suite.units(0), policy("full"), 0))
    right = Counter(outcome.detail["family"] for outcome in outcomes if outcome.score == 1.0)
    assert sum(right.values()) >= 40, right  # of 48; 0.92 of many
    assert set(right) == set(FAMILIES)


@pytest.mark.filterwarnings("error:.*read alike to the host", "error:.*the host was trained on")
@pytest.mark.parametrize(("frames", "clips", "least"), [(256, 2, 10), (1024, 1, 4)])
def test_longer_clips_have_a_packaged_host_of_their_own(frames: int, clips: int, least: int) -> None:
    suite = asked_of_the_packaged_host(clips, task=f"video_qa/suite_{frames}")
    outcomes = list(suite.evaluate(suite.units(0), policy("random", budget=0.5), 0))  # which costs it next to nothing
    assert sum(outcome.score for outcome in outcomes) >= least, outcomes  # of 8 a clip; a quarter of them by chance
    assert all(16 * frames < outcome.tokens_seen < 16 * frames + 100 for outcome in outcomes)


@pytest.mark.filterwarnings("error:.*read alike to the host", "error:.*the host was trained on")
def test_the_host_on_smollm2_answers_in_words_and_remembers() -> None:
    pytest.importorskip("peft")
    try:
        load_language("smollm2-135m-instruct")
    except DataError as error:  # it is not shipped, but fetched once
        pytest.skip(str(error))
    suite = asked_of_the_packaged_host(2, "model=llava_next_video_smollm2")
    assert suite.inputs()["language model"] == "smollm2-135m-instruct"
    outcomes = list(suite.evaluate(suite.units(0), policy("full"), 0))
    assert sum(outcome.score for outcome in outcomes) >= 10, outcomes  # of 16
    few = list(suite.evaluate(suite.units(0)[:4], policy("h2o", budget=0.5), 0))
    assert all(outcome.kept_at_updates == pytest.approx(0.5, abs=0.01) for outcome in few)


def test_the_packaged_host_needs_its_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown another clip, it must fall towards chance: the answers come from the frames."""
    suite = asked_of_the_packaged_host(6)
    following = {clip: suite.clip_path((number + 1) % 6) for number, clip in enumerate(suite._clips)}
    monkeypatch.setattr(SuiteQA, "_file", lambda self, clip: following[clip.path.stem])
    outcomes = list(suite.evaluate(suite.units(0), policy("full"), 0))
    assert sum(outcome.score for outcome in outcomes) <= 0.6 * len(outcomes)


def test_eval_and_inspect_take_the_configuration(tiny_hosts: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    chosen = [
        "task=video_qa/suite",
        f"task.model.path={tiny_hosts / 'video_llm'}",
        "task.clips=1",
        "task.questions=2",
        "policy=h2o",
        "policy.budget=0.5",
    ]
    transfer(composed("eval", chosen), tmp_path / "eval", console, "eval")
    rows = RunFolder(tmp_path / "eval").rows()
    assert [row.detail["family"] for row in rows] == ["colour", "shape"]
    inspect(composed("inspect", chosen), tmp_path / "inspect", console)
    assert (tmp_path / "inspect" / "retained.png").is_file()
