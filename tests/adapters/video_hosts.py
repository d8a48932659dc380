"""Tiny randomly initialised video LLMs with real pixel inputs, and prompts whose placeholders match their features."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from .hosts import BASE, IMAGE, ROPE, SPECIAL, VIDEO, VISION_END, VISION_START, VOCABULARY, seeded

SIZE = 32
"""Height and width of every image and frame, in pixels."""
FRAMES = 6
_LM = {k: v for k, v in BASE.items() if k != "tie_word_embeddings"}
_MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
_TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = _TOWER | {"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": 8}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": 4, "vision_use_head": False}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "intermediate_size": 32}
_IDS = {"image_token_index": IMAGE, "video_token_index": VIDEO}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


@dataclass(frozen=True)
class VideoLLM:
    """One architecture of the matrix.

    Attributes:
        config: settings of the composite config.
        pixels: name and shape of the pixel input of one row.
        extra: further inputs of one row that go with the pixels.
        kind: the pixels are images or a video.
        spans: runs of placeholders, each between a start and an end token.
        types: name of the input that marks placeholders with 1 (images) or 2 (videos), if the model takes one.
        prefix: the whole prompt attends to itself; ``types`` is 0 throughout.
    """

    config: dict[str, Any]
    pixels: tuple[str, tuple[int, ...]]
    extra: dict[str, Any] = field(default_factory=dict)
    kind: Literal["image", "video"] = "video"
    spans: int = 1
    types: str | None = None
    prefix: bool = False


_GEMMA3 = {
    "model_type": "gemma3",
    "image_token_index": IMAGE,
    "boi_token_index": VISION_START,
    "eoi_token_index": VISION_END,
    "vision_config": _SIGLIP,
    "text_config": _LM
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    | {"head_dim": 8, "query_pre_attn_scalar": 8},
}
_IMAGES = ("pixel_values", (FRAMES, 3, SIZE, SIZE))
_VIDEO = ("pixel_values_videos", (1, FRAMES, 3, SIZE, SIZE))
# two frames and 4 x 4 pixels a patch; fewer steps in time than merged patches in width, because where it is the other
# way round, transformers' Qwen2-VL places the text that follows a video otherwise when it comes in a later call
_GRID = (4, 8, 12)
_PATCHES = ("pixel_values_videos", (prod(_GRID), 3 * 2 * 4 * 4))
_THW = {"video_grid_thw": [_GRID]}
_LLAMA = {"text_config": _LM | {"model_type": "llama"}}
_QWEN2 = {"text_config": _LM | {"model_type": "qwen2"}}

VIDEO_LLMS: dict[str, VideoLLM] = {
    "llava": VideoLLM(
        _LLAMA | _IDS | {"model_type": "llava", "vision_config": _CLIP}, _IMAGES, kind="image", spans=FRAMES
    ),
    "llava-siglip": VideoLLM(
        _QWEN2 | _IDS | {"model_type": "llava", "vision_config": _SIGLIP, "vision_feature_select_strategy": "full"},
        ("pixel_values", (2, 3, SIZE, SIZE)),
        kind="image",
        spans=2,
    ),
    "llava-next": VideoLLM(  # an image as several tiles
        _LLAMA
        | _IDS
        | {"model_type": "llava_next", "vision_config": _CLIP, "image_grid_pinpoints": [[64, 32], [32, 64]]},
        ("pixel_values", (2, 3, 3, SIZE, SIZE)),
        {"image_sizes": [[64, 32], [30, 60]]},
        kind="image",
    ),
    "llava-next-video": VideoLLM(
        _LLAMA | _IDS | {"model_type": "llava_next_video", "vision_config": _CLIP | {"patch_size": 4}}, _VIDEO
    ),
    "llava-onevision": VideoLLM(_QWEN2 | _IDS | {"model_type": "llava_onevision", "vision_config": _SIGLIP}, _VIDEO),
    "video-llava": VideoLLM(_LLAMA | _IDS | {"model_type": "video_llava", "vision_config": _CLIP}, _VIDEO),
    "qwen2-vl": VideoLLM(  # positions in time, height and width
        _QWEN_IDS
        | {"model_type": "qwen2_vl", "text_config": _LM | _MROPE}
        | {"vision_config": _QWEN | {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}},
        _PATCHES,
        _THW,
        types="mm_token_type_ids",
    ),
    "qwen2.5-vl": VideoLLM(
        _QWEN_IDS
        | {"model_type": "qwen2_5_vl", "text_config": _LM | _MROPE}
        | {
            "vision_config": _QWEN
            | {"hidden_size": 24, "out_hidden_size": 32, "window_size": 16, "tokens_per_second": 1}
            | {"fullatt_block_indexes": [1]}  # a window of 16 tokens is no longer than any update interval
        },
        _PATCHES,
        _THW,
        types="mm_token_type_ids",
    ),
    "qwen3-vl": VideoLLM(  # features also enter the first layers (deepstack)
        _QWEN_IDS
        | {"model_type": "qwen3_vl", "text_config": _LM | _MROPE | {"head_dim": 8}}
        | {
            "vision_config": _QWEN
            | {"hidden_size": 24, "out_hidden_size": 32, "num_position_embeddings": 64}
            | {"deepstack_visual_indexes": [0, 1]}
        },
        _PATCHES,
        _THW,
        spans=_GRID[0],
        types="mm_token_type_ids",
    ),
    "internvl": VideoLLM(
        _QWEN2
        | {"model_type": "internvl", "image_token_id": IMAGE}
        | {"vision_config": _TOWER | {"image_size": SIZE, "patch_size": 4}},
        _IMAGES,
        kind="image",
        spans=FRAMES,
    ),
    "smolvlm": VideoLLM(
        _LLAMA
        | {
            "model_type": "smolvlm",
            "image_token_id": IMAGE,
            "vision_config": _TOWER | {"image_size": SIZE, "patch_size": 4},
        },
        ("pixel_values", (1, FRAMES, 3, SIZE, SIZE)),
        kind="image",
        spans=FRAMES,
    ),
    "gemma3": VideoLLM(  # the tokens of an image attend to each other, within the sliding window too
        _GEMMA3 | {"mm_tokens_per_image": 16}, _IMAGES, kind="image", spans=FRAMES, types="token_type_ids"
    ),
    "gemma3-short": VideoLLM(  # a prompt with its image may be shorter than a hop
        _GEMMA3 | {"mm_tokens_per_image": 4}, ("pixel_values", (1, 3, SIZE, SIZE)), kind="image", types="token_type_ids"
    ),
    "paligemma": VideoLLM(  # the whole prompt attends to itself
        {"model_type": "paligemma", "image_token_index": IMAGE, "projection_dim": 32, "vision_config": _SIGLIP}
        | {"text_config": _LM | {"model_type": "gemma", "head_dim": 8}},
        ("pixel_values", (1, 3, SIZE, SIZE)),
        kind="image",
        types="token_type_ids",
        prefix=True,
    ),
}


@cache
def video_llm(name: str) -> PreTrainedModel:
    """A tiny video LLM; the same object at every call."""
    settings = dict(VIDEO_LLMS[name].config)
    config = AutoConfig.for_model(settings.pop("model_type"), tie_word_embeddings=False, **settings)
    return seeded(lambda: AutoModelForImageTextToText.from_config(config), seed=11)


@cache
def placeholders(name: str) -> int:
    """Tokens that the vision part makes of one row's pixels."""
    case, model = VIDEO_LLMS[name], video_llm(name)
    call = model.model.get_image_features if case.kind == "image" else model.model.get_video_features
    features = call(**pixels(name, 0), return_dict=True).pooler_output
    features = torch.cat(list(features)) if isinstance(features, tuple | list) else features.flatten(0, -2)
    return len(features)


