"""Training batches: several questions about one clip share the clip's visual tokens in one sequence.

Shape letters: B clips, T frames, N questions of a clip, L tokens of a question, M tokens of a clip's frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch

from namm_transfer.eval.video_qa.host import VideoQAProcessor
from namm_transfer.eval.video_qa.questions import VIDEO_PLACEHOLDER, Question

IGNORED = -100
CELLS = 4
"""Cells of a frame along a side: one for each of a frame's visual tokens."""
CELL_COVERAGE = 0.08
"""A cell shows what covers so much of it."""
UNASKED = ("told", "frames")
"""Stages of training in which no question is asked."""
C = TypeVar("C")


class Material(Protocol[C]):
    """What a video LLM is taught with: clips that know their truth, and questions about them.

    Attributes:
        words: of the questions and answers, and of the looks.
        looks: the words for what a token may look like, by respect. Nothing in a respect is the class after the last.
        classes: how many things may be true at a token, by name.
        shown: how many frames of a clip may be shown, the usual number first.
    """

    words: ClassVar[Sequence[str]]
    looks: ClassVar[Mapping[str, Sequence[str]]]
    classes: ClassVar[Mapping[str, int]]
    shown: ClassVar[Sequence[int]]

    def clips(self, rng: np.random.Generator, count: int, frames: int) -> list[C]:
        """Clips of the training split, of which so many frames will be shown."""
        ...

    def questions(self, rng: np.random.Generator, clip: C, count: int) -> list[Question]:
        """Different questions about a clip, families mixed as they come."""
        ...

    def frames(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Numbers of the frames that are shown, int64 [T]."""
        ...

    def moment(self, rng: np.random.Generator, clip: C) -> np.ndarray:
        """The number of one frame, int64 [1]."""
        ...

    def frame_truth(self, clips: list[C], frames: np.ndarray) -> dict[str, torch.Tensor]:
        """What is to be known of frames that are told in few tokens, int64 [B, M]: one per key of `classes` (IGNORED
        where it is not asked for) and of `looks`, the "cell" (16: none), and the "place" among all visual tokens."""
        ...

    def cell_truth(self, clip: C, frames: np.ndarray) -> dict[str, torch.Tensor]:
        """What each cell shows, int64 [T, 16]: one per key of `looks`, and the "cell" (16: it shows nothing)."""
        ...

    def render(self, clip: C, frames: np.ndarray | None = None) -> np.ndarray:
        """Pixels of some frames, by default of all, uint8 [T, S, S, 3] RGB."""
        ...


@dataclass(frozen=True)
class PackedQuestions:
    """N questions of each of B clips, padded on the right to L tokens.

    `before`: tokens ahead of the video. `lengths`: int64 [B, N], tokens of each question and its answer. `tokens`,
    `labels`: int64 [B, N, L], labels only where the answer and its end are predicted; `content`: int64 [B, N, L], at
    the question mark and at the cue, the first token of the answer that tells it from the other options; elsewhere
    both are IGNORED.
    """

    before: list[int]
    lengths: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    content: torch.Tensor


def pack_questions(
    processor: VideoQAProcessor, questions: list[list[Question]], *, options: bool = True
) -> PackedQuestions:
    """Tokens of the questions; every clip must ask the same number.

    With `options` the answer follows the whole prompt; without, only the bare question is asked, and `content`
    is all there is to predict.
    """
    tokenizer = processor.tokenizer
    flat = [question for row in questions for question in row]
    asked = [q.prompt() if options else f"{VIDEO_PLACEHOLDER}\n{q.text}" for q in flat]
    prompts = [processor.around(prompt)[1] for prompt in asked]
    answers = [tokenizer(list(q.options), add_special_tokens=False)["input_ids"] for q in flat]
    longest = max(len(p) + options * max(map(len, a)) for p, a in zip(prompts, answers, strict=True))
    shape = (len(flat), longest)
    tokens, lengths = np.zeros(shape, dtype=np.int64), np.zeros(len(flat), dtype=np.int64)
    labels, content = np.full(shape, IGNORED), np.full(shape, IGNORED)
    for row, (question, prompt, written) in enumerate(zip(flat, prompts, answers, strict=True)):
        words = written[question.answer]
        end, told = len(prompt), words[_telling(written)]
        tokens[row, :end], lengths[row] = prompt, end
        if " these " not in question.text:  # known as soon as the question ends, before the options
            content[row, _mark(tokenizer.convert_ids_to_tokens(prompt))] = told
        if options:
            content[row, end - 1] = told
            tokens[row, end : end + len(words)] = words
            lengths[row] += len(words)
            labels[row, end - 1 : end + len(words)] = [*words, tokenizer.eos_token_id]
    before = processor.around(VIDEO_PLACEHOLDER)[0]
    packed = [array.reshape(len(questions), -1, *array.shape[1:]) for array in (lengths, tokens, labels, content)]
    return PackedQuestions(before, *map(torch.from_numpy, packed))


def _mark(tokens: Sequence[str]) -> int:
    """The place of the question mark, which a tokenizer may have joined with the end of its line."""
    return next(place for place, token in enumerate(tokens) if "?" in token)


def _telling(options: Sequence[Sequence[int]]) -> int:
    """Which token of the answer is the first that not all options have at this place."""
    return next(place for place, found in enumerate(zip(*options, strict=False)) if len(set(found)) > 1)
