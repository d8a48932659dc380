"""Video LLMs that place a video's tokens in time, height and width (multimodal rotary positions, as of the Qwen-VLs).

A token's number in the sequence is not its position there, so a stream has to say where every batch stands.

Shape letters: n steps of a batch, B questions, S tokens seen, L tokens of a question.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from namm_transfer.adapters.video_steps import FrameLayout, Marks
from namm_transfer.errors import ConfigError

__all__ = ["base_of", "batch_positions", "behind_video", "check_marks", "frames_of_step", "go_on_at", "has_grid"]

_TEXT, _VIDEO = 0, 2
"""What ``mm_token_type_ids`` holds of a token."""


def base_of(model: PreTrainedModel) -> Any:
    """The model without its head."""
    return getattr(model, model.base_model_prefix, model)


def has_grid(model: PreTrainedModel) -> bool:
    """Whether videos come as patches with ``video_grid_thw``."""
    base = base_of(model)
    if not (hasattr(base, "get_rope_index") and hasattr(base, "get_video_features")):
        return False
    return "video_grid_thw" in inspect.signature(base.get_video_features).parameters


def frames_of_step(model: PreTrainedModel) -> int:
    """Frames that become tokens together."""
    return int(model.config.vision_config.temporal_patch_size)


def check_marks(model: PreTrainedModel, layout: FrameLayout, marks: Marks) -> None:
    """Refuse marks between the steps of one grid, and none where each step is a grid of its own.

    Raises:
        ConfigError: the model numbers two steps with such marks otherwise than it reads them.
    """
    try:
        _numbered(model, layout, [marks, marks])
    except (RuntimeError, ValueError, StopIteration) as error:
        name = type(model).__name__
        if any(marks):
            raise ConfigError(
                f"{name} numbers the tokens of a video as one grid, with nothing in between: put what stands before "
                "and after the video into before=, and in front of the question, not into marks="
            ) from error
        raise ConfigError(
            f"{name} holds the steps of a video apart by text: pass the token ids before and after each as "
            "marks=(before, after), or as a function of its time in seconds"
        ) from error


def batch_positions(
    model: PreTrainedModel, layout: FrameLayout, position: int, frames: int, marks: Sequence[Marks]
) -> tuple[Tensor, int]:
    """Where n steps and their marks stand.

    Args:
        position: of the video's first token if it is one grid, else of the batch's first.
        frames: frames before.
        marks: of each of the n steps.

    Returns:
        positions [3, 1, tokens], and what ``position`` is for the next batch.
    """
    if not layout.one_grid:
        numbered = position + _numbered(model, layout, marks)
        return numbered[..., :-1], int(numbered[0, 0, -1])
    grid = layout.thw(frames // layout.step + len(marks))[0]
    merged = model.config.vision_config.spatial_merge_size
    found: Tensor = base_of(model).get_vision_position_ids(position, grid, 1, merged, _interval(model, layout))
    return found[:, None, -len(marks) * layout.tokens :].to(model.device), position


def behind_video(model: PreTrainedModel, layout: FrameLayout, position: int, frames: int) -> int:
    """Where text goes on behind a video of so many frames, as the model itself numbers it in one prompt.

    Args:
        position: as :func:`batch_positions` returned it.
    """
    if not layout.one_grid:
        return position
    steps = -(-frames // layout.step)
    return position + int(_numbered(model, layout, [((), ())] * steps)[0, 0, -1])


def go_on_at(model: PreTrainedModel, position: int, mask: Tensor, count: int) -> Tensor:
    """Let the model's next call go on at ``position``.

    Args:
        mask: [B, S + L]; the last ``count`` = L are the question's.

    Returns:
        Positions [3, B, L] for a forward call; ``generate`` makes them itself, of what it is told here.
    """
    seen = mask.shape[1] - count
    base_of(model).rope_deltas = torch.full((len(mask), 1), position - seen, device=mask.device)
    numbers = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -count:] + position - seen
    return numbers.expand(3, -1, -1)


def _numbered(model: PreTrainedModel, layout: FrameLayout, marks: Sequence[Marks]) -> Tensor:
    """Positions [3, 1, tokens + 1] of steps with these marks and of one token of text behind, from 0 on."""
    types: list[int] = []
    for before, after in marks:
        types += [*[_TEXT] * len(before), *[_VIDEO] * layout.tokens, *[_TEXT] * len(after)]
    kinds = torch.tensor([[*types, _TEXT]], device=model.device)
    given: dict[str, Any] = {
        "mm_token_type_ids": kinds,
        "video_grid_thw": layout.thw(len(marks)).to(model.device),
    }
    if _takes_seconds(model):
        given["second_per_grid_ts"] = [layout.seconds]
    found: Tensor = base_of(model).get_rope_index(torch.zeros_like(kinds), **given)[0]
    return found


def _interval(model: PreTrainedModel, layout: FrameLayout) -> float:
    """By how much the position in time grows from step to step (Bai et al., "Qwen2.5-VL", 2025, section 2.1.2)."""
    return float(model.config.vision_config.tokens_per_second * layout.seconds) if _takes_seconds(model) else 1.0


def _takes_seconds(model: PreTrainedModel) -> bool:
    return "second_per_grid_ts" in inspect.signature(base_of(model).get_rope_index).parameters
