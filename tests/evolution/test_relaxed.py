"""A relaxed reading reads what an ordinary one reads, and its gradient says what would help."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from namm_transfer import NAMM, policy
from namm_transfer.errors import UnsupportedModelError
from namm_transfer.evolution.page import Sample
from namm_transfer.evolution.population import Condition, read_sample
from namm_transfer.evolution.relaxed import _through, read_relaxed
from namm_transfer.network import unflatten

LENGTH, INTERVAL = 150, 64
BUDGETS = (0.2, None, 0.5)


@pytest.fixture
def model(llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return llama().requires_grad_(False)


@pytest.fixture
def namm() -> NAMM:
    return NAMM.from_vector(
        torch.from_numpy(np.random.default_rng(0).normal(0, 0.3, 4172)).float(),
        feature_mean=torch.full((17,), 0.02),
        feature_var=torch.full((17,), 0.001),
    )


def sample(first_target: int = 130) -> Sample:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 256, LENGTH))
    return Sample("needles", "none", ids, torch.arange(first_target, LENGTH, 3))


@pytest.mark.parametrize("earlier", [0.4, None])
def test_forward_it_is_the_ordinary_reading(model: PreTrainedModel, namm: NAMM, earlier: float | None) -> None:
    # with one budget throughout, and the decision at 128 the last of both, they do the same
    budgets = (earlier,)
    found = read_relaxed(model, sample(), Condition(earlier, INTERVAL), namm, budgets, price=1.0)
    everything = read_relaxed(model, sample(), Condition(earlier, INTERVAL), namm, (1.0,), price=1.0)
    assert found is not None and everything is not None
    plain = read_sample(model, sample(), policy("namm", namm=namm, budget=earlier), INTERVAL)
    single = read_sample(model, sample(), policy("namm", namm=namm, budget=earlier), 128)
    first = read_relaxed(model, sample(), Condition(earlier, 128), namm, budgets, price=1.0)
    full = read_sample(model, sample(), policy("full"), 128)
    assert first is not None
    # one decision at 128: nothing was evicted before, so the difference is to the full cache itself
    expected = float(single.log_likelihood[0] - full.log_likelihood[0])
    assert float(first.difference[0]) == pytest.approx(expected, abs=2e-5)
    assert float(first.kept[0]) == pytest.approx(float(single.kept[0]), abs=1e-6)
    assert abs(expected) > 1e-4
    # two decisions: after an eviction at 64 that both made, the second one is relaxed
    assert float(everything.difference[0]) == pytest.approx(0.0, abs=2e-5)
    kept = (float(plain.kept[0]) * 2 - float(first_decision(model, namm, earlier))) if earlier is None else 0.4
    assert float(found.kept[0]) == pytest.approx(kept, abs=0.01)


def first_decision(model: PreTrainedModel, namm: NAMM, budget: float | None) -> float:
    short = Sample("needles", "none", sample().input_ids[:100], torch.arange(80, 100))
    return float(read_sample(model, short, policy("namm", namm=namm, budget=budget), INTERVAL).kept[0])


def test_what_changes_no_decision_has_no_gradient(model: PreTrainedModel, namm: NAMM) -> None:
    found = read_relaxed(model, sample(), Condition(0.4, INTERVAL), namm, (0.2, 0.5), price=1.0)
    assert found is not None
    scale = found.gradient.abs().max()
    assert scale > 1e-6
    vector, weights = namm.to_vector(), unflatten(found.gradient.unsqueeze(0))
    assert abs(float(weights.b)) < 1e-4 * float(scale)  # ranks do not know the last bias,
    read_out = unflatten(torch.zeros(1, 4172))
    read_out.w.copy_(unflatten(vector.unsqueeze(0)).w)  # nor the scale of the read-out (but that the edge is smooth)
    along = float((weights.w * read_out.w).sum())
    assert abs(along) < 0.04 * float(weights.w.norm() * read_out.w.norm())


def test_the_price_closes_gates_by_threshold(model: PreTrainedModel, namm: NAMM) -> None:
    def pull(price: float) -> float:
        found = read_relaxed(model, sample(), Condition(None, INTERVAL), namm, (None,), price)
        assert found is not None
        return float(unflatten(found.gradient.unsqueeze(0)).b)

    assert pull(100.0) < pull(1.0) < pull(0.0)
    assert pull(100.0) - pull(0.0) == pytest.approx(100 * (pull(1.0) - pull(0.0)), rel=1e-2)


def test_uphill_is_better(model: PreTrainedModel, namm: NAMM) -> None:
    def climb(vector: torch.Tensor) -> tuple[float, torch.Tensor]:
        here = NAMM.from_vector(vector, feature_mean=namm.feature_mean, feature_var=namm.feature_var)
        found = read_relaxed(model, sample(), Condition(0.2, 128), here, (0.2,), price=0.0)
        assert found is not None
        return float(found.difference[0]), found.gradient

    vector = namm.to_vector()
    first, _ = climb(vector)
    best = first
    for _ in range(30):
        _, gradient = climb(vector)
        vector = vector + 0.05 * gradient / gradient.norm()
        best = max(best, climb(vector)[0])
    assert best > first + 0.005


def test_an_evicted_tokens_gradient_is_what_its_return_would_change() -> None:
    rng = np.random.default_rng(3)
    weights, new, values = (torch.from_numpy(rng.random(shape)) for shape in ((1, 1, 1, 6), (1, 1, 1, 2), (8, 3)))
    weights[..., 2] *= 50  # most of the attention was evicted

    def output(gates: torch.Tensor) -> torch.Tensor:
        gated = _through(weights, gates, new)
        joined = torch.cat([gated, new], -1)
        return (joined / joined.sum(-1, keepdim=True) @ values).flatten()

    gates = torch.tensor([1.0, 1, 0, 1, 0, 1], dtype=torch.float64).view(1, 1, 1, 6)
    slopes = torch.autograd.functional.jacobian(output, gates).flatten(1)
    for token in (2, 4):
        returned = gates.clone()
        returned[..., token] = 1
        change = output(returned) - output(gates)
        torch.testing.assert_close(slopes[:, token], change, atol=1e-9, rtol=1e-9)


def test_no_decision_before_the_answers(model: PreTrainedModel, namm: NAMM) -> None:
    assert read_relaxed(model, sample(20), Condition(0.3, 96), namm, BUDGETS, price=1.0) is None


def test_answers_before_the_decision_do_not_count(model: PreTrainedModel, namm: NAMM) -> None:
    early = sample(60)  # 60, 63, ..., the decision at 64
    late = Sample("needles", "none", early.input_ids, early.targets[early.targets > INTERVAL])
    condition = Condition(0.3, INTERVAL)
    found = [read_relaxed(model, given, condition, namm, (0.3,), price=1.0) for given in (early, late)]
    assert found[0] is not None and found[1] is not None
    torch.testing.assert_close(found[0].difference, found[1].difference)


def test_a_host_with_more_than_causal_attention_is_refused(namm: NAMM, llama: Callable[..., PreTrainedModel]) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="namm",
    )
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="descent_steps=0"):
        read_relaxed(model, sample(), Condition(0.3, INTERVAL), namm, (0.3,), price=1.0)
