"""The random control: one score a token for life, uniform, and independent of everything but its own place."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from namm_transfer import policy
from namm_transfer.policies import LayerView
from namm_transfer.store import TokenStore


def scores(count: int, *, heads: int = 1, layer: int = 0, seed: int = 0, start: int = 0) -> Tensor:
    """[heads, count] scores of the positions from ``start`` on."""
    positions = torch.arange(start, start + count, dtype=torch.int32).expand(1, heads, count)
    store = TokenStore({"positions": positions}, torch.full((1, heads), count), count, True)
    view = LayerView(store, layer, (0, 1), start + count, start + count, 16)
    return policy("random", budget=1, seed=seed).scores(view)[0]


def test_uniform() -> None:
    drawn = scores(20_000, heads=4)
    for head in drawn:
        assert stats.kstest(head.numpy(), "uniform").pvalue > 1e-3


def test_what_a_budget_keeps_is_uniform_over_positions() -> None:
    counts = torch.zeros(8)
    for seed in range(60):
        kept = scores(512, heads=2, seed=seed).topk(64).indices
        counts += torch.bincount(kept.flatten() // 64, minlength=8)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_heads_layers_and_seeds_are_unrelated() -> None:
    drawn = [
        *scores(4096, heads=3),
        scores(4096, layer=1)[0],
        scores(4096, seed=1)[0],
        scores(4096, layer=5, seed=9)[0],
    ]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlation.abs().max() < 5 / 4096**0.5


def test_neighbours_are_unrelated() -> None:
    drawn = scores(8192)[0]
    for lag in (1, 2, 16, 512):
        pair = torch.stack([drawn[:-lag], drawn[lag:]])
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / 8192**0.5


def test_for_life() -> None:
    assert torch.equal(scores(100, heads=2)[:, 40:], scores(60, heads=2, start=40))
