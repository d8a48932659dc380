"""The command `remember` on real files: answers, saving, resuming, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from namm_transfer import MemoryCache, adapt, policy
from namm_transfer.cli import app
from namm_transfer.errors import DataError
from namm_transfer.eval import remember as module
from namm_transfer.eval.video import decode, fit, write_mp4
from namm_transfer.eval.video_qa import hour
from namm_transfer.eval.video_qa.clips import make_clip, render
from namm_transfer.eval.video_qa.evaluate import ask
from namm_transfer.eval.video_qa.host import ANSWER_TOKENS, load_host
from namm_transfer.eval.video_qa.hour import HourConfig, difference, draw
from namm_transfer.eval.video_qa.packaged import packaged_clips


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_hosts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    settings = [f"model.path={tiny_hosts / 'video_llm'}", f"policy.namm={tiny_hosts / 'namm'}"]

    def call(*arguments, packaged=False):
        return CliRunner().invoke(app, ["remember", *map(str, arguments), *([] if packaged else settings)])

    return call


@pytest.fixture
def video(tmp_path):
    """Two clips behind each other, wider than high."""
    frames = np.concatenate([render(make_clip(seed)) for seed in (1, 2)])
    path = tmp_path / "two clips.mp4"
    write_mp4(path, np.concatenate([frames, frames[:, :, ::-1]], axis=2), 16.0)
    return path


def test_the_packaged_host_answers_as_in_the_evaluation(run):
    """Frame by frame and with all frames in one prompt: the same answers, with the full cache and under the NAMM."""
    clip = packaged_clips()[0]
    model, processor = load_host()
    frames = decode(clip.path).frames
    questions = clip.questions[::2]
    options = [part for question in questions for part in ("--question", question.suffix())]
    for keep, setting in ((policy("full"), "policy=full"), (policy("h2o", budget=300), "policy=h2o")):
        with torch.no_grad(), adapt(model, keep, 256) as host:
            replies = ask(model, processor, frames, questions, host.new_cache(), MemoryCache.fork, host)
            expected = [reply for reply, _ in replies]
        budget = [] if setting == "policy=full" else ["policy.budget=300"]
        result = run(clip.path, setting, *budget, f"max_new_tokens={ANSWER_TOKENS}", *options, packaged=True)
        assert result.exit_code == 0, result.output
        assert [line[5:] for line in result.output.splitlines() if line.startswith("  -> ")] == expected
        assert "remembered 64 frames, up to 0:00:03.938" in result.output


def test_an_interrupted_memory_is_resumed_to_the_same_memory(run, video, tmp_path, monkeypatch, tiny_hosts):
    assert run(video, "--save", "whole.safetensors", "policy.budget=64").exit_code == 0
    watched = module._pixels
    calls = []

    def stop(frames):
        calls.append(len(frames))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return watched(frames)

    monkeypatch.setattr(module, "_pixels", stop)
    stopped = run(video, "--save", "part.safetensors", "policy.budget=64", "save_every=0.000001")
    assert stopped.exit_code == 130
    settings = f"model.path={tiny_hosts / 'video_llm'} policy.namm={tiny_hosts / 'namm'}"
    again = f"namm-transfer remember 'two clips.mp4' policy.budget=64 save_every=0.000001 {settings}"
    assert f"go on with: {again} --resume part.safetensors" in stopped.output.replace(str(tmp_path) + "/two", "two")
    monkeypatch.setattr(module, "_pixels", watched)
    with safe_open(tmp_path / "part.safetensors", "pt") as file:
        assert json.loads(file.metadata()["video"])["frames"] == 64
    resumed = run(video, "--resume", "part.safetensors", "policy.budget=64")
    assert resumed.exit_code == 0, resumed.output
    assert "64 of 128 frames are in part.safetensors already" in resumed.output
    assert difference(tmp_path / "whole.safetensors", tmp_path / "part.safetensors") == 0.0
    asked = run(video, "--resume", "part.safetensors", "policy.budget=64", "--question", "What came first?")
    assert "128 of 128 frames" in asked.output
    assert "What came first?\n  -> " in asked.output
    other = run(video, "--resume", "part.safetensors", "policy.budget=64", "fps=2")
    assert (other.exit_code, "is the memory of {'video': 'two clips.mp4'" in other.output) == (2, True)
    other = [f"policy.namm={tiny_hosts / 'namm'}", "policy.budget=64"]
    foreign = run(video, "--resume", "part.safetensors", *other, packaged=True)
    assert (foreign.exit_code, "is the memory of" in foreign.output) == (2, True)
    policy_ = run(video, "--resume", "part.safetensors", "policy.budget=65")
    assert (policy_.exit_code, "was saved under the policy" in policy_.output) == (2, True)


def test_a_fault_in_the_file_keeps_what_was_seen(run, video, tmp_path, monkeypatch):
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + len(data) * 7 // 10
    data[start : start + 2000] = bytes(2000)
    video.write_bytes(data)
    result = run(video, "--save", "memory.safetensors")
    assert result.exit_code == 2
    assert "two clips.mp4" in result.output
    with safe_open(tmp_path / "memory.safetensors", "pt") as file:
        assert 0 < json.loads(file.metadata()["video"])["frames"] < 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file"),
        (["two clips.mp4", "fsp=2"], "the nearest is 'fps'"),
        (["two clips.mp4", "fps=0"], "expected a positive fps"),
        (["two clips.mp4", "batch=0"], "batch is 0"),
        (["two clips.mp4", "save_every=-1"], "save_every is -1"),
        (["two clips.mp4", "max_new_tokens=0"], "max_new_tokens is 0"),
        (["two clips.mp4", "max_new_tokens=2.5"], "max_new_tokens is 2.5; expected an integer"),
        (["two clips.mp4", "--save", "."], "is to be saved in ., which is a folder"),
        (["two clips.mp4", "--save", "two clips.mp4/a"], "File exists"),
        (["two clips.mp4", "model=vivit"], "remember: model.host is 'vivit'; expected one of llava_next_video"),
        (["two clips.mp4", "--resume", "none.safetensors"], "cannot read a memory"),
    ],
)
def test_wrong_arguments_are_one_message(run, video, tmp_path, arguments, message):
    result = run(*arguments)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert [path.name for path in tmp_path.iterdir()] == [video.name]


def test_a_video_beyond_the_hosts_positions_is_told(run, tmp_path):
    draw(tmp_path / "long.mp4", 280, 16.0)
    result = run("long.mp4", "policy.budget=64")
    assert result.exit_code == 0, result.output
    assert "remembered 280 frames" in result.output
    assert "beyond the 4,096 positions" in result.output


def test_unknown_words_are_named(run, video):
    result = run(video, "fps=4", "--question", "What colour was the elephant?")
    assert result.exit_code == 0
    assert "does not know the words 'elephant'" in result.output


def test_frames_are_fitted_to_the_host():
    frames = np.zeros((2, 90, 160, 3), np.uint8)
    frames[:, :, 80:] = 255
    fitted = fit(frames, 64)
    assert fitted.shape == (2, 64, 64, 3)
    assert fitted[:, :, :28].max() < 30 and fitted[:, :, 36:].min() > 225, "the middle, not squeezed"
    small = np.arange(2 * 20 * 10 * 3, dtype=np.uint8).reshape(2, 20, 10, 3)
    assert fit(small, 64).shape == (2, 64, 64, 3)
    exact = render(make_clip(3))
    assert fit(exact, 64) is exact


def test_a_long_video_is_drawn_clip_after_clip(tmp_path):
    draw(tmp_path / "long.mp4", 150, 25.0)
    video = decode(tmp_path / "long.mp4")
    assert len(video.frames) == 150
    assert np.abs(video.frames[64:128].astype(float) - render(make_clip(20_001))).mean() < 6
    with pytest.raises(ValueError, match="kill_at"):
        HourConfig(tmp_path, kill_at=2.0)


def test_a_video_that_is_killed_half_way_is_gone_on_with_and_told_of(tmp_path):
    setting = HourConfig(
        tmp_path / "hour", minutes=1, frames_per_second=10, sampled=10, budget=64, policy="h2o", threads=1,
        kill_at=0.05, save_every=0.01,
    )  # fmt: skip
    told = hour.run(setting)
    assert told == json.loads((tmp_path / "hour" / "hour.json").read_text())
    assert told["watched_frames"] == told["video_frames"] == 600 and told["video_seconds"] == 60
    assert 0.05 * 600 <= told["watched_at_kill"] < 600 and told["exit_codes"] == [0, -9, 0]
    assert told["difference"] == 0.0
    assert 50 < told["resident_mib_at_frames"]["peak"] < 4000


def test_an_hour_that_cannot_be_watched_is_told(tmp_path, monkeypatch):
    setting = HourConfig(tmp_path, minutes=0.02, frames_per_second=10, policy="h2o")
    monkeypatch.setattr(hour, "COMMAND", ["false"])
    with pytest.raises(DataError, match=r"exit code 1, and whole.safetensors was not saved"):
        hour.run(setting)
    monkeypatch.setattr(hour, "watch", lambda arguments, memory, kill_at=None: memory.touch() or hour.Watched(1, [], 0))
    monkeypatch.setattr(hour, "_frames", lambda path: 12)
    with pytest.raises(DataError, match=r"expected a kill after the first save, exit code -9; got 0"):
        hour.run(setting)
