"""A harder video QA suite: eight families of questions about long, redundant clips."""

from namm_transfer.eval.video_qa.suite.clips import FRAMES, SuiteClip, make_clip
from namm_transfer.eval.video_qa.suite.questions import FAMILIES, questions_of

__all__ = ["FAMILIES", "FRAMES", "SuiteClip", "make_clip", "questions_of"]
