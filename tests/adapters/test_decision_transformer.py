"""Decision transformers streamed through a memory against the wrapper's recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from namm_transfer import NAMM, adapt, policy
from namm_transfer.adapters.decision_transformer import DecisionTransformerHost
from namm_transfer.errors import CacheError, DataError

B, T, O, A = 3, 40, 5, 2


@pytest.fixture(scope="module")
def model() -> DecisionTransformerModel:
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        state_dim=O, act_dim=A, hidden_size=32, n_layer=2, n_head=2, max_ep_len=64, n_inner=64, n_positions=256
    )
    return DecisionTransformerModel(config).eval()


@pytest.fixture
def episode() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, O, generator=generator), torch.randn(B, T, generator=generator)


def wrapper_action(model: DecisionTransformerModel, states: Tensor, actions: Tensor, returns: Tensor) -> Tensor:
    """The action at the last of t timesteps, recomputed over all of them; the last action is a placeholder."""
    rows, t = states.shape[:2]
    padded = torch.cat([actions, torch.zeros(rows, 1, A)], dim=1)
    with torch.no_grad():
        out = model(
            states=states,
            actions=padded,
            returns_to_go=returns.unsqueeze(-1),
            timesteps=torch.arange(t).expand(rows, -1),
            attention_mask=torch.ones(rows, t, dtype=torch.long),
        )
    return out.action_preds[:, -1]


@pytest.mark.parametrize("name", ["full", "namm", "h2o", "streaming"])
def test_streaming_equals_the_wrapper(model, episode, name: str) -> None:
    states, returns = episode
    nothing_evicted = {"full": {}, "namm": {"namm": NAMM()}}
    chosen = policy(name, **nothing_evicted.get(name, {"budget": 1.0}))
    actions = torch.zeros(B, 0, A)
    with adapt(model, chosen, update_interval=48) as host:
        assert isinstance(host, DecisionTransformerHost)
        host.reset(B)
        for t in range(T):
            action = host.step(states[:, t], returns[:, t])
            expected = wrapper_action(model, states[:, : t + 1], actions, returns[:, : t + 1])
            torch.testing.assert_close(action, expected, atol=1e-5, rtol=0)
            actions = torch.cat([actions, action.unsqueeze(1)], dim=1)
        assert host.stats().seen == [3 * T - 1] * B


@pytest.mark.parametrize("name", ["namm", "h2o", "tova", "snapkv", "key_norm", "streaming", "random"])
def test_rows_that_reset_are_as_alone(model, episode, name: str) -> None:
    """Row 1 starts anew at timestep 13, row 2 at 21: each acts as if it were alone."""
    states, returns = episode
    flat = torch.randn(4172, generator=torch.Generator().manual_seed(3)) * 0.2
    chosen = policy("namm", namm=NAMM.from_vector(flat), budget=0.4) if name == "namm" else policy(name, budget=0.4)
    starts = [0, 13, 21]
    with adapt(model, chosen, update_interval=16) as host:
        host.reset(B)
        together = []
        for t in range(T):
            if t in starts[1:]:
                host.reset_rows(torch.tensor([starts.index(t)]))
            together.append(host.step(states[:, t], returns[:, t]))
        retained = host.stats().retained
        assert host.stats().kept_at_updates < 0.6
        for row, start in enumerate(starts):
            host.reset(1)
            for t in range(start, T):
                alone = host.step(states[row : row + 1, t], returns[row : row + 1, t])
                torch.testing.assert_close(together[t][row], alone[0], atol=1e-5, rtol=0)
            assert torch.equal(host.stats().retained[:, 0], retained[:, row])


def test_whole_sequence_call(model, episode) -> None:
    states, returns = episode
    inputs = {
        "states": states,
        "actions": torch.randn(B, T, A, generator=torch.Generator().manual_seed(2)),
        "returns_to_go": returns.unsqueeze(-1),
        "timesteps": torch.arange(T).expand(B, -1),
    }
    with torch.no_grad():
        expected = model(**inputs).action_preds
        with adapt(model, policy("h2o", budget=1.0), update_interval=48) as host:
            torch.testing.assert_close(host(**inputs).action_preds, expected, atol=1e-5, rtol=0)
            rest = {k: v for k, v in inputs.items() if k != "states"}
            torch.testing.assert_close(host(states, **rest).action_preds, expected, atol=1e-5, rtol=0)
        with adapt(model, policy("h2o", budget=0.3), update_interval=48) as host:
            assert (host(**inputs).action_preds - expected).abs().max() > 1e-4
            assert host.stats().kept_at_updates == pytest.approx(0.3, abs=0.02)
        assert torch.equal(model(**inputs).action_preds, expected)
    assert model.config._attn_implementation != "namm"


def test_bad_input(model, episode) -> None:
    states, returns = episode
    with adapt(model, policy("full")) as host:
        with pytest.raises(CacheError, match="reset"):
            host.step(states[:, 0], returns[:, 0])
        host.reset(B)
        with pytest.raises(DataError, match=r"expected states \(3, 5\).*got \(3, 4\)"):
            host.step(states[:, 0, :4], returns[:, 0])
        with pytest.raises(DataError, match="NaN"):
            host.step(states[:, 0] * float("nan"), returns[:, 0])
        for t in range(64):
            host.step(states[:, t % T], returns[:, t % T])
        with pytest.raises(DataError, match="timestep 64"):
            host.step(states[:, 0], returns[:, 0])
