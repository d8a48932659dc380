"""Playing environments with `act`: each row as alone, whatever the others do, and errors that change nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from namm_transfer import NAMM, MemoryCache, adapt, policy
from namm_transfer.errors import CacheError, ConfigError, DataError

T, O, A = 60, 5, 2
NORMALISATION = SimpleNamespace(
    state_mean=(0.5, -0.5, 1.0, 0.0, 2.0), state_std=(1.0, 2.0, 0.5, 3.0, 1.5), return_scale=10.0, target_return=25.0
)


@pytest.fixture(scope="module")
def model() -> DecisionTransformerModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DecisionTransformerConfig(
            state_dim=O, act_dim=A, hidden_size=32, n_layer=2, n_head=2, max_ep_len=64, n_inner=64
        )
        model = DecisionTransformerModel(config).eval().requires_grad_(False)
        for parameter in model.parameters():  # larger than the initial weights, so that context matters
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_policy(name: str):
    if name == "full":
        return policy("full")
    if name == "namm":
        flat = torch.randn(4172, generator=torch.Generator().manual_seed(3)) * 0.2
        return policy("namm", namm=NAMM.from_vector(flat), budget=0.4)
    return policy(name, budget=0.4)


def stream(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Observations [T, rows, O] and rewards [T, rows]."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((T, rows, O)), generator.standard_normal((T, rows))


class Oracle:
    """One episode, all of it recomputed by the unmodified model at each step."""

    def __init__(self, model: DecisionTransformerModel, target: float) -> None:
        self.model, self.target = model, target
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.to_go: list[float] = []

    def act(self, observation: np.ndarray, reward: float) -> np.ndarray:
        self.states.append((observation - NORMALISATION.state_mean) / NORMALISATION.state_std)
        self.to_go.append(self.to_go[-1] - reward / 10.0 if self.to_go else self.target / 10.0)
        with torch.no_grad():
            found = self.model(
                states=torch.tensor(np.stack(self.states)[None], dtype=torch.float32),
                actions=torch.tensor(np.stack([*self.actions, np.zeros(A)])[None], dtype=torch.float32),
                returns_to_go=torch.tensor(self.to_go, dtype=torch.float32)[None, :, None],
                timesteps=torch.arange(len(self.states))[None],
            ).action_preds[0, -1]
        self.actions.append(found.numpy())
        return self.actions[-1]


def test_rows_that_reset_act_as_the_unmodified_model(model) -> None:
    """Row 0 plays through, row 1 starts anew twice, once with a target of its own, row 2 at every step."""
    observations, rewards = stream(3)
    oracles = [Oracle(model, 25.0) for _ in range(3)]
    with adapt(model, policy("full"), normalisation=NORMALISATION) as host:
        host.reset(3)
        for t in range(T):
            anew = [False, t in (7, 30), t > 0]
            if any(anew):
                targets = np.array([25.0, 10.0 if t == 30 else 25.0, 25.0])[anew]
                host.reset_rows(np.array(anew), targets)
                for row in np.flatnonzero(anew):
                    oracles[row] = Oracle(model, 10.0 if (row, t) == (1, 30) else 25.0)
            found = host.act(observations[t], rewards[t] if t else None)
            wanted = [oracle.act(*pair) for oracle, *pair in zip(oracles, observations[t], rewards[t], strict=True)]
            np.testing.assert_allclose(found, wanted, atol=2e-5)
        assert host.cache.get_seq_length() == 0, "a mask of everything since the first reset would be needed"
        assert host.stats().seen == [3 * T - 1, 3 * (T - 30) - 1, 2]


@pytest.mark.parametrize("name", ["namm", "h2o", "tova", "snapkv", "key_norm", "streaming", "random", "full"])
def test_each_row_is_exactly_as_alone(model, name: str) -> None:
    """Eight rows that start anew at random; the same for every policy, whose decisions fall at other times in each."""
    rows, chosen = 8, make_policy(name)
    observations, rewards = stream(rows)
    done = np.random.default_rng(2).random((T, rows)) < 0.04
    with adapt(model, chosen, update_interval=16, normalisation=NORMALISATION) as host:
        host.reset(rows)
        together = []
        for t in range(T):
            host.reset_rows(done[t])
            together.append(host.act(observations[t], rewards[t]))
        retained = host.stats().retained
        assert len(set(host.stats().seen)) > 3, "the rows are at different points"
        for row in range(rows):
            host.reset(1)
            for t in range(T):
                host.reset_rows(done[t, row : row + 1])
                alone = host.act(observations[t, row : row + 1], rewards[t, row : row + 1])
                np.testing.assert_allclose(together[t][row], alone[0], atol=1e-5)
            assert torch.equal(host.stats().retained[:, 0], retained[:, row])


class Noise(gymnasium.Env):
    """Random observations and rewards; a row that falls ends its first episode after 20 timesteps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (O,), np.float64)
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (A,), np.float32)

    def __init__(self, falls: bool) -> None:
        self.falls, self.generator = falls, np.random.default_rng(int(falls))

    def reset(self, *, seed=None, options=None) -> tuple[np.ndarray, dict]:
        self.t = 0
        return self.generator.standard_normal(O), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        fell = self.falls and self.t == 20
        self.falls = self.falls and not fell
        return self.generator.standard_normal(O), float(self.generator.standard_normal()), fell, False, {}


