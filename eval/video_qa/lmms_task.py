"""A task folder of lmms-eval with rows and files as Video-MME has them, of our clips: a template for one's own videos.

Two tasks on the same rows: `namm_shapes` asks and scores as `video_qa/shapes` does; `namm_shapes_videomme` asks with
Video-MME's own prompt and scores both ways (the packaged host answers in words, Video-MME reads letters only).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from namm_transfer.eval.video_qa.evaluate import QAClip
from namm_transfer.eval.video_qa.host import CHAT_ANSWER_TOKENS
from namm_transfer.eval.video_qa.packaged import packaged_clips
from namm_transfer.eval.video_qa.questions import LETTERS, Question, parse_answer

__all__ = ["doc_to_text", "process_results", "rows", "write_task"]

_SHARED = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
cluster_key: videoID
doc_to_visual: !function utils.doc_to_visual
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
"""
_SHAPES = """
task: namm_shapes
doc_to_text: !function utils.doc_to_text
process_results: !function utils.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
_VIDEOMME = """
task: namm_shapes_videomme
doc_to_text: !function utils.videomme_doc_to_text
process_results: !function utils.process_results_both
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
  - metric: videomme_perception_score
    aggregation: !function utils.videomme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer with the option's letter from the given choices directly."
"""
_UTILS = '''\
"""What the tasks of this folder call."""

from pathlib import Path

from lmms_eval.tasks.videomme.utils import (  # noqa: F401
    videomme_aggregate_results,
    videomme_doc_to_text,
    videomme_process_results,
)

from namm_transfer.eval.video_qa.lmms_task import doc_to_text, process_results  # noqa: F401


def doc_to_visual(doc):
    return [str(Path(__file__).parent / "data" / f"{doc['videoID']}.mp4")]


def process_results_both(doc, results):
    return process_results(doc, results) | videomme_process_results(doc, results)
'''


def rows(clips: Sequence[QAClip]) -> list[dict[str, Any]]:
    """The questions as rows of Video-MME."""
    return [
        {
            "video_id": f"{number:03}",
            "duration": "short",
            "domain": "Knowledge",
            "sub_category": "Technology",
            "videoID": clip.path.stem,
            "question_id": f"{number:03}-{index}",
            "task_type": "Temporal Perception" if question.family == "order" else "Attribute Perception",
            "question": question.text,
            "options": [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)],
            "answer": question.letter,
        }
        for number, clip in enumerate(clips)
        for index, question in enumerate(clip.questions)
    ]


def write_task(folder: Path, clips: Sequence[QAClip] | None = None) -> None:
    """Write the tasks, their rows (`test.parquet`) and videos (`data/`) into a folder, for `--include_path`.

    Args:
        clips: ours, packaged, by default.
    """
    from pyarrow import Table
    from pyarrow.parquet import write_table

    clips = packaged_clips() if clips is None else clips
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for clip in clips:
        shutil.copyfile(clip.path, folder / "data" / clip.path.name)
    table = folder.resolve() / "test.parquet"
    write_table(Table.from_pylist(rows(clips)), table)
    (folder / "utils.py").write_text(_UTILS)
    shared = _SHARED.format(rows=table, tokens=CHAT_ANSWER_TOKENS)
    (folder / "namm_shapes.yaml").write_text(shared + _SHAPES)
    (folder / "namm_shapes_videomme.yaml").write_text(shared + _VIDEOMME)


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The packaged video LLM's own prompt, without the video that stands before it."""
    return _question(doc).suffix()


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """One deterministic parser; what it cannot read is wrong, nothing is guessed."""
    question = _question(doc)
    return {"accuracy": float(parse_answer(results[0], question.options) == question.answer)}


def _question(doc: Mapping[str, Any]) -> Question:
    options = tuple(option.split(". ", 1)[1] for option in doc["options"])
    return Question(doc["task_type"], doc["question"], options, LETTERS.index(doc["answer"]))
