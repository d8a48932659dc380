"""Rows and pieces: however a prompt is split, and whoever shares the batch, each row gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from namm_transfer import NAMM, MemoryCache, policy
from namm_transfer.errors import CacheError, UnsupportedModelError
from namm_transfer.policies import Policy

INTERVAL = 32
POLICIES = ("full", "random", "streaming", "h2o", "key_norm", "tova", "snapkv", "namm", "namm-rank")
LENGTHS = (75, 64, 9, 75, 40)
"""Rows: some at the same point, one that has just decided, one that has not begun to."""
PROMPT = max(LENGTHS)


@pytest.fixture(scope="module")
def make_policy(make_namm) -> Callable[[str], Policy]:
    """A policy of each kind, by name."""

    def make(name: str) -> Policy:
        if name == "full":
            return policy("full")
        if name.startswith("namm"):
            return policy("namm", namm=make_namm(), budget=0.4 if name == "namm-rank" else None)
        return policy(name, budget=0.4)

    return make


def feed(model: LlamaForCausalLM, cache: MemoryCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [rows, count, vocab] of more tokens."""
    more = {}
    if mask is not None:
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]}
    with torch.no_grad():
        return model(ids, past_key_values=cache, **more).logits


def padded(ids: Tensor, side: str = "left") -> tuple[Tensor, Tensor]:
    """Ids [rows, PROMPT] with LENGTHS tokens each, and their mask."""
    place = torch.arange(PROMPT)
    lengths = torch.tensor(LENGTHS).unsqueeze(1)
    mask = place >= PROMPT - lengths if side == "left" else place < lengths
    return ids[:, :PROMPT].masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POLICIES)
def test_padded_rows_equal_single_rows(llama, tokens, make_policy, retained, name: str, side: str) -> None:
    model, steps = llama(), 45  # each row passes a decision while decoding, at another step than the others
    ids, mask = padded(tokens(PROMPT, rows=len(LENGTHS)), side)
    more = tokens(steps, rows=len(LENGTHS), seed=1)
    cache = MemoryCache(make_policy(name), INTERVAL)
    logits = [feed(model, cache, ids, mask)]
    for step in range(steps):
        mask = torch.cat([mask, torch.ones(len(LENGTHS), 1, dtype=torch.int64)], dim=1)
        logits.append(feed(model, cache, more[:, step : step + 1], mask))
    together, kept = torch.cat(logits, dim=1), retained(cache)
    for row, length in enumerate(LENGTHS):
        alone = MemoryCache(make_policy(name), INTERVAL)
        sequence = torch.cat([ids[row][mask[row, :PROMPT] == 1], more[row]]).unsqueeze(0)
        want = feed(model, alone, sequence)[0]
        torch.testing.assert_close(together[row][mask[row] == 1], want, atol=1e-4, rtol=0)
        assert [layer[row] for layer in kept] == [layer[0] for layer in retained(alone)]
        assert cache.stats().seen[row] == length + steps


@pytest.mark.parametrize("name", POLICIES)
def test_rows_between_hops_take_a_whole_hop_together(llama, tokens, make_policy, retained, name: str) -> None:
    """Both rows begin and end the call with a finished hop, and are in the middle of one while it lasts."""
    model, lengths = llama(), (48, 32)
    ids, more = tokens(48, rows=2), tokens(16, rows=2, seed=1)
    mask = (torch.arange(48) >= 48 - torch.tensor(lengths).unsqueeze(1)).long()
    cache = MemoryCache(make_policy(name), INTERVAL)
    feed(model, cache, ids.masked_fill(mask == 0, 0), mask)
    logits = feed(model, cache, more, torch.cat([mask, torch.ones(2, 16, dtype=torch.int64)], dim=1))
    for row, length in enumerate(lengths):
        alone = MemoryCache(make_policy(name), INTERVAL)
        want = feed(model, alone, torch.cat([ids[row, 48 - length :], more[row]]).unsqueeze(0))[0, length:]
        torch.testing.assert_close(logits[row], want, atol=1e-4, rtol=0)
        assert [layer[row] for layer in retained(cache)] == [layer[0] for layer in retained(alone)]


