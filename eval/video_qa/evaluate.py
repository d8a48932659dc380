"""Accuracy of the video LLM with its full cache, on clips that were written as mp4 and decoded again."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import track
from transformers import Cache, DynamicCache, LlavaNextVideoForConditionalGeneration

from namm_transfer.eval.video import decode, write_mp4
from namm_transfer.eval.video_qa.clips import FPS, HELD_OUT_SEEDS, make_clip, render
from namm_transfer.eval.video_qa.host import VideoQAProcessor
from namm_transfer.eval.video_qa.questions import Question, parse_answer, sample_questions

C = TypeVar("C", bound=Cache)


@dataclass(frozen=True)
class QAClip:
    """A video file and the questions about it."""

    path: Path
    seed: int
    questions: tuple[Question, ...]


def questions_of(seed: int, per_family: int) -> tuple[Question, ...]:
    """The questions that a held-out or packaged clip is asked; a function of its seed."""
    return tuple(sample_questions(make_clip(seed), np.random.default_rng([seed, 4]), per_family))


def write_clips(folder: Path, seeds: Iterable[int], per_family: int) -> Iterator[QAClip]:
    """Render the clips of `seeds` into a folder as mp4, one after another."""
    for seed in seeds:
        path = folder / f"{seed}.mp4"
        write_mp4(path, render(make_clip(seed)), FPS)
        yield QAClip(path, seed, questions_of(seed, per_family))


def ask(
    model: LlavaNextVideoForConditionalGeneration,
    processor: VideoQAProcessor,
    frames: np.ndarray,
    questions: Iterable[Question],
    seen: C,
    fork: Callable[[C], C],
    host: Any = None,
) -> Iterator[tuple[str, C]]:
    """Reply to each question about a video uint8 [T, S, S, 3], and the cache that gave it.

    The video is read once, into `seen`; every question is asked of a fork of it. What is called is `host`, the model
    under a memory, or by default the model itself.
    """
    host = model if host is None else host
    prompts = [processor(frames, question.prompt()).to(model.device) for question in questions]
    video = prompts[0]["input_ids"] == model.config.video_token_id
    prefix = int(video.nonzero()[-1, 1]) + 1
    host(
        input_ids=prompts[0]["input_ids"][:, :prefix],
        pixel_values_videos=prompts[0]["pixel_values_videos"],
        past_key_values=seen,
        logits_to_keep=1,
    )
    for prompt in prompts:
        memory = fork(seen)
        tokens = host.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            past_key_values=memory,
            max_new_tokens=processor.answer_tokens,
            do_sample=False,
        )
        yield processor.decode(tokens[0, prompt["input_ids"].shape[1] :]), memory


@torch.inference_mode()
def answer(
    model: LlavaNextVideoForConditionalGeneration,
    processor: VideoQAProcessor,
    frames: np.ndarray,
    questions: Iterable[Question],
) -> list[str]:
    """The model's replies about one video uint8 [T, S, S, 3], full cache."""
    seen = DynamicCache(config=model.config.get_text_config())
    return [reply for reply, _ in ask(model, processor, frames, questions, seen, copy.deepcopy)]


def accuracy_by_family(
    model: LlavaNextVideoForConditionalGeneration,
    processor: VideoQAProcessor,
    clips: Iterable[QAClip],
    *,
    total: int,
    num_frames: int | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy and number of questions, per family and over all; an unparsable reply is wrong.

    Args:
        total: number of clips, for the progress bar.
        num_frames: frames of each video to look at, evenly spaced; all of them by default.
    """
    right: dict[str, list[bool]] = {}
    for clip in track(clips, description="held-out clips", total=total):
        frames = decode(clip.path, num_frames=num_frames).frames
        for question, reply in zip(clip.questions, answer(model, processor, frames, clip.questions), strict=True):
            right.setdefault(question.family, []).append(parse_answer(reply, question.options) == question.answer)
    right["all"] = [value for values in right.values() for value in values]
    return {family: {"accuracy": float(np.mean(values)), "n": len(values)} for family, values in right.items()}


def held_out_accuracy(
    model: LlavaNextVideoForConditionalGeneration,
    processor: VideoQAProcessor,
    clips: int,
    *,
    per_family: int = 1,
    num_frames: int | None = None,
) -> dict[str, dict[str, float]]:
    """`accuracy_by_family` on the first `clips` held-out seeds, through mp4 files in a temporary folder."""
    seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + clips)
    with tempfile.TemporaryDirectory() as folder:
        written = write_clips(Path(folder), seeds, per_family)
        return accuracy_by_family(model, processor, written, total=clips, num_frames=num_frames)
