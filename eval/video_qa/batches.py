"""Training batches: several questions about one clip share the clip's visual tokens in one sequence.

Shape letters: B clips, T frames, N questions of a clip, L tokens of a question.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from namm_transfer.eval.video_qa.clips import DIRECTIONS, EVENTS, FRAMES, RADIUS, SIDE, Clip, make_clip
from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES, coverage
from namm_transfer.eval.video_qa.questions import Question, all_questions

IGNORED = -100
CELLS = 4
CELL_COVERAGE = 0.08
COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
SHAPE_INDEX = {name: index for index, name in enumerate(SHAPES)}
DIRECTION_INDEX = {name: index for index, name in enumerate(DIRECTIONS)}
# Classes of what is true at a frame; "nothing there" is the last class of each.
FRAME_CLASSES = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "direction": len(DIRECTIONS) + 1,
    "previous": len(COLOURS) + 1,
    "count": EVENTS + 1,
}


@dataclass(frozen=True)
class PackedQuestions:
    """N questions of each of B clips, padded on the right to L tokens.

    `tokens`, `labels`: int64 [B, N, L], labels only where the answer and its end are predicted; `content`: int64
    [B, N, L], at the question mark and at the cue, the first word of the answer; elsewhere both are IGNORED.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    content: torch.Tensor


def pack_questions(
    tokenizer: PreTrainedTokenizerFast, questions: list[list[Question]], *, options: bool = True
) -> PackedQuestions:
    """Tokens of the questions; every clip must ask the same number.

    With `options` the answer follows the whole prompt; without, only the bare question is asked, and `content`
    is all there is to predict.
    """
    mark = tokenizer.convert_tokens_to_ids("?")
    flat = [question for row in questions for question in row]
    prompts = tokenizer([q.suffix() if options else q.text for q in flat], add_special_tokens=False)["input_ids"]
    answers = tokenizer([q.truth for q in flat], add_special_tokens=False)["input_ids"]
    shape = (len(flat), max(len(p) + options * len(a) for p, a in zip(prompts, answers, strict=True)))
    tokens = np.full(shape, tokenizer.pad_token_id)
    labels, content = np.full(shape, IGNORED), np.full(shape, IGNORED)
    for row, (prompt, words) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt)
        tokens[row, :end] = prompt
        # Known as soon as the question ends, before the options.
        content[row, prompt.index(mark)] = words[0]
        if options:
            content[row, end - 1] = words[0]
            tokens[row, end : end + len(words)] = words
            labels[row, end - 1 : end + len(words)] = [*words, tokenizer.eos_token_id]
    split = (len(questions), -1, shape[1])
    return PackedQuestions(*(torch.from_numpy(array.reshape(split)) for array in (tokens, labels, content)))


def draw_clips(rng: np.random.Generator, count: int, first_seed: int) -> list[Clip]:
    """Clips of random seeds at or above `first_seed`."""
    return [make_clip(int(seed)) for seed in rng.integers(first_seed, 2**40, size=count)]


def draw_questions(rng: np.random.Generator, clips: list[Clip], per_clip: int) -> list[list[Question]]:
    """`per_clip` questions of each clip, families mixed as they come."""
    chosen = []
    for clip in clips:
        pool = all_questions(clip, rng)
        chosen.append([pool[i] for i in rng.permutation(len(pool))[:per_clip]])
    return chosen


def draw_frames(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` evenly spaced frame numbers of a clip with a random offset, int64 [T]."""
    step = FRAMES // count
    return np.arange(count) * step + rng.integers(step)


def frame_truth(clips: list[Clip], frames: np.ndarray) -> dict[str, torch.Tensor]:
    """What is true at each frame, int64 [B, T] per key of `FRAME_CLASSES`, and the main "cell" (16: none)."""
    nothing = {key: size - 1 for key, size in FRAME_CLASSES.items()} | {"count": 0, "cell": CELLS**2}
    truth = {key: np.full((len(clips), len(frames)), value) for key, value in nothing.items()}
    for row, clip in enumerate(clips):
        for number, event in enumerate(clip.events):
            begun, visible = frames >= event.start, (frames >= event.start) & (frames < event.end)
            truth["count"][row, begun] = number + 1
            truth["colour"][row, visible] = COLOUR_INDEX[event.colour]
            truth["shape"][row, visible] = SHAPE_INDEX[event.shape]
            truth["direction"][row, visible] = DIRECTION_INDEX[event.direction]
            if number:
                truth["previous"][row, begun] = COLOUR_INDEX[clip.events[number - 1].colour]
            cells = np.clip(event.centres(frames[visible]) * CELLS / SIDE, 0, CELLS - 1).astype(int)
            truth["cell"][row, visible] = cells[:, 1] * CELLS + cells[:, 0]
    return {key: torch.from_numpy(value) for key, value in truth.items()}


def cell_truth(clips: list[Clip], frames: np.ndarray) -> dict[str, torch.Tensor]:
    """What each cell of a 4 x 4 grid shows, int64 [B, T, 16] per "colour", "shape" and "cell".

    A cell shows a shape that covers at least `CELL_COVERAGE` of it; the last class means nothing there, and an
    empty cell has no place ("cell" is 16).
    """
    size = (len(clips), len(frames), CELLS**2)
    colour = np.full(size, FRAME_CLASSES["colour"] - 1)
    shape = np.full(size, FRAME_CLASSES["shape"] - 1)
    for row, clip in enumerate(clips):
        for event in clip.events:
            visible = (frames >= event.start) & (frames < event.end)
            if not visible.any():
                continue
            alpha = coverage(event.shape, event.centres(frames[visible]), RADIUS, SIDE)
            side = SIDE // CELLS
            shares = alpha.reshape(-1, CELLS, side, CELLS, side).mean(axis=(2, 4)).reshape(-1, CELLS**2)
            covered = np.zeros(size[1:], dtype=bool)
            covered[visible] = shares >= CELL_COVERAGE
            colour[row][covered] = COLOUR_INDEX[event.colour]
            shape[row][covered] = SHAPE_INDEX[event.shape]
    cell = np.where(shape < FRAME_CLASSES["shape"] - 1, np.arange(CELLS**2), CELLS**2)
    return {key: torch.from_numpy(value) for key, value in {"colour": colour, "shape": shape, "cell": cell}.items()}
