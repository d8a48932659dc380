"""Training: windows are cut right, settings are checked, an interrupted run goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.offline_rl import train
from namm_transfer.eval.offline_rl.batches import WindowSampler
from namm_transfer.eval.offline_rl.behaviour import (
    BehaviourConfig,
    load_behaviour,
    read_progress,
    replayed,
    train_behaviour,
)
from namm_transfer.eval.offline_rl.episodes import Episode, save_episodes
from namm_transfer.eval.offline_rl.sources import check_environment
from namm_transfer.eval.offline_rl.train import TrainingConfig


def make_episode(length: int) -> Episode:
    draw = np.random.default_rng(length).standard_normal
    observations, actions = draw((length, 4), np.float32), draw((length, 2), np.float32)
    return Episode(length, observations, actions, draw(length), terminated=False, truncated=True)


EPISODES = [make_episode(length) for length in (3, 30, 50)]


def test_episodes_of_another_environment_are_refused(tmp_path: Path) -> None:
    save_episodes(tmp_path / "own.npz", EPISODES)
    with pytest.raises(DataError, match=r"own\.npz holds observations .*Hopper-v5 has \(11,\) and \(3,\)"):
        check_environment(tmp_path / "own.npz", EPISODES, "Hopper-v5")
    with pytest.raises(DataError, match=r"a version before v5.*expected Hopper-v5: rewards are not the same"):
        check_environment(tmp_path / "hopper_expert-v2.hdf5", EPISODES, "Hopper-v5")


def test_windows_hold_the_episodes_own_values() -> None:
    sampler = WindowSampler(EPISODES, return_scale=10.0, start_fraction=0.25)
    batch = sampler.batch(200, 8, np.random.default_rng(0))
    by_action = {e.actions[t].tobytes(): (e, t) for e in EPISODES for t in range(e.length)}
    found = set()
    for row in range(200):
        kept = int(batch.mask[row].sum())
        assert batch.mask[row, :kept].all(), "the padding is not on the right"
        episode, start = by_action[batch.actions[row, 0].numpy().tobytes()]
        assert kept == min(8, episode.length - start)
        span = slice(start, start + kept)
        np.testing.assert_array_equal(batch.timesteps[row, :kept], np.arange(start, start + kept))
        np.testing.assert_array_equal(batch.actions[row, :kept], episode.actions[span])
        states = batch.states[row, :kept].numpy() * sampler.std + sampler.mean
        np.testing.assert_allclose(states, episode.observations[span], atol=1e-5)
        to_go = batch.returns_to_go[row, :kept, 0].numpy() * 10
        np.testing.assert_allclose(to_go, episode.returns_to_go()[span], atol=1e-4)
        found.add((episode.seed, start))
    assert {(50, 0), (50, 42)} <= found, "an episode's first or last window was never drawn"
    assert len({seed for seed, _ in found}) == 3


def test_states_are_normalised() -> None:
    sampler = WindowSampler(EPISODES, return_scale=1.0, start_fraction=0.0)
    np.testing.assert_allclose(sampler.states.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(sampler.states.std(0), 1, atol=1e-4)


def test_no_episodes_no_sampler() -> None:
    with pytest.raises(DataError, match="no episodes"):
        WindowSampler([], 1.0, 0.0)


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    save_episodes(tmp_path / "data.npz", EPISODES)
    return TrainingConfig(
        behaviour=tmp_path / "behaviour",
        episodes=(tmp_path / "data.npz",),
        folder=tmp_path / "run",
        host=tmp_path / "host",
        steps=6,
        contexts=((4, 0.5), (16, 0.5)),
        timesteps_per_step=64,
        warmup_steps=2,
        hidden_size=16,
        layers=1,
        max_episode_length=50,
        checkpoint_every=2,
    )


def test_resumed_run_equals_an_uninterrupted_one(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WindowSampler(EPISODES, config.return_scale, config.start_fraction)
    whole, losses, _ = train._fit(config, sampler, progress=False)
    interrupted = replace(config, folder=config.folder / "interrupted")
    steps = 0

    def stop_in_step_five(*arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return action_loss(*arguments)

    action_loss = train.action_loss
    with monkeypatch.context() as patch:
        patch.setattr(train, "action_loss", stop_in_step_five)
        with pytest.raises(KeyboardInterrupt):
            train._fit(interrupted, sampler, progress=False)
    resumed, resumed_losses, _ = train._fit(interrupted, sampler, progress=False)
    assert resumed_losses == losses
    assert [row["step"] for row in losses] == [2, 4, 6]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_checkpoint_of_other_settings_is_refused(config: TrainingConfig) -> None:
    sampler = WindowSampler(EPISODES, config.return_scale, config.start_fraction)
    train._fit(config, sampler, progress=False)
    with pytest.raises(CheckpointError, match="other settings"):
        train._fit(replace(config, learning_rate=0.5), sampler, progress=False)
    train._fit(replace(config, target_return=1.0), sampler, progress=False)  # only measured with, not trained with


def test_training_leaves_the_global_generator_alone(config: TrainingConfig) -> None:
    before = torch.get_rng_state()
    train._fit(config, WindowSampler(EPISODES, 1.0, 0.0), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_learning_rate_warms_up_and_ends_near_zero(config: TrainingConfig) -> None:
    config = replace(config, steps=100, warmup_steps=10)
    rates = [train.learning_rate_at(step, config) / config.learning_rate for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=1e-3)
    assert max(rates) > 0.95
    assert np.argmax(rates) == 9
    assert rates[-1] < 1e-3


def test_episode_longer_than_the_model_is_refused(config: TrainingConfig) -> None:
    config.behaviour.mkdir()
    (config.behaviour / "config.json").write_text('{"env_id": "Hopper-v5"}')
    with pytest.raises(ConfigError, match="50 timesteps; max_episode_length is 49"):
        train.train_decision_transformer(replace(config, max_episode_length=49), progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"contexts": ((20, 0.5),)},
        {"contexts": ((0, 1.0),)},
        {"contexts": ()},
        {"steps": 0},
        {"warmup_steps": 0},
        {"evaluation_episodes": 0},
        {"learning_rate": float("nan")},
        {"return_scale": 0.0},
        {"start_fraction": 2.0},
        {"heads": 3},
        {"data": "expert"},  # beside episodes
        {"data": "good", "episodes": ()},
        {"data": "medium-replay", "episodes": (), "dataset": "mine/hopper-v0"},
        {"episodes": ()},
    ],
)
def test_impossible_settings_are_refused(config: TrainingConfig, change: dict) -> None:
    with pytest.raises(ConfigError):
        replace(config, **change)


def test_behaviour_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="timesteps is 0"):
        BehaviourConfig(output=tmp_path, timesteps=0)


def test_behaviour_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = BehaviourConfig(output=tmp_path)
    (tmp_path / "config.json").write_text('{"env_id": "Walker2d-v5"}')
    with pytest.raises(ConfigError, match="other values of env_id"):
        train_behaviour(config, progress=False)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Hoper-v5", "no environment 'Hoper-v5'"),
        ("Hopper-v3", "'Hopper-v3' cannot be made"),
        ("CartPole-v1", "expected a one-dimensional Box"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_environment_leaves_the_folder_free(tmp_path: Path, env_id: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_behaviour(BehaviourConfig(output=tmp_path / "run", env_id=env_id), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_behaviour_run_ends_at_its_timesteps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a multiple of the timesteps between two evaluations, nor of those between two updates."""
    pytest.importorskip("sbx")
    config = BehaviourConfig(
        output=tmp_path, env_id="InvertedPendulum-v5", timesteps=109, evaluate_every=48, evaluation_episodes=1,
        medium_return=0.0, learning_starts=1_000,
    )  # fmt: skip
    train_behaviour(config)
    assert [row["timesteps"] for row in read_progress(tmp_path)] == [48, 96, 112]
    assert "stopped at 112 timesteps: as many as asked for" in capsys.readouterr().out
    assert (tmp_path / "medium-replay.npz").is_file()
    train_behaviour(replace(config, stop_return=0.5))
    assert "the best return reached stop_return" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(ConfigError, match="timesteps is 113, but the run in .* fewer than 113"):
        train_behaviour(replace(config, timesteps=113), progress=False)


