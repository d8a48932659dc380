"""A threshold is a shift of the scores: what a NAMM with another last bias would evict."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from namm_transfer import NAMM, MemoryCache, policy
from namm_transfer.policies import Policy


@pytest.fixture
def vector() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 0.3, 4172)).float()


def kept(model: PreTrainedModel, memory: Policy) -> list[torch.Tensor]:
    cache = MemoryCache(memory, update_interval=48)
    with torch.no_grad():
        model(torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 96))), past_key_values=cache)
    return [layer.tokens["positions"] for layer in cache.layers]


@pytest.mark.parametrize("threshold", [-0.3, 0.25, np.float32(0.5), 1])
def test_a_threshold_is_a_shift_of_the_last_bias(
    llama: Callable[..., PreTrainedModel], vector: torch.Tensor, threshold: float
) -> None:
    model, shifted = llama(), vector.clone()
    shifted[-1] -= float(threshold)
    found = kept(model, policy("namm", namm=NAMM.from_vector(vector), threshold=threshold))
    expected = kept(model, policy("namm", namm=NAMM.from_vector(shifted)))
    unmoved = kept(model, policy("namm", namm=NAMM.from_vector(vector)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert any(one.shape != other.shape or (one != other).any() for one, other in zip(found, unmoved, strict=True))


def test_it_is_described_where_there_is_one(vector: torch.Tensor) -> None:
    namm = NAMM.from_vector(vector)
    assert "threshold" not in policy("namm", namm=namm).describe()
    assert policy("namm", namm=namm, threshold=0.5).describe()["threshold"] == 0.5