@pytest.mark.parametrize("name", ["h2o", "namm"])
def test_left_padded_generate(llama, tokens, make_policy, name: str) -> None:
    model = llama()
    ids, mask = padded(tokens(PROMPT, rows=len(LENGTHS)))
    settings = {"max_new_tokens": 40, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, past_key_values=MemoryCache(make_policy(name), 16), **settings)
    for row, length in enumerate(LENGTHS):
        single = ids[row : row + 1, PROMPT - length :]
        alone = model.generate(
            single,
            attention_mask=torch.ones_like(single),
            past_key_values=MemoryCache(make_policy(name), 16),
            **settings,
        )
        assert together[row, PROMPT:].tolist() == alone[0, length:].tolist()


TOTAL = 120


@given(
    name=st.sampled_from(POLICIES),
    cuts=st.lists(st.integers(1, TOTAL - 1), max_size=8, unique=True).map(sorted),
    pad=st.integers(0, 40),
)
def test_any_split(llama, tokens, make_policy, retained, name: str, cuts: list[int], pad: int) -> None:
    """Two rows, the second with fewer tokens, in one piece and in any pieces."""
    model, ids = llama(), tokens(TOTAL, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    whole, split = (MemoryCache(make_policy(name), INTERVAL) for _ in range(2))
    want = feed(model, whole, ids, mask)
    parts = [feed(model, split, ids[:, a:b], mask[:, :b]) for a, b in zip([0, *cuts], [*cuts, TOTAL], strict=True)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask == 1], want[mask == 1], atol=1e-4, rtol=0)
    assert retained(split) == retained(whole)
    mine, other = split.stats(), whole.stats()
    assert (mine.seen, mine.updates) == (other.seen, other.updates)
    assert mine.kept_at_updates == pytest.approx(other.kept_at_updates)


@pytest.mark.parametrize("budget", [None, 20])
def test_population_rows_equal_single_runs(llama, tokens, make_namm, retained, budget: int | None) -> None:
    model, seeds = llama(), (2, 4, 6, 0)
    members = [make_namm(seed) for seed in seeds]
    shared = members[0]  # the normaliser is the same for all
    vectors = torch.stack([m.to_vector() for m in members])
    ids = tokens(110, rows=4)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    cache = MemoryCache(policy("namm", namm=shared, vectors=vectors, budget=budget), INTERVAL)
    logits = torch.cat(
        [
            feed(model, cache, ids[:, :90], mask[:, :90]),
            *(feed(model, cache, ids[:, i : i + 1], mask[:, : i + 1]) for i in range(90, 110)),
        ],
        1,
    )
    counts = []
    for row, vector in enumerate(vectors):
        alone = NAMM.from_vector(vector, feature_mean=shared.feature_mean, feature_var=shared.feature_var)
        single = MemoryCache(policy("namm", namm=alone, budget=budget), INTERVAL)
        want = feed(model, single, ids[row : row + 1, mask[row] == 1])
        torch.testing.assert_close(logits[row][mask[row] == 1], want[0], atol=1e-4, rtol=0)
        assert [layer[row] for layer in retained(cache)] == [layer[0] for layer in retained(single)]
        counts.append(single.stats().retained.sum().item())
    assert budget is not None or len(set(counts)) > 1  # the members really differ


@pytest.mark.parametrize("name", ["full", "h2o", "namm"])
def test_cleared_rows_start_again(llama, tokens, make_policy, retained, name: str) -> None:
    """One row begins a new sequence while its neighbours go on."""
    model, ids = llama(), tokens(200, rows=3)
    cache = MemoryCache(make_policy(name), INTERVAL)
    mask = torch.ones(3, 70, dtype=torch.int64)
    feed(model, cache, ids[:, :70], mask)
    cache.clear_rows(torch.tensor([1]))
    mask[1] = 0
    logits = []
    for i in range(70, 130):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        logits.append(feed(model, cache, ids[:, i : i + 1], mask))
    together = torch.cat(logits, dim=1)
    for row, begin in ((0, 0), (1, 70), (2, 0)):
        alone = MemoryCache(make_policy(name), INTERVAL)
        want = feed(model, alone, ids[row : row + 1, begin:130])
        torch.testing.assert_close(together[row], want[0, -60:], atol=1e-4, rtol=0)
        assert [layer[row] for layer in retained(cache)] == [layer[0] for layer in retained(alone)]