def test_a_replay_buffer_becomes_its_whole_episodes() -> None:
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    buffer = buffers.ReplayBuffer(20, box, box)
    with pytest.raises(DataError, match="0 timesteps holds no whole episode"):
        replayed(buffer)
    ends = {3: False, 8: True}  # timestep -> cut off by the time limit; three timesteps are of an unfinished episode
    for step in range(12):
        place, following = (np.full((1, 2), at / 20, np.float32) for at in (step, step + 1))
        done, infos = np.array([step in ends]), [{"TimeLimit.truncated": ends.get(step, False)}]
        buffer.add(place, following, -place, np.array([float(step)]), done, infos)
    first, second = replayed(buffer)
    assert (first.length, first.terminated, first.truncated) == (4, True, False)
    assert (second.length, second.terminated, second.truncated) == (5, False, True)
    assert second.rewards.tolist() == [4, 5, 6, 7, 8]
    np.testing.assert_allclose(second.observations[:, 0] * 20, second.rewards, rtol=1e-6)
    np.testing.assert_allclose(second.actions, -second.observations)
    for _ in range(8):
        buffer.add(place, place, place, np.zeros(1), np.zeros(1), [{}])
    with pytest.raises(DataError, match="which is full"):
        replayed(buffer)


def test_an_episode_cut_off_by_an_interruption_is_no_part_of_the_next(tmp_path: Path) -> None:
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    box = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    buffer = buffers.ReplayBuffer(20, box, box)

    def play(values: list[float], *, ends: bool) -> None:
        for now, following in pairwise(values):
            done = ends and following == values[-1]
            buffer.add(*(np.full((1, 1), x, np.float32) for x in (now, following, 0)), np.ones(1), [done], [{}])

    play([0.0, 0.1, 0.2, 0.3], ends=True)
    play([0.0, 0.15, 0.25], ends=False)  # here the run was killed; resumed, it begins an episode
    play([0.05, 0.12, 0.18, 0.22, 0.4], ends=True)
    play([0.0, 0.5], ends=False)
    first, second = replayed(buffer)
    assert first.observations[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert second.observations[:, 0].tolist() == pytest.approx([0.05, 0.12, 0.18, 0.22])
    assert (second.terminated, second.truncated) == (True, False)


def test_missing_behaviour_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no behaviour policy at .*policy\.zip"):
        load_behaviour(tmp_path / "policy.zip")
