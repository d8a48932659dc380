"""Accuracy of the video encoder, unmodified, on clips that were written as mp4 and decoded again."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from namm_transfer.eval.video import decode, write_mp4
from namm_transfer.eval.video_classification.clips import FPS, HELD_OUT_SEEDS, MOTIONS, make_clip, render
from namm_transfer.eval.video_classification.host import VideoEncoder, VideoEncoderProcessor


@dataclass(frozen=True)
class LabelledClip:
    """A video file and the motion it shows."""

    path: Path
    seed: int
    motion: str

    @property
    def label(self) -> int:
        """Class number: place in `MOTIONS`."""
        return MOTIONS.index(self.motion)


def write_clips(folder: Path, seeds: Iterable[int]) -> Iterator[LabelledClip]:
    """Render the clips of `seeds` into a folder as mp4, one after another."""
    for seed in seeds:
        clip = make_clip(seed)
        path = folder / f"{seed}.mp4"
        write_mp4(path, render(clip), FPS)
        yield LabelledClip(path, seed, clip.motion)


def classify(model: VideoEncoder, processor: VideoEncoderProcessor, frames: np.ndarray) -> int:
    """Class number of one video uint8 [T, S, S, 3]."""
    with torch.inference_mode():
        return int(model(**processor(frames)).logits.argmax(-1))


def accuracy_by_motion(
    model: VideoEncoder,
    processor: VideoEncoderProcessor,
    clips: Iterable[LabelledClip],
    *,
    total: int,
) -> dict[str, dict[str, float]]:
    """Accuracy and number of clips, per motion and over all; `total` is for the progress bar."""
    right: dict[str, list[bool]] = {motion: [] for motion in MOTIONS}
    for clip in track(clips, description="held-out clips", total=total):
        right[clip.motion].append(classify(model, processor, decode(clip.path).frames) == clip.label)
    right["all"] = [value for values in right.values() for value in values]
    return {key: {"accuracy": float(np.mean(values)), "n": len(values)} for key, values in right.items() if values}


def held_out_accuracy(model: VideoEncoder, processor: VideoEncoderProcessor, clips: int) -> dict[str, dict[str, float]]:
    """`accuracy_by_motion` on the first `clips` held-out seeds, through mp4 files in a temporary folder."""
    seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + clips)
    with tempfile.TemporaryDirectory() as folder:
        return accuracy_by_motion(model, processor, write_clips(Path(folder), seeds), total=clips)
