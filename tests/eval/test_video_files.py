"""Files as users have them: every one decodes to what PyAV sees, or is refused by an error that names file and fault.

Each runs through `decode`, `stream` and a decord reader that seeks; none may crash the process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.eval import video as module
from namm_transfer.eval.video import decode, stream

from .video_files import COUNT, scene, truth, write

VARIABLE = list(np.cumsum([0.04, 0.04, 0.2, 0.01] * 6) - 0.04)
"""Seconds at which the frames of a recording with a variable rate are shown."""

WHOLE = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.mov": {},
    "h264.avi": {},
    "h264.ts": {},
    "h264.flv": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9 named.mp4": {"codec": "libvpx-vp9", "container": "webm"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "av1.mkv": {"codec": "libsvtav1"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "yuv444p"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "grey.mp4": {"pix_fmt": "gray"},
    "odd.webm": {"codec": "libvpx-vp9", "frames": scene(height=47, width=61)},
    "odd.mp4": {"pix_fmt": "yuv444p", "frames": scene(height=47, width=61)},
    "small.mp4": {"frames": scene(10, 24, 24)},
    "one frame.mp4": {"frames": scene(1)},
    "1 fps.mp4": {"rate": 1},
    "240 fps.mp4": {"rate": 240},
    "variable.mp4": {"times": VARIABLE},
    "variable.mkv": {"times": VARIABLE},
    "from 5 s.mp4": {"times": [5 + i / 25 for i in range(COUNT)]},
    "from 5 s.mkv": {"times": [5 + i / 25 for i in range(COUNT)]},
    "turned 90.mp4": {"rotation": 90},
    "turned 180.mp4": {"rotation": 180},
    "turned 270.mp4": {"rotation": -90},
    "turned 90.mkv": {"rotation": 90},
    "sound.mp4": {"sound": 1.0},
    "longer sound.mp4": {"sound": 5.0},
    "fragments.mp4": {"settings": {"movflags": "frag_keyframe+empty_moov"}},
    "100% [1] ü:%d.mp4": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def long(folder) -> dict[str, bytes]:
    """Whole files of 100 frames with their index in front, by kind."""
    kinds = {
        "mp4": {"settings": {"movflags": "faststart"}},
        "mkv": {},
        "avi": {"codec": "mpeg4"},
        "webm": {"codec": "libvpx-vp9"},
    }
    for kind, settings in kinds.items():
        write(folder / f"long.{kind}", scene(100), **settings)
    return {kind: (folder / f"long.{kind}").read_bytes() for kind in kinds}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_decode_as_pyav_sees_them(name: str, folder: Path) -> None:
    path = folder / name
    write(path, **WHOLE[name])
    pictures, times = truth(path)
    video = decode(path)
    np.testing.assert_array_equal(video.frames, pictures)
    np.testing.assert_allclose(video.timestamps, np.sort(times), atol=1e-6)
    assert (np.diff(video.timestamps) > 0).all()
    with stream(path, batch=7) as batches:
        seen = list(batches)
    np.testing.assert_array_equal(np.concatenate([frames for frames, _ in seen]), pictures)
    np.testing.assert_array_equal(np.concatenate([stamps for _, stamps in seen]), video.timestamps)


@pytest.mark.parametrize("name", WHOLE)
def test_sought_frames_are_those_of_the_whole_file(name: str, folder: Path, monkeypatch) -> None:
    """As in a long file: decord seeks the frames, where it can."""
    path = folder / name
    if not path.exists():
        write(path, **WHOLE[name])
    whole = decode(path).frames
    monkeypatch.setattr(module, "SOUGHT", 0)
    places = [len(whole) - 1, 0, len(whole) // 2, 0]
    sought = decode(path, indices=places).frames
    assert sought.shape == whole[places].shape
    difference = np.abs(sought.astype(int) - whole[places]).mean(axis=(1, 2, 3))
    assert difference.max() < 1.0, "decord scales the colours of odd sizes otherwise"


def test_a_scene_is_shown_upright_and_in_order(folder: Path) -> None:
    """The test's own picture comes back: `truth` and `decode` are not wrong together."""
    for name, turns in (("turned 90.mp4", 1), ("turned 180.mp4", 2), ("turned 270.mp4", 3), ("turned 90.mkv", 1)):
        write(folder / name, **WHOLE[name])
        expected = np.rot90(scene(), turns, axes=(1, 2))
        found = decode(folder / name).frames
        assert found.shape == expected.shape
        errors = np.abs(found[:, None].astype(int) - expected[None]).mean(axis=(2, 3, 4))
        assert (errors.argmin(1) == np.arange(COUNT)).all(), name


