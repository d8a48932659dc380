"""The suite's clips as mp4 files, with their questions and their truth in a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.video import write_mp4
from namm_transfer.eval.video_qa.evaluate import QAClip
from namm_transfer.eval.video_qa.packaged import packaged_clips, question_entries
from namm_transfer.eval.video_qa.suite.clips import FPS, HELD_OUT_SEEDS, TRAIN_SEEDS, SuiteClip, make_clip
from namm_transfer.eval.video_qa.suite.drawing import render
from namm_transfer.eval.video_qa.suite.questions import questions_of
from namm_transfer.files import write_atomically

__all__ = ["HELD_OUT", "file_of", "read_clips", "truth", "write_clip", "write_clips"]

HELD_OUT = range(HELD_OUT_SEEDS, TRAIN_SEEDS)
"""Seeds of clips that may be evaluated on."""


def file_of(clip: SuiteClip, folder: Path) -> QAClip:
    """A clip's place in a folder, and its questions; nothing is written."""
    return QAClip(folder / f"{clip.seed}.mp4", clip.seed, questions_of(clip))


def write_clip(clip: SuiteClip, path: Path) -> None:
    """Render a clip into an mp4."""
    write_mp4(path, render(clip), FPS)


def truth(clip: SuiteClip) -> dict[str, Any]:
    """All that is true of a clip, and what is asked about it, as plain values."""
    return {**asdict(clip), "questions": question_entries(questions_of(clip))}


def write_clips(folder: Path, seeds: Iterable[int], frames: int, redundancy: float) -> None:
    """Render the clips of held-out seeds, and write the manifest.

    Raises:
        ConfigError: a seed is outside of the held-out block, or a setting is out of range.
    """
    chosen = list(seeds)
    if outside := [seed for seed in chosen if seed not in HELD_OUT]:
        raise ConfigError(f"seeds {outside[:3]} are outside of the held-out block {HELD_OUT.start} to {HELD_OUT[-1]}")
    clips = [make_clip(seed, frames, redundancy) for seed in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for clip in track(clips, description="drawing clips"):
        file = file_of(clip, folder)
        write_clip(clip, file.path)
        entries.append({"file": file.path.name, **truth(clip)})
    write_atomically(folder / "manifest.json", json.dumps({"clips": entries}, indent=1) + "\n")


def read_clips(folder: Path, frames: int, redundancy: float) -> list[QAClip]:
    """The clips of a manifest, in its order; the files themselves are not opened.

    Raises:
        DataError: no manifest in the folder, or one that cannot be read.
        ConfigError: its clips were drawn with other settings.
    """
    clips = packaged_clips(folder)
    try:
        entries = json.loads((folder / "manifest.json").read_text())["clips"]
        drawn = {(entry["frames"], entry["redundancy"]) for entry in entries}
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'manifest.json'} is not a manifest of the suite's clips: {error!r}") from error
    if drawn != {(frames, float(redundancy))}:
        raise ConfigError(
            f"{folder} holds clips of (frames, redundancy) {sorted(drawn)}; asked for {frames, redundancy}"
        )
    return clips
