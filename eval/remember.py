"""Watch a video file of any length with a video LLM under a policy, batch by batch, and ask about it."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from namm_transfer.adapters import adapt
from namm_transfer.adapters.video_memory import VideoMemory
from namm_transfer.errors import ConfigError, VideoError
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.task import host_folder, packaged_host
from namm_transfer.eval.transfer import Interrupted
from namm_transfer.eval.video import fit, stream
from namm_transfer.eval.video_qa.clips import SIDE
from namm_transfer.eval.video_qa.host import PACKAGED_HOSTS, VideoQAProcessor, identity, load_host, pixel_values
from namm_transfer.eval.video_qa.questions import VIDEO_PLACEHOLDER
from namm_transfer.eval.workers import build_policy
from namm_transfer.policies import Policy

__all__ = ["remember"]


def remember(
    config: Mapping[str, Any],
    video: Path,
    questions: Sequence[str],
    console: Console,
    *,
    save: Path | None = None,
    resume: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Watch `video`, or what `resume` has not seen of it, then answer each question from the memory.

    Args:
        config: of the command `remember`.
        save: file of the memory, written every `save_every` seconds and at the end; by default `resume`, if given.
        overrides: those that made `config`, to tell how to go on.

    Returns:
        The answers.

    Raises:
        VideoError: the file cannot be decoded; what was seen before the fault is saved.
        ConfigError: settings out of range, or `resume` is the memory of another video or host.
        CheckpointError, DataError: a host on a language model cannot be read, or that model is gone.
        CacheError: `resume` is no memory of a video, or was made under another policy.
        Interrupted: on Ctrl-C.
    """
    use_executor(config["executor"])
    if isinstance(every := config["save_every"], bool) or not isinstance(every, int | float) or every <= 0:
        raise ConfigError(f"save_every is {every!r}; expected a positive number of seconds")
    count = config["max_new_tokens"]
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"max_new_tokens is {count!r}; expected an integer of at least 1")
    if asked := [question for question in questions if VIDEO_PLACEHOLDER in question]:
        raise ConfigError(f"a question is asked about the video, and has no {VIDEO_PLACEHOLDER}: got {asked[0]!r}")
    policy = build_policy(config["policy"])
    device, interval, save = config["model"]["device"], config["model"]["update_interval"], save or resume
    memory = _stored(resume, policy)
    frames = stream(video, fps=config["fps"], batch=config["batch"], start=memory.frames if memory else 0)
    folder = host_folder(config["model"], packaged_host("remember", config["model"], PACKAGED_HOSTS))
    source = {"video": video.name, "bytes": video.stat().st_size, "fps": config["fps"], **identity(folder)}
    if memory is not None and memory.about != source:
        raise ConfigError(f"{resume} is the memory of {memory.about}; asked to go on with {source}")
    saver = _Saver(save, config["save_every"], resumed=save is not None and save == resume)
    model, processor = load_host(folder)
    with frames, adapt(model.to(device), policy, interval) as host:
        start = None
        if memory is None:
            memory, start = VideoMemory(host.new_cache(), about=source), processor.around(VIDEO_PLACEHOLDER)[0]
        else:
            memory.cache.to(device)
            console.print(f"{memory.frames} of {frames.total} frames are in {resume} already")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the video passes token")  # said in the report
                host.remember(
                    frames, memory=memory, before=start, preprocess=_pixels, total=len(frames), after_batch=saver
                )
        except KeyboardInterrupt:
            asked = [word for question in questions for word in ("--question", question)]
            raise Interrupted(saver.advice([str(video), *overrides, *asked])) from None
        except VideoError:  # what was seen before the fault was seen right
            saver.write(memory)
            raise
        saver.write(memory)
        _report(memory, model.config.get_text_config().max_position_embeddings, console)
        return [
            _answer(host, processor, memory, question, count or processor.answer_tokens, console)
            for question in questions
        ]


class _Saver:
    """Saves a memory that grows, every few seconds; `resumed` tells that the file is there already."""

    def __init__(self, path: Path | None, seconds: float, *, resumed: bool) -> None:
        if path is not None:
            if path.is_dir():
                raise ConfigError(f"the memory is to be saved in {path}, which is a folder; expected a file")
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.seconds = path, seconds
        self.last, self.saved = time.monotonic(), resumed

    def __call__(self, memory: VideoMemory) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.write(memory)

    def write(self, memory: VideoMemory) -> None:
        if self.path is not None:
            memory.save(self.path)
            self.saved = True
        self.last = time.monotonic()

    def advice(self, command: Sequence[str]) -> str:
        """What to tell whoever interrupted this command."""
        if self.path is None:
            return "interrupted: nothing was saved (give --save FILE)"
        if not self.saved:
            return f"interrupted before {self.path} was first saved"
        again = shlex.join(["namm-transfer", "remember", *command, "--resume", str(self.path)])
        return f"interrupted: go on with: {again}"


def _stored(resume: Path | None, policy: Policy) -> VideoMemory | None:
    return None if resume is None else VideoMemory.load(resume, policy)


def _pixels(frames: Any) -> torch.Tensor:
    return pixel_values(fit(frames, SIDE))


def _report(memory: VideoMemory, positions: int, console: Console) -> None:
    stats, until = memory.stats(), memory.timestamp
    at = "" if until is None else f", up to {int(until) // 3600}:{int(until) // 60 % 60:02}:{until % 60:06.3f}"
    console.print(
        f"remembered {memory.frames} frames{at}: {stats.kept_fraction:.2%} of {stats.seen[0]} tokens, "
        f"{stats.bytes['total'] / 2**20:.2f} MiB"
    )
    cache = memory.cache
    if cache.policy.evicts and not stats.updates:
        console.print(f"[yellow]nothing was evicted: a decision is taken every {cache.update_interval} tokens[/]")
    if stats.seen[0] > positions:
        console.print(f"[yellow]beyond the {positions:,} positions that the host was trained on: trust no answer[/]")


def _answer(
    host: Any, processor: VideoQAProcessor, memory: VideoMemory, question: str, count: int, console: Console
) -> str:
    """Ask one question; the host knows few words, so those that it does not know are named."""
    tokenizer = processor.tokenizer
    cue = "" if question.rstrip().endswith("Answer:") else "\nAnswer:"
    read = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
    unknown = [question[start:end] for token, (start, end) in spans if token == tokenizer.unk_token_id]
    if unknown:
        words = ", ".join(map(repr, unknown))
        console.print(f"[yellow]the host does not know the words {words}[/]", highlight=False)
    behind = processor.around(f"{VIDEO_PLACEHOLDER}\n{question}{cue}")[1]
    ids = torch.tensor([behind], device=host.model.device)
    tokens = host.generate(input_ids=ids, memory=memory, max_new_tokens=count, do_sample=False)
    answer = processor.decode(tokens[0, ids.shape[1] :])
    console.print(f"{question.strip()}\n  -> {answer}", highlight=False, markup=False)
    return answer
