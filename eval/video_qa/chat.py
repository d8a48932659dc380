"""From a conversation with videos to a video LLM's inputs: any model of the Hub by its own processor and chat template,
and the packaged one by its fixed prompt.

A conversation is what lmms-eval makes of a benchmark's row: messages of a role and parts, each part a text, an image or
a video. Shape letters: T frames, H height and W width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchEncoding, PreTrainedModel
from transformers.video_utils import VideoMetadata

from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.video import DecodedVideo, decode, fit
from namm_transfer.eval.video_qa import host as packaged_host
from namm_transfer.eval.video_qa.clips import SIDE
from namm_transfer.eval.video_qa.questions import VIDEO_PLACEHOLDER

__all__ = ["Encoded", "Frames", "Reader", "load_video_llm"]

DEFAULT_FRAMES = 32
DTYPES = ("auto", "float32", "bfloat16", "float16")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_MILLISECONDS = 1000

Part = Mapping[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Frames:
    """Which frames of a video are looked at: `num_frames`, evenly spaced ("all": every one), or `fps` of them a second.

    Of a video shorter than `num_frames` all frames are. Without either, 32.
    """

    num_frames: int | str | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ConfigError(f"expected num_frames or fps, got both: {self.num_frames} and {self.fps}")
        if self.num_frames is None and self.fps is None:
            object.__setattr__(self, "num_frames", DEFAULT_FRAMES)
        for name, kinds in (("num_frames", int), ("fps", (int, float))):
            value = getattr(self, name)
            if value is None or (name, value) == ("num_frames", "all"):
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise ConfigError(f"{name} is {value!r}; expected a number above 0")

    def __call__(self, path: str | Path) -> DecodedVideo:
        """Decode those frames.

        Raises:
            VideoError: the file cannot be decoded.
        """
        if isinstance(self.num_frames, int):
            return decode(path, at_most=self.num_frames)
        return decode(path, fps=self.fps)


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model gets it: its inputs, and the prompt that they were made from, for the log."""

    inputs: BatchEncoding
    prompt: str


class Reader(Protocol):
    """Writes a conversation as a model's inputs, and its tokens as text."""

    def encode(self, messages: Sequence[Message], videos: Sequence[DecodedVideo]) -> Encoded:
        """Inputs of one conversation; `videos` are those of its parts, in their order.

        Raises:
            DataError: the model cannot be shown such a conversation.
        """
        ...

    def text(self, tokens: torch.Tensor) -> str:
        """Text of generated tokens, special tokens left out."""
        ...


@dataclass(frozen=True)
class PackagedReader:
    """The packaged video LLMs, and those of `train video_llm`: one video, then the text, as they were trained."""

    processor: packaged_host.VideoQAProcessor

    def encode(self, messages: Sequence[Message], videos: Sequence[DecodedVideo]) -> Encoded:
        parts = [part for message in messages for part in message["content"]]
        kinds = [part["type"] for part in parts]
        if kinds != ["video", "text"] or len(videos) != 1:
            raise DataError(f"the packaged video LLM reads one video and then one text; got {', '.join(kinds)}")
        prompt = f"{VIDEO_PLACEHOLDER}\n{parts[1]['text']}"
        return Encoded(self.processor(fit(videos[0].frames, SIDE), prompt), prompt)

    def text(self, tokens: torch.Tensor) -> str:
        return self.processor.decode(tokens)


@dataclass(frozen=True)
class HubReader:
    """A model's own processor and chat template; where it takes no videos, their frames are images (Gemma 3)."""

    processor: Any
    name: str

    def __post_init__(self) -> None:
        if not _default(getattr(self.processor, "chat_template", None)):
            raise ConfigError(f"the processor of {self.name} has no chat template, which says where a video belongs")

    def encode(self, messages: Sequence[Message], videos: Sequence[DecodedVideo]) -> Encoded:
        as_images = getattr(self.processor, "video_processor", None) is None
        left, chat, images = list(videos), [], []
        for message in messages:
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                elif part["type"] == "video" and not as_images:
                    parts.append({"type": "video"})
                elif part["type"] in ("image", "video"):
                    shown = [part["url"]] if part["type"] == "image" else list(left.pop(0).frames)
                    images += shown
                    parts += [{"type": "image"}] * len(shown)
                else:
                    raise DataError(f"{self.name} cannot be shown a part of type {part['type']!r}")
            chat.append({"role": message["role"], "content": parts})
        template = _default(self.processor.chat_template)
        # Not given where it need not be: SmolVLM's processor knows a better one than its checkpoints have.
        chosen = {"chat_template": packaged_host.on_one_day(template)} if "strftime_now" in template else {}
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **chosen)
        bos = self.processor.tokenizer.bos_token
        # Templates differ in whether they write the first token themselves.
        given: dict[str, Any] = {"add_special_tokens": not (bos and prompt.startswith(bos))}
        if images:
            given["images"] = images
        if left:
            given |= {
                "videos": [video.frames for video in left],
                "video_metadata": [_metadata(video) for video in left],
                "do_sample_frames": False,
            }
        return Encoded(self.processor(text=[prompt], return_tensors="pt", **given), prompt)

    def text(self, tokens: torch.Tensor) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))


def load_video_llm(pretrained: str, dtype: str = "auto") -> tuple[PreTrainedModel, Reader]:
    """A video LLM in evaluation mode and its reader.

    Args:
        pretrained: "packaged", the name of a packaged host, a folder (of transformers, or of `namm-transfer train
            video_llm`), or a Hub id.
        dtype: one of `DTYPES`; "auto" is what the weights were saved in (a packaged one runs in float32, one on a
            language model in that model's type).

    Raises:
        ConfigError: an unknown dtype, or a processor without a chat template.
        CheckpointError: there is no such model, or it cannot be read.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    folder = {"packaged": packaged_host.PACKAGED, **packaged_host.PACKAGED_HOSTS}.get(pretrained, Path(pretrained))
    if packaged_host.is_host(folder) and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        model, processor = packaged_host.load_host(folder)
        return (model if dtype == "auto" else model.to(getattr(torch, dtype))), PackagedReader(processor)
    try:
        AutoConfig.from_pretrained(pretrained)  # before gigabytes are fetched
        reader = HubReader(AutoProcessor.from_pretrained(pretrained), pretrained)
        found = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"cannot load a video LLM from {pretrained!r}: {error}") from error
    return found.eval(), reader


def _default(templates: str | Mapping[str, str] | None) -> str:
    """A processor's chat template, that named "default" where it has several; empty if there is none."""
    return (templates.get("default") if isinstance(templates, Mapping) else templates) or ""


def _metadata(video: DecodedVideo) -> VideoMetadata:
    """When its frames are, for models that are told: a clock of milliseconds is exact enough, whatever the rate."""
    times, count = video.timestamps, len(video.timestamps)
    span = float(times[-1] - times[0]) * count / (count - 1) if count > 1 else 1.0
    return VideoMetadata(
        total_num_frames=max(round(span * _MILLISECONDS), count),
        fps=float(_MILLISECONDS),
        width=video.frames.shape[2],
        height=video.frames.shape[1],
        duration=float(times[-1]),
        frames_indices=[round(float(time) * _MILLISECONDS) for time in times],
    )