def test_sampling_follows_the_clock_where_the_rate_varies(folder: Path) -> None:
    write(folder / "variable.mp4", times=VARIABLE)
    whole = decode(folder / "variable.mp4")
    np.testing.assert_allclose(whole.timestamps, VARIABLE, atol=1e-3)
    for fps in (2.0, 5.0, 20.0):
        moments = np.arange(0, VARIABLE[-1] + 1e-9, 1 / fps)
        shown = sorted({max(i for i, t in enumerate(whole.timestamps) if t <= moment + 1e-3) for moment in moments})
        chosen = decode(folder / "variable.mp4", fps=fps)
        np.testing.assert_array_equal(chosen.timestamps, whole.timestamps[shown])
        np.testing.assert_array_equal(chosen.frames, whole.frames[shown])
    even = decode(folder / "variable.mp4", num_frames=5).timestamps
    assert np.abs(even - np.linspace(0, VARIABLE[-1], 5)).max() <= 0.1, "within half of the longest frame"
    at = decode(folder / "variable.mp4", timestamps=[1.0, 0.1, 0.0, VARIABLE[-1]])
    np.testing.assert_array_equal(at.frames, whole.frames[[13, 1, 0, 23]])
    with pytest.raises(ConfigError, match=r"expected timestamps within 0\.000"):
        decode(folder / "variable.mp4", timestamps=[2.5])


def _damaged(data: bytes, start: float, count: int) -> bytes:
    at = int(len(data) * start)
    return data[:at] + _noise(count) + data[at + count :]


def _noise(count: int) -> bytes:
    return np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8).tobytes()


def _bad_frame(data: bytes, number: int) -> bytes:
    """Noise in place of one packet of the video but for its first bytes, its container whole."""
    with av.open(io.BytesIO(data)) as container:
        packet = next(islice(container.demux(video=0), number, None))
        at, count = data.index(bytes(packet)) + 5, packet.size - 5
        return data[:at] + _noise(count) + data[at + count :]


def _box(data: bytes, name: bytes, size: int) -> bytes:
    at = data.index(name) - 4
    return data[:at] + size.to_bytes(4, "big") + data[at + 4 :]


def _picture(path: Path, codec: str, kind: str) -> None:
    with av.open(str(path), "w", format="image2") as out:
        still = out.add_stream(codec, rate=1)
        still.width, still.height, still.pix_fmt = 64, 48, "rgb24" if codec == "png" else "yuvj420p"
        out.mux(still.encode(av.VideoFrame.from_ndarray(scene(1)[0], format="rgb24")))
        out.mux(still.encode(None))


