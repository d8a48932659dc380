"""The packaged motion clips: held-out mp4 files with their labels, listed in a manifest."""

import json
from pathlib import Path

from namm_transfer.errors import DataError
from namm_transfer.eval.video_classification.clips import MOTIONS, PACKAGED_SEEDS, make_clip
from namm_transfer.eval.video_classification.evaluate import LabelledClip, write_clips

PACKAGED_VIDEOS = Path(__file__).resolve().parent.parent / "assets" / "videos" / "motion"
CLIPS = 24
SEEDS = range(PACKAGED_SEEDS, PACKAGED_SEEDS + CLIPS)


def packaged_clips(folder: Path = PACKAGED_VIDEOS) -> list[LabelledClip]:
    """The clips of a manifest, in its order; the files themselves are not opened.

    Raises:
        DataError: no manifest in the folder, one that cannot be read, or an unknown motion in it.
    """
    manifest = folder / "manifest.json"
    try:
        entries = json.loads(manifest.read_text())["clips"]
        clips = [LabelledClip(folder / entry["file"], entry["seed"], entry["motion"]) for entry in entries]
    except FileNotFoundError as error:
        raise DataError(f"no manifest of packaged clips at {manifest}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is not a manifest of motion clips: {error!r}") from error
    for clip in clips:
        if clip.motion not in MOTIONS:
            raise DataError(f"{manifest}: expected a motion of {MOTIONS}, got {clip.motion!r} for {clip.path.name}")
    return clips


def write_packaged(folder: Path = PACKAGED_VIDEOS, seeds: range = SEEDS) -> None:
    """Render the clips of the seeds and write the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for clip in write_clips(folder, seeds):
        truth = make_clip(clip.seed)
        entries.append(
            {
                "file": clip.path.name,
                "seed": clip.seed,
                "motion": clip.motion,
                "colour": truth.colour,
                "shape": truth.shape,
            }
        )
    (folder / "manifest.json").write_text(json.dumps({"clips": entries}, indent=1) + "\n")