def test_environments_that_reset_in_the_next_step_are_played_to_the_models_last_timestep(model) -> None:
    """Row 0 ends by the time limit, row 1 earlier too; each episode is as one that began with `reset`."""
    limit = model.config.max_ep_len
    makes = [lambda falls=falls: gymnasium.wrappers.TimeLimit(Noise(falls), limit) for falls in (False, True)]
    envs = SyncVectorEnv(makes, autoreset_mode=AutoresetMode.NEXT_STEP)
    played = [[[]], [[]]]  # row, episode, timestep: observation, reward before it, action
    with adapt(model, policy("h2o", budget=0.4), update_interval=16, normalisation=NORMALISATION) as host:
        host.reset(2)
        observation, reward = envs.reset()[0], None
        done = np.zeros(2, bool)
        for _ in range(2 * limit + 10):
            action = host.act(observation, reward)
            for row in np.flatnonzero(~done):
                played[row][-1].append((observation[row], 0.0 if reward is None else reward[row], action[row]))
            observation, reward, terminated, truncated, _ = envs.step(action)
            ignored, done = done, terminated | truncated
            host.reset_rows(ignored | done)
            for row in np.flatnonzero(done):
                played[row].append([])
        assert [[len(episode) for episode in row] for row in played] == [[limit, limit, 8], [20, limit, 52]]
        for episode in (episode for row in played for episode in row):
            host.reset(1)
            for shown, earned, acted in episode:
                np.testing.assert_allclose(host.act(shown[None], [earned])[0], acted, atol=1e-5)
    envs.close()


def test_arrays_give_arrays_and_tensors_tensors(model) -> None:
    observations, _ = stream(2)
    with adapt(model, policy("full"), normalisation=NORMALISATION) as host:
        host.reset(2)
        array = host.act(observations[0])
        host.reset(2)
        tensor = host.act(torch.from_numpy(observations[0]))
    assert (array.shape, array.dtype) == ((2, A), np.float32)
    np.testing.assert_array_equal(array, tensor.numpy())


def test_a_decision_falls_every_16_timesteps_by_default(model) -> None:
    observations, rewards = stream(2)
    with adapt(model, policy("h2o", budget=0.5), normalisation=NORMALISATION) as host:
        host.reset(2)
        for t in range(33):
            host.act(observations[t], rewards[t])
        assert host.update_interval == 48
        assert host.stats().updates_by_row == [2 * 2, 2 * 2]  # of two layers
        assert host.stats().kept_at_updates == pytest.approx(0.5)
    assert adapt(torch_lm(), policy("full")).update_interval == 512


