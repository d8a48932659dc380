"""The suite as a task: clips that are drawn when they are asked for, or read from a folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from namm_transfer.errors import ConfigError
from namm_transfer.eval.task import check_settings
from namm_transfer.eval.video_qa.batches import UNASKED
from namm_transfer.eval.video_qa.evaluate import QAClip
from namm_transfer.eval.video_qa.host import TOKENS_PER_FRAME
from namm_transfer.eval.video_qa.questions import Question
from namm_transfer.eval.video_qa.suite.clips import SuiteClip, make_clip
from namm_transfer.eval.video_qa.suite.files import HELD_OUT, file_of, read_clips, truth, write_clip
from namm_transfer.eval.video_qa.suite.questions import FAMILIES, PER_FAMILY
from namm_transfer.eval.video_tasks import ShapesQA

__all__ = ["SuiteQA"]

DRAWN = "drawn"
"""What `videos` is where the clips are drawn: each is written to a temporary folder when it is first looked at."""


@dataclass(frozen=True)
class SuiteQA(ShapesQA):
    """Eight families of questions about long, redundant clips; a unit is a question, its cluster the clip."""

    redundancy: float = 0.5
    families: Sequence[str] = FAMILIES

    def __post_init__(self) -> None:
        if isinstance(self.families, str) or not self.families or not set(self.families) <= set(FAMILIES):
            raise ConfigError(f"{self.name}: families is {self.families!r}; expected some of {', '.join(FAMILIES)}")
        self._make(HELD_OUT.start)  # refuses settings out of range
        clips = len(HELD_OUT) if self.videos == DRAWN else len(self._clips)
        check_settings(self, self._packaged, clips=clips, questions=PER_FAMILY * len(set(self.families)))

    def _load(self) -> tuple[Any, Any]:
        """Also warns of what the host cannot read, which counts all the same."""
        model, processor = super()._load()
        for trouble in self._troubles(model, processor):
            warnings.warn(f"{self.name}: {trouble}", stacklevel=2)
        return model, processor

    def _troubles(self, model: Any, processor: Any) -> Iterator[str]:
        asked = [question for clip in self._clips.values() for question in clip.questions]
        alike = sum(_alike(processor.tokenizer, question) for question in asked)
        if alike:
            yield (
                f"of {len(asked)} questions {alike} have options that read alike to the host: it does not know their "
                "words"
            )
        positions = model.config.get_text_config().max_position_embeddings
        tokens = self.frames * TOKENS_PER_FRAME
        if tokens > positions:
            yield f"{self.frames} frames are {tokens} tokens, but the host was made for {positions}"
        taught = _taught(self._folder)
        if taught and self.frames not in taught:
            yield (
                f"clips of {self.frames} frames, but the host was trained on clips of "
                f"{', '.join(map(str, sorted(taught)))}: what it answers tells little"
            )

    def inputs(self) -> dict[str, str]:
        """Digests of the host and of the clips: where they are drawn, of all that is true of them."""
        if self.videos != DRAWN:
            return super().inputs()
        truths = json.dumps([truth(self._make(clip.seed)) for clip in self._clips.values()])
        return {**self._identity(), "clips": sha256(truths.encode()).hexdigest()[:16]}

    def _file(self, clip: QAClip) -> Path:
        if self.videos == DRAWN and not clip.path.is_file():
            write_clip(self._make(clip.seed), clip.path)
        return clip.path

    def _make(self, seed: int) -> SuiteClip:
        return make_clip(seed, self.frames, self.redundancy)

    @cached_property
    def _clips(self) -> dict[str, QAClip]:
        if self.videos == DRAWN:
            folder = Path(self._drawn.name)
            clips = [file_of(self._make(seed), folder) for seed in HELD_OUT[: self.clips]]
        else:
            clips = read_clips(Path(self.videos), self.frames, self.redundancy)
        return {clip.path.stem: self._asked(clip) for clip in clips}

    def _asked(self, clip: QAClip) -> QAClip:
        """The clip with the questions of the chosen families only."""
        chosen: list[Question] = [question for question in clip.questions if question.family in self.families]
        return QAClip(clip.path, clip.seed, tuple(chosen))

    @cached_property
    def _drawn(self) -> TemporaryDirectory[str]:
        """Goes with the task."""
        return TemporaryDirectory(prefix="namm-transfer-")


def _taught(folder: Path) -> set[int]:
    """Of how many frames the clips were that a host was asked about in training, where its folder tells."""
    try:
        stages = json.loads((folder / "training.json").read_text())["config"]["stages"]
        return {stage["frames"] for stage in stages if stage["name"] not in UNASKED}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _alike(tokenizer: Any, question: Question) -> bool:
    """Whether any two options of a question are the same tokens."""
    read = tokenizer(list(question.options), add_special_tokens=False)["input_ids"]
    return len({tuple(ids) for ids in read}) < len(question.options)
