"""Attention that is observed, on a GPU: no matrix of probabilities goes through its memory.

The forward kernel keeps the log of each query's softmax denominator; the kernels that observe compute the logits once
more, hop by hop, for the tokens of a block, and fold them where they are.

Shape legend: R rows, H query heads, K KV heads, G = H / K, t queries of a tile, N tokens, D key width, V value width,
P parts that the tokens are split into.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from namm_transfer.spectrogram import BINS, HOP, basis

__all__ = ["column_sums", "forward", "observe_spectrum", "ready", "serves"]

LOG2E = tl.constexpr(1.4426950408889634)
_HOP = tl.constexpr(HOP)
_BINS = tl.constexpr(BINS)
WIDEST = 256
"""The widest keys and values whose blocks fit on a multiprocessor."""
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: the kernels run on CPU tensors, in numpy."""


def serves(key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take keys [R, K, N, D] and values [R, K, N, V] of this type and width."""
    narrow = max(key.shape[-1], value.shape[-1]) <= WIDEST
    return narrow and key.dtype == value.dtype and key.dtype in (torch.float32, torch.float16, torch.bfloat16)


def ready() -> None:
    """Build what Triton needs to launch anything.

    Raises:
        RuntimeError, OSError, subprocess.SubprocessError: it cannot, e.g. for want of a C compiler.
    """
    if not INTERPRETED:
        triton.runtime.driver.active.get_current_device()


# -- the kernels ---------------------------------------------------------------------------------------------------
# Sizes that change from tile to tile are not specialised on, else each new one that 16 divides would be compiled for.


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter cannot multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _logits(products, scale, SOFTCAP: tl.constexpr):
    """Of queries and keys, times log2(e), since the hardware's exponential is that of 2."""
    if SOFTCAP > 0:
        capped = SOFTCAP * (2 * tl.sigmoid(2 * scale / SOFTCAP * products) - 1)  # tanh
        return capped * LOG2E
    return products * (scale * LOG2E)


@triton.jit
def _span(
    acc, total, top, q, key, value, key_token, value_token, start, stop, limit, scale,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tokens [start, stop), of which each query sees those below its ``limit``."""
    token, d, v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for first in range(start, stop, BLOCK_N):
        place = first + token
        k_at = key + place[None, :] * key_token + d[:, None]
        v_at = value + place[:, None] * value_token + v[None, :]
        if MASKED:
            keys = tl.load(k_at, mask=(place < stop)[None, :] & (d < D)[:, None], other=0.0)
            values = tl.load(v_at, mask=(place < stop)[:, None] & (v < V)[None, :], other=0.0)
        else:
            keys = tl.load(k_at) if D == BLOCK_D else tl.load(k_at, mask=(d < D)[:, None], other=0.0)
            values = tl.load(v_at) if V == BLOCK_V else tl.load(v_at, mask=(v < V)[None, :], other=0.0)
        logits = _logits(_dot(q, keys, None, PRECISION, WIDEN), scale, SOFTCAP)
        if MASKED:
            logits = tl.where(place[None, :] < limit[:, None], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        if MASKED:  # a query may have seen nothing yet
            base = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            base = higher
        p = tl.exp2(logits - base[:, None])
        less = tl.exp2(top - base)
        total = total * less + tl.sum(p, 1)
        acc = _dot(p.to(values.dtype), values, acc * less[:, None], PRECISION, WIDEN)
        top = higher
    return acc, total, top


@triton.jit(do_not_specialize=["count", "ahead", "parts"])
def _forward(
    query, key, value, lengths, sinks, out, lse,
    query_row, query_head, query_one, key_row, key_head, key_token, value_row, value_head, value_token,
    heads, kv_heads, count, ahead, scale, parts,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head, over one part of the tokens.

    out [P, R, H, t, V] and lse [P, R, H, t] (base 2), contiguous.
    """
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the last queries see most: they start first
    pair, part = tl.program_id(0), tl.program_id(2)  # heads that share keys run side by side
    row, head = (pair // heads).to(tl.int64), pair % heads
    kv_head = head // (heads // kv_heads)
    length = tl.load(lengths + row * kv_heads + kv_head).to(tl.int32)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    if CAUSAL:
        limit = length - ahead + i
        all_see = length - ahead + block * BLOCK_M
        some_see = tl.minimum(length, length - ahead + tl.minimum(count, (block + 1) * BLOCK_M) - 1)
    else:
        limit = length + 0 * i
        all_see = length
        some_see = length
    some_see = tl.maximum(some_see, 0)
    share = tl.cdiv(tl.cdiv(some_see, parts), BLOCK_N) * BLOCK_N
    start, stop = tl.minimum(part * share, some_see), tl.minimum((part + 1) * share, some_see)
    limit = tl.minimum(limit, stop)
    whole = start + tl.maximum(tl.minimum(stop, all_see) - start, 0) // BLOCK_N * BLOCK_N

    q_at = query + row * query_row + head.to(tl.int64) * query_head + i[:, None].to(tl.int64) * query_one + d[None, :]
    q = tl.load(q_at, mask=(i < count)[:, None] & (d < D)[None, :], other=0.0)
    key += row * key_row + kv_head.to(tl.int64) * key_head
    value += row * value_row + kv_head.to(tl.int64) * value_head
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS:  # a logit that takes probability and gives nothing
        top = tl.maximum(top, tl.where(part == 0, tl.load(sinks + head) * LOG2E, float("-inf")))
        total += tl.where(part == 0, 1.0, 0.0)
    acc, total, top = _span(
        acc, total, top, q, key, value, key_token, value_token, start, whole, limit, scale,
        D, V, BLOCK_D, BLOCK_V, BLOCK_N, False, SOFTCAP, PRECISION, WIDEN,
    )  # fmt: skip
    acc, total, top = _span(
        acc, total, top, q, key, value, key_token, value_token, whole, stop, limit, scale,
        D, V, BLOCK_D, BLOCK_V, BLOCK_N, True, SOFTCAP, PRECISION, WIDEN,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # a query that sees nothing gets nothing
    acc = acc / total[:, None]
    at = (part * tl.num_programs(0) + pair).to(tl.int64) * count + i
    tl.store(lse + at, top + tl.log2(total), mask=i < count)
    tl.store(
        out + at[:, None] * V + v[None, :], acc.to(out.dtype.element_ty), mask=(i < count)[:, None] & (v < V)[None, :]
    )


@triton.jit(do_not_specialize=["parts"])
def _combine(parts_out, parts_lse, out, lse, parts, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr):
    """One query's attention from those over the parts of the tokens."""
    at, queries = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    p, v = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    each = tl.load(parts_lse + p * queries + at, mask=p < parts, other=float("-inf"))
    top = tl.max(each, 0)
    weight = tl.exp2(each - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    total = tl.where(total > 0, total, 1.0)
    x_at = parts_out + (p[:, None] * queries + at) * V + v[None, :]
    x = tl.load(x_at, mask=(p < parts)[:, None] & (v < V)[None, :], other=0.0)
    mean = tl.sum(x * weight[:, None], 0) / total
    tl.store(out + at * V + v, mean.to(out.dtype.element_ty), mask=v < V)
    tl.store(lse + at, top + tl.log2(total))


@triton.jit
def _hop(
    keys, query, lse, query_head, query_one, count, first, limit, place, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr, STACK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What 16 queries from ``first`` on give to a block of tokens, summed over the heads: [BLOCK_N, 16].

    ``query`` and ``lse`` are those of the first head; ``keys`` [BLOCK_N, BLOCK_D]. The first query sees the places
    below ``limit``, the next one more (or, with a limit for good, as many).
    """
    BLOCK_N: tl.constexpr = keys.shape[0]
    column, d = tl.arange(0, STACK * _HOP), tl.arange(0, BLOCK_D)
    i = first + column % _HOP
    total = tl.zeros([BLOCK_N, _HOP], tl.float32)
    for group in tl.static_range(0, GROUPS, STACK):  # so many heads at a time as make whole products
        head = group + column // _HOP
        q_at = query + head[None, :] * query_head + i[None, :] * query_one + d[:, None]
        q = tl.load(q_at, mask=(i < count)[None, :] & (d < D)[:, None], other=0.0)
        normaliser = tl.load(lse + head * count + i, mask=i < count, other=float("inf"))
        p = tl.exp2(_logits(_dot(keys, q, None, PRECISION, WIDEN), scale, SOFTCAP) - normaliser[None, :])
        total += tl.sum(tl.reshape(p, [BLOCK_N, STACK, _HOP]), 1) if STACK > 1 else p
    return tl.where(place[:, None] < limit[None, :], total, 0.0)


@triton.jit(do_not_specialize=["ema_row", "ema_head", "count", "tokens", "ahead"])
def _spectrum(
    query, key, lse, lengths, table, ema, previous,
    query_row, query_head, query_one, key_row, key_head, key_token, ema_row, ema_head, previous_row, previous_head,
    kv_heads, count, tokens, ahead, scale, decay, state_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STACK: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """All frames of a tile for a block of tokens of one KV head.

    Frames are made in the type and scale of the state. table [4, 16, 16]: of a hop as the first half of a frame its
    real parts, then its imaginary ones; then the same of a hop as the second half. They are those of the bins 0 to 15,
    except that the imaginary part of bin 0, which is none, gives its place to bin 16, which is real.
    """
    pair, block = tl.program_id(0), tl.program_id(1)
    row, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    length = tl.load(lengths + pair).to(tl.int32)
    if block * BLOCK_N >= length:
        return
    place, d, column = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, _HOP)
    used = (place < length) & (place < tokens)
    key += row * key_row + head * key_head
    query += row * query_row + head * GROUPS * query_head
    lse += pair.to(tl.int64) * GROUPS * count
    keys = tl.load(key + place[:, None] * key_token + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)

    cell = column[:, None] * _HOP + column[None, :]
    first_re, first_im = tl.load(table + cell), tl.load(table + _HOP * _HOP + cell)
    second_re, second_im = tl.load(table + 2 * _HOP * _HOP + cell), tl.load(table + 3 * _HOP * _HOP + cell)
    ema_at = ema + row * ema_row + head * ema_head + place[:, None] * _BINS + column[None, :]
    previous_at = previous + row * previous_row + head * previous_head + place[:, None] * _HOP + column[None, :]
    average = tl.load(ema_at, mask=used[:, None], other=0.0).to(tl.float32)
    # of bin 16 in column 0; the other columns are idle
    highest = tl.load(ema_at + _HOP, mask=used[:, None] & (column == 0)[None, :], other=0.0).to(tl.float32)
    hop = tl.load(previous_at, mask=used[:, None], other=0.0)
    re = tl.dot(hop, first_re, input_precision=PRECISION)
    im = tl.dot(hop, first_im, input_precision=PRECISION)
    for first in range(0, count, _HOP):
        limit = length - ahead + first + column if CAUSAL else length + 0 * column
        attn = _hop(
            keys, query, lse, query_head, query_one, count, first, limit, place, scale,
            D, BLOCK_D, GROUPS, STACK, SOFTCAP, PRECISION, WIDEN,
        )  # fmt: skip
        hop = (attn * (state_scale / GROUPS)).to(hop.dtype)
        re = tl.dot(hop, second_re, re, input_precision=PRECISION)
        im = tl.dot(hop, second_im, im, input_precision=PRECISION)
        magnitude = tl.sqrt(re * re + tl.where((column > 0)[None, :], im * im, 0.0))
        average = decay * average + (1 - decay) * magnitude
        highest = decay * highest + (1 - decay) * tl.abs(im)
        re = tl.dot(hop, first_re, input_precision=PRECISION)
        im = tl.dot(hop, first_im, input_precision=PRECISION)
    tl.store(ema_at, average.to(ema.dtype.element_ty), mask=used[:, None])
    tl.store(ema_at + _HOP, highest.to(ema.dtype.element_ty), mask=used[:, None] & (column == 0)[None, :])
    tl.store(previous_at, hop, mask=used[:, None])


@triton.jit(do_not_specialize=["begin", "count", "tokens", "ahead"])
def _sums(
    query, key, lse, lengths, out,
    query_row, query_head, query_one, key_row, key_head, key_token,
    kv_heads, begin, count, tokens, ahead, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STACK: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What the queries from ``begin`` on give to a block of tokens of one KV head; out [R, K, N] contiguous."""
    pair, block = tl.program_id(0), tl.program_id(1)
    row, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    length = tl.load(lengths + pair).to(tl.int32)
    place, d, i = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, _HOP)
    used = (place < length) & (place < tokens)
    total = tl.zeros([BLOCK_N, _HOP], tl.float32)
    if block * BLOCK_N < length:
        key += row * key_row + head * key_head
        query += row * query_row + head * GROUPS * query_head
        lse += pair.to(tl.int64) * GROUPS * count
        keys = tl.load(key + place[:, None] * key_token + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
        for first in range(begin, count, _HOP):
            limit = length - ahead + first + i if CAUSAL else length + 0 * i
            total += _hop(
                keys, query, lse, query_head, query_one, count, first, limit, place, scale,
                D, BLOCK_D, GROUPS, STACK, SOFTCAP, PRECISION, WIDEN,
            )  # fmt: skip
    sums = tl.where(used, tl.sum(total, 1) / GROUPS, 0.0)
    tl.store(out + pair.to(tl.int64) * tokens + place, sums, mask=place < tokens)


# -- their callers -------------------------------------------------------------------------------------------------


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    ahead: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a tile.

    Args:
        query: [R, H, t, D].
        key, value: [R, K, N, D], [R, K, N, V].
        lengths: [R, K] int64 tokens in use.
        ahead: tokens newer than the first query (causality); None: every query sees every token in use.
        scale, softcap, sinks: of the logits; sinks [H].
        parts: P; by default as many as keep the device busy.

    Returns:
        The output [R, H, t, V], and [R, H, t] float32 the base-2 logarithm of each query's sum of exponentials.
    """
    query, key, value = (_rows(x) for x in (query, key, value))
    rows, heads, count, width = query.shape
    wide, value_wide = _padded(width), _padded(value.shape[3])
    blocks = _forward_blocks(key.dtype, wide, value_wide, count, _shared_memory(key.device))
    queries = triton.cdiv(count, blocks["BLOCK_M"])
    if parts is None:
        # a small model's heads alone leave most of a GPU idle; a part should be worth a program's start
        spare = _multiprocessors(key.device) // (rows * heads * queries)
        parts = max(1, min(spare, key.shape[2] // 512, 16))
    made = query.new_empty(
        (parts, rows, heads, count, value.shape[3]), dtype=torch.float32 if parts > 1 else query.dtype
    )
    lse = query.new_empty((parts, rows, heads, count), dtype=torch.float32)
    with _on(key.device):
        _forward[(rows * heads, queries, parts)](
            query, key, value, lengths.contiguous(), sinks if sinks is None else sinks.float().contiguous(), made, lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            heads, key.shape[1], count, ahead or 0, scale, parts,
            D=width, V=value.shape[3], BLOCK_D=wide, BLOCK_V=value_wide, CAUSAL=ahead is not None,
            SINKS=sinks is not None, SOFTCAP=softcap or 0.0, **_numbers(key.dtype), **blocks,
        )  # fmt: skip
        if parts == 1:
            return made[0], lse[0]
        out, whole_lse = torch.empty_like(made[0], dtype=query.dtype), torch.empty_like(lse[0])
        _combine[(rows * heads * count,)](
            made, lse, out, whole_lse, parts,
            V=value.shape[3], BLOCK_V=value_wide, BLOCK_P=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return out, whole_lse


def observe_spectrum(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    lengths: Tensor,
    ahead: int | None,
    scale: float,
    ema: Tensor,
    previous: Tensor,
    decay: float,
    state_scale: float,
    softcap: float | None = None,
) -> None:
    """Fold whole hops into the moving average of the spectrum, in place (``spectrogram.advance``).

    Args:
        query, key, lengths, ahead, scale, softcap: as they were given to :func:`forward`.
        lse: [R, H, t] as it made it.
        ema: [R, K, N, 17], float32 or float16, holding ``state_scale`` times its values, tokens contiguous.
        previous: [R, K, N, 16], the same.
        decay: what a hop leaves of the average.
    """
    query, key, shape, options = _watched(query, key, ahead, softcap, ema.shape[2])
    with _on(key.device):
        _spectrum[shape](
            query, key, lse.contiguous(), lengths.contiguous(), _table(key.device, ema.dtype), ema, previous,
            *query.stride()[:3], *key.stride()[:3], *ema.stride()[:2], *previous.stride()[:2],
            key.shape[1], query.shape[2], ema.shape[2], ahead or 0, scale, decay, state_scale, **options,
        )  # fmt: skip


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    lengths: Tensor,
    ahead: int | None,
    scale: float,
    begin: int = 0,
    softcap: float | None = None,
) -> Tensor:
    """Attention that each token gets of the queries from ``begin`` on, averaged over the heads: [R, K, N] float32.

    Args:
        query, key, lengths, ahead, scale, softcap: as they were given to :func:`forward`.
        lse: [R, H, t] as it made it.
    """
    query, key, shape, options = _watched(query, key, ahead, softcap, key.shape[2])
    out = key.new_empty(key.shape[:3], dtype=torch.float32)
    with _on(key.device):
        _sums[shape](
            query, key, lse.contiguous(), lengths.contiguous(), out, *query.stride()[:3], *key.stride()[:3],
            key.shape[1], begin, query.shape[2], key.shape[2], ahead or 0, scale, **options,
        )  # fmt: skip
    return out


def _watched(
    query: Tensor, key: Tensor, ahead: int | None, softcap: float | None, tokens: int
) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, Any]]:
    """Query, key, grid and options of a kernel that observes."""
    query, key = _rows(query), _rows(key)
    groups, wide, pairs = query.shape[1] // key.shape[1], _padded(key.shape[3]), key.shape[0] * key.shape[1]
    blocks = _observe_blocks(key.dtype, wide, groups, _shared_memory(key.device))
    while blocks["BLOCK_N"] > 32 and pairs * triton.cdiv(tokens, blocks["BLOCK_N"]) < _multiprocessors(key.device):
        blocks["BLOCK_N"] //= 2
    fixed = {
        "D": key.shape[3],
        "BLOCK_D": wide,
        "GROUPS": groups,
        "CAUSAL": ahead is not None,
        "SOFTCAP": softcap or 0.0,
    }
    return query, key, (pairs, triton.cdiv(tokens, blocks["BLOCK_N"])), fixed | blocks | _numbers(key.dtype)


def _observe_blocks(dtype: torch.dtype, wide: int, groups: int, shared: int) -> dict[str, int]:
    """Sizes of a kernel that observes.

    A block of keys stays in shared memory all the while; the larger it is, the less often the queries are read. The
    heads of a step are a power of two that divides the group: at most 64 columns a product.
    """
    if dtype == torch.float32:  # products in full precision are made in registers
        size, block, stack = 4, 32, 1
    else:
        size, block, stack = 2, 128 if wide <= 128 else 64, min(groups & -groups, 4)

    def needed(stages: int) -> int:  # when pipelined, the queries of all steps of two hops lie side by side
        queries = HOP * stack if stages == 1 else stages * HOP * groups
        return size * wide * (block + queries) + 8 * 2**10

    stages = 2 if needed(2) <= shared else 1
    while needed(stages) > shared and block > 16:
        block //= 2
    # two blocks of four warps on a multiprocessor hide each other's waiting; more heads need more registers
    return {"BLOCK_N": block, "STACK": stack, "num_warps": 8 if groups > 4 and block >= 64 else 4, "num_stages": stages}


def _forward_blocks(dtype: torch.dtype, wide: int, value_wide: int, count: int, shared: int) -> dict[str, int]:
    """Block sizes: 128 queries by 64 tokens in half precision, less where registers or shared memory end."""
    if dtype == torch.float32:  # products in full precision are made in registers
        sizes = {"BLOCK_M": 64 if max(wide, value_wide) <= 64 else 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    else:
        wider = max(wide, value_wide)
        block = 128 if wider <= 128 and count > 64 else 64
        warps, tokens = (8 if block == 128 or wider > 128 else 4), (64 if wider <= 128 else 32)
        sizes = {"BLOCK_M": block, "BLOCK_N": tokens, "num_warps": warps, "num_stages": 3}
    size = 4 if dtype == torch.float32 else 2

    def needed() -> int:
        tokens = sizes["BLOCK_N"] * sizes["num_stages"] * (wide + value_wide)
        return size * (sizes["BLOCK_M"] * wide + tokens)

    while needed() > shared and sizes["num_stages"] > 1:
        sizes["num_stages"] -= 1
    while needed() > shared and sizes["BLOCK_N"] > 16:
        sizes["BLOCK_N"] //= 2
    return sizes


def _numbers(dtype: torch.dtype) -> dict[str, Any]:
    """How products are made: of float32 as torch's own matrix products are."""
    full = torch.get_float32_matmul_precision() == "highest"
    widen = INTERPRETED and dtype == torch.bfloat16
    return {"PRECISION": "ieee" if full else "tf32", "WIDEN": widen, "enable_fp_fusion": True}


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    parts = []
    for half in basis(torch.device("cpu")).split(2 * BINS, dim=1):
        real, imaginary = half[:, : BINS - 1], half[:, BINS : 2 * BINS - 1].clone()
        imaginary[:, 0] = half[:, BINS - 1]
        parts += [real, imaginary]
    return torch.stack(parts).to(device=device, dtype=dtype).contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have."""
    if device.type != "cuda":
        return 227 * 2**10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 2**10)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