def torch_lm():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def test_an_error_changes_nothing(model) -> None:
    observations, rewards = stream(2)
    with adapt(model, policy("h2o", budget=0.4), update_interval=16, normalisation=NORMALISATION) as host:
        host.reset(2)
        undisturbed = [host.act(observations[t], rewards[t]) for t in range(20)]
        host.reset(2)
        for t in range(20):
            broken = observations[t].copy()
            broken[1, 3] = np.nan
            for bad, earned, message in (
                (broken, rewards[t], r"rows \[1\] hold values that are NaN"),
                (observations[t, :, :4], rewards[t], r"expected observations \(2, 5\).*got \(2, 4\)"),
                (observations[t, :1], rewards[t], r"got \(1, 5\)"),
                (observations[t] * [[1.0], [1e38]], rewards[t], r"rows \[1\] are too large for the model"),
            ):
                with pytest.raises(DataError, match=message):
                    host.act(bad, earned)
            if t:
                for earned, message in (
                    (np.array([1.0, np.inf]), r"rows \[1\]"),
                    (rewards[t, :1], r"expected rewards \(2,\)"),
                    (None, "needs the rewards"),
                ):
                    with pytest.raises(DataError, match=message):
                        host.act(observations[t], earned)
            np.testing.assert_array_equal(host.act(observations[t], rewards[t]), undisturbed[t])


def test_what_is_missing_or_does_not_fit_is_told(model) -> None:
    observations, _ = stream(2)
    with adapt(model, policy("full")) as host:
        with pytest.raises(CacheError, match="reset"):
            host.act(observations[0])
        host.reset(2)
        with pytest.raises(ConfigError, match="normalisation="):
            host.act(observations[0])
    short = SimpleNamespace(**{**vars(NORMALISATION), "state_std": (1.0,) * 4})
    with pytest.raises(ConfigError, match="5 means and 4 standard deviations.*takes 5"):
        adapt(model, policy("full"), normalisation=short)
    with adapt(model, policy("full"), normalisation=NORMALISATION) as host:
        with pytest.raises(CacheError, match="reset"):
            host.reset_rows([0])
        for count in (0, True, np.True_, 2.0, "2"):
            with pytest.raises(ConfigError, match="rows must be an int"):
                host.reset(count)
        with pytest.raises(DataError, match="one for each of 2 rows"):
            host.reset(2, target_return=[1.0, 2.0, 3.0])
        host.reset(np.int64(2), target_return=torch.tensor([1.0, 2.0], requires_grad=True))
        host.reset_rows([])
        for rows in ([2], [-1], [0.5], [[0]], [1, 1], [[0], [1, 2]], "all"):
            with pytest.raises(DataError, match="reset_rows"):
                host.reset_rows(rows)
        host.reset(3)
        with pytest.raises(DataError, match="a mask of bool"):
            host.reset_rows(torch.tensor([0, 1, 1], dtype=torch.uint8))
    for wrong in (vars(NORMALISATION), "normalisation.json"):
        with pytest.raises(ConfigError, match=r"without state_mean, .*such as the one that load_host returns"):
            adapt(model, policy("full"), normalisation=wrong)
    for change in ({"state_std": (0.0,) * 5}, {"return_scale": -1.0}, {"state_mean": (np.nan,) * 5}):
        with pytest.raises(ConfigError, match="must be finite, its deviations and scale positive"):
            adapt(model, policy("full"), normalisation=SimpleNamespace(**{**vars(NORMALISATION), **change}))
    with adapt(model, policy("full")) as host, pytest.raises(ConfigError, match="target_return is raw"):
        host.reset(2, target_return=3.0)


def test_a_host_that_is_not_laid_over_its_model_says_so(model) -> None:
    host = adapt(model, policy("full"), normalisation=NORMALISATION)
    host.reset(2)
    for call in (lambda: host.act(np.zeros((2, O))), lambda: host(states=torch.zeros(1, 1, O))):
        with pytest.raises(CacheError, match="use the host inside its with block"):
            call()


