"""The model `namm` of lmms-eval: any video LLM that `adapt` serves, under a policy, on every generative task.

lmms-eval finds it by the entry point `lmms_eval.models` (see `lmms_command`); its settings are `model_args`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from rich.progress import track

from namm_transfer.adapters import adapt
from namm_transfer.errors import ConfigError, DataError, VideoError
from namm_transfer.eval.executor import check_device
from namm_transfer.eval.provenance import versions
from namm_transfer.eval.results import OK, UNDECODABLE
from namm_transfer.eval.video_qa.chat import Frames, Message, load_video_llm
from namm_transfer.eval.video_qa.lmms_command import FINGERPRINT
from namm_transfer.eval.workers import build_policy
from namm_transfer.files import append_json
from namm_transfer.layer import check_interval
from namm_transfer.policies import NAMMPolicy
from namm_transfer.stats import MemoryStats

__all__ = ["NAMMVideoLLM"]

NOTHING = " "
"""The reply of a sample without one: blank, so that lmms-eval does not cache it (and may strip it). lmms-eval's own
mark of a failed request begins with "[LMMS_EVAL", where suites that look for a letter read an A."""
WORDLESS = "."
"""The reply of a model that ends at once: not blank, and no letter."""


class NAMMVideoLLM(lmms):  # type: ignore[misc]
    """A video LLM under a policy, one sample at a time.

    Args:
        pretrained: "packaged", a folder, or a Hub id.
        policy: a policy's name; its options (`budget`, `eviction`, `seed`, ...) are further arguments.
        update_interval: tokens between two decisions, a multiple of 16.
        num_frames, fps: which frames of a video are looked at; 32 evenly spaced ones by default ("all": every one).
        dtype: "auto", "float32", "bfloat16" or "float16".
        namm: the NAMM of policy "namm": packaged, a folder, or a Hub id.
        fingerprint: the NAMM's; required, since lmms-eval's results and cache keys hold these arguments and nothing
            else of the model. `namm-transfer lmms-eval` adds it.
        text_only: let tasks without images or videos be answered.
        log: JSON lines, one a sample: prompt, times of the frames, reply, tokens seen and kept, bytes.

    Raises:
        ConfigError: an argument is unknown or out of range, or the fingerprint is missing or another NAMM's.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "packaged",
        policy: str = "full",
        update_interval: int = 512,
        num_frames: int | str | None = None,
        fps: float | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        fingerprint: str | None = None,
        text_only: bool = False,
        log: str | None = None,
        **options: Any,
    ) -> None:
        if str(batch_size) != "1":
            raise ConfigError(f"batch_size is {batch_size}; the model `namm` answers one sample at a time")
        if policy == NAMMPolicy.name:
            options.setdefault("namm", "default")
        self.policy = build_policy({"name": policy, **options})
        _check_fingerprint(self.policy.describe().get("namm"), fingerprint)
        self.update_interval, self.frames = check_interval(update_interval), Frames(num_frames, fps)
        self.text_only, self.log = text_only, Path(log) if log else None
        self._device = torch.device(_device(device))
        check_device(self._device)
        self._model, self.reader = load_video_llm(pretrained, dtype)
        self._model.to(self._device)  # type: ignore[arg-type]
        self.description = {
            "pretrained": pretrained,
            "policy": self.policy.describe(),
            "update_interval": self.update_interval,
            "num_frames": self.frames.num_frames,
            "fps": self.frames.fps,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }
        self.model_name = str(self.description)  # names the folder of lmms-eval's older cache
        super().__init__()
        self._decode = lru_cache(maxsize=1)(self.frames)  # questions about one video follow one another
        logger.info(f"namm: {self.description}")
        if self.log:
            found = versions() | {"lmms-eval": metadata.version("lmms-eval")}
            append_json(self.log, {"model": self.description, "versions": found})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Replies, in order; that of a sample whose video cannot be decoded is `NOTHING`, and counted.

        Raises:
            ConfigError: the policy evicts, but no sample was long enough for a decision.
        """
        replies, seen, decided = [], [], False
        with torch.inference_mode(), adapt(self._model, self.policy, self.update_interval) as host:
            for request in track(requests, "namm", disable=self.rank != 0):
                text, stats = self._answer(host, request)
                counts = TokenCounts(input_tokens=stats.seen[0]) if stats else None
                replies.append(GenerationResult(text, counts))
                seen += stats.seen if stats else []
                decided = decided or bool(stats and stats.updates)
        if self.policy.evicts and seen and not decided:
            raise ConfigError(
                f"policy {self.policy.name!r} took no decision in any of {len(seen)} samples: update_interval is "
                f"{self.update_interval}, the samples have {min(seen)} to {max(seen)} tokens; choose a smaller one"
            )
        return replies

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise DataError("the model `namm` answers in words; choose a generative variant of the task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise DataError("the model `namm` answers single questions; choose a task with one round")

    def _answer(self, host: Any, request: Instance) -> tuple[str, MemoryStats | None]:
        _, doc_to_messages, settings, doc, task, split = request.args
        _count_undecodable(doc_to_messages)
        messages = doc_to_messages(self.task_dict[task][split][doc])
        row = {"task": task, "doc": doc, "videos": [Path(str(url)).name for url in _urls(messages, "video")]}
        started = time.perf_counter()
        try:
            videos = [self._decode(url) for url in _urls(messages, "video")]
            if not (videos or _urls(messages, "image") or self.text_only):
                raise VideoError("there is neither a video nor an image (text_only=True lets such tasks be answered)")
        except VideoError as error:
            logger.warning(f"{task}, sample {doc} is not answered: {error}")
            self._write(row | {"status": UNDECODABLE, "error": str(error)})
            return NOTHING, None
        encoded = self.reader.encode(messages, videos)
        inputs = {key: self._placed(value) for key, value in encoded.inputs.items()}
        tokens = host.generate(**inputs, **_generation(settings))
        reply = _until(self.reader.text(tokens[0, inputs["input_ids"].shape[1] :]), settings.get("until"))
        stats: MemoryStats = host.stats()
        self._write(
            row
            | {"status": OK, "frames": [[round(float(t), 3) for t in video.timestamps] for video in videos]}
            | {"prompt": encoded.prompt, "reply": reply, "tokens_seen": stats.seen[0]}
            | {"kept_fraction": stats.kept_fraction, "kept_at_updates": stats.kept_at_updates, "bytes": stats.bytes}
            | {"seconds": round(time.perf_counter() - started, 3)}
        )
        return reply or WORDLESS, stats

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._device, self._model.dtype if value.is_floating_point() else None)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.log:
            append_json(self.log, row)


def _check_fingerprint(namm: str | None, given: str | None) -> None:
    if namm is None and given is None:
        return
    if namm is None:
        raise ConfigError(f"fingerprint is {given}, but the policy has no NAMM")
    found = FINGERPRINT.format(namm)
    if given is None:
        raise ConfigError(
            f"policy=namm needs fingerprint={found} in model_args, so that no cached reply of another NAMM is taken "
            "for one of this; `namm-transfer lmms-eval` adds it"
        )
    if given != found:
        raise ConfigError(f"fingerprint is {given}, but that of this NAMM is {found}")


def _device(given: str | None) -> str:
    """The device that is asked for, by default the best; of several GPUs, the one of this process."""
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _urls(messages: Sequence[Message], kind: str) -> list[Any]:
    return [part["url"] for message in messages for part in message["content"] if part["type"] == kind]


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's `generation_kwargs` mean to `generate`: greedy unless a temperature is given."""
    temperature = settings.get("temperature") or 0
    chosen: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": settings.get("max_new_tokens", 128)}
    if temperature > 0:
        chosen |= {"temperature": temperature, "top_p": settings.get("top_p") or 1.0}
    if (settings.get("num_beams") or 1) > 1:
        chosen["num_beams"] = settings["num_beams"]
    return chosen


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop, stripped."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _count_undecodable(doc_to_messages: Any) -> None:
    """Let a task leave samples without a reply out of its scores, and count them beside these.

    lmms-eval knows no failed sample: every reply is scored, and some suites guess where they find no answer.
    """
    task: Any = getattr(doc_to_messages, "__self__", None)
    if not isinstance(getattr(task, "_aggregation_list", None), dict):
        raise DataError(f"cannot count undecodable samples of {task!r}: expected a task of lmms-eval 0.7")
    if UNDECODABLE in task._aggregation_list:
        return
    score = task.process_results

    def process_results(doc: Any, results: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        replies = [text for reply in results for text in (reply if isinstance(reply, list) else [reply])]
        if not all(text.strip() for text in replies):
            return {UNDECODABLE: 1}
        return {**score(doc, results, *args, **kwargs), UNDECODABLE: 0}

    task.process_results = process_results
    task._aggregation_list[UNDECODABLE] = sum
    task._higher_is_better[UNDECODABLE] = False
