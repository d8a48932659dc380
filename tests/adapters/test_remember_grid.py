"""Videos remembered by models that place tokens in time, height and width, against one prompt to the unmodified one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLVideoProcessor

from namm_transfer import adapt, policy
from namm_transfer.adapters.video_memory import VideoMemory
from namm_transfer.errors import ConfigError

from . import checks
from .checks import INTERVAL, TOLERANCE, evictor
from .hosts import SPECIAL, VIDEO, VISION_END, VISION_START, VOCABULARY
from .video_hosts import video_llm

WIDTH = 3 * 2 * 4 * 4
"""Values of a patch: colours, two frames, four by four pixels."""
ONE_GRID = ["qwen2-vl", "qwen2.5-vl"]
APART = "qwen3-vl"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def text(count: int, seed: int) -> list[int]:
    return torch.randint(SPECIAL, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def patches(grid: tuple[int, int, int]) -> Tensor:
    return torch.randn(prod(grid), WIDTH, generator=torch.Generator().manual_seed(5))


def cut(values: Tensor, grid: tuple[int, int, int], sizes: Sequence[int], **more: Any) -> list[dict[str, Any]]:
    """Batches of so many steps, as a video processor returns them."""
    parts = values.view(grid[0], -1, WIDTH).split(list(sizes))
    return [
        {"pixel_values_videos": x.flatten(0, 1), "video_grid_thw": torch.tensor([[len(x), *grid[1:]]]), **more}
        for x in parts
    ]


def prompt(grid: tuple[int, int, int], values: Tensor, marks: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """The whole prompt; ``marks`` of the video, or of each step."""
    span = [VIDEO] * (prod(grid) // 4 // len(marks))
    ids = torch.tensor([[*text(9, 1), *(i for a, b in marks for i in (*a, *span, *b)), *text(20, 2)]])
    return {
        "input_ids": ids,
        "pixel_values_videos": values,
        "video_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
    }


def question(front: Sequence[int] = ()) -> Tensor:
    return torch.tensor([[*front, *text(20, 2)]])


@pytest.mark.parametrize("name", ONE_GRID)
@pytest.mark.parametrize("grid", [(11, 4, 4), (3, 4, 16)], ids=["long", "wide"])
def test_a_question_stands_where_the_model_puts_it_in_one_prompt(name: str, grid: tuple[int, int, int]) -> None:
    model, values = video_llm(name), patches(grid)
    whole = prompt(grid, values, [([VISION_START], [VISION_END])])
    tokens, logits = checks.greedy(model.generate, whole)
    with adapt(model, policy("full"), INTERVAL) as host:
        memory = host.remember(cut(values, grid, [1, grid[0] - 1]), before=[*text(9, 1), VISION_START])
        ours, our_logits = checks.greedy(
            lambda **x: host.generate(**x, memory=memory), {"input_ids": question([VISION_END])}
        )
    assert memory.frames == 2 * grid[0]
    assert torch.equal(ours, tokens)
    assert checks.distance(our_logits, logits) <= TOLERANCE


@pytest.mark.parametrize("seconds", [0.4, 1.5])
def test_time_between_steps_counts(seconds: float) -> None:
    grid = (6, 4, 8)
    model, values = video_llm("qwen2.5-vl"), patches(grid)
    whole = prompt(grid, values, [([VISION_START], [VISION_END])])
    expected = model(**whole, second_per_grid_ts=[seconds]).logits[:, -20:]
    assert checks.distance(model(**whole).logits[:, -20:], expected) > 10 * TOLERANCE
    with adapt(model, policy("full"), INTERVAL) as host:
        batches = cut(values, grid, [1, 2, 3], second_per_grid_ts=[seconds])
        memory = host.remember(batches, before=[*text(9, 1), VISION_START])
        ours = host(input_ids=question([VISION_END]), memory=memory).logits[:, -20:]
        assert checks.distance(ours, expected) <= TOLERANCE
        with pytest.raises(ConfigError, match=rf"steps are {seconds} s apart, but those of a batch 1.0 s"):
            host.remember(cut(values, grid, [6]), memory=memory)


def stamp(seconds: float) -> tuple[list[int], list[int]]:
    """Marks as long as the time that they tell."""
    return [*text(1 + int(seconds), 7), VISION_START], [VISION_END]


def test_marks_may_tell_the_time(tmp_path) -> None:
    """A step's two frames are told by the time between them."""
    grid, times = (4, 4, 8), torch.arange(8) * 1.0
    model, values, keep = video_llm(APART), patches(grid), evictor()
    whole = prompt(grid, values, [stamp(0.5), stamp(2.5), stamp(4.5), stamp(6.5)])
    logits = model(**whole).logits[:, -20:]
    with adapt(model, policy("full"), INTERVAL) as host:
        batches = list(zip(cut(values, grid, [3, 1]), times.split([6, 2]), strict=True))
        memory = host.remember(batches, before=text(9, 1), marks=stamp)
        assert checks.distance(host(input_ids=question(), memory=memory).logits, logits) <= TOLERANCE
    with adapt(model, keep, INTERVAL) as host:
        expected = host(**whole).logits[:, -20:]
        host.remember(batches[:1], before=text(9, 1), marks=stamp).save(tmp_path / "memory.safetensors")
        memory = VideoMemory.load(tmp_path / "memory.safetensors", keep)
        with pytest.raises(ConfigError, match="are a function of the time: pass it again"):
            host.remember(batches[1:], memory=memory)
        host.remember(batches[1:], memory=memory, marks=stamp)
        assert checks.distance(host(input_ids=question(), memory=memory).logits, expected) <= TOLERANCE
    assert (memory.frames, memory.timestamp) == (8, 7.0)


