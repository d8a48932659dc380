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
        carried: what every head of a layer has evicted by its end is gone for the later layers: nothing attends to it,
            and its own attention is not computed (zeros stand for it); special tokens go on asking. Otherwise every
            layer begins with all tokens.

    Attributes:
        layers: what each module's calls did, in the order of the first calls.
        batch: inputs in the batch, where it is known; an attention call may have several rows for each.
    """

    def __init__(
        self, policy: Policy, update_interval: int, modules: Mapping[nn.Module, int], *, carried: bool = False
    ) -> None:
        self.policy = policy
        self.update_interval = check_interval(update_interval)
        self.modules = modules
        self.carried = carried
        self.layers: dict[nn.Module, list[_Pass]] = {}
        self.batch: int | None = None
        self._left: Tensor | None = None
        """[B, N] bool, in the order of the queries: the tokens that earlier layers left, in mode `carried`."""

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
        # temporal order, special tokens last; positions are ranks in that order
        special = self.modules[module]
        order = torch.arange(count, device=query.device).roll(-special)
        left = self._tokens_left(module, rows, order) if self.carried else None
        tokens = self._filled(key, value, order, left)

        passes = self.layers.setdefault(module, [])
        layer = list(self.layers).index(module)
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        record = _Pass(tokens, rows, count)
        for first, last in [(0, rows)] if left is None else [(row, row + 1) for row in range(rows)]:
            of_rows = tokens.rows(first, last)
            asked = order if left is None else order[left[first]]
            view = LayerView(of_rows, layer, (first, last), count, 0, self.update_interval)
            step = self.update_interval if self.policy.evicts else len(asked)
            for start in range(0, len(asked), step):
                block = asked[start : start + step]
                record.attended[first:last] += len(block) * of_rows.lengths.double().mean(1).cpu()
                found = watch(view, self.policy, query[first:last, :, block], lambda a, b: None, options)
                out[first:last, :, block] = found
                if self.policy.evicts and start + step < len(asked):
                    of_rows.keep(self.policy.decide(view))
                    record.updates[first:last] += 1
                    record.kept[first:last] += of_rows.lengths.double().mean(1).cpu() / count
        tokens.recount()
        if left is not None:
            self._left = left & (_held(tokens, count) | (torch.arange(count, device=left.device) >= count - special))
        tokens.trim(settled=True)
        passes.append(record)
        return out

    def _tokens_left(self, module: nn.Module, rows: int, order: Tensor) -> Tensor:
        """[rows, N] bool, in the order [N] of the queries."""
        left, count = self._left, len(order)
        if left is None:
            left = torch.ones(rows, count, dtype=torch.bool, device=order.device)
        if tuple(left.shape) != (rows, count):
            raise UnsupportedModelError(
                f"{type(module).__name__} attends in {rows} rows to {count} tokens, an earlier layer in {len(left)} "
                f"rows to {left.shape[1]}: what is evicted can be carried only between layers of the same tokens"
            )
        return left

    def _filled(self, key: Tensor, value: Tensor, order: Tensor, left: Tensor | None) -> TokenStore:
        """A store of a layer's keys and values [B, K, N, ...] in order, of those that are left."""
        rows, heads, count, _ = key.shape
        given = {"keys": key[:, :, order], "values": value[:, :, order]}
        positions = torch.arange(count, device=key.device, dtype=torch.int32).repeat(rows, heads, 1)
        lengths = torch.full((rows,), count, device=key.device) if left is None else left.sum(1)
        if left is not None:
            front = torch.argsort(~left, dim=1, stable=True)[:, : int(lengths.max())]  # those that are left come first
            where = front[:, None, :].expand(-1, heads, -1)
            given = {name: x.gather(2, where[..., None].expand(-1, -1, -1, x.shape[-1])) for name, x in given.items()}
            positions = positions.gather(2, where)
        tokens = TokenStore.from_padded(given | {"positions": positions}, lengths[:, None].repeat(1, heads))
        tokens.add_fields(self.policy.fields(key.dtype))
        if (lengths % HOP).any():
            tokens.add_fields(self.policy.unfinished_fields(key.dtype))
        return tokens

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
        if self.policy.evicts and not any(p.updates.any() for p in passes):
            longest = max(p.count for p in passes)
            advice = f"choose a multiple of {HOP} below {longest}" if longest > HOP else "no interval is that small"
            raise CacheError(
                f"the policy {self.policy.name!r} never decided in {type(model).__name__}: its layers attend to at "
                f"most {longest} tokens, and with update_interval={self.update_interval} no decision falls within "
                f"them; {advice}"
            )

    def stats(self) -> MemoryStats:
        """What the layers retained after their last decision, layers in the order of their calls.

        Where a layer attends within parts of an input (a patch over time, a frame), the parts are summed up. A vision
        tower that was shown both images and videos in one call has other rows for each: they are summed up to one.
        """
        passes = [p for layer in self.layers.values() for p in layer]
        inputs = 1 if self.batch is None and len({p.rows for p in passes}) > 1 else self.batch
        return measure(
            [p.tokens for p in passes],
            [[p.count] * p.rows for p in passes],
            [p.updates.tolist() for p in passes],
            [p.kept.tolist() for p in passes],
            inputs=inputs,
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
        self.updates = torch.zeros(rows, dtype=torch.int64)
        self.kept = torch.zeros(rows, dtype=torch.float64)
        self.attended = torch.zeros(rows, dtype=torch.float64)


def _held(tokens: TokenStore, count: int) -> Tensor:
    """[B, count] bool: the positions of which any head of a row holds the token."""
    held = torch.zeros(len(tokens.lengths), count + 1, dtype=torch.bool, device=tokens.lengths.device)
    positions = tokens["positions"].long().masked_fill(~tokens.valid(), count)  # padding goes where nobody looks
    return held.scatter_(1, positions.flatten(1), True)[:, :count]
