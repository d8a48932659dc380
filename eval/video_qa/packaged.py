"""The packaged question-answering clips: held-out mp4 files with their questions, listed in a manifest."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from namm_transfer.errors import DataError
from namm_transfer.eval.video_qa.clips import PACKAGED_SEEDS, make_clip
from namm_transfer.eval.video_qa.evaluate import QAClip, write_clips
from namm_transfer.eval.video_qa.questions import Question

PACKAGED_VIDEOS = Path(__file__).resolve().parent.parent / "assets" / "videos" / "qa"
CLIPS = 16
SEEDS = range(PACKAGED_SEEDS, PACKAGED_SEEDS + CLIPS)
QUESTIONS_PER_FAMILY = 2


def packaged_clips(folder: Path = PACKAGED_VIDEOS) -> list[QAClip]:
    """The clips of a manifest, in its order; the files themselves are not opened.

    Raises:
        DataError: no manifest in the folder, or one that cannot be read.
    """
    manifest = folder / "manifest.json"
    try:
        entries = json.loads(manifest.read_text())["clips"]
        clips = [
            QAClip(
                path=folder / entry["file"],
                seed=entry["seed"],
                questions=tuple(
                    Question(q["family"], q["text"], tuple(q["options"]), q["answer"]) for q in entry["questions"]
                ),
            )
            for entry in entries
        ]
        if bad := [q for clip in clips for q in clip.questions if q.answer not in range(len(q.options))]:
            raise KeyError(f"answer {bad[0].answer!r} of the {len(bad[0].options)} options of {bad[0].text!r}")
        if not clips or len({clip.path.stem for clip in clips}) < len(clips):
            raise KeyError("no clips, or two of one name")
        return clips
    except FileNotFoundError as error:
        raise DataError(f"no manifest of packaged clips at {manifest}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is not a manifest of question-answering clips: {error!r}") from error


def question_entries(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Questions as a manifest holds them."""
    return [{"family": q.family, "text": q.text, "options": list(q.options), "answer": q.answer} for q in questions]


def write_packaged(folder: Path = PACKAGED_VIDEOS, seeds: range = SEEDS) -> None:
    """Render the clips of the seeds and write the manifest: questions and ground truth of each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for clip in write_clips(folder, seeds, QUESTIONS_PER_FAMILY):
        events = [
            {"colour": e.colour, "shape": e.shape, "direction": e.direction, "start": e.start, "end": e.end}
            for e in make_clip(clip.seed).events
        ]
        questions = question_entries(clip.questions)
        entries.append({"file": clip.path.name, "seed": clip.seed, "events": events, "questions": questions})
    (folder / "manifest.json").write_text(json.dumps({"clips": entries}, indent=1) + "\n")