Maker = Callable[[Path, dict[str, bytes]], object]
BROKEN: dict[str, tuple[Maker, str]] = {
    "missing.mp4": (lambda path, long: None, "no such file"),
    "folder.mp4": (lambda path, long: path.mkdir(), "a folder"),
    "dangling.mp4": (lambda path, long: path.symlink_to(path.with_name("nowhere")), "no such file"),
    "pipe.mp4": (lambda path, long: os.mkfifo(path), "no regular file"),
    "zero.mp4": (lambda path, long: path.write_bytes(b""), "empty"),
    "text.mp4": (lambda path, long: path.write_text("not a video\n" * 200), "not a readable video"),
    "text.txt": (lambda path, long: path.write_text("not a video\n" * 200), "text, not a video"),
    "page.mp4": (lambda path, long: path.write_text("<!DOCTYPE html><html>404</html>"), "not a readable video"),
    "noise.mp4": (lambda path, long: path.write_bytes(_damaged(bytes(9000), 0, 9000)), "not a readable video"),
    "png.mp4": (lambda path, long: _picture(path.with_suffix(".png"), "png", "png") or
                path.with_suffix(".png").rename(path), r"an image \(png\)"),
    "jpeg.mp4": (lambda path, long: _picture(path.with_suffix(".jpg"), "mjpeg", "jpeg") or
                 path.with_suffix(".jpg").rename(path), r"an image \(jpeg\)"),
    "sound.m4a": (lambda path, long: write(path, scene(0), sound=1.0), "no video stream; .* holds audio only"),
    "sound named.mp4": (lambda path, long: write(path, scene(0), sound=1.0, container="mp4"), "holds audio only"),
    "header.mp4": (lambda path, long: path.write_bytes(long["mp4"][:32]), "not a readable video"),
    "no index.mp4": (lambda path, long: write(path) or
                     path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not a readable video"),
    "index only.mp4": (lambda path, long: path.write_bytes(long["mp4"][: long["mp4"].index(b"mdat")]), "."),
    "huge box.mp4": (lambda path, long: write(path) or
                     path.write_bytes(_box(path.read_bytes(), b"mdat", 0x7FFFFFFF)), "not a readable video"),
    "noise within.mp4": (lambda path, long: path.write_bytes(_damaged(long["mp4"], 0.5, 900)), "."),
    "noise within.mkv": (lambda path, long: path.write_bytes(_damaged(long["mkv"], 0.5, 900)), "."),
    "a bad frame.mkv": (lambda path, long: path.write_bytes(_bad_frame(long["mkv"], 50)), "damaged|readable"),
    "noise within.avi": (lambda path, long: path.write_bytes(_damaged(long["avi"], 0.5, 900)), "."),
    "noise within.webm": (lambda path, long: path.write_bytes(_damaged(long["webm"], 0.5, 900)), "."),
} | {
    f"{percent} of 100.{kind}": (
        lambda path, long, percent=percent, kind=kind: path.write_bytes(
            long[kind][: len(long[kind]) * percent // 100]
        ),
        "truncated|not a readable video|holds no stream",
    )
    for kind in ("mp4", "mkv", "avi", "webm")
    for percent in (1, 30, 60, 85)
    if (kind, percent) != ("avi", 85)  # it has lost its index alone
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_name_and_fault(name: str, tmp_path: Path, long: dict[str, bytes]) -> None:
    make, fault = BROKEN[name]
    path = tmp_path / name
    make(path, long)

    def read_stream() -> None:
        with stream(path, batch=8) as batches:
            for _ in batches:
                pass

    for read in (lambda: decode(path), read_stream):
        with pytest.raises(VideoError, match=fault) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: "), caught.value


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path: Path, long: dict[str, bytes]) -> None:
    path = tmp_path / "private.mp4"
    path.write_bytes(long["mp4"])
    path.chmod(0)
    with pytest.raises(VideoError, match="private.mp4: permission denied"):
        decode(path)


def test_permission_is_asked_for(tmp_path: Path, long: dict[str, bytes], monkeypatch) -> None:
    """The same for root, who is never refused."""
    path = tmp_path / "private.mp4"
    path.write_bytes(long["mp4"])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(VideoError, match="private.mp4: permission denied"):
        decode(path)


def test_a_file_that_lost_its_index_alone_is_whole(tmp_path: Path, long: dict[str, bytes]) -> None:
    path = tmp_path / "no index.avi"
    path.write_bytes(long["avi"][: len(long["avi"]) * 99 // 100])
    np.testing.assert_array_equal(decode(path).frames, truth(path)[0])
    assert len(decode(path).frames) == 100


def test_few_frames_of_a_long_file_are_sought(folder: Path, monkeypatch) -> None:
    write(folder / "plain.mp4")
    whole = decode(folder / "plain.mp4").frames
    monkeypatch.setattr(module, "SOUGHT", 5)
    monkeypatch.setattr(module, "_in_batches", lambda *_: pytest.fail("read in order"))
    np.testing.assert_array_equal(decode(folder / "plain.mp4", indices=[20, 3]).frames, whole[[20, 3]])
    with pytest.raises(pytest.fail.Exception, match="read in order"):
        decode(folder / "plain.mp4", num_frames=12)


def test_all_frames_of_a_file_with_no_more_than_at_most(tmp_path: Path) -> None:
    """Forty frames, of which all but the last lie within two seconds: a choice by time would repeat some."""
    times = [*np.linspace(0, 2, 39).tolist(), 100.0]
    write(tmp_path / "tail.mp4", scene(40), times=times)
    video = decode(tmp_path / "tail.mp4", at_most=64)
    assert len(video.frames) == 40 and (np.diff(video.timestamps) > 0).all()
    np.testing.assert_array_equal(video.frames, decode(tmp_path / "tail.mp4").frames)
    assert len(decode(tmp_path / "tail.mp4", at_most=8).frames) == 8


def test_a_size_that_changes_within_a_file_is_told(tmp_path: Path) -> None:
    parts = [tmp_path / f"{side}.h264" for side in (64, 96)]
    for part, side in zip(parts, (64, 96), strict=True):
        write(part, scene(5, side, side))
    both = tmp_path / "both.h264"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    for batch in (4, 6):
        with (
            pytest.raises(VideoError, match=r"both\.h264: frame 5 is 96 x 96, those before are 64 x 64"),
            stream(both, batch=batch) as frames,
        ):
            list(frames)
    with pytest.raises(VideoError, match="frame 5 is 96 x 96"):
        decode(both)


def test_an_mp4_that_lost_its_last_frames_between_packets_is_truncated(tmp_path: Path, long: dict[str, bytes]) -> None:
    whole = tmp_path / "whole.mp4"
    whole.write_bytes(long["mp4"])
    with av.open(str(whole)) as container:
        ends = [p.pos + p.size for p in container.demux(video=0) if p.size]
    (tmp_path / "cut.mp4").write_bytes(long["mp4"][: ends[-4]])
    with pytest.raises(VideoError, match=r"cut\.mp4: truncated"):
        decode(tmp_path / "cut.mp4")
