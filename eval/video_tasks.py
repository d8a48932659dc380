"""The tasks on packaged mp4 clips: questions to a video LLM, and the motion that a video encoder sees.

Shape letters: T frames, U steps in time (frames, or tubelets of several frames), S side of a frame in pixels, L layers,
K KV heads, h, w patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange

from namm_transfer.adapters import adapt
from namm_transfer.adapters.video_encoder import special_tokens
from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.eval.provenance import digest
from namm_transfer.eval.results import UNDECODABLE
from namm_transfer.eval.task import Outcome, Unit, check_settings, host_folder, measured, packaged_host
from namm_transfer.eval.video import DecodedVideo, decode, fit
from namm_transfer.eval.video_classification import host as encoder_host
from namm_transfer.eval.video_classification import packaged as motion_clips
from namm_transfer.eval.video_classification.evaluate import LabelledClip
from namm_transfer.eval.video_qa import host as llm_host
from namm_transfer.eval.video_qa import packaged as qa_clips
from namm_transfer.eval.video_qa.clips import SIDE
from namm_transfer.eval.video_qa.evaluate import QAClip, ask
from namm_transfer.eval.video_qa.questions import VIDEO_PLACEHOLDER, Question, parse_answer
from namm_transfer.memory import MemoryCache
from namm_transfer.policies import Policy

__all__ = ["Motion", "ShapesQA"]

MOST_FRAMES = 1024
"""Of a video whose frames are all held at once; `remember` is for longer ones."""


@dataclass(frozen=True)
class _ClipTask(ABC):
    """A host that is shown mp4 clips; a unit belongs to the clip that is its cluster."""

    name: str
    model: Mapping[str, Any]
    videos: str
    clips: int

    packaged_hosts: ClassVar[Mapping[str, Path]]
    """Folders of the packaged hosts by name, the usual one first."""
    packaged_videos: ClassVar[Path]

    @abstractmethod
    def units(self, seed: int) -> list[Unit]:
        """Those of the first `clips` clips, clip by clip."""

    def inputs(self) -> dict[str, str]:
        """What the host is, and the digest of the clips."""
        return {**self._identity(), "clips": digest(next(iter(self._clips.values())).path.parent)}

    def evaluate(self, units: Sequence[Unit], policy: Any, seed: int) -> Iterator[Outcome]:
        """Clip by clip; no baseline applies, so `policy` is a policy."""
        for name, members in groupby(units, key=lambda unit: unit.cluster):
            clip, of_clip = self._clips[name], list(members)
            try:
                frames = self.watch(self._file(clip)).frames
            except VideoError as error:
                fault = str(error).replace(str(clip.path), clip.path.name)
                yield from (Outcome(unit, status=UNDECODABLE, error=fault) for unit in of_clip)
            else:
                yield from self._outcomes(clip, frames, of_clip, policy)

    def clip_path(self, number: int) -> Path:
        """File of a packaged clip."""
        return self._file(_numbered(list(self._clips.values()), number))

    @abstractmethod
    def watch(self, path: Path) -> DecodedVideo:
        """What the host is shown of a video file of any size and length: uint8 [T, S, S, 3].

        Raises:
            VideoError: the file cannot be decoded, or is too short.
        """

    @abstractmethod
    def retained(self, frames: np.ndarray, policy: Policy) -> np.ndarray:
        """Visual tokens that each layer and head holds once a video was read: bool [L, K, U, h, w]."""

    @abstractmethod
    def _outcomes(self, clip: Any, frames: np.ndarray, units: Sequence[Unit], policy: Policy) -> Iterator[Outcome]:
        """Outcomes of the units of one decoded clip, uint8 [T, S, S, 3]."""

    @abstractmethod
    def _read_clips(self, folder: Path) -> Sequence[Any]:
        """The clips of a folder's manifest, each with a `path`."""

    @abstractmethod
    def _load(self) -> tuple[Any, Any]:
        """Host and processor."""

    @cached_property
    def _clips(self) -> dict[str, Any]:
        folder = self.packaged_videos if self.videos == "packaged" else Path(self.videos)
        return {clip.path.stem: clip for clip in self._read_clips(folder)}

    def _file(self, clip: Any) -> Path:
        """The clip's file, which is there."""
        path: Path = clip.path
        return path

    def _identity(self) -> dict[str, str]:
        return {"host": digest(self._folder)}

    @property
    def _folder(self) -> Path:
        return host_folder(self.model, self._packaged)

    @property
    def _packaged(self) -> Path:
        """Folder of the packaged host that the model's settings name.

        Raises:
            ConfigError: it is another task's.
        """
        return packaged_host(self.name, self.model, self.packaged_hosts)

    @cached_property
    def _host(self) -> tuple[Any, Any]:
        model, processor = self._load()
        return model.to(self.model["device"]), processor