def test_rows_without_a_new_token_stay_as_they_are(llama, tokens, make_policy, retained) -> None:
    """A row may be all padding in a call: nothing about it changes."""
    model, ids = llama(), tokens(100, rows=2)
    cache = MemoryCache(make_policy("namm"), INTERVAL)
    mask = torch.ones(2, 60, dtype=torch.int64)
    feed(model, cache, ids[:, :60], mask)
    before = [layer[1] for layer in retained(cache)]
    for i in range(60, 75):
        mask = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
        assert feed(model, cache, ids[:, i : i + 1], mask)[0].isfinite().all()
    assert [layer[1] for layer in retained(cache)] == before
    assert cache.stats().seen == [75, 60]
    alone = MemoryCache(make_policy("namm"), INTERVAL)
    feed(model, alone, ids[:1, :75])
    assert [layer[0] for layer in retained(cache)] == [layer[0] for layer in retained(alone)]


def test_reference_eviction_depends_on_the_batch(llama, tokens, make_namm) -> None:
    """Documented: every head of every row drops as many as the one that drops fewest."""
    cache = MemoryCache(policy("namm", namm=make_namm(), eviction="reference"), INTERVAL)
    feed(llama(), cache, tokens(96, rows=3))
    retained = cache.stats().retained
    assert all(len(layer.unique()) == 1 for layer in retained)
    assert (retained < 96).all()


@pytest.mark.parametrize("name", ["h2o", "namm"])
def test_masks_in_four_dimensions(llama, tokens, make_policy, retained, name: str) -> None:
    """A caller's own causal mask, bool or additive, is the same as none."""
    model, ids = llama(), tokens(90, rows=2)
    plain = MemoryCache(make_policy(name), INTERVAL)
    want = torch.cat([feed(model, plain, ids[:, :60]), feed(model, plain, ids[:, 60:])], dim=1)
    causal = torch.ones(1, 1, 90, 90, dtype=torch.bool).tril()
    for mask in (causal, torch.zeros(1, 1, 90, 90).masked_fill(~causal, torch.finfo(torch.float32).min)):
        cache = MemoryCache(make_policy(name), INTERVAL)
        with torch.no_grad():
            first = model(ids[:, :60], attention_mask=mask[:, :, :60, :60], past_key_values=cache).logits
            second = model(ids[:, 60:], attention_mask=mask[:, :, 60:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, second], dim=1), want, atol=1e-4, rtol=0)
        assert retained(cache) == retained(plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["bool", "additive"])
def test_padding_in_a_mask_of_four_dimensions_is_refused(llama, tokens, make_policy, side: str, form: str) -> None:
    """It would be counted as tokens: another number of decisions, at other points."""
    ids, mask = padded(tokens(PROMPT, rows=len(LENGTHS)), side)
    allowed = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    if form == "additive":
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with pytest.raises(UnsupportedModelError, match=r"may not see their own token.*attention_mask as \[B, S\]"):
        feed_masked(llama(), MemoryCache(make_policy("h2o"), INTERVAL), ids, allowed)


def test_a_mask_of_four_dimensions_after_padding_is_refused(llama, tokens, make_policy) -> None:
    """Its columns count padding, the memory's positions do not."""
    model, ids = llama(), tokens(60, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    cache = MemoryCache(make_policy("full"), INTERVAL)
    feed(model, cache, ids[:, :40], mask[:, :40])
    allowed = (torch.ones(60, 60, dtype=torch.bool).tril() & mask.bool()[:, None, None])[:, :, 40:]
    with pytest.raises(UnsupportedModelError, match=r"came after padding.*\[40, 30\] of 40"):
        feed_masked(model, cache, ids[:, 40:], allowed)


def test_a_mask_of_four_dimensions_has_the_rows_of_the_batch(llama, tokens, make_policy) -> None:
    causal = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(CacheError, match="the 4-D mask has 2 rows, but the batch has 3"):
        feed_masked(llama(), MemoryCache(make_policy("full"), INTERVAL), tokens(20, rows=3), causal)


def feed_masked(model: LlamaForCausalLM, cache: MemoryCache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of more tokens under a mask [rows, 1, count, seen + count]."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits
