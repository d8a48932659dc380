"""Video files in and out: sampling and decoding, reading ahead of a model, writing mp4.

PyAV probes a file and reads it in order; decord seeks single frames of long files. decord does not see a file before it
was probed: on what is broken it may hang, or hand out neighbours of the frames wanted.

Shape letters: T frames, n frames of a batch, H height and W width in pixels.
"""

import io
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import av
import decord
import numpy as np
import torch
from einops import rearrange
from torchvision.transforms.v2.functional import center_crop, resize

from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.eval.video_file import VideoFile, picture, probe, read_in_order
from namm_transfer.files import replacing

__all__ = ["DecodedVideo", "VideoStream", "decode", "fit", "stream", "through_mp4", "write_mp4"]

DAMAGED = 1e-9
"""Fraction of frames that decord may replace by their neighbours: none."""
SOUGHT = 250
"""Frames that decord decodes for each that it seeks: the usual distance of key frames."""
Batch = tuple[np.ndarray, np.ndarray]
"""Frames uint8 [n, H, W, 3] RGB, and the time of each in seconds, float64 [n]."""


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of one file: uint8 [T, H, W, 3] RGB, upright, and the time of each in seconds, float64 [T]."""

    frames: np.ndarray
    timestamps: np.ndarray
    path: Path


def decode(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    at_most: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    timestamps: Sequence[float] | np.ndarray | None = None,
) -> DecodedVideo:
    """Decode a video file: all of its frames, or a selection.

    Frames are chosen by the times at which they are shown, also where the frame rate varies.

    Args:
        path: a file that FFmpeg reads.
        num_frames: this many frames, evenly spaced from the first to the last, those nearest in time.
        at_most: the same of a longer video; all frames of one that has no more.
        fps: the frames shown at this many moments a second; each at most once.
        indices: exactly these frames, in this order.
        timestamps: the frames shown at these seconds, in this order.

    Raises:
        ConfigError: more than one selection, or one out of range.
        VideoError: the file is missing, empty, truncated or corrupt, or has no video; names file and fault.
    """
    if sum(option is not None for option in (num_frames, at_most, fps, indices, timestamps)) > 1:
        raise ConfigError("expected at most one of num_frames, at_most, fps, indices and timestamps")
    file = probe(path)
    if at_most is not None:
        _check_count("at_most", at_most)
        num_frames = at_most if at_most < len(file) else None
    chosen = _choose(file, num_frames, fps, indices, timestamps)
    return DecodedVideo(_read(file, chosen), file.times[chosen], file.path)


def stream(
    path: str | os.PathLike[str], *, fps: float | None = None, batch: int = 16, start: int = 0, ahead: int = 2
) -> "VideoStream":
    """The frames of a file of any length in order, decoded in the background while a model is busy.

    Args:
        path: a file that FFmpeg reads.
        fps: the frames shown at this many moments a second, each at most once; None for all.
        batch: frames that are handed out together.
        start: leave out so many of the chosen frames: where to go on.
        ahead: batches that may wait; at most ``(ahead + 2) * batch`` frames are held at any time.

    Raises:
        ConfigError: settings out of range.
        VideoError: as of :func:`decode`; faults behind the first frames come while iterating.
    """
    for name, value, least in (("batch", batch, 1), ("start", start, 0), ("ahead", ahead, 1)):
        _check_count(name, value, least)
    file = probe(path)
    return VideoStream(file, _choose(file, fps=fps), batch, start, ahead)


class VideoStream:
    """An iterator of (frames uint8 [n, H, W, 3] RGB, timestamps float64 [n]); close it, or use it as a context.

    Attributes:
        total: frames chosen of the whole file; ``len`` counts those from ``start`` on.
    """

    def __init__(self, file: VideoFile, chosen: np.ndarray, batch: int, start: int, ahead: int) -> None:
        self.path, self.total = file.path, len(chosen)
        self._file, self._chosen, self._batch = file, chosen[start:], batch
        self._waiting: queue.Queue[Batch | Exception | None] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._stopped.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"decode {self.path.name}", daemon=True)
            self._thread.start()
        item = self._waiting.get()
        if isinstance(item, tuple):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop decoding and let go of all frames."""
        self._stopped.set()
        while self._thread is not None and self._thread.is_alive():
            while not self._waiting.empty():
                self._waiting.get_nowait()
            self._thread.join(timeout=0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        """In the background: decode until the end, a fault, or :meth:`close`."""
        end: Exception | None = None
        try:
            for batch in _in_batches(self._file, self._chosen, self._batch):
                self._waiting.put(batch)
                if self._stopped.is_set():
                    return
        except Exception as error:  # whatever it is, the iterating thread has to know
            end = error
        self._waiting.put(end)


def write_mp4(
    target: str | os.PathLike[str] | BinaryIO, frames: np.ndarray | Iterable[np.ndarray], fps: float, *, crf: int = 12
) -> None:
    """Write frames uint8 [T, H, W, 3] RGB, or parts of a video one after the other, as H.264 (yuv420p) in an mp4.

    A path is written through a temporary file beside it, so that no half-written file carries its name.

    Args:
        crf: 0 (best) to 51.

    Raises:
        VideoError: frames of another shape or type, an odd height or width, no frames, or a rate that is none.
    """
    if not 0 < fps < np.inf:
        raise VideoError(f"expected a positive number of frames a second, got {fps}")
    parts = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = _writable(next(parts, np.empty((0, 0, 0, 3), np.uint8)))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One thread: the bytes do not depend on the machine's number of cores.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.options = {"crf": str(crf), "preset": "medium", "threads": "1"}
        stream.height, stream.width, stream.pix_fmt = *first.shape[1:3], "yuv420p"
        for part in chain([first], parts):
            for frame in _writable(part, first.shape[1:]):
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


def fit(frames: np.ndarray, side: int) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of any size to [T, side, side, 3]: the shorter side is scaled, the middle is kept."""
    height, width = frames.shape[1:3]
    if (height, width) == (side, side):
        return frames
    scale = side / min(height, width)
    size = [max(side, round(height * scale)), max(side, round(width * scale))]
    images = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
    scaled = center_crop(resize(images, size, antialias=True), [side, side])
    return rearrange(scaled, "t c h w -> t h w c").numpy()


def _writable(frames: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The frames, if they can be written, and are of the shape [H, W, 3] of those before."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise VideoError(f"expected uint8 frames [T, H, W, 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    if shape is not None and frames.shape[1:] != shape:
        raise VideoError(f"expected frames of shape {list(shape)} as those before, got {list(frames.shape[1:])}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"yuv420p needs an even height and width, got {height} x {width}")
    return frames


def _in_batches(file: VideoFile, chosen: np.ndarray, size: int) -> Iterator[Batch]:
    """The chosen frames, ascending, one pass through the file."""
    wanted, held = iter(chosen.tolist()), []
    following = next(wanted, None)
    count, shape = 0, None
    for index, frame in enumerate(read_in_order(file.path)):
        if following is None:
            break
        if index == following:
            held.append(picture(frame))
            shape = shape or held[0].shape
            if held[-1].shape != shape:
                now, before = (f"{height} x {width}" for height, width, _ in (held[-1].shape, shape))
                raise VideoError(f"{file.path}: frame {index} is {now}, those before are {before}")
            following = next(wanted, None)
            if len(held) == size:
                yield np.stack(held), file.times[chosen[count : count + size]]
                held, count = [], count + size
    if following is not None:
        raise VideoError(f"{file.path}: truncated: frame {following} of {len(file)} is missing")
    if held:
        yield np.stack(held), file.times[chosen[count:]]


def _read(file: VideoFile, chosen: np.ndarray) -> np.ndarray:
    """The chosen frames in their order, uint8 [n, H, W, 3]: few of many are sought with decord, else read in order."""
    places = np.unique(chosen)
    if len(places) * SOUGHT < places[-1] and not file.rotation:  # decord misses some formats' rotation
        try:
            reader = decord.VideoReader(str(file.path), ctx=decord.cpu(0), num_threads=1, fault_tol=DAMAGED)
            # else it would wait for frames that never come, or hand out others
            if len(reader) == len(file) and _agree(reader.get_frame_timestamp(places)[:, 0], file.times[places]):
                return reader.get_batch(chosen).asnumpy()
        except (decord.DECORDError, RuntimeError):
            pass  # a codec or a fault of which FFmpeg in PyAV knows more
    pictures = np.concatenate([frames for frames, _ in _in_batches(file, places, 64)])
    return (
        pictures if len(chosen) == len(places) and (chosen == places).all() else pictures[places.searchsorted(chosen)]
    )


def _agree(times: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two readers see the same frames: the same seconds, from whatever moment each counts."""
    return bool(np.abs((times - times[0]) - (expected - expected[0])).max() < 2e-3)


def _choose(
    file: VideoFile,
    num_frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    timestamps: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Indices of the frames."""
    times = file.times
    total, first, last = len(times), times[0], times[-1]
    apart = float(np.median(np.diff(times))) if total > 1 else 1.0
    # a frame is there at its moment, even if its time was rounded up from it (Matroska: to milliseconds)
    early = min(file.tick, 0.1 * apart)
    if num_frames is not None:
        _check_count("num_frames", num_frames)
        if num_frames > total:
            raise ConfigError(f"expected num_frames between 1 and the video's {total}, got {num_frames}")
        return np.round(_places(times, np.linspace(first, last, num_frames))).astype(np.int64)
    if fps is not None:
        if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps < np.inf:
            raise ConfigError(f"expected a positive fps, got {fps!r}")
        if fps >= 1 / np.diff(times, append=last + np.inf).min():
            return np.arange(total)
        moments = first + np.arange(int((last - first + early) * fps + 1e-6) + 1) / fps
        return np.unique(np.floor(_places(times, moments + early)).astype(np.int64))
    if timestamps is not None:
        moments = _vector("timestamps", timestamps, "fiu").astype(np.float64)
        end = last + (last - first) / max(total - 1, 1)  # the last frame is shown as long as the others on average
        if not moments.size or not (first <= moments.min() and moments.max() <= end):
            raise ConfigError(f"expected timestamps within {first:.3f}..{end:.3f} s, got {list(timestamps)}")
        return np.floor(_places(times, moments + early)).astype(np.int64)
    if indices is None:
        return np.arange(total)
    chosen = _vector("indices", indices, "iu").astype(np.int64)
    if not chosen.size or chosen.min() < 0 or chosen.max() >= total:
        raise ConfigError(f"expected frame indices within 0..{total - 1}, got {list(indices)}")
    return chosen


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")


def _vector(name: str, values: Any, kinds: str) -> np.ndarray:
    """Numbers of one axis; `kinds` are NumPy's letters for those that are allowed."""
    try:
        found = np.asarray(values)
    except ValueError:  # ragged
        found = np.empty(0, object)
    if found.ndim != 1 or (found.size and found.dtype.kind not in kinds):
        kind = "integers" if "f" not in kinds else "numbers"
        raise ConfigError(f"expected {name} to be a list of {kind}, got {values!r}")
    return found


def _places(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Where moments fall between the frames, as fractional indices without the noise of floating point."""
    return np.round(np.interp(moments, times, np.arange(len(times))), 4)
