"""Video LLMs: the text decoder gets the memory; the vision tower keeps its own attention, or gets a policy too.

Shape letters: n frames of a batch, C channels, S sides of a frame in pixels, B questions, L tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from namm_transfer.adapters.causal_lm import CausalLMHost, by_name
from namm_transfer.adapters.video_encoder import attention_modules, special_tokens
from namm_transfer.adapters.video_grid import batch_positions, behind_video, go_on_at, has_grid
from namm_transfer.adapters.video_memory import VideoMemory, encode, find_layout, vision_inputs
from namm_transfer.adapters.video_steps import (
    FrameLayout,
    Marks,
    TimedMarks,
    check_steps,
    fixed_marks,
    read_frames,
    read_patches,
    settled_marks,
    steps_marks,
)
from namm_transfer.encoder import EncoderMemory
from namm_transfer.errors import CacheError, ConfigError
from namm_transfer.layer import check_interval
from namm_transfer.memory import MemoryCache
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats

__all__ = ["VideoLLMHost"]


class VideoLLMHost(CausalLMHost):
    """A language model with one or more vision towers.

    Args:
        vision: a policy for the towers: within each of their sequences (a frame, or a clip) later queries see less.
            None leaves the towers alone.
        vision_interval: queries between two decisions in a tower, a multiple of 16; None for ``update_interval``.
    """

    vision_memory: EncoderMemory | None = None
    """The towers' memory in the last call that had images or videos."""

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        update_interval: int = 512,
        *,
        vision: Policy | None = None,
        vision_interval: int | None = None,
    ) -> None:
        super().__init__(model, policy, update_interval)
        if vision is not None and not isinstance(vision, Policy):
            raise ConfigError(f"vision must be a policy, e.g. namm_transfer.policy('full'); got {vision!r}")
        if vision is None and vision_interval is not None:
            raise ConfigError("vision_interval has no effect without vision, a policy for the vision tower")
        self.vision = vision
        self.vision_interval = check_interval(update_interval if vision_interval is None else vision_interval)

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        misfit = CausalLMHost.misfit(model)
        if misfit is None and isinstance(model, PreTrainedModel) and not vision_towers(model):
            return f"a vision tower beside the text decoder; found none in {type(model).__name__}"
        return misfit

    def attach(self) -> None:
        towers = vision_towers(self.model) if self.vision is not None else []
        self._use_namm(self.model.get_decoder(), *towers)

    def _run(self, call: Any, inputs: dict[str, Any]) -> Any:
        shown = any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
        if self.vision is None or not shown:
            return super()._run(call, inputs)
        modules = {
            module: special_tokens(tower) for tower in vision_towers(self.model) for module in attention_modules(tower)
        }
        self.vision_memory = EncoderMemory(self.vision, self.vision_interval, modules)
        with self.vision_memory.listening():
            out = super()._run(call, inputs)
        self.vision_memory.check_used(vision_towers(self.model)[0])
        return out

    def vision_stats(self) -> MemoryStats:
        """What the vision tower's layers retained after their last decision.

        Raises:
            CacheError: no call with images or videos yet, or no policy for the tower.
        """
        if self.vision_memory is None:
            raise CacheError("no call with images or videos under a vision policy yet")
        return self.vision_memory.stats()

    # -- remembering a video as it comes -----------------------------------------------------------------------

    @torch.no_grad()
    def remember(
        self,
        batches: Iterable[Any],
        *,
        memory: VideoMemory | None = None,
        before: Sequence[int] | Tensor | None = None,
        marks: Sequence[Sequence[int]] | TimedMarks = ((), ()),
        preprocess: Callable[[Any], Any] | None = None,
        total: int | None = None,
        after_batch: Callable[[VideoMemory], None] | None = None,
    ) -> VideoMemory:
        """Watch a video of any length, batch by batch, evicting as it goes; neither frames nor features are kept.

        Ask the result with ``host.generate(**question, memory=memory)``, as often as wanted.

        Args:
            batches: the frames in order, from a file (``stream``), a camera, a list: pixel values [n, C, S, S] as the
                model takes them, or what ``preprocess`` makes into such; or pairs of those and their timestamps [n].
                Models that place tokens on a grid (the Qwen-VLs) take what their video processor returns for a
                batch: patches and ``video_grid_thw`` (and ``second_per_grid_ts``), the same size throughout.
            memory: go on with this memory, in place; by default a new one begins.
            before: token ids of the prompt in front of the video.
            marks: token ids that stand before and after each frame, as in the prompts of models of images; or, as in
                those of Qwen3-VL, a function that gives them by the time in seconds.
            preprocess: makes pixel values of the frames of one batch, as a model's video processor does.
            total: frames to come, if known: shows a progress bar.
            after_batch: called after each batch with the memory, e.g. to save it.

        Raises:
            UnsupportedModelError: the model's structure does not permit it; says why.
            ConfigError: a batch is of another shape than frames or than those before, or settings do not fit.
        """
        memory = VideoMemory(self.new_cache()) if memory is None else memory
        told = marks if callable(marks) else fixed_marks(marks)
        if before is not None:
            if memory.cache.get_seq_length():
                raise ConfigError("before belongs in front of the video; this memory has begun already")
            start = {"input_ids": self._ids(before, "before"), "past_key_values": memory.cache}
            self._run(self.model, start | self._one_logit)
            memory.position = memory.cache.get_seq_length()
        if memory.layout is not None:
            told = settled_marks(memory.layout, told)
        read = read_patches if has_grid(self.model) else read_frames
        with Progress(*Progress.get_default_columns(), disable=total is None, transient=True) as bar:
            task = bar.add_task("remembering", total=total)
            for batch in batches:
                if isinstance(batch, tuple) and len(batch) != 2:
                    raise ConfigError(f"a batch is frames, or a pair of them and their times; got {len(batch)} things")
                frames, times = batch if isinstance(batch, tuple) else (batch, ())
                steps = read(frames if preprocess is None else preprocess(frames))
                if not (number := len(steps.pixels)):
                    continue
                if memory.layout is None:
                    (first,) = steps_marks(told, times[:1], 1, 1)
                    memory.layout = find_layout(self.model, steps, first, settled=not callable(told))
                layout = memory.layout
                check_steps(layout, steps, memory.frames, len(times))
                self._watch(memory, layout, steps.pixels, steps_marks(told, times, layout.step, number))
                count = len(times) or number * layout.step
                memory.frames += count
                memory.timestamp = float(times[-1]) if len(times) else None
                bar.advance(task, count)
                if after_batch is not None:
                    after_batch(memory)
        return memory

    def __call__(self, *args: Any, memory: VideoMemory | None = None, **inputs: Any) -> Any:
        """The model's forward call, with the memory as its cache; with ``memory``, of what follows that video."""
        if memory is None:
            return super().__call__(*args, **inputs)
        return super().__call__(**self._recall(memory, by_name(self.model.forward, args, inputs)))

    def generate(self, *args: Any, memory: VideoMemory | None = None, **inputs: Any) -> Any:
        """The model's ``generate``, with the memory as its cache.

        With ``memory``, ``input_ids`` [B, L] are what follows the video in the prompt (and ``attention_mask`` [B, L] is
        0 where they are padded): B questions to a memory that stays as it is. Returned is what the model returns: the
        question's ids with the answer's behind them.
        """
        if memory is None:
            return super().generate(*args, **inputs)
        return super().generate(**self._recall(memory, by_name(self.model.generate, args, inputs)))

    def _watch(self, memory: VideoMemory, layout: FrameLayout, pixels: Tensor, marks: Sequence[Marks]) -> None:
        """Run one batch of steps [n, C, S, S] or [n, P, D] through tower, projector and decoder, into the memory."""
        token = getattr(self.model.config, f"{layout.kind}_token_id")
        parts = [i for before, after in marks for i in (*before, *[token] * layout.tokens, *after)]
        ids = self._ids(parts, "marks")
        self._warn_of_positions(memory.cache.get_seq_length(), ids.shape[1])
        inputs = {"input_ids": ids} | vision_inputs(self.model, layout, pixels) | self._one_logit
        if "token_type_ids" in self._takes:
            past = ids.new_zeros(1, memory.cache.get_seq_length())  # masks read types by position in the whole prompt
            inputs["token_type_ids"] = torch.cat([past, (ids == token).long()], dim=1)
        position = memory.position
        if layout.grid:
            inputs["position_ids"], position = batch_positions(self.model, layout, position, memory.frames, marks)
        call = partial(self._unclosed, layout) if layout.closing else self.model
        self._run(call, inputs | {"past_key_values": memory.cache})
        memory.position = position

    def _warn_of_positions(self, seen: int, count: int) -> None:
        """Positions go on counting whatever was evicted: a long video leaves the range that a model was trained on."""
        limit = getattr(self.model.get_decoder().config, "max_position_embeddings", None)
        if limit and seen <= limit < seen + count:
            warnings.warn(
                f"the video passes token {limit:,}, the max_position_embeddings of {type(self.model).__name__}: its "
                "memory stays bounded, but the model was not trained on positions beyond",
                stacklevel=5,  # the caller of remember
            )

    def _unclosed(self, layout: FrameLayout, **inputs: Any) -> Any:
        """The model's call without the tokens that it puts behind a video: more frames follow."""
        out = encode(self.model, layout, inputs.pop(layout.pixels)[0])
        out.pooler_output = out.pooler_output[:, : -layout.closing]
        return self.model(**inputs, mm_encoder_outputs={layout.kind: out})

    def _recall(self, memory: VideoMemory, inputs: dict[str, Any]) -> dict[str, Any]:
        """Let a call go on from a copy of the memory, one for each row.

        Raises:
            ConfigError: no input_ids of the question, a mask of another shape, or a cache beside the memory.
        """
        ids, mask = inputs.get("input_ids", inputs.get("inputs")), inputs.get("attention_mask")
        if not isinstance(memory, VideoMemory):
            raise ConfigError(f"memory must be what host.remember returned; got {type(memory).__name__}")
        if inputs.get("past_key_values") is not None:
            raise ConfigError("memory and past_key_values are two memories; pass one")
        for name in ("num_beams", "num_return_sequences"):
            number = inputs.get(name) or getattr(self.model.generation_config, name, None) or 1
            if number > 1:
                raise ConfigError(
                    f"{name} is {number}: a memory is asked for one answer a row; repeat the question's rows"
                )
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            raise ConfigError("memory needs input_ids [B, L], the ids of what follows the video in the prompt")
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise ConfigError(
                f"attention_mask is of shape {tuple(mask.shape)}; expected {tuple(ids.shape)}, the question's"
            )
        cache, layout = memory.cache.fork(len(ids)), memory.layout
        if layout is not None and layout.closing:
            self._close(cache, layout, len(ids))
        mask = torch.cat([mask.new_ones(len(ids), cache.get_seq_length()), mask], dim=1)
        inputs = inputs | {"past_key_values": cache, "attention_mask": mask}
        if layout is not None and layout.grid:
            begin = behind_video(self.model, layout, memory.position, memory.frames)
            inputs["position_ids"] = go_on_at(self.model, begin, mask, ids.shape[1])
        return inputs

    @torch.no_grad()
    def _close(self, cache: MemoryCache, layout: FrameLayout, rows: int) -> None:
        """Put the tokens behind the video that the model puts there; they are the same for any frames."""
        out = encode(self.model, layout, torch.zeros(1, *layout.frame))
        out.pooler_output = out.pooler_output[:, -layout.closing :].repeat(rows, 1, 1)
        token = getattr(self.model.config, f"{layout.kind}_token_id")
        ids = self._ids([token] * layout.closing, "closing").repeat(rows, 1)
        inputs = {"input_ids": ids, "past_key_values": cache, "mm_encoder_outputs": {layout.kind: out}}
        self._run(self.model, inputs | self._one_logit)

    @cached_property
    def _takes(self) -> set[str]:
        """Names of the inputs of the model's forward call."""
        return set(inspect.signature(self.model.forward).parameters)

    @property
    def _one_logit(self) -> dict[str, int]:
        """Nobody reads the logits of a video's tokens."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}

    def _ids(self, ids: Any, what: str) -> Tensor:
        """Token ids as [1, L] on the model's device."""
        try:
            found = torch.as_tensor(ids, device=self.model.device)
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        if found.is_floating_point() or found.ndim > 2 or not found.numel() or found.numel() != found.shape[-1]:
            raise ConfigError(f"{what} must be token ids [L] or [1, L]; got {ids!r}")
        return found.view(1, -1).long()


def vision_towers(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The outermost models inside ``model`` that attend bidirectionally to patches, apart from its text decoder."""
    decoder = set(model.get_decoder().modules())
    towers: list[PreTrainedModel] = []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module in decoder or not hasattr(module.config, "patch_size"):
            continue
        inside = any(module in set(tower.modules()) for tower in towers)
        if not inside and module._can_set_attn_implementation() and attention_modules(module):
            towers.append(module)
    return towers
