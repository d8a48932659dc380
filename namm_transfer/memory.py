"""The memory: a key/value cache whose tokens a policy may evict while the prompt streams through it.

Shape legend: B batch rows, K KV heads, Q new queries, D key width, V value width, M chosen rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from namm_transfer.errors import CacheError, ConfigError
from namm_transfer.files import replacing
from namm_transfer.layer import LayerMemory, check_interval
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats, measure
from namm_transfer.store import Layout, TokenStore

__all__ = ["MemoryCache"]

_COUNTS = ("total", "seen", "updates", "kept")
"""A layer's counters, which a saved memory carries beside its tensors."""


class MemoryCache(Cache):
    """A cache for ``past_key_values`` that a policy prunes.

    The model must run the ``namm`` attention: ``model.set_attn_implementation("namm")``.

    Args:
        policy: made by :func:`namm_transfer.policy`.
        update_interval: tokens between two decisions, a multiple of 16 (512 in the paper).
        layout: "ragged": each head pays for the keys and values that it keeps; "padded": for those of the fullest head
            of the batch, the simple reference.

    Raises:
        ConfigError: update_interval is no positive multiple of 16, policy is none, or layout is unknown.
    """

    layers: list[LayerMemory]  # type: ignore[assignment]

    def __init__(self, policy: Policy, update_interval: int = 512, layout: Layout = "ragged") -> None:
        if not isinstance(policy, Policy):
            raise ConfigError(f"MemoryCache needs a policy, e.g. namm_transfer.policy('full'); got {policy!r}")
        if layout not in get_args(Layout):
            raise ConfigError(f"layout must be one of {get_args(Layout)}; got {layout!r}")
        self.policy = policy
        self.update_interval = check_interval(update_interval)
        self.layout = layout
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: new keys [B, K, Q, D] and values [B, K, Q, V] of one layer.

        Raises:
            CacheError: the model has another number of layers than those that filled this memory.
        """
        self.check_consumed()
        self._check_layers(layer_idx, key_states.shape[2])
        while len(self.layers) <= layer_idx:
            self.layers.append(LayerMemory(len(self.layers), self.policy, self.update_interval, self.layout))
        return self.layers[layer_idx].update(key_states, value_states)

    def _check_layers(self, index: int, count: int) -> None:
        """Before ``count`` tokens reach layer ``index``: every call must have passed through the same layers."""
        used = [layer for layer in self.layers if layer.is_initialized]
        if not used:
            return
        new = index >= len(self.layers) or not self.layers[index].is_initialized
        if new and used[0].total > count:
            raise CacheError(
                f"layer {index} is new to this memory, but layer {used[0].index} had seen "
                f"{used[0].total - count} tokens before this call: the memory is that of a model with {len(used)} "
                "layers; use a new MemoryCache for another model"
            )
        if index == used[0].index and used[-1].total != used[0].total:
            raise CacheError(
                f"layer {used[-1].index} has seen {used[-1].total} tokens, but layer {used[0].index} has seen "
                f"{used[0].total}: the last call was broken off, or its model has fewer layers than the {len(used)} of "
                "this memory; use a new MemoryCache for another model"
            )

    def check_consumed(self) -> None:
        """Raise CacheError if a model gave keys but did not attend through this memory (a silent no-op)."""
        for layer in self.layers:
            layer.check_consumed()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: the position of the next token, whatever was evicted."""
        self.check_consumed()
        return super().get_seq_length(layer_idx)

    def _selected(self, index: Tensor) -> MemoryCache:
        self.check_consumed()
        chosen = copy.copy(self)
        chosen.layers = []
        for layer in self.layers:
            twin = copy.copy(layer)
            twin.select_rows(index)
            chosen.layers.append(twin)
        return chosen

    def fork(self, rows: int = 1) -> MemoryCache:
        """An independent copy, with each row ``rows`` times: ask many questions of one remembered input."""
        if isinstance(rows, bool) or not isinstance(rows, Integral) or rows < 1:
            raise ConfigError(f"fork: rows must be an int of at least 1; got {rows!r}")
        count = len(self.layers[0].seen) if self.layers else 0
        return self._selected(torch.arange(count).repeat_interleave(int(rows)))

    def clear_rows(self, rows: Tensor) -> None:
        """Let some rows [M] start a new sequence while the others go on.

        From then on the model needs an attention_mask in which all earlier places of those rows are padding, or
        :meth:`forget_padding` after each call.
        """
        self.check_consumed()
        for layer in self.layers:
            layer.clear_rows(rows)

    def forget_padding(self) -> None:
        """Let the next attention_mask speak of new tokens only, as if the memory were empty; what is retained stays.

        For causal models that are told their position ids: rows that start anew for as long as a program runs would
        need an ever longer mask.
        """
        self.check_consumed()
        for layer in self.layers:
            layer.total = 0

    def to(self, device: torch.device | str) -> MemoryCache:
        """Move all tensors to a device, in place."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.tokens = layer.tokens.to(device)
        return self

    def stats(self) -> MemoryStats:
        """What is held now, and what it costs."""
        self.check_consumed()
        layers = [layer for layer in self.layers if layer.is_initialized]
        return measure(
            [x.tokens for x in layers], [x.seen for x in layers], [x.updates for x in layers], [x.kept for x in layers]
        )

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        """Write all tokens and the policy's state to one safetensors file; ``about`` joins its metadata.

        Raises:
            CacheError: the file cannot be written.
        """
        self.check_consumed()
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            for name, _ in layer.tokens:
                tensors[f"{layer.index}.{name}"] = layer.tokens[name].contiguous()
            tensors[f"{layer.index}.lengths"] = layer.tokens.lengths
        state = {
            "policy": self.policy.describe(),
            "update_interval": self.update_interval,
            "layers": [{name: getattr(layer, name) for name in _COUNTS} for layer in self.layers],
        }
        metadata = {**(about or {}), "memory": json.dumps(state)}
        # whole or not at all; besides, the tensors of a loaded memory may be mapped from the very file
        try:
            with replacing(Path(path)) as partial:
                save_file(tensors, partial, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise CacheError(f"cannot write a memory to {str(path)!r}: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, policy: Policy) -> MemoryCache:
        """Read a memory back; ``policy`` must be the one it was saved with.

        Raises:
            CacheError: the file is missing, truncated or no memory, or the policy is another one.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("memory", "null"))
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise CacheError(f"cannot read a memory from {str(path)!r}: {type(error).__name__}: {error}") from error
        if about is None:
            raise CacheError(f"cannot read a memory from {str(path)!r}: it is a safetensors file of something else")
        if policy.describe() != about["policy"]:
            raise CacheError(f"{str(path)!r} was saved under the policy {about['policy']}; got {policy.describe()}")
        cache = cls(policy, about["update_interval"])
        for index, state in enumerate(about["layers"]):
            layer = LayerMemory(index, policy, cache.update_interval)
            prefix = f"{index}."
            fields = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if fields:  # else the memory was saved before this layer's first token
                lengths = fields.pop("lengths")
                layer.tokens = TokenStore.from_padded(fields, lengths)
                layer.is_initialized = True
            for name in _COUNTS:
                setattr(layer, name, state[name])
            cache.layers.append(layer)
        return cache
