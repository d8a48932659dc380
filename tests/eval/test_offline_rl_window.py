"""The window agent against an unbatched, unpadded oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.host import Normalisation
from namm_transfer.eval.offline_rl.scores import ReturnSummary
from namm_transfer.eval.offline_rl.window import WindowAgent

LONGEST = 12


@pytest.fixture(scope="module")
def model() -> DecisionTransformerModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DecisionTransformerConfig(
            state_dim=4, act_dim=2, hidden_size=16, n_layer=2, n_head=2, max_ep_len=LONGEST
        )
        model = DecisionTransformerModel(config).eval()
        for parameter in model.parameters():  # larger than the initial weights, so that context matters
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


NORMALISATION = Normalisation(
    env_id="Tiny-v0",
    state_mean=(0.5, -0.5, 1.0, 0.0),
    state_std=(1.0, 2.0, 0.5, 3.0),
    return_scale=10.0,
    window=3,
    target_return=25.0,
    random=ReturnSummary(0.0, 1.0, 2),
    behaviour=ReturnSummary(1.0, 1.0, 2),
)


class Oracle:
    """One episode, all of it kept; the last K timesteps are cut out and fed without any padding."""

    def __init__(self, model: DecisionTransformerModel, window: int) -> None:
        self.model, self.window = model, window
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.to_go: list[float] = []

    def act(self, observation: np.ndarray, reward: float) -> np.ndarray:
        self.states.append((observation - NORMALISATION.state_mean) / NORMALISATION.state_std)
        self.to_go.append(self.to_go[-1] - reward / 10.0 if self.to_go else 2.5)
        now, past = len(self.states), slice(-self.window, None)
        actions = np.stack([*self.actions, np.zeros(2)])[past]
        with torch.inference_mode():
            action = self.model(
                states=torch.tensor(np.stack(self.states)[None, past], dtype=torch.float32),
                actions=torch.tensor(actions[None], dtype=torch.float32),
                returns_to_go=torch.tensor(self.to_go[past], dtype=torch.float32)[None, :, None],
                timesteps=torch.arange(max(0, now - self.window), now)[None],
            ).action_preds[0, -1]
        self.actions.append(action.numpy())
        return self.actions[-1]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_rows_of_different_ages_match_the_oracle(model: DecisionTransformerModel, window: int) -> None:
    generator = np.random.default_rng(1)
    agent = WindowAgent(model, NORMALISATION, 3, window=window)
    agent.reset(np.arange(3))
    oracles = [Oracle(model, window) for _ in range(3)]
    starts = {2: [1], 5: [0, 2]}  # rows whose episode ends before this step
    seen = []
    for step in range(9):
        rewards = generator.standard_normal(3)
        if step in starts:
            agent.reset(np.array(starts[step]))
            rewards[starts[step]] = 0.0
            for row in starts[step]:
                oracles[row] = Oracle(model, window)
        observations = generator.standard_normal((3, 4))
        actions = agent.act(observations, rewards)
        wanted = np.stack([o.act(x, r) for o, x, r in zip(oracles, observations, rewards, strict=True)])
        np.testing.assert_allclose(actions, wanted, atol=1e-5)
        seen.append(actions)
    assert np.std(seen) > 0.05, "the model ignores its inputs, so the comparison shows nothing"


def test_window_matters(model: DecisionTransformerModel) -> None:
    observations = np.random.default_rng(2).standard_normal((6, 1, 4))
    agents = [WindowAgent(model, NORMALISATION, 1, window=window) for window in (2, 5)]
    last = [[agent.act(o, np.ones(1)) for o in observations][-1] for agent in agents]
    assert np.abs(last[0] - last[1]).max() > 1e-3


def test_target_return_matters(model: DecisionTransformerModel) -> None:
    observation = np.zeros((1, 4))
    low, high = (WindowAgent(model, NORMALISATION, 1, target_return=t) for t in (0.0, 50.0))
    assert np.abs(low.act(observation, np.zeros(1)) - high.act(observation, np.zeros(1))).max() > 1e-3


def test_episode_beyond_the_timestep_embeddings_is_refused(model: DecisionTransformerModel) -> None:
    agent = WindowAgent(model, NORMALISATION, 1)
    for _ in range(LONGEST):
        agent.act(np.zeros((1, 4)), np.zeros(1))
    with pytest.raises(DataError, match="timestep 12"):
        agent.act(np.zeros((1, 4)), np.zeros(1))
    agent.reset(np.array([0]))
    agent.act(np.zeros((1, 4)), np.zeros(1))


def test_empty_window_is_refused(model: DecisionTransformerModel) -> None:
    with pytest.raises(ConfigError, match="window 0"):
        WindowAgent(model, NORMALISATION, 1, window=0)
