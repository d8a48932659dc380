"""What a video file holds, and whether it is whole: read with PyAV before anything is decoded.

Shape letters: T frames, n frames of a batch, H height and W width in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream as AVVideoStream

from namm_transfer.errors import VideoError

__all__ = ["VideoFile", "picture", "probe", "read_in_order"]

IMAGES = ("image2", "ico", "tiff", "webp", "apng")
TEXTS = ("tty", "bin", "xbin", "adf", "idf")
"""Formats that FFmpeg shows as a picture of the text."""
MISSING_SECONDS = 0.5
"""A file may announce so much more than it holds: containers round, and count a last frame's duration."""


@dataclass(frozen=True)
class VideoFile:
    """A file with video whose packets are all there.

    Attributes:
        times: when each frame is shown, in seconds, float64 [T], ascending.
        tick: what the file's times are multiples of, in seconds: they are rounded by so much at most.
        rotation: degrees counter-clockwise that bring its frames upright.
    """

    path: Path
    times: np.ndarray
    tick: float
    rotation: int

    def __len__(self) -> int:
        return len(self.times)


def probe(path: str | os.PathLike[str]) -> VideoFile:
    """Look at a file: every packet of it is read, none but the first frame decoded.

    Raises:
        VideoError: there is no such file, or it is unreadable, empty, of another kind, without video, or truncated;
            names file and fault.
    """
    path = Path(path)
    _check_file(path)
    with _opened(path) as (container, stream):
        pts: list[int] = []
        ends = {one.index: 0.0 for one in container.streams}
        packets = discarded = 0
        for packet in container.demux():
            if packet.size and packet.pts is not None and packet.time_base is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream_index] = max(ends[packet.stream_index], end)
            if packet.size and packet.stream_index == stream.index and packet.is_discard:
                discarded += 1
            elif packet.size and packet.stream_index == stream.index:
                packets += 1
                if packet.is_corrupt:
                    raise VideoError(f"{path}: truncated or damaged: packet {packets} of the video is incomplete")
                if packet.pts is not None:
                    pts.append(packet.pts)
        if not packets:
            raise VideoError(f"{path}: the video stream holds no frames")
        if "mp4" in container.format.name and stream.frames > packets + discarded:  # others only estimate it
            raise VideoError(f"{path}: truncated: it announces {stream.frames} frames and holds {packets + discarded}")
        announced = container.duration / av.time_base if container.duration else 0.0
        end = max(ends.values())
        # some formats count a duration from the start of the first stream, some from zero
        if announced > max(end, end - (container.start_time or 0) / av.time_base) + MISSING_SECONDS:
            raise VideoError(f"{path}: truncated: it announces {announced:.2f} s and ends at {end:.2f} s")
        known = len(set(pts)) == packets
        tick = float(stream.time_base or 1)
        times = np.sort(np.asarray(pts, dtype=np.float64) * tick)
    if not known:  # raw streams tell no times, or only those of decoding
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        times, tick = np.arange(sum(1 for _ in read_in_order(path))) / rate, 0.0
    return VideoFile(path, times, tick, _rotation(path))


def read_in_order(path: Path) -> Iterator[av.VideoFrame]:
    """Every frame from the first to the last; see :func:`picture`.

    Raises:
        VideoError: a frame is damaged; names file and fault.
    """
    with _opened(path) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise VideoError(f"{path}: frame {count} is damaged")
            yield frame


def picture(frame: av.VideoFrame) -> np.ndarray:
    """A frame as it is to be seen, uint8 [H, W, 3] RGB: upright."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))


def _rotation(path: Path) -> int:
    """Degrees by which the first frame is to be turned, which is decoded for it."""
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            return round(frame.rotation)
    raise VideoError(f"{path}: no frame of the video can be decoded")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise VideoError(f"{path}: a folder, not a file")
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: no regular file, but a pipe or a device")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: permission denied")
    if not path.stat().st_size:
        raise VideoError(f"{path}: the file is empty (0 bytes)")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, AVVideoStream]]:
    """A container and its first real video stream.

    Raises:
        VideoError: neither is there, or FFmpeg gave up within the block; names file and fault.
    """
    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            kind = container.format.name
            if kind in IMAGES or kind.endswith("_pipe"):
                raise VideoError(f"{path}: an image ({kind.removesuffix('_pipe')}), not a video")
            if kind in TEXTS:
                raise VideoError(f"{path}: text, not a video")
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                held = " and ".join(sorted({str(one.type) for one in container.streams}))
                raise VideoError(f"{path}: no video stream; {kind} holds {held + ' only' if held else 'no stream'}")
            streams[0].thread_count = 1
            yield container, streams[0]
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a readable video ({error.strerror or type(error).__name__})") from error
