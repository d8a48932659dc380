"""Video files in and out: decoding with decord, writing mp4 with PyAV.

Shape letters: T frames, H height and W width in pixels.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import decord
import numpy as np

from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.files import replacing


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of one file: uint8 [T, H, W, 3] RGB, and the time of each in seconds, float64 [T]."""

    frames: np.ndarray
    timestamps: np.ndarray
    path: Path


def decode(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
) -> DecodedVideo:
    """Decode a video file: all of its frames, or a selection.

    Args:
        path: a file that FFmpeg reads.
        num_frames: this many frames, evenly spaced from the first to the last.
        fps: about this many frames per second of video; at most every frame.
        indices: exactly these frames, in this order.

    Raises:
        ConfigError: more than one selection, or one out of range.
        VideoError: the file is missing, empty or corrupt, or has no (complete) video; names file and fault.
    """
    path = Path(path)
    if sum(option is not None for option in (num_frames, fps, indices)) > 1:
        raise ConfigError("expected at most one of num_frames, fps and indices")
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    if not path.stat().st_size:
        raise VideoError(f"{path}: the file is empty (0 bytes)")
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        total, rate = len(reader), reader.get_avg_fps()
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(f"{path}: no readable video stream ({_fault(error)})") from error
    if not total:
        raise VideoError(f"{path}: the video stream holds no frames")
    chosen = _choose(total, rate, num_frames, fps, indices)
    try:
        frames = reader.get_batch(chosen).asnumpy()
        timestamps = reader.get_frame_timestamp(chosen)[:, 0]
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(f"{path}: decoding failed within {total} frames ({_fault(error)})") from error
    return DecodedVideo(frames, np.asarray(timestamps, dtype=np.float64), path)


def write_mp4(target: str | os.PathLike[str] | BinaryIO, frames: np.ndarray, fps: float, *, crf: int = 12) -> None:
    """Write frames uint8 [T, H, W, 3] RGB as H.264 (yuv420p) in an mp4; `crf` 0 (best) to 51.

    A path is written through a temporary file beside it, so that no half-written file carries its name.

    Raises:
        VideoError: frames of another shape or type, an odd height or width, or no frames.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise VideoError(f"expected uint8 frames [T, H, W, 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"yuv420p needs an even height and width, got {height} x {width}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread: the bytes do not depend on the machine's number of cores.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.options = {"crf": str(crf), "preset": "medium", "threads": "1"}
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    if not isinstance(target, (str, os.PathLike)):
        target.write(buffer.getvalue())
        return
    with replacing(Path(target)) as partial:
        partial.write_bytes(buffer.getvalue())


def through_mp4(frames: np.ndarray, fps: float, *, crf: int = 12) -> np.ndarray:
    """The frames as they come back from an mp4, uint8 [T, H, W, 3]: written and decoded in memory."""
    buffer = io.BytesIO()
    write_mp4(buffer, frames, fps, crf=crf)
    buffer.seek(0)
    reader = decord.VideoReader(buffer, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def _choose(
    total: int,
    rate: float,
    num_frames: int | None,
    fps: float | None,
    indices: Sequence[int] | np.ndarray | None,
) -> np.ndarray:
    if num_frames is not None:
        if not 1 <= num_frames <= total:
            raise ConfigError(f"expected num_frames between 1 and the video's {total}, got {num_frames}")
        return np.linspace(0, total - 1, num_frames).round().astype(np.int64)
    if fps is not None:
        if fps <= 0:
            raise ConfigError(f"expected a positive fps, got {fps}")
        return np.arange(0, total, max(rate / fps, 1.0)).astype(np.int64)
    if indices is None:
        return np.arange(total)
    chosen = np.asarray(indices, dtype=np.int64)
    if not chosen.size or chosen.min() < 0 or chosen.max() >= total:
        raise ConfigError(f"expected frame indices within 0..{total - 1}, got {list(indices)}")
    return chosen


def _fault(error: Exception) -> str:
    # decord prefixes its message with a C++ time and source line, and appends a stack trace.
    first = str(error).strip().splitlines()[0]
    return first.rsplit("] ", 1)[-1][:200]
