"""The memory of one layer: new tokens stream in, block by block, and the policy evicts between blocks.

Shape legend: B batch rows, R rows of a run, H query heads, K KV heads, Q new queries, n tokens of a block, t queries
of a tile, N retained tokens, D key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from namm_transfer.attention import NAME, AttentionOptions, Memory, expecting
from namm_transfer.errors import CacheError, ConfigError, UnsupportedModelError
from namm_transfer.masks import AttentionMask, RunMask, from_tensor, take
from namm_transfer.scoring import LayerView, Policy, runs
from namm_transfer.spectrogram import HOP
from namm_transfer.store import Fields, Layout, TokenStore
from namm_transfer.tiles import Context, Visible

__all__ = ["LayerMemory", "check_interval", "watch"]


def check_interval(update_interval: Any) -> int:
    """Tokens between two decisions: a positive multiple of 16.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(update_interval, bool) or not isinstance(update_interval, Integral):
        raise ConfigError(f"update_interval must be an int; got {update_interval!r}")
    if update_interval < HOP or update_interval % HOP:
        raise ConfigError(f"update_interval must be a positive multiple of {HOP}; got {update_interval}")
    return int(update_interval)


def watch(
    view: LayerView,
    policy: Policy,
    query: Tensor,
    visible: Callable[[int, int], Visible],
    options: AttentionOptions,
    ahead: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend to the retained tokens in tiles, and let the policy see each tile.

    Args:
        view: the layer; its counter of queries moves on.
        query: [R, H, n, D].
        visible: (start, stop) of a tile -> what its queries may attend to.
        ahead: keys and values [R, K, m, D] of tokens that exist for the mask only (the rest of a bidirectional span).

    Returns:
        [R, H, n, V].
    """
    heads, count = query.shape[1:3]
    context = Context(view.tokens, options, count, ahead=ahead, masked=isinstance(visible(0, 1), Tensor))
    observer = partial(policy.observe, view) if policy.observes else None
    out = []
    for start, stop in context.tiles(heads, count, view.queries % HOP, policy.observes):
        out.append(context.attend(query[:, :, start:stop], visible(start, stop), observer))
        view.queries += stop - start
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


class LayerMemory(CacheLayerMixin):
    """The tokens of one layer.

    The layer's attention call follows :meth:`update` at once; it is answered here, block by block up to each
    decision, so that no query after a decision sees what was evicted.
    """

    is_sliding = False

    def __init__(self, index: int, policy: Policy, update_interval: int, layout: Layout = "ragged") -> None:
        super().__init__()
        self.index = index
        self.policy = policy
        self.update_interval = update_interval
        self.layout = layout
        self.total = 0
        """Tokens seen, padding included: the length that the model is told."""
        self.seen: list[int] = []
        """Tokens seen by each row."""
        self.updates: list[int] = []
        self.kept: list[float] = []
        """Sum over each row's decisions of the fraction kept."""
        self.tokens: TokenStore
        self._pending: tuple[Tensor, Tensor] | None = None
        self._outer: Memory | None = None
        """Who expects the calls around this layer's own: an encoder's memory, or nobody."""

    # -- the cache's side ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        fields: Fields = {
            "keys": ((width,), key_states.dtype),
            "values": ((value_states.shape[-1],), value_states.dtype),
            "positions": ((), torch.int32),
        }
        self.policy.check_rows(rows)
        fields |= self.policy.fields(key_states.dtype)
        self.tokens = TokenStore.empty(rows, heads, fields, key_states.device, self.layout)
        self.seen, self.updates, self.kept = [0] * rows, [0] * rows, [0.0] * rows
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys and values [B, K, Q, D]; the attention call that follows streams them in."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (rows, heads), width = self.tokens.lengths.shape, self.tokens.places()[0].shape[1]
        if (key_states.shape[0], key_states.shape[1], key_states.shape[3]) != (rows, heads, width):
            raise CacheError(
                f"layer {self.index}: this memory holds {rows} rows of {heads} KV heads of width {width}, but got keys "
                f"of shape {tuple(key_states.shape)}; use a new MemoryCache for another batch or model"
            )
        self._pending = (key_states, value_states)
        outer = expecting.get()
        self._outer = None if isinstance(outer, LayerMemory) else outer
        expecting.set(self)
        return key_states, value_states

    def check_consumed(self) -> None:
        """Raise if the keys last given were never attended to through this memory."""
        if self._pending is not None:
            expecting.set(self._outer)
            raise CacheError(
                f"layer {self.index}: the model gave its keys to a MemoryCache, but its attention is not {NAME!r}, so "
                f"nothing would be evicted and the output would be wrong; call model.set_attn_implementation({NAME!r}) "
                "(for a composite model: {'text_config': 'namm'}), or use namm_transfer.adapt(model, policy)"
            )

    def new_call(self) -> Memory | None:
        # keys still waiting when a model begins its call were another model's: check_consumed tells their user
        return self._outer

    def get_seq_length(self) -> int:
        """Tokens seen, padding included (not tokens retained): positions go on correctly after evictions."""
        return self.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.total + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.seen)

    # -- attention -------------------------------------------------------------------------------------------

    def expects(self, module: nn.Module, key: Tensor) -> bool:
        if self._pending is None:
            return False
        if key is self._pending[0]:
            return True
        if getattr(module, "layer_idx", None) == self.index:
            raise UnsupportedModelError(
                f"layer {self.index}: {type(module).__name__} attends to keys of shape {tuple(key.shape)}, which are "
                f"not what it put into the cache, {tuple(self._pending[0].shape)}: a memory serves caches of keys and "
                "values, not of latents that are expanded later"
            )
        return False

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
        """Stream the new tokens in; return the attention output [B, H, Q, V].

        Raises:
            CacheError: the mask does not cover all tokens seen.
            UnsupportedModelError: the queries are not of the same tokens as the keys (cross-attention), or a 4-D mask
                is none that a memory can honour.
        """
        expecting.set(self._outer)
        self._pending = None
        if query.shape[2] != key.shape[2]:
            raise UnsupportedModelError(
                f"layer {self.index}: {type(module).__name__} has {query.shape[2]} queries, but {key.shape[2]} new "
                "keys: a memory serves self-attention only"
            )
        if isinstance(mask, Tensor):
            mask = from_tensor(mask, self.seen, self.total)
        elif mask is None:
            mask = AttentionMask(causal_mask_function)
        count = query.shape[2]
        if mask.covers is not None and mask.covers < self.total + count:
            raise CacheError(
                f"attention_mask covers {mask.covers} tokens, but {self.total} were seen before these "
                f"{count}; pass a mask over all of them"
            )
        given = None if mask.padding is None else mask.padding[:, self.total : self.total + count]
        added = [count] * len(self.seen) if given is None else given.sum(-1).tolist()
        unfinished = self.policy.unfinished_fields(key.dtype)
        few = count < HOP and mask.causal
        in_steps = few or self._token_by_token(mask, added, count, query.device)
        if in_steps or any(s % HOP or (s + n) % HOP for s, n in zip(self.seen, added, strict=True)):
            self.tokens.add_fields(unfinished)
        if in_steps:
            out = self._steps(mask, query, key, value, options, given, whole=few)
        else:
            out = self._by_runs(mask, query, key, value, options, given, added)
        self.total += count
        if not any(s % HOP for s in self.seen):
            self.tokens.drop_fields(unfinished)
        self.tokens.trim(settled=count > HOP)
        return out

    def _token_by_token(self, mask: AttentionMask, added: list[int], count: int, device: torch.device) -> bool:
        """Whether a hop at most is taken in token by token, since rows are at different points."""
        points = list(runs(list(zip(self.seen, added, strict=True))))
        if len(points) == 1 or count > HOP:
            return False
        # a query that attends to later tokens (of an image) needs them beside it
        return mask.causal or not any(
            RunMask(mask, a, b, device).reaches_ahead(self.seen[a], self.seen[a] + added[a]) for a, b in points
        )

    def _by_runs(
        self,
        mask: AttentionMask,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        given: Tensor | None,
        added: list[int],
    ) -> Tensor:
        """Take in ``added[r]`` tokens of each row, rows at the same point together. Returns [B, H, Q, V]."""
        count, out = query.shape[2], query.new_zeros(*query.shape[:3], value.shape[-1])
        for first, last in runs(list(zip(self.seen, added, strict=True))):
            part, seen_by = slice(first, last), RunMask(mask, first, last, query.device)
            if added[first] == count:
                out[part] = self._stream(seen_by, query[part], key[part], value[part], options)
            elif given is not None and added[first]:
                places = given[part].nonzero()[:, 1].view(last - first, -1)
                q, k, v = (take(x[part], places) for x in (query, key, value))
                streamed = self._stream(seen_by, q, k, v, options)
                out[part].scatter_(2, places[:, None, :, None].expand_as(streamed), streamed)
        return out

    def _steps(
        self,
        mask: AttentionMask,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        given: Tensor | None,
        *,
        whole: bool,
    ) -> Tensor:
        """Take in at most 16 tokens of each row, ``given`` [B, Q] of them, piece by piece. Returns [B, H, Q, V].

        Unless ``whole``, a piece is one token.
        """
        columns = [[True] * len(self.seen)] * query.shape[2] if given is None else given.T.tolist()
        if whole and given is None and not self._decides_within(query.shape[2] - 1):
            return self._step(mask, query, key, value, options, columns[0])
        out = []
        for start, stop in self._pieces(columns, whole):
            q, k, v = (query, key, value)
            if stop - start < len(columns):
                q, k, v = (x[:, :, start:stop] for x in (query, key, value))
            out.append(self._step(mask, q, k, v, options, columns[start]))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _decides_within(self, count: int) -> bool:
        """Whether a row comes to a decision within so many tokens."""
        interval = self.update_interval
        return self.policy.evicts and any(seen % interval + count >= interval for seen in self.seen)

    def _pieces(self, columns: list[list[bool]], whole: bool) -> Iterator[tuple[int, int]]:
        """Cut new tokens into pieces [start, stop) that rows at different points may take in one go.

        The same rows get all tokens of a piece, and none comes to a decision before its end.
        ``columns[i][r]`` says whether row r has an i-th new token or padding; unless ``whole``, a piece is one token.
        """
        seen, start = list(self.seen), 0
        for i, column in enumerate(columns):
            seen = [s + int(moved) for s, moved in zip(seen, column, strict=True)]
            decides = self.policy.evicts and any(
                moved and s % self.update_interval == 0 for s, moved in zip(seen, column, strict=True)
            )
            if not whole or decides or i + 1 == len(columns) or columns[i + 1] != column:
                yield start, i + 1
                start = i + 1

    def _step(
        self,
        mask: AttentionMask,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        moving: list[bool],
    ) -> Tensor:
        """A piece of n tokens for each of the rows that are ``moving``, wherever they are. Returns [B, H, n, V]."""
        policy, tokens, count, before = self.policy, self.tokens, query.shape[2], self.seen
        tokens.reserve(count)
        tokens.append_some(key, value, before, moving)
        visible: Visible = count - 1 if count > 1 else None  # plain causality
        if not mask.causal:
            rows = RunMask(mask, 0, len(moving), key.device)
            visible = rows.visible_newest(tokens, torch.tensor(before, device=key.device))
        observer = None
        if policy.observes:
            observer = partial(policy.observe_apart, tokens, self.index, self.update_interval, before, moving)
        out = Context(tokens, options, count).attend(query, visible, observer)
        if not all(moving):  # a row without a new token attended to nothing
            out = out.masked_fill(~torch.tensor(moving, device=key.device).view(-1, 1, 1, 1), 0.0)
        self.seen = [s + count * moves for s, moves in zip(before, moving, strict=True)]
        for first, last in runs(list(zip(self.seen, moving, strict=True))) if policy.evicts else ():
            seen = self.seen[first]
            if moving[first] and seen % self.update_interval == 0:
                part = tokens.rows(first, last)
                self._decide(LayerView(part, self.index, (first, last), seen, seen, self.update_interval))
                if part is not tokens:
                    tokens.recount()
        return out

    def _stream(self, mask: RunMask, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attend, observe and evict, block by block, for the rows of a run. Returns [R, H, n, V]."""
        first, last, policy = mask.first, mask.last, self.policy
        count, done, seen, out = query.shape[2], 0, self.seen[mask.first], []
        while done < count:
            left = count - done
            size = min(left, self.update_interval - seen % self.update_interval) if policy.evicts else left
            block = slice(done, done + size)
            self.tokens.reserve(size)
            tokens = self.tokens.rows(first, last)
            positions = torch.arange(seen, seen + size, device=key.device, dtype=torch.int32)
            tokens.append(
                {
                    "keys": key[:, :, block],
                    "values": value[:, :, block],
                    "positions": positions.expand(*key.shape[:2], -1),
                }
            )
            view = LayerView(tokens, self.index, (first, last), seen + size, seen, self.update_interval)
            ahead = mask.ahead(seen + size, left - size)
            span = slice(block.stop, block.stop + ahead)
            extra = (key[:, :, span], value[:, :, span]) if ahead else None
            visible = partial(mask.visible, tokens, seen, seen + size, ahead)
            out.append(watch(view, policy, query[:, :, block], visible, options, extra))
            done, seen = done + size, seen + size
            if policy.evicts and seen % self.update_interval == 0:
                self._decide(view)
            if tokens is not self.tokens:
                self.tokens.recount()
        self.seen[first:last] = [seen] * (last - first)
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _decide(self, view: LayerView) -> None:
        view.tokens.keep(self.policy.decide(view))
        fractions = (view.tokens.lengths.float().mean(1) / view.seen).tolist()
        for row, fraction in zip(range(*view.rows), fractions, strict=True):
            self.updates[row] += 1
            self.kept[row] += fraction

    # -- rows ------------------------------------------------------------------------------------------------

    def select_rows(self, index: Tensor) -> None:
        """Continue with the rows ``index`` [B'], which may repeat."""
        if self.is_initialized:
            self.policy.check_rows(len(self.seen), index.tolist())
            self.tokens = self.tokens.select(index)
            for name in ("seen", "updates", "kept"):
                old = getattr(self, name)
                setattr(self, name, [old[i] for i in index.tolist()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continue with some of the rows."""
        self.select_rows(torch.arange(len(self.seen))[indices.cpu()])

    def clear_rows(self, rows: Tensor) -> None:
        """Let the rows [M] start a new sequence; the counts of decisions go on."""
        if self.is_initialized:
            self.tokens.clear(rows.to(self.tokens.lengths.device))
            for row in rows.tolist():
                self.seen[row] = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue with each row ``repeats`` times."""
        self.select_rows(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, the batch's shape included."""
        if self.is_initialized:
            del self.tokens
        self.total, self.is_initialized, self._pending = 0, False, None
        self.seen, self.updates, self.kept = [], [], []

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: evictions cannot be undone.

        Raises:
            CacheError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise CacheError(
                "a MemoryCache cannot be cropped: what was evicted cannot come back; fork it before instead"
            )
