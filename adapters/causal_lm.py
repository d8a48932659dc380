"""Decoders that generate: causal language models, and the text decoders of video LLMs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from namm_transfer.adapters.base import Host, use_namm_attention
from namm_transfer.attention import NAME
from namm_transfer.errors import CacheError, ConfigError
from namm_transfer.memory import MemoryCache
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats

__all__ = ["CausalLMHost"]

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types whose only state is keys and values."""


class CausalLMHost(Host):
    """A decoder that generates: ``host.generate(**inputs)``, ``host(**inputs)``.

    Only the text decoder runs the ``namm`` attention; a vision tower keeps its own. A call without
    ``past_key_values`` starts a new memory, ``host.cache``; to go on with one, pass it.
    """

    cache: MemoryCache | None = None
    """The memory of the last call."""

    def __init__(self, model: PreTrainedModel, policy: Policy, update_interval: int = 512) -> None:
        super().__init__(model, policy, update_interval)
        self._before: list[tuple[PreTrainedModel, str]] = []

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        if not isinstance(model, PreTrainedModel):
            return f"a transformers model; found {type(model).__module__}.{type(model).__name__}"
        name = type(model).__name__
        if not model.can_generate():
            return f"a model that generates (a language-model head); {name} has none"
        if model.config.is_encoder_decoder:
            return f"a decoder-only model; {name} is an encoder-decoder"
        decoder = model.get_decoder()
        if not isinstance(decoder, PreTrainedModel):
            return f"a text decoder that is a transformers model; found {type(decoder).__name__} in {name}"
        config = decoder.config
        other = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
        if other or model._is_stateful:
            of = f"layers of type {', '.join(other)}" if other else "a recurrent state"
            return f"plain attention in every layer; {name} has {of}"
        if getattr(config, "kv_lora_rank", None):
            return f"a cache of keys and values; {name} caches latents that are expanded later (kv_lora_rank)"
        if getattr(config, "num_kv_shared_layers", None):
            count = config.num_kv_shared_layers
            return f"keys and values of its own in every layer; in {name}, {count} layers share those of others"
        if not decoder._can_set_attn_implementation():
            return (
                f"attention that dispatches through transformers' AttentionInterface; that of {type(decoder).__name__} "
                "does not"
            )
        return None

    def attach(self) -> None:
        self._use_namm(self.model.get_decoder())

    def _use_namm(self, *parts: PreTrainedModel) -> None:
        self._before += [(part, part.config._attn_implementation) for part in parts]
        for part in parts:
            use_namm_attention(part, NAME)

    def detach(self) -> None:
        while self._before:
            part, name = self._before.pop()
            use_namm_attention(part, name)

    def new_cache(self) -> MemoryCache:
        """An empty memory under the host's policy."""
        return MemoryCache(self.policy, self.update_interval)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward call, with the memory as its cache."""
        return self._run(self.model, by_name(self.model.forward, args, inputs))

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """The model's ``generate``, with the memory as its cache."""
        return self._run(self.model.generate, by_name(self.model.generate, args, inputs))

    def _run(self, call: Any, inputs: dict[str, Any]) -> Any:
        """Call the model with the memory as its cache.

        Raises:
            ConfigError: the call asks for another cache, or for none, or for one under another policy or interval.
            CacheError: the memory is another model's, or the model left it, or one of its layers, empty; or the host
                is not laid over its model.
        """
        if not self._before:
            raise CacheError("the model runs without its memory: use the host in a block, `with adapt(...) as host:`")
        cache = inputs.get("past_key_values")
        if cache is None:
            cache = self.new_cache()
        if not isinstance(cache, MemoryCache):
            raise ConfigError(
                f"past_key_values must be a MemoryCache, e.g. host.new_cache(); got {type(cache).__name__}"
            )
        self._check_policy(cache)
        if inputs.get("use_cache") not in (None, True):  # None: as the model likes
            raise ConfigError("use_cache=False leaves a policy nothing to do; call the model itself instead")
        expected = getattr(self.model.get_decoder().config, "num_hidden_layers", None)
        held = sum(layer.is_initialized for layer in cache.layers)
        if expected and held not in (0, expected):
            raise CacheError(
                f"past_key_values is a memory of {held} layers, but {type(self.model).__name__} has {expected}; use a "
                "new one for another model"
            )
        self.cache = cache
        out = call(**inputs | {"past_key_values": cache, "use_cache": True})
        cache.check_consumed()
        found = sum(layer.is_initialized for layer in cache.layers)
        if found < (expected or 1):
            raise CacheError(
                f"{type(self.model).__name__} put tokens of {found} of its {expected or 1} layers into the memory, so "
                f"the policy {self.policy.name!r} would do nothing in the others"
            )
        return out

    def _check_policy(self, cache: MemoryCache) -> None:
        """Refuse a memory that others than the host's settings prune."""
        pairs = {
            "policy": (cache.policy.describe(), self.policy.describe()),
            "update_interval": (cache.update_interval, self.update_interval),
        }
        for name, (found, expected) in pairs.items():
            if found != expected:
                raise ConfigError(f"this memory was made with {name} {found}, but the host has {expected}")

    def stats(self) -> MemoryStats:
        if self.cache is None:
            raise CacheError("no call yet: stats() tells of the memory of the last call")
        return self.cache.stats()


def by_name(call: Callable[..., Any], args: tuple[Any, ...], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All inputs of a call by name, those given by position too."""
    signature = inspect.signature(call)
    signature.bind_partial(*args, **inputs)  # what does not fit is the call's own TypeError
    return {**signature.bind_partial(*args).arguments, **inputs}
