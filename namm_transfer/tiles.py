"""Attention in tiles that can be watched: by the compiled kernels where there are any, by torch elsewhere.

Shape legend: R rows, H query heads, K KV heads, G = H / K, t queries of a tile, n queries of a block, N tokens,
D key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from namm_transfer import kernels
from namm_transfer.spectrogram import DECAY, HOP, advance, state_scale
from namm_transfer.store import TokenStore

__all__ = ["AttentionOptions", "Context", "Observed", "Visible", "attend"]

TILE_BYTES = 32 * 2**20
"""Bound on the float32 attention probabilities that torch's operators make at a time."""
OBSERVED_BYTES = 8 * 2**20
"""Bound on those that the kernel hands to an observer: they are read at once, while they are in the cache."""
FEW = 16
"""Below so many queries the kernel reads keys and values as they lie, since laying them out would cost more."""

TRITON_DEVICES = {"cuda"}
"""Where Triton's kernels serve (its interpreter would serve a CPU)."""

Visible = Tensor | int | None
"""What a tile's queries may attend to: None, every token in use; an int, all but so many of the newest for the first
query, one more for each of the next (causality); or a bool tensor [R or 1, K or 1, t, N]."""


class AttentionOptions:
    """The numbers that a model's attention call carries beside its tensors."""

    def __init__(self, scaling: float | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> None:
        self.scaling = scaling
        self.softcap = softcap
        self.sinks = sinks

    @property
    def plain(self) -> bool:
        """Neither a cap on the logits nor learned sinks: torch's own kernels compute it."""
        return self.softcap is None and self.sinks is None

    def scale(self, width: int) -> float:
        """What the products of queries and keys of this width are multiplied with."""
        return width**-0.5 if self.scaling is None else self.scaling


class Observed:
    """What a tile's queries attend to: probabilities averaged in float32 over each group of query heads.

    It is asked for what is needed of it, since not every backend holds the probabilities themselves.
    """

    def __init__(self, attn: Tensor) -> None:
        """Of the probabilities [R, K, t, N]."""
        self._attn = attn

    @property
    def count(self) -> int:
        """t."""
        return self._attn.shape[2]

    def __iter__(self) -> Iterator[Tensor]:
        """The probabilities in their order, [R, K, s, N]: the parts' s add up to t, and are whole hops or the rest."""
        yield self._attn

    def sums(self, start: int = 0) -> Tensor:
        """What each token gets of the queries from ``start`` on, [R, K, N]."""
        return self._attn[:, :, start:].sum(2)

    def advance(self, ema: Tensor, previous: Tensor) -> None:
        """Fold the queries, which are whole hops, into a spectrum: see :func:`spectrogram.advance`."""
        advance(ema, previous, self._attn)


Observer = Callable[[Observed], None]


class _Recomputed(Observed):
    """Attention that was not held: Triton's kernels compute it again from the queries' normalisers."""

    def __init__(
        self, kernel: ModuleType, context: Context, query: Tensor, lse: Tensor, lengths: Tensor, ahead: int | None
    ) -> None:
        self._kernel = kernel
        self._context = context
        self._call = (query, context.shown_key, lse, lengths, ahead, context.options.scale(query.shape[3]))

    @property
    def count(self) -> int:
        return self._call[0].shape[2]

    def __iter__(self) -> Iterator[Tensor]:
        query, ahead = self._call[0], self._call[4]
        rows, heads, count = query.shape[:3]
        step = max(1, TILE_BYTES // (rows * heads * self._context.key.shape[2] * 4) // HOP) * HOP
        for start in range(0, count, step):
            part = query[:, :, start : start + step]
            yield self._context.probabilities(part, None if ahead is None else ahead - start)

    def sums(self, start: int = 0) -> Tensor:
        found: Tensor = self._kernel.column_sums(*self._call, start, self._context.options.softcap)
        return found

    def advance(self, ema: Tensor, previous: Tensor) -> None:
        scale, softcap = state_scale(ema.dtype), self._context.options.softcap
        self._kernel.observe_spectrum(*self._call, ema, previous, DECAY, scale, softcap)


class Context:
    """Tokens that some queries attend to.

    Args:
        tokens: the store; these are what an observer is shown.
        options: of the attention call.
        count: n, how many queries are to come.
        ahead: keys and values [R, K, m, D] of tokens that exist for the mask only (the rest of a bidirectional span).
        masked: whether a tensor is to say what the queries may attend to.
    """

    def __init__(
        self,
        tokens: TokenStore,
        options: AttentionOptions,
        count: int,
        *,
        ahead: tuple[Tensor, Tensor] | None = None,
        masked: bool = False,
    ) -> None:
        self.width = tokens.width
        if ahead is not None:
            wide = {k: torch.cat([tokens[k], x], dim=2) for k, x in zip(("keys", "values"), ahead, strict=True)}
            full = torch.full_like(tokens.lengths, wide["keys"].shape[2])
            tokens = TokenStore.from_padded(wide, full, "padded")
        self.tokens = tokens
        self.options = options
        self.key, self.value, self._starts = tokens.places()
        self._triton: ModuleType | None = None
        if self.key.device.type in TRITON_DEVICES and count >= HOP and not masked:
            module = kernels.gpu()
            self._triton = module if module is not None and module.serves(self.key, self.value) else None
        usable = self.key.device.type == "cpu" and self.key.dtype in (torch.float32, torch.bfloat16, torch.float16)
        self._kernel = kernels.cpu() if usable and self._triton is None else None
        self._packed: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._kernel is None:
            self.key, self.value = tokens["keys"], tokens["values"]
        elif count >= FEW:
            self._packed = self._kernel.pack(self.key, self.value, *self._extents())

    def _extents(self) -> tuple[Tensor, Tensor, int]:
        """Where each head's tokens start, how many they are, and how many the fullest has."""
        return self._starts.contiguous(), self.tokens.lengths.contiguous(), self.tokens.width

    def tiles(self, heads: int, count: int, phase: int, observed: bool) -> Iterator[tuple[int, int]]:
        """Cut ``count`` queries of H = ``heads`` heads into tiles, ends of hops in between.

        Args:
            heads, count: H, n.
            phase: queries of an unfinished hop before the first one, in [0, 16).
            observed: whether each tile is to be observed.
        """
        (rows, kv_heads), width = self.tokens.lengths.shape, self.tokens.width
        if self._triton is not None:
            limit = count + HOP
        elif self._kernel is None:
            limit = TILE_BYTES // max(rows * heads * width * 4, 1)
        elif observed:
            limit = OBSERVED_BYTES // max(rows * kv_heads * width * 4, 1)
        else:
            limit = count + HOP
        limit = max(1, limit // HOP) * HOP
        start = 0
        if phase:
            stop = min(HOP - phase, count)
            yield 0, stop
            start = stop
        whole = start + (count - start) // HOP * HOP
        while start < whole:
            stop = min(start + limit, whole)
            yield start, stop
            start = stop
        if start < count:
            yield start, count

    def attend(self, query: Tensor, visible: Visible, observer: Observer | None) -> Tensor:
        """Attention of one tile.

        Args:
            query: [R, H, t, D].
            visible: which tokens each query may attend to.
            observer: is shown what the tile attends to.

        Returns:
            [R, H, t, V].
        """
        options, lengths, mask, ahead = self.options, self.tokens.lengths, None, None
        if self._triton is not None and not isinstance(visible, Tensor) and query.shape[2] >= HOP:
            scale, softcap, sinks = options.scale(query.shape[3]), options.softcap, options.sinks
            out, lse = self._triton.forward(query, self.key, self.value, lengths, visible, scale, softcap, sinks)
            if observer is not None:
                observer(_Recomputed(self._triton, self, query, lse, lengths, visible))
            return out
        if self._kernel is None:
            show = None if observer is None else (lambda attn: self._show(attn, observer))
            return attend(query, self.key, self.value, self._allowed(query, visible), options, show)
        if isinstance(visible, Tensor):
            mask = visible.expand(*visible.shape[:2], query.shape[2], self.tokens.width).contiguous()
        elif visible is not None:
            ahead = visible
        out, attn = self._kernel.attend(
            query if query.stride(-1) == 1 else query.contiguous(),
            self.key,
            self.value,
            *self._extents(),
            *self._packed,
            ahead,
            mask,
            options.scale(query.shape[-1]),
            options.softcap or 0.0,
            None if options.sinks is None else options.sinks.float().contiguous(),
            observer is not None,
        )
        if observer is not None:
            self._show(attn, observer)
        return out

    def probabilities(self, query: Tensor, visible: Visible) -> Tensor:
        """What an observer is shown of a tile, [R, K, t, N], by torch's operators."""
        held: list[Tensor] = []
        attend(query, self.key, self.value, self._allowed(query, visible), self.options, held.append)
        return held[0][..., : self.width]

    @property
    def shown_key(self) -> Tensor:
        """The keys of the tokens that are shown to an observer."""
        return self.key[:, :, : self.width]

    def _show(self, attn: Tensor, observer: Observer) -> None:
        observer(Observed(attn if attn.shape[-1] == self.width else attn[..., : self.width]))

    def _allowed(self, query: Tensor, visible: Visible) -> Tensor | None:
        """``visible`` as a tensor, or None if every query sees every place."""
        if isinstance(visible, Tensor):
            return visible
        tokens = self.tokens
        if tokens.even and not visible and (visible is None or query.shape[2] == 1):
            return None
        device = self.key.device
        lengths = (tokens.lengths[:1, :1] if tokens.even else tokens.lengths).unsqueeze(-1)
        if visible is not None:
            lengths = lengths - visible + torch.arange(query.shape[2], device=device)
        return torch.arange(tokens.width, device=device) < lengths.unsqueeze(-1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    options: AttentionOptions,
    observer: Callable[[Tensor], None] | None,
) -> Tensor:
    """Attention of one tile by torch's operators.

    Args:
        query: [R, H, t, D].
        key, value: [R, K, N, D], [R, K, N, V].
        allowed: [R or 1, K or 1, t, N] bool, or None if every query sees every token.
        observer: gets the probabilities averaged in float32 over each group of query heads, [R, K, t, N].

    Returns:
        [R, H, t, V].
    """
    rows, heads, count, _ = query.shape
    kv_heads, width = key.shape[1:3]
    groups = heads // kv_heads
    if observer is None and options.plain:
        if allowed is not None and allowed.shape[1] not in (1, heads):
            allowed = allowed.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=options.scaling, enable_gqa=groups > 1
        )
    scaling = options.scale(query.shape[-1])
    grouped = query.reshape(rows, kv_heads, groups * count, -1)
    logits = torch.matmul(grouped, key.transpose(-1, -2)).view(rows, kv_heads, groups, count, width).float() * scaling
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if allowed is not None:
        logits = logits.masked_fill(~allowed.unsqueeze(2), float("-inf"))
    if options.sinks is not None:  # one more logit per head that takes probability and gives nothing
        sink = options.sinks.float().view(1, kv_heads, groups, 1, 1).expand(rows, -1, -1, count, 1)
        attn = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        attn = logits.softmax(-1)
    if observer is not None:
        observer(attn.mean(2))
    out = torch.matmul(attn.to(value.dtype).view(rows, kv_heads, groups * count, width), value)
    return out.view(rows, heads, count, -1)