def test_weights_that_give_no_actions_end_the_episodes(model) -> None:
    broken = copy.deepcopy(model)
    broken.encoder.h[1].mlp.c_fc.bias.fill_(np.nan)
    with adapt(broken, policy("full"), normalisation=NORMALISATION) as host:
        host.reset(2)
        with pytest.raises(DataError, match="actions are NaN or infinite"):
            host.act(np.zeros((2, O)))
        with pytest.raises(CacheError, match="no episode yet"):
            host.act(np.zeros((2, O)))


def test_step_takes_arrays_and_lists(model) -> None:
    states = np.random.default_rng(0).standard_normal((2, O)).astype(np.float32)
    found = []
    with adapt(model, policy("full")) as host:
        for given, to_go in (
            (torch.from_numpy(states), torch.ones(2)),
            (states, np.ones(2)),
            (states.tolist(), [1, 1]),
            (torch.from_numpy(states).requires_grad_(), torch.ones(2)),
        ):
            host.reset(2)
            found.append(host.step(given, to_go))
        with pytest.raises(DataError, match="expected states as an array of numbers"):
            host.step(None, [1, 1])
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("bad", [None, {"a": 1}, [[1.0], [1.0, 2.0]], np.full((2, O), None), [["x"] * O] * 2])
def test_observations_that_are_no_numbers_are_refused(model, bad) -> None:
    with adapt(model, policy("full"), normalisation=NORMALISATION) as host:
        host.reset(2)
        with pytest.raises(DataError, match="expected observations as an array of numbers"):
            host.act(bad)
        with pytest.raises(DataError, match="as real numbers; got torch.complex"):
            host.act(np.ones((2, O), np.complex64))
        for target in ("abc", [1.0, np.nan], [[1.0]]):
            with pytest.raises(DataError, match="expected a finite target_return"):
                host.reset(2, target_return=target)


def test_a_refused_reset_leaves_the_episodes_as_they_were(model) -> None:
    observations, rewards = stream(2)
    with adapt(model, policy("full"), normalisation=NORMALISATION) as host:
        host.reset(2)
        expected = [host.act(observations[t], rewards[t]) for t in range(3)]
        host.reset(2)
        for t in range(3):
            with pytest.raises(DataError, match="expected a finite target_return"):
                host.reset(2, target_return=np.nan)
            np.testing.assert_array_equal(host.act(observations[t], rewards[t]), expected[t])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_precision_plays(model, dtype) -> None:
    observations, rewards = stream(2)
    with adapt(copy.deepcopy(model).to(dtype), policy("full"), normalisation=NORMALISATION) as host:
        host.reset(2)
        found = [host.act(observations[t][::-1], rewards[t]) for t in range(4)]  # rows upside down: strides below zero
    with adapt(model, policy("full"), normalisation=NORMALISATION) as host:
        host.reset(2)
        exact = [host.act(observations[t][::-1].copy(), rewards[t]) for t in range(4)]
    assert all(one.dtype == np.float32 for one in found)
    np.testing.assert_allclose(found, exact, atol=1e-5 if dtype == torch.float64 else 0.1)


def test_a_memory_forgets_padding_but_no_token(model) -> None:
    cache = MemoryCache(policy("full"))
    model.set_attn_implementation("namm")
    try:
        embeds = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(4))
        zeros = torch.zeros(1, 6, dtype=torch.long)
        whole = model.encoder(inputs_embeds=embeds, position_ids=zeros, past_key_values=MemoryCache(policy("full")))[0]
        model.encoder(inputs_embeds=embeds[:, :4], position_ids=zeros[:, :4], past_key_values=cache)
        cache.forget_padding()
        mask = torch.ones(1, 2, dtype=torch.long)
        rest = model.encoder(
            inputs_embeds=embeds[:, 4:], position_ids=zeros[:, 4:], attention_mask=mask, past_key_values=cache
        )[0]
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=0)
    assert cache.stats().seen == [6]
