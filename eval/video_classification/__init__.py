"""Motion classification of generated clips with the packaged video encoder."""

from namm_transfer.eval.video_classification.clips import MOTIONS
from namm_transfer.eval.video_classification.evaluate import LabelledClip
from namm_transfer.eval.video_classification.host import VideoEncoderProcessor, load_host
from namm_transfer.eval.video_classification.packaged import packaged_clips

__all__ = ["MOTIONS", "LabelledClip", "VideoEncoderProcessor", "load_host", "packaged_clips"]