@pytest.mark.parametrize("name", ONE_GRID)
def test_a_saved_memory_goes_on_where_it_stood(name: str, tmp_path) -> None:
    grid = (6, 4, 8)
    values, keep = patches(grid), evictor()
    before = [*text(9, 1), VISION_START]
    with adapt(video_llm(name), keep, INTERVAL) as host:
        expected = host.remember(cut(values, grid, [6]), before=before)
        host.remember(cut(values, grid, [4, 2])[:1], before=before).save(tmp_path / "memory.safetensors")
        again = VideoMemory.load(tmp_path / "memory.safetensors", keep)
        host.remember(cut(values, grid, [4, 2])[1:], memory=again)
        asked = [host(input_ids=question([VISION_END]), memory=memory).logits for memory in (expected, again)]
    assert checks.distance(*asked) <= TOLERANCE


@pytest.mark.parametrize("name", [*ONE_GRID, APART])
def test_padded_questions_are_answered_as_each_alone(name: str) -> None:
    grid = (4, 4, 8)
    marks = {"marks": ((VISION_START,), (VISION_END,))} if name == APART else {}
    long, short = question([VISION_END]), question([VISION_END])[:, 7:]
    ids = torch.cat([long, torch.nn.functional.pad(short, (7, 0))])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with adapt(video_llm(name), evictor(), INTERVAL) as host:
        memory = host.remember(cut(patches(grid), grid, [4]), before=text(9, 1), **marks)

        def ask(**inputs):
            return checks.greedy(lambda **x: host.generate(**x, memory=memory), inputs)

        tokens, logits = ask(input_ids=ids, attention_mask=mask)
        both = host(input_ids=ids, attention_mask=mask, memory=memory).logits
        for i, asked in enumerate((long, short)):
            alone, alone_logits = ask(input_ids=asked)
            assert torch.equal(alone[0], tokens[i])
            assert checks.distance(alone_logits[0], logits[i]) <= TOLERANCE
            forward = host(input_ids=asked, memory=memory).logits[0]
            assert checks.distance(both[i, -len(forward) :], forward) <= TOLERANCE


def test_a_prompt_after_a_memory_is_numbered_anew() -> None:
    grid = (4, 4, 8)
    model, values = video_llm("qwen2-vl"), patches(grid)
    whole = prompt(grid, values, [([VISION_START], [VISION_END])])
    tokens, _ = checks.greedy(model.generate, whole)
    with adapt(model, policy("full"), INTERVAL) as host:
        memory = host.remember(cut(values, grid, [4]) * 3)
        host.generate(input_ids=question(), memory=memory, max_new_tokens=2)
        ours, _ = checks.greedy(host.generate, whole)
    assert torch.equal(ours, tokens)


def test_what_a_video_processor_makes_is_taken_as_it_is() -> None:
    """Five frames: the processor repeats the last one, so that the third step is whole."""
    processor = Qwen2VLVideoProcessor(patch_size=4, do_resize=False, do_sample_frames=False)
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 32), dtype=np.uint8)
    times = np.arange(5) / 4

    def preprocess(part: np.ndarray) -> Any:
        return processor(videos=[torch.from_numpy(part)], return_tensors="pt")

    shown = preprocess(frames)
    grid = tuple(shown["video_grid_thw"][0].tolist())
    assert grid == (3, 4, 8)
    whole = prompt(grid, shown["pixel_values_videos"], [([VISION_START], [VISION_END])])
    model = video_llm("qwen2-vl")
    expected = model(**whole).logits[:, -20:]
    with adapt(model, policy("full"), INTERVAL) as host:
        parts = [(frames[:2], times[:2]), (frames[2:], times[2:])]
        memory = host.remember(parts, before=[*text(9, 1), VISION_START], preprocess=preprocess)
        assert (memory.frames, memory.timestamp) == (5, 1.0)
        ours = host(input_ids=question([VISION_END]), memory=memory).logits[:, -20:]
        assert checks.distance(ours, expected) <= TOLERANCE
        with pytest.raises(ConfigError, match="only the last batch may end within a step of 2 frames; 5 came before"):
            host.remember(parts[:1], memory=memory, preprocess=preprocess)


def test_wrong_batches_are_named() -> None:
    grid = (2, 4, 8)
    values = patches(grid)
    (batch,) = cut(values, grid, [2])
    marks = ((VISION_START,), (VISION_END,))
    for name, given, message in [
        ("qwen2-vl", {"batches": [torch.zeros(2, 3, 32, 32)]}, "video processor makes of its frames.*got Tensor"),
        ("qwen2-vl", {"batches": [{"pixel_values": values}]}, r"got \['pixel_values'\]"),
        ("qwen2-vl", {"batches": [batch | {"video_grid_thw": [grid, grid]}]}, "of one video of 64 patches"),
        ("qwen2-vl", {"batches": [batch | {"video_grid_thw": [[2, 4, 4]]}]}, r"64 patches; got \[\[2, 4, 4\]\]"),
        ("qwen2-vl", {"batches": [batch], "marks": marks}, "as one grid, with nothing in between"),
        ("qwen3-vl", {"batches": [batch]}, "holds the steps of a video apart by text"),
        ("qwen3-vl", {"batches": [batch], "marks": stamp}, "must be pairs of frames and their timestamps"),
        (
            "qwen2-vl",
            {"batches": [(batch, [0.0, 0.5])]},
            "a batch of 2 steps of 2 frames came with 2 timestamps",
        ),
        ("qwen2-vl", {"batches": [batch, *cut(values, (2, 8, 4), [2])]}, r"of shape \(4, 8\), but .* with \(8, 4\)"),
    ]:
        with adapt(video_llm(name), evictor(), INTERVAL) as host, pytest.raises(ConfigError, match=message):
            host.remember(**given)
