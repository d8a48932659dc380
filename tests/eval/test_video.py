"""Decoding: what goes into an mp4 comes out, and every kind of broken file is a `VideoError` naming it."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.eval.video import decode, through_mp4, write_mp4
from namm_transfer.eval.video_qa.clips import FPS, FRAMES, make_clip, render


@pytest.fixture(scope="module")
def clip_frames() -> np.ndarray:
    return render(make_clip(5))


@pytest.fixture
def mp4(tmp_path: Path, clip_frames: np.ndarray) -> Path:
    path = tmp_path / "clip.mp4"
    write_mp4(path, clip_frames, FPS)
    return path


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255.0**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_round_trip_keeps_frames_and_times(mp4: Path, clip_frames: np.ndarray) -> None:
    video = decode(mp4)
    assert video.frames.shape == clip_frames.shape and video.frames.dtype == np.uint8
    assert _psnr(video.frames, clip_frames) > 30.0
    np.testing.assert_allclose(video.timestamps, np.arange(FRAMES) / FPS, atol=1e-3)
    assert not list(mp4.parent.glob("*.partial"))


def test_frames_come_back_in_order(mp4: Path, clip_frames: np.ndarray) -> None:
    frames = decode(mp4).frames.astype(float)
    moving = make_clip(5).events[0]
    for index in range(moving.start, moving.halt):
        errors = np.mean((clip_frames[moving.start : moving.halt] - frames[index]) ** 2, axis=(1, 2, 3))
        assert moving.start + int(errors.argmin()) == index


def test_in_memory_round_trip_equals_the_file(mp4: Path, clip_frames: np.ndarray) -> None:
    np.testing.assert_array_equal(through_mp4(clip_frames, FPS), decode(mp4).frames)


def test_writing_is_deterministic(mp4: Path, tmp_path: Path, clip_frames: np.ndarray) -> None:
    write_mp4(tmp_path / "again.mp4", clip_frames, FPS)
    assert (tmp_path / "again.mp4").read_bytes() == mp4.read_bytes()


@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        ({"num_frames": 4}, [0, 21, 42, 63]),
        ({"num_frames": 64}, list(range(64))),
        ({"fps": 4.0}, list(range(0, 64, 4))),
        ({"fps": 100.0}, list(range(64))),
        ({"indices": [7, 3, 3]}, [7, 3, 3]),
    ],
)
def test_selections(mp4: Path, selection: dict, indices: list[int]) -> None:
    whole, chosen = decode(mp4), decode(mp4, **selection)
    np.testing.assert_array_equal(chosen.frames, whole.frames[indices])
    np.testing.assert_allclose(chosen.timestamps, whole.timestamps[indices])


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi", ".ts"])
@pytest.mark.parametrize("rate", [16, 24, 30, 60, Fraction(30000, 1001)])
def test_rounded_times_move_no_frame(tmp_path: Path, suffix: str, rate: Fraction) -> None:
    """Matroska tells times in whole milliseconds, so that most frames seem to come a little late or early."""
    path = tmp_path / f"rounded{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if suffix == ".webm" else "mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(48):
            picture = np.full((32, 32, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    whole = decode(path)
    assert len(whole.frames) == 48
    for step in (1, 2, 3):
        np.testing.assert_array_equal(decode(path, fps=float(rate) / step).timestamps, whole.timestamps[::step])
    moments = whole.timestamps[0] + np.arange(48) / float(rate)
    np.testing.assert_array_equal(decode(path, timestamps=moments[:-1]).timestamps, whole.timestamps[:-1])
    between = moments[:-1] + 0.5 / float(rate)
    np.testing.assert_array_equal(decode(path, timestamps=between).timestamps, whole.timestamps[:-1])


@pytest.mark.parametrize(
    "selection",
    [
        {"num_frames": 65},
        {"num_frames": 0},
        {"fps": 0.0},
        {"indices": [64]},
        {"indices": []},
        {"fps": 1.0, "num_frames": 2},
        {"num_frames": 2.5},
        {"num_frames": "3"},
        {"at_most": 2.0},
        {"at_most": 0},
        {"fps": "2"},
        {"indices": ["a"]},
        {"indices": 3},
        {"indices": [1.7]},
        {"indices": [[0, 1]]},
        {"indices": [[0], [1, 2]]},
        {"timestamps": ["x"]},
        {"timestamps": 1.0},
    ],
)
def test_selection_out_of_range(mp4: Path, selection: dict) -> None:
    with pytest.raises(ConfigError):
        decode(mp4, **selection)


def _damage(kind: str, path: Path, data: bytes) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "junk":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "corrupt":
        broken, start = bytearray(data), data.index(b"mdat") + 100
        broken[start : start + 3900] = bytes(3900)
        path.write_bytes(broken)
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "junk", "corrupt", "audio"])
def test_broken_files_are_named(kind: str, mp4: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.mp4"
    _damage(kind, path, mp4.read_bytes())
    with pytest.raises(VideoError, match=f"{kind}.mp4: ."):
        decode(path)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 7, 8, 3), np.uint8),
    ],
)
def test_unwritable_frames(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(VideoError):
        write_mp4(tmp_path / "bad.mp4", frames, FPS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none(tmp_path: Path, fps: float) -> None:
    with pytest.raises(VideoError, match="expected a positive number of frames a second"):
        write_mp4(tmp_path / "bad.mp4", np.zeros((2, 8, 8, 3), np.uint8), fps)
