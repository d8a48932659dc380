"""Accuracy of a video LLM with its full cache on held-out clips of the suite."""

import tempfile
from pathlib import Path

from transformers import LlavaNextVideoForConditionalGeneration

from namm_transfer.eval.video_qa.evaluate import QAClip, accuracy_by_family
from namm_transfer.eval.video_qa.host import VideoQAProcessor
from namm_transfer.eval.video_qa.suite.clips import make_clip
from namm_transfer.eval.video_qa.suite.files import HELD_OUT, file_of, write_clip

__all__ = ["held_out_accuracy"]

REDUNDANCY = 0.5


def held_out_accuracy(
    model: LlavaNextVideoForConditionalGeneration, processor: VideoQAProcessor, clips: int, *, num_frames: int
) -> dict[str, dict[str, float]]:
    """`accuracy_by_family` on clips of `num_frames` frames, half of them redundant, of the last of the held-out seeds:
    the task begins with the first."""
    with tempfile.TemporaryDirectory() as folder:

        def written(seed: int) -> QAClip:
            clip = make_clip(seed, num_frames, REDUNDANCY)
            file = file_of(clip, Path(folder))
            write_clip(clip, file.path)
            return file

        return accuracy_by_family(model, processor, (written(seed) for seed in HELD_OUT[-clips:]), total=clips)
