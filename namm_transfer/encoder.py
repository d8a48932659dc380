"""The memory of a bidirectional encoder: all keys and values of a layer, forgotten while queries stream through.

An encoder has no growing cache. Its queries are taken in temporal order, in blocks; between two blocks the policy
evicts, so that later queries see less. With nothing evicted the output is the unmodified model's.

Shape legend: B batch rows, H query heads, K KV heads, N tokens, D key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from namm_transfer.attention import AttentionOptions, expecting
from namm_transfer.errors import CacheError, ConfigError, UnsupportedModelError
from namm_transfer.layer import check_interval, watch
from namm_transfer.masks import AttentionMask
from namm_transfer.scoring import LayerView, Policy
from namm_transfer.spectrogram import HOP
from namm_transfer.stats import MemoryStats, measure
from namm_transfer.store import TokenStore

__all__ = ["EncoderMemory"]


class EncoderMemory:
    """One forward pass of an encoder under a policy.

    Args:
        policy: made by :func:`namm_transfer.policy`.
        update_interval: queries between two decisions, a multiple of 16.
        modules: the attention modules that are meant, and the number of special tokens (class, registers) at the
            front of each one's sequence: these are read out last; their keys stay as long as the policy likes.

    Attributes:
        layers: what each module's calls did, in the order of the first calls.
        batch: inputs in the batch, where it is known; an attention call may have several rows for each.
    """

    def __init__(self, policy: Policy, update_interval: int, modules: Mapping[nn.Module, int]) -> None:
        self.policy = policy
        self.update_interval = check_interval(update_interval)
        self.modules = modules
        self.layers: dict[nn.Module, list[_Pass]] = {}
        self.batch: int | None = None

    @contextmanager
    def listening(self) -> Iterator[EncoderMemory]:
        """Answer the ``namm`` attention calls of the modules in this block."""
        token = expecting.set(self)
        try:
            yield self
        finally:
            expecting.reset(token)

    def expects(self, module: nn.Module, key: Tensor) -> bool:
        return module in self.modules

    def new_call(self) -> EncoderMemory:
        return self

    @torch.no_grad()
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask | Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        """Stream the queries [B, H, N, D] past the layer's keys and values; return [B, H, N, V].

        Raises:
            ConfigError: the policy is a population that does not fit the batch.
            UnsupportedModelError: the call has a mask, or other tokens in the queries than in the keys.
        """
        if isinstance(mask, AttentionMask):
            mask = mask.tensor()
        if mask is not None or query.shape[2] != key.shape[2]:
            raise UnsupportedModelError(
                f"{type(module).__name__}: an encoder memory serves self-attention over all tokens without a mask; got "
                f"{query.shape[2]} queries, {key.shape[2]} keys and {'a' if mask is not None else 'no'} mask"
            )
        rows, _, count, _ = query.shape
        self._check_rows(module, rows)
        device = query.device
        # temporal order, special tokens last; positions are ranks in that order
        order = torch.arange(count, device=device).roll(-self.modules[module])
        fields = {
            "keys": ((key.shape[-1],), key.dtype),
            "values": ((value.shape[-1],), value.dtype),
            "positions": ((), torch.int32),
        }
        state = self.policy.fields(key.dtype) | (self.policy.unfinished_fields(key.dtype) if count % HOP else {})
        tokens = TokenStore.empty(rows, key.shape[1], fields | state, device)
        tokens.reserve(count, exact=True)
        positions = torch.arange(count, device=device, dtype=torch.int32).expand(rows, key.shape[1], -1)
        tokens.append({"keys": key[:, :, order], "values": value[:, :, order], "positions": positions})

        passes = self.layers.setdefault(module, [])
        layer = list(self.layers).index(module)
        view = LayerView(tokens, layer, (0, rows), count, 0, self.update_interval)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        record = _Pass(tokens, rows, count)
        step = self.update_interval if self.policy.evicts else count
        for start in range(0, count, step):
            block = order[start : start + step]
            record.attended += len(block) * tokens.lengths.double().mean(1).cpu()
            out[:, :, block] = watch(view, self.policy, query[:, :, block], lambda a, b: None, options)
            if self.policy.evicts and start + step < count:
                tokens.keep(self.policy.decide(view))
                record.updates += 1
                record.kept += tokens.lengths.double().mean(1).cpu() / count
        tokens.trim(settled=True)
        passes.append(record)
        return out

    def _check_rows(self, module: nn.Module, rows: int) -> None:
        inputs = rows if self.batch is None else self.batch
        self.policy.check_rows(inputs)
        if rows == inputs:
            return
        try:  # a patch over time, a frame: an input has several rows
            self.policy.check_rows(inputs, [row * inputs // rows for row in range(rows)])
        except ConfigError as error:
            raise ConfigError(
                f"{type(module).__name__} attends in {rows} rows for {inputs} inputs: a layer with several rows per "
                "input cannot carry a population; evaluate its members one by one"
            ) from error

    def check_used(self, model: nn.Module) -> None:
        """To be called after a call of the model: the policy must have had something to do.

        Raises:
            CacheError: no attention module asked the memory, or no decision fell within any layer's sequence.
        """
        if not self.layers:
            raise CacheError(
                f"none of the {len(self.modules)} attention modules of {type(model).__name__} asked the memory, so the "
                f"policy {self.policy.name!r} did nothing; use the host inside its 'with' block"
            )
        passes = [p for layer in self.layers.values() for p in layer]
        if self.policy.evicts and not any(p.updates for p in passes):
            longest = max(p.count for p in passes)
            advice = f"choose a multiple of {HOP} below {longest}" if longest > HOP else "no interval is that small"
            raise CacheError(
                f"the policy {self.policy.name!r} never decided in {type(model).__name__}: its layers attend to at "
                f"most {longest} tokens, and with update_interval={self.update_interval} no decision falls within "
                f"them; {advice}"
            )

    def stats(self) -> MemoryStats:
        """What the layers retained after their last decision, layers in the order of their calls.

        Where a layer attends within parts of an input (a patch over time, a frame), the parts are summed up.
        """
        passes = [p for layer in self.layers.values() for p in layer]
        return measure(
            [p.tokens for p in passes],
            [[p.count] * p.rows for p in passes],
            [[p.updates] * p.rows for p in passes],
            [p.kept.tolist() for p in passes],
            inputs=self.batch,
        )

    def attention_work(self) -> float:
        """Query-key products computed, as a fraction of the unmodified model's."""
        passes = [p for layer in self.layers.values() for p in layer]
        return sum(float(p.attended.mean()) / p.count**2 for p in passes) / max(len(passes), 1)

    def retained(self) -> list[list[list[Tensor]]]:
        """Token numbers, in the model's order (special tokens first), retained by [call][row][head]."""
        found = []
        for module, passes in self.layers.items():
            for done in passes:
                numbers = (done.tokens["positions"].long() + self.modules[module]) % done.count
                valid = done.tokens.valid()
                found.append([[n[v] for n, v in zip(*row, strict=True)] for row in zip(numbers, valid, strict=True)])
        return found


class _Pass:
    """One layer's pass: what was retained, and how much was attended to."""

    def __init__(self, tokens: TokenStore, rows: int, count: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.count = count
        self.updates = 0
        self.kept = torch.zeros(rows, dtype=torch.float64)
        self.attended = torch.zeros(rows, dtype=torch.float64)
