"""Heads that compete for a budget keep the best of all their tokens, and as many as they would one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from namm_transfer import NAMM, MemoryCache, policy
from namm_transfer.errors import ConfigError
from namm_transfer.policies import LayerView
from namm_transfer.store import TokenStore


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=3), min_size=1, max_size=2).filter(
        lambda rows: len({len(row) for row in rows}) == 1
    ),
    budget=st.integers(1, 8),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_the_best_of_all_heads_stay(lengths: list[list[int]], budget: int, seed: int, ties: bool) -> None:
    counts = torch.tensor(lengths)
    width = int(counts.max())
    rng = np.random.default_rng(seed)
    shape = (*counts.shape, width)
    drawn = rng.integers(0, 3, shape) if ties else rng.normal(size=shape)
    scores = torch.from_numpy(drawn).float()
    store = TokenStore.from_padded({"positions": torch.arange(width, dtype=torch.int32).expand(shape)}, counts)
    view = LayerView(store, 0, (0, len(counts)), 12, 12, 16)
    keep = policy("h2o", budget=budget, allocation="per_layer").rank(view, scores)
    for row, of_row in enumerate(lengths):
        tokens = [
            (place == length - 1, float(scores[row, head, place]), bool(keep[row, head, place]))
            for head, length in enumerate(of_row)
            for place in range(length)
        ]
        kept = sorted(token[:2] for token in tokens if token[2])
        assert len(kept) == min(budget * len(of_row), sum(of_row))
        assert kept == sorted(sorted((token[:2] for token in tokens), reverse=True)[: len(kept)])
        assert all(keep[row, head, length - 1] for head, length in enumerate(of_row))
    assert not (keep & ~view.valid()).any()


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.lists(st.integers(1, 14), min_size=2, max_size=2), min_size=1, max_size=2),
    budget=st.integers(1, 12),
    parts=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    allocation=st.sampled_from(["per_head", "per_layer"]),
)
def test_each_kind_has_its_part_of_the_budget(
    lengths: list[list[int]], budget: int, parts: list[int], seed: int, allocation: str
) -> None:
    counts, seen, kinds, rng = torch.tensor(lengths), 20, len(parts), np.random.default_rng(seed)
    positions = _positions(lengths, seen, rng)
    scores = rng.integers(0, 4, positions.shape)
    store = TokenStore.from_padded({"positions": torch.from_numpy(positions).int()}, counts)
    chosen = policy("h2o", budget=budget, allocation=allocation, kinds=kinds if set(parts) == {1} else parts)
    exact = [budget * part / sum(parts) for part in parts]
    left = budget - sum(int(part) for part in exact)
    keep = chosen.rank(LayerView(store, 0, (0, len(counts)), seen, seen, 16), torch.from_numpy(scores).float())
    for row, of_row in enumerate(lengths):
        pools = [[0, 1]] if allocation == "per_layer" else [[0], [1]]
        for pool in pools:
            for kind in range(kinds):
                tokens = [
                    (positions[row, head, place] == seen - 1, scores[row, head, place], bool(keep[row, head, place]))
                    for head in pool
                    for place in range(of_row[head])
                    if positions[row, head, place] % kinds == kind
                ]
                extra = (seen - 1 - kind) % kinds < left  # the newest token's kind comes first
                share = (int(exact[kind]) + extra) * len(pool)
                kept = sorted(token[:2] for token in tokens if token[2])
                assert len(kept) == min(share, len(tokens))
                assert kept == sorted(sorted((token[:2] for token in tokens), reverse=True)[: len(kept)])
    assert keep.gather(2, (counts - 1).unsqueeze(-1)).all()


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.lists(st.integers(1, 14), min_size=2, max_size=2), min_size=1, max_size=2),
    budget=st.integers(1, 12),
    segment=st.integers(1, 9),
    kinds=st.integers(1, 2),
    seed=st.integers(0, 99),
    allocation=st.sampled_from(["per_head", "per_layer"]),
)
def test_segments_take_turns_at_the_budget(
    lengths: list[list[int]], budget: int, segment: int, kinds: int, seed: int, allocation: str
) -> None:
    counts, seen = torch.tensor(lengths), 20
    positions = _positions(lengths, seen, np.random.default_rng(seed))
    scores = np.random.default_rng(seed + 1).permutation(positions.size).reshape(positions.shape)
    store = TokenStore.from_padded({"positions": torch.from_numpy(positions).int()}, counts)
    chosen = policy("h2o", budget=budget, allocation=allocation, segment=segment, kinds=kinds)
    keep = chosen.rank(LayerView(store, 0, (0, len(counts)), seen, seen, 16), torch.from_numpy(scores).float())
    for row, of_row in enumerate(lengths):
        for pool in [[0, 1]] if allocation == "per_layer" else [[0], [1]]:
            for kind in range(kinds):
                extra = (seen - 1 - kind) % kinds < budget % kinds
                queues: dict[int, list[tuple[bool, int, tuple[int, int]]]] = {}
                for head in pool:
                    for place, position in enumerate(positions[row, head, : of_row[head]]):
                        if position % kinds == kind:
                            token = (bool(position == seen - 1), int(scores[row, head, place]), (head, place))
                            queues.setdefault(position // segment, []).append(token)
                ranks = [
                    (not newest, turn, -score, where)
                    for queue in queues.values()
                    for turn, (newest, score, where) in enumerate(sorted(queue, reverse=True))
                ]
                share = (budget // kinds + extra) * len(pool)
                expected = {where for *_, where in sorted(ranks)[:share]}
                found = {
                    (head, place)
                    for head in pool
                    for place in range(of_row[head])
                    if keep[row, head, place] and positions[row, head, place] % kinds == kind
                }
                assert found == expected
    assert keep.gather(2, (counts - 1).unsqueeze(-1)).all()
    assert not (keep & ~store.valid()).any()


def _positions(lengths: list[list[int]], seen: int, rng: np.random.Generator) -> np.ndarray:
    """[R, K, N] of some earlier tokens and the newest."""
    positions = np.zeros((len(lengths), len(lengths[0]), max(map(max, lengths))), np.int64)
    for row, of_row in enumerate(lengths):
        for head, length in enumerate(of_row):
            positions[row, head, :length] = [*sorted(rng.choice(seen - 1, length - 1, replace=False)), seen - 1]
    return positions


@pytest.mark.parametrize(
    ("name", "stays"), [("streaming", range(4)), ("h2o", range(152, 160)), ("snapkv", range(144, 160))]
)
def test_what_a_rule_never_evicts_stays_whatever_its_segment(name: str, stays: range) -> None:
    positions = torch.arange(160, dtype=torch.int32).view(1, 1, -1)
    chosen = policy(name, budget=24 if name == "snapkv" else 16, segment=16)
    fields = {"positions": positions}
    for field, (shape, dtype) in chosen.fields(torch.float32).items():
        fields[field] = torch.rand(1, 1, 160, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = LayerView(TokenStore.from_padded(fields, torch.tensor([[160]])), 0, (0, 1), 160, 160, 16)
    kept = chosen.decide(view).nonzero()[:, 2].tolist()
    assert len(kept) == chosen.budget
    assert {*stays} <= {*kept}


@pytest.mark.parametrize("divided", [{"segment": 16}, {"kinds": 3}, {"kinds": [2, 1]}])
def test_what_is_divided_must_be_there(divided: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="kinds and segment divide a budget, and there is none"):
        policy("namm", namm=NAMM.from_pretrained("default"), **divided)


@pytest.mark.parametrize("segment", [0, -1, 16.0, True, "16"])
def test_a_segment_is_counted(segment: object) -> None:
    with pytest.raises(ConfigError, match="segment must be an int of at least 1"):
        policy("h2o", budget=3, segment=segment)


@pytest.mark.parametrize("kinds", [0, 2.0, True, [2, 0], [1.5], "31", []])
def test_kinds_are_counted(kinds: object) -> None:
    with pytest.raises(ConfigError, match="kinds must be an int of at least 1"):
        policy("h2o", budget=3, kinds=kinds)


def test_heads_keep_different_numbers_of_tokens_within_the_layers_budget(
    llama: Callable[..., PreTrainedModel],
) -> None:
    vector = torch.from_numpy(np.random.default_rng(0).normal(0, 0.3, 4172)).float()
    chosen = policy("namm", namm=NAMM.from_vector(vector), budget=0.4, allocation="per_layer")
    cache = MemoryCache(chosen, update_interval=48)
    with torch.no_grad():
        llama()(torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 96))), past_key_values=cache)
    for layer in cache.layers:
        assert layer.tokens.lengths.sum(1).tolist() == [round(0.4 * 96) * layer.tokens.lengths.shape[1]] * 2
        assert len(set(layer.tokens.lengths.flatten().tolist())) > 1


def test_an_unknown_allocation_is_refused() -> None:
    with pytest.raises(ConfigError, match="allocation must be one of"):
        policy("h2o", budget=3, allocation="per_model")
