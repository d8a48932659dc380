"""Video files of every kind that users have, and of every kind that is broken, written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COUNT = 24


def scene(count: int = COUNT, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [T, H, W, 3]: a bright square on a smooth gradient, at another place in every frame, nothing symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    ground = np.stack([40 + x, 60 + y, 90 + 0 * x], axis=-1).astype(np.uint8)
    frames = np.repeat(ground[None], count, axis=0)
    for t in range(count):
        top, left = 4 + (3 * t) % (height - 16), 2 + (5 * t) % (width - 16)
        frames[t, top : top + 10, left : left + 12] = (220, 60 + 6 * t % 160, 40)
    return frames


def write(
    path: Path,
    frames: np.ndarray | None = None,
    *,
    codec: str = "libx264",
    rate: int = 25,
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotation: int | None = None,
    sound: float = 0.0,
    container: str | None = None,
    settings: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """Write one file; ``times`` in seconds make a variable frame rate, ``sound`` adds so many seconds of audio."""
    frames = scene() if frames is None else frames
    # bit-exact: without random identifiers, so that damage at a place is the same damage every time
    with av.open(str(path), "w", format=container, options={"fflags": "+bitexact"} | (settings or {})) as out:
        if len(frames):
            stream = out.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
            stream.options = {"threads": "1"} | (options or {})
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if rotation is not None:
                stream.set_display_rotation(rotation)
        speaker = out.add_stream("aac", rate=44100) if sound else None
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        if len(frames):
            out.mux(stream.encode(None))
        if speaker is not None:
            wave = av.AudioFrame.from_ndarray(
                np.zeros((1, int(44100 * sound)), np.float32), format="fltp", layout="mono"
            )
            wave.sample_rate = 44100
            out.mux(speaker.encode(wave))
            out.mux(speaker.encode(None))


def truth(path: Path, rotate: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """All frames as they are to be shown, and their times, by PyAV alone."""
    frames, times = [], []
    with av.open(str(path)) as source:
        for frame in source.decode(video=0):
            picture = frame.to_ndarray(format="rgb24")
            if rotate and frame.rotation:
                picture = np.rot90(picture, round(frame.rotation / 90) % 4)
            frames.append(picture)
            times.append(float(frame.time))
    return np.stack(frames), np.asarray(times)
