"""Write clips that no host was trained on, with their manifest, as many as wanted.

python -P -m namm_transfer.eval.video_clips --of video_qa --out clips --clips 200
namm-transfer study task=video_qa/shapes task.videos=clips task.clips=200

python -P -m namm_transfer.eval.video_clips --of video_qa_suite --out long --clips 200 --frames 1024 --redundancy 0.9
namm-transfer study task=video_qa/suite task.videos=long task.clips=200 task.frames=1024 task.redundancy=0.9
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from namm_transfer.cli import plain_errors
from namm_transfer.errors import ConfigError
from namm_transfer.eval.video_classification import clips as motion_clips
from namm_transfer.eval.video_classification import packaged as motion
from namm_transfer.eval.video_qa import clips as qa_clips
from namm_transfer.eval.video_qa import packaged as qa
from namm_transfer.eval.video_qa.suite import files as suite_files


class Suite(StrEnum):
    """Which task the clips are for."""

    video_qa = "video_qa"
    video_qa_suite = "video_qa_suite"
    video_classification = "video_classification"


def main(
    of: Annotated[Suite, typer.Option(help="The task that they are for.")],
    out: Annotated[Path, typer.Option(help="Folder of the clips.")],
    clips: Annotated[int, typer.Option(help="How many.", min=1)] = 200,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip; the suite only.", show_default=False)] = None,
    redundancy: Annotated[
        float | None, typer.Option(help="Fraction of the frames that tell nothing; the suite only.", show_default=False)
    ] = None,
) -> None:
    """Write held-out clips, other ones than those packaged."""
    if of is Suite.video_qa_suite:
        if frames is None or redundancy is None:
            raise ConfigError("the suite's clips need --frames and --redundancy")
        suite_files.write_clips(out, suite_files.HELD_OUT[:clips], frames, redundancy)
        return
    if frames is not None or redundancy is not None:
        raise ConfigError(f"{of.value} has clips of one kind: --frames and --redundancy are the suite's")
    suite, first = {
        Suite.video_qa: (qa, qa_clips.HELD_OUT_SEEDS),
        Suite.video_classification: (motion, motion_clips.HELD_OUT_SEEDS),
    }[of]
    suite.write_packaged(out, range(first, first + clips))


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
