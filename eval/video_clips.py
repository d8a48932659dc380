"""Write clips that no host was trained on, with their manifest, as many as wanted.

python -P -m namm_transfer.eval.video_clips --of video_qa --out clips --clips 200
namm-transfer study task=video_qa/shapes task.videos=clips task.clips=200
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from namm_transfer.eval.video_classification import clips as motion_clips
from namm_transfer.eval.video_classification import packaged as motion
from namm_transfer.eval.video_qa import clips as qa_clips
from namm_transfer.eval.video_qa import packaged as qa


class Suite(StrEnum):
    """Which task the clips are for."""

    video_qa = "video_qa"
    video_classification = "video_classification"


def main(
    of: Annotated[Suite, typer.Option(help="The task that they are for.")],
    out: Annotated[Path, typer.Option(help="Folder of the clips.")],
    clips: Annotated[int, typer.Option(help="How many.", min=1)] = 200,
) -> None:
    """Write held-out clips, other ones than those packaged."""
    suite, first = {
        Suite.video_qa: (qa, qa_clips.HELD_OUT_SEEDS),
        Suite.video_classification: (motion, motion_clips.HELD_OUT_SEEDS),
    }[of]
    suite.write_packaged(out, range(first, first + clips))


if __name__ == "__main__":
    typer.run(main)
