"""Multiple-choice questions about generated clips, and the packaged video LLM that answers them."""

from namm_transfer.eval.video_qa.evaluate import QAClip
from namm_transfer.eval.video_qa.host import VideoQAProcessor, load_host
from namm_transfer.eval.video_qa.packaged import packaged_clips
from namm_transfer.eval.video_qa.questions import Question, parse_answer

__all__ = ["QAClip", "Question", "VideoQAProcessor", "load_host", "packaged_clips", "parse_answer"]