def pixels(name: str, seed: int) -> dict[str, Tensor]:
    """Random pixels of one row, and what goes with them."""
    case = VIDEO_LLMS[name]
    key, shape = case.pixels
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {key: values} | {k: torch.tensor(v) for k, v in case.extra.items()}


def row(name: str, seed: int, before: int = 9, after: int = 30) -> dict[str, Tensor]:
    """One prompt: text, the video or the images, text.

    Args:
        before, after: text tokens on either side.
    """
    case = VIDEO_LLMS[name]
    generator = torch.Generator().manual_seed(1000 + seed)

    def text(count: int) -> list[int]:
        return torch.randint(SPECIAL, VOCABULARY, (count,), generator=generator).tolist()

    token = IMAGE if case.kind == "image" else VIDEO
    span = [VISION_START, *[token] * (placeholders(name) // case.spans), VISION_END]
    ids = torch.tensor([text(before) + span * case.spans + text(after)])
    out = {"input_ids": ids, **pixels(name, seed)}
    if case.types:
        out[case.types] = (ids == token).long() * (0 if case.prefix else 1 if case.kind == "image" else 2)
    return out


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of different lengths as a left-padded batch."""
    width = max(x["input_ids"].shape[1] for x in rows)
    out = {}
    for key in rows[0]:
        if key.endswith("_ids"):
            out[key] = torch.cat([torch.nn.functional.pad(x[key], (width - x[key].shape[1], 0)) for x in rows])
        else:
            out[key] = torch.cat([x[key] for x in rows])
    lengths = torch.tensor([[x["input_ids"].shape[1]] for x in rows])
    return out | {"attention_mask": (torch.arange(width) >= width - lengths).long()}
