"""A model of lm-evaluation-harness whose memory a policy prunes: `namm-transfer lm-eval run --model namm ...`.

Tokenisation, chat templates, truncation, batching and decoding are those of the harness's own `hf` model. Attention is
ours, and every batch begins with an empty memory; a row of a batch gets what it gets alone.

Shape legend: B requests of a batch, T tokens, C tokens of the longest continuation, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from namm_transfer.adapters import CausalLMHost
from namm_transfer.errors import ConfigError, UnsupportedModelError
from namm_transfer.eval.language.readings import Readings
from namm_transfer.eval.workers import build_policy
from namm_transfer.evolution.hosts import PACKAGED_HOSTS, load_host
from namm_transfer.layer import check_interval
from namm_transfer.policies import Policy

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ImportError as error:
    raise ConfigError(
        f"lm-evaluation-harness is missing or another release ({error}): pip install 'namm-transfer[lm-eval]'"
    ) from error

__all__ = ["NAMMLM"]

logger = logging.getLogger("lm_eval.models.namm")  # the harness shows what its own loggers say

_OPTION = "policy_"
_MACHINE = ("batch_size", "max_batch_size", "device")
"""Arguments that are of no effect on a response."""
_CLAIM = "namm-transfer"
"""The key in a cache of responses that says under what memory they were given; the others are hashes."""

Encoded = tuple[Any, list[int], list[int]]
"""A request for a likelihood: what the harness calls it, the context's tokens, the continuation's."""


@register_model("namm")
class NAMMLM(HFLM):  # type: ignore[misc]
    """A causal language model under a policy.

    Args:
        pretrained: a packaged host (see `load_host`), a folder, or a Hub id.
        policy: its name; an option of it is given with the prefix `policy_`, as in `policy_seed=1`.
        budget: int, tokens; float, a fraction of the tokens seen.
        namm: packaged name, folder or Hub id of a NAMM; "default" where the policy is one.
        update_interval: tokens between two decisions, a multiple of 16.
        allow_idle: accept a task whose requests are all too short for a decision.
        dtype: of the weights; "auto" is bfloat16 for a packaged host.
        tokenizer: another one than the model's.
        options: those of the harness's `hf` model.

    Raises:
        ConfigError: an option is unknown or out of range.
        UnsupportedModelError: the model is not one that a memory can serve.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = "full",
        budget: float | None = None,
        namm: str | None = None,
        update_interval: int = 512,
        allow_idle: bool = False,
        dtype: str = "auto",
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        settings = {key.removeprefix(_OPTION): options.pop(key) for key in list(options) if key.startswith(_OPTION)}
        self.policy = _policy(policy, budget, namm, settings)
        self.update_interval = check_interval(update_interval)
        self.allow_idle = allow_idle
        self.readings: dict[str, Readings] = {}
        """By task; what a cache of responses answered is not in it."""
        self._current = Readings(self.policy)
        self._identity = {
            "pretrained": pretrained,
            "tokenizer": str(tokenizer or pretrained),
            "dtype": str(dtype),
            "policy": self.policy.describe(),
            "update_interval": self.update_interval,
            **{key: str(value) for key, value in options.items() if key not in _MACHINE},
        }
        if pretrained in PACKAGED_HOSTS:
            packaged = load_host(pretrained, _dtype(dtype))
            device = options.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
            model = packaged.model.to(device)  # type: ignore[arg-type]
            super().__init__(pretrained=model, tokenizer=tokenizer or packaged.tokenizer, **options)
            self.pretrained = pretrained
        else:
            super().__init__(pretrained=pretrained, dtype=dtype, tokenizer=tokenizer, **options)
        if misfit := CausalLMHost.misfit(self.model):
            raise UnsupportedModelError(f"the model 'namm' of the harness needs {misfit}")
        self.host = CausalLMHost(self.model, self.policy, self.update_interval)
        self.host.attach()

    # -- what the harness asks for: task by task, so that each has its own figures ------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the `config` of the results, beside the model's arguments; `memory` is of this process."""
        return {
            **super().get_model_info(),
            "policy": self.policy.describe(),
            "update_interval": self.update_interval,
            "memory": {task: readings.summary() for task, readings in self.readings.items()},
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the hook of a cache of responses.

        The harness keys responses by the request alone, so a cache serves one model under one policy.

        Raises:
            ConfigError: the cache holds the responses of another model, or of this one under another memory.
        """
        if (responses := cache_hook.dbdict) is not None:
            mine = json.dumps(self._identity, sort_keys=True, default=str)
            theirs = responses.get(_CLAIM)
            if theirs != mine and len(responses):
                raise ConfigError(
                    f"this cache of responses was filled by {theirs or 'another model'}, but this run is {mine}: "
                    "responses must not mix; give another path as use_cache"
                )
            responses[_CLAIM] = mine
        super().set_cache_hook(cache_hook)

    def _by_task(self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name or "", []).append(place)
        answers: list[Any] = [None] * len(requests)
        longest = {task: max(len(str(requests[place].args)) for place in mine) for task, mine in places.items()}
        for task in sorted(places, key=longest.__getitem__):  # where a policy may never decide is known first
            mine = places[task]
            self._current = self.readings.setdefault(task, Readings(self.policy))
            found = answer([requests[place] for place in mine], disable_tqdm=disable_tqdm)
            for place, one in zip(mine, found, strict=True):
                answers[place] = one
            self._refuse_idle(task)
        return answers

    # -- the memory ------------------------------------------------------------------------------------------

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        cache = self.host.new_cache()
        out: Tensor = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        self._current.add(cache.stats())
        return out

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of a whole batch; the harness tries with it how large a batch may be."""
        return self._logits(input_ids=inps, attention_mask=attn_mask)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """How likely each continuation is under what is left of its context, and whether it is the greedy one."""
        ordered = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), tuple(request[1] + request[2])),
            # requests that differ in the last token alone are read once
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        automatic = self.batch_size == "auto" and not override_bs
        size = 0 if automatic else override_bs or self.batch_size
        if automatic:
            self.batch_sizes: dict[int, int] = {}  # those found for other requests say nothing of these
        found: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for batch in ordered.get_batched(n=size, batch_fn=self._batch_scheduler if automatic else None):
            for (name, context, continuation), logits in zip(batch, self._read(batch), strict=True):
                log_p = F.log_softmax(logits.unsqueeze(0), dim=-1, dtype=self.softmax_dtype)
                for key, tokens, each in ordered.get_cache(
                    req_str=name, cxt_toks=context, cont_toks=continuation, logits=log_p
                ):
                    target, mine = torch.tensor(tokens, device=each.device), each[0, -len(tokens) :]
                    answer = (float(mine.gather(1, target[:, None]).sum()), bool((mine.argmax(-1) == target).all()))
                    found.append(answer)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    bar.update(1)
        bar.close()
        answers: list[tuple[float, bool]] = ordered.get_original(found)
        return answers

    def _read(self, batch: Sequence[Encoded]) -> list[Tensor]:
        """The logits [c, V] that predict the c tokens of each continuation."""
        rows = [(context + continuation)[-(self.max_length + 1) :][:-1] for _, context, continuation in batch]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        counts = [len(continuation) for _, _, continuation in batch]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._logits(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=max(counts))
        self._current.add(self.host.stats())
        return [row[-count:] for row, count in zip(logits, counts, strict=True)]

    def _logits(self, **inputs: Any) -> Tensor:
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            logits: Tensor = self.host(**inputs).logits
        return logits

    def _refuse_idle(self, task: str) -> None:
        readings = self.readings[task]
        about = readings.summary()
        logger.info("%s under %s: %s", task, self.policy.describe(), about)
        if not readings.idle:
            return
        idle = (
            f"{task}: policy {self.policy.name!r} took no decision in any of {about['readings']} readings: "
            f"update_interval is {self.update_interval}, they have {about['tokens_shortest']} to "
            f"{about['tokens_longest']} tokens"
        )
        if not self.allow_idle:
            raise ConfigError(f"{idle}; choose a smaller interval, or accept it with allow_idle=true")
        logger.warning(idle)


def _dtype(name: str) -> torch.dtype:
    dtype = torch.bfloat16 if name == "auto" else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype is {name!r}; expected auto, float32, bfloat16 or another floating type of torch")
    return dtype


def _policy(name: str, budget: float | None, namm: str | None, settings: Mapping[str, Any]) -> Policy:
    chosen = {"name": name, **settings}
    if budget is not None:
        chosen["budget"] = budget
    if namm is not None or name == "namm":
        chosen["namm"] = namm or "default"
    return build_policy(chosen)