@dataclass(frozen=True)
class ShapesQA(_ClipTask):
    """Multiple-choice questions about moving shapes; a unit is a question, its cluster the clip.

    Of a video that has more than `frames`, so many are shown, evenly spaced.
    The video is read once: every question is asked of a fork of the memory that it left.
    """

    questions: int
    frames: int = 64
    metric: str = "accuracy"
    baselines: tuple[str, ...] = ()

    packaged_hosts: ClassVar[Mapping[str, Path]] = llm_host.PACKAGED_HOSTS
    packaged_videos: ClassVar[Path] = qa_clips.PACKAGED_VIDEOS

    def __post_init__(self) -> None:
        questions = min(len(clip.questions) for clip in self._clips.values())
        check_settings(self, self._packaged, clips=len(self._clips), questions=questions, frames=MOST_FRAMES)

    def units(self, seed: int) -> list[Unit]:
        """`questions` of each of the first `clips` clips."""
        return [Unit(f"{clip}/{q}", clip) for clip in list(self._clips)[: self.clips] for q in range(self.questions)]

    def watch(self, path: Path) -> DecodedVideo:
        video = decode(path, at_most=self.frames)
        return replace(video, frames=fit(video.frames, SIDE))

    def _outcomes(self, clip: QAClip, frames: np.ndarray, units: Sequence[Unit], policy: Policy) -> Iterator[Outcome]:
        questions = _families_in_turn(clip.questions)
        asked = [questions[int(unit.id.rsplit("/", 1)[1])] for unit in units]
        for unit, question, (reply, memory) in zip(units, asked, self.ask(frames, asked, policy), strict=True):
            right = parse_answer(reply, question.options) == question.answer
            detail = {"family": question.family, "reply": reply, "expected": question.letter}
            yield Outcome(unit, score=float(right), detail=detail, **measured(memory.stats(), policy))

    def ask(self, frames: np.ndarray, questions: Sequence[Question], policy: Any) -> Iterator[tuple[str, MemoryCache]]:
        """Reply to each question about a video uint8 [T, S, S, 3], and the memory that gave it."""
        model, processor = self._host
        with torch.inference_mode(), adapt(model, policy, self.model["update_interval"]) as host:
            yield from ask(model, processor, frames, questions, host.new_cache(), MemoryCache.fork, host)

    def retained(self, frames: np.ndarray, policy: Policy) -> np.ndarray:
        """Visual tokens that each layer and head holds once it has read a video: bool [L, K, T, h, w]."""
        model, processor = self._host
        inputs = processor(frames, VIDEO_PLACEHOLDER).to(model.device)
        visual = (inputs["input_ids"][0] == model.config.video_token_id).nonzero()[:, 0]
        with torch.inference_mode(), adapt(model, policy, self.model["update_interval"]) as host:
            host(**inputs, logits_to_keep=1)
            memory = host.cache
        if policy.evicts and not memory.stats().updates:
            raise ConfigError(
                f"policy {policy.name!r} took no decision: the video has {len(visual)} tokens, model.update_interval "
                f"is {self.model['update_interval']}; choose a smaller interval, or a longer video"
            )
        side = math.isqrt(len(visual) // len(frames))
        held = [
            [
                positions[valid]
                for positions, valid in zip(layer.tokens["positions"][0], layer.tokens.valid()[0], strict=True)
            ]
            for layer in memory.layers
        ]
        return _grid(held, int(visual[0]), (len(frames), side, side))

    def _read_clips(self, folder: Path) -> list[QAClip]:
        return qa_clips.packaged_clips(folder)

    def _load(self) -> tuple[Any, Any]:
        return llm_host.load_host(self._folder)

    def _identity(self) -> dict[str, str]:
        return llm_host.identity(self._folder)


@dataclass(frozen=True)
class Motion(_ClipTask):
    """The motion that a clip shows; a unit is a clip."""

    metric: str = "accuracy"
    baselines: tuple[str, ...] = ()

    packaged_hosts: ClassVar[Mapping[str, Path]] = encoder_host.PACKAGED_HOSTS
    packaged_videos: ClassVar[Path] = motion_clips.PACKAGED_VIDEOS

    def __post_init__(self) -> None:
        check_settings(self, self._packaged, clips=len(self._clips))

    def units(self, seed: int) -> list[Unit]:
        """The first `clips` clips."""
        return [Unit(clip, clip) for clip in list(self._clips)[: self.clips]]

    def watch(self, path: Path) -> DecodedVideo:
        _, processor = self._host
        video = decode(path, at_most=processor.frames)
        if len(video.frames) < processor.frames:
            raise VideoError(f"{path}: {len(video.frames)} frames; expected at least {processor.frames}")
        return replace(video, frames=fit(video.frames, processor.side))

    def _outcomes(
        self, clip: LabelledClip, frames: np.ndarray, units: Sequence[Unit], policy: Policy
    ) -> Iterator[Outcome]:
        model, processor = self._host
        with torch.inference_mode(), self._adapted(model, policy) as host:
            inputs = {key: value.to(model.device) for key, value in processor(frames).items()}
            label = int(host(**inputs).logits.argmax(-1))
            stats = host.stats()
        detail = {"reply": model.config.id2label[label], "expected": clip.motion}
        for unit in units:
            yield Outcome(unit, score=float(label == clip.label), detail=detail, **measured(stats, policy))

    def retained(self, frames: np.ndarray, policy: Policy) -> np.ndarray:
        """Patches that each layer and head holds after its last decision: bool [L, K, U, h, w]."""
        model, processor = self._host
        inputs = {key: value.to(model.device) for key, value in processor(frames).items()}
        with torch.inference_mode(), self._adapted(model, policy) as host:
            host(**inputs)
            held = [layer[0] for layer in host.memory.retained()]
        return _grid(held, special_tokens(model), encoder_host.token_grid(model))

    def _adapted(self, model: Any, policy: Policy) -> Any:
        return adapt(model, policy, self.model["update_interval"], carried=self.model.get("carried", False))

    def _read_clips(self, folder: Path) -> list[LabelledClip]:
        return motion_clips.packaged_clips(folder)

    def _load(self) -> tuple[Any, Any]:
        return encoder_host.load_host(self._folder)


def _families_in_turn(questions: Sequence[Question]) -> list[Question]:
    """One question of each family, then the second of each, and so on: any number of them is balanced."""
    met: Counter[str] = Counter()
    turns = []
    for question in questions:
        turns.append(met[question.family])
        met[question.family] += 1
    return [question for _, question in sorted(zip(turns, questions, strict=True), key=lambda pair: pair[0])]


def _numbered(clips: Sequence[Any], number: int) -> Any:
    if not 0 <= number < len(clips):
        raise ConfigError(
            f"clip is {number}; expected 0 to {len(clips) - 1}, the packaged clips, or the path of a file"
        )
    return clips[number]


def _grid(held: Sequence[Sequence[torch.Tensor]], first: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Token numbers by [layer][head] to bool [L, K, U, h, w]; `first` is the number of the first patch."""
    size, (_, height, width) = math.prod(shape), shape
    grid = np.zeros((len(held), len(held[0]), size), dtype=bool)
    for layer, heads in enumerate(held):
        for head, numbers in enumerate(heads):
            patches = numbers.cpu().numpy() - first
            grid[layer, head, patches[(patches >= 0) & (patches < size)]] = True
    return rearrange(grid, "l k (u h w) -> l k u h w", h=height, w=width)
