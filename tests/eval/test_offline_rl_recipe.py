"""From a behaviour run to a data set to a host: collected with Minari, read back as played, trained, asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.offline_rl import collect, data, measure
from namm_transfer.eval.offline_rl.behaviour import environment_of
from namm_transfer.eval.offline_rl.collect import CollectionConfig, collect_episodes
from namm_transfer.eval.offline_rl.data import data_of, return_to_ask
from namm_transfer.eval.offline_rl.episodes import Episode, best_return, save_episodes
from namm_transfer.eval.offline_rl.host import load_host
from namm_transfer.eval.offline_rl.sources import read_episodes
from namm_transfer.eval.offline_rl.train import TrainingConfig, train_decision_transformer

ENV_ID = "Hopper-v5"


def predict(observations: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
    """A policy of three joints that leans on what it sees; drawn actions are told by their sign."""
    return np.tanh(observations[:, 2:5]) * (1.0 if deterministic else -1.0), None


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A behaviour run's folder, whose policies are files that nobody reads."""
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    folder = tmp_path / "behaviour"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"env_id": ENV_ID}))
    for name in ("policy.zip", "medium.zip"):
        (folder / name).write_bytes(name.encode())
    for module in (collect, measure):
        monkeypatch.setattr(module, "load_behaviour", lambda path: SimpleNamespace(predict=predict, path=path))
    return folder


@pytest.fixture
def config(behaviour: Path) -> CollectionConfig:
    return CollectionConfig(behaviour / "policy.zip", "namm/hopper-v5/tiny-v0", ENV_ID, timesteps=30)


def test_a_collected_data_set_reads_back_as_it_was_played(config: CollectionConfig) -> None:
    source = collect_episodes(config, progress=False)
    assert source == "minari:namm/hopper-v5/tiny-v0"
    episodes = read_episodes(source)
    lengths = [episode.length for episode in episodes]
    assert sum(lengths[:-1]) < 30 <= sum(lengths)
    with gymnasium.make(ENV_ID) as env:
        for number, episode in enumerate(episodes):
            observation, _ = env.reset(seed=config.seed + number)
            for seen, action, reward in zip(episode.observations, episode.actions, episode.rewards, strict=True):
                np.testing.assert_allclose(seen, observation, atol=1e-5)
                np.testing.assert_allclose(action, predict(seen[None], deterministic=False)[0][0], atol=1e-6)
                observation, earned, terminated, truncated, _ = env.step(action)
                assert reward == pytest.approx(earned, abs=1e-4)
            assert (episode.terminated, episode.truncated) == (terminated, truncated)


def test_every_noise_level_has_its_timesteps_and_its_seeds(config: CollectionConfig) -> None:
    episodes = read_episodes(collect_episodes(replace(config, noise_levels=(0.0, 0.3)), progress=False))
    off = [
        float(np.abs(episode.actions - predict(episode.observations, deterministic=True)[0]).mean())
        for episode in episodes
    ]
    quiet = [size < 1e-6 for size in off]
    assert quiet == sorted(quiet, reverse=True)  # one level after the other
    for level in (True, False):
        assert sum(e.length for e, still in zip(episodes, quiet, strict=True) if still == level) >= 30


def test_a_data_set_is_collected_once_and_never_taken_for_another(config: CollectionConfig, tmp_path: Path) -> None:
    source = collect_episodes(config, progress=False)
    (file,) = (tmp_path / "minari").rglob("*.hdf5")
    before = file.stat().st_mtime_ns
    assert collect_episodes(config, progress=False) == source
    moved = replace(config, policy=config.policy.rename(tmp_path / "moved.zip"))  # the same policy elsewhere
    assert collect_episodes(moved, progress=False) == source
    assert file.stat().st_mtime_ns == before
    (tmp_path / "other.zip").write_bytes(b"other weights")
    changes: dict[str, Any] = {"timesteps": 31, "noise_levels": (0.1,), "seed": 1, "policy": tmp_path / "other.zip"}
    for name, value in changes.items():
        with pytest.raises(ConfigError, match=f"other values of {name};"):
            collect_episodes(replace(moved, **{name: value}), progress=False)


def test_the_environment_is_that_of_the_policy(config: CollectionConfig, tmp_path: Path) -> None:
    source = collect_episodes(replace(config, env_id=None), progress=False)
    assert collect_episodes(config, progress=False) == source  # the same settings
    elsewhere = config.policy.rename(tmp_path / "moved.zip")
    with pytest.raises(ConfigError, match=r"env_id has no value, and .* has no config\.json .*moved\.zip"):
        collect_episodes(replace(config, policy=elsewhere, env_id=None), progress=False)


def test_what_cannot_be_collected_is_told(config: CollectionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'no id!' is no id of a Minari data set"):
        collect_episodes(replace(config, dataset="no id!"), progress=False)
    with pytest.raises(ConfigError, match=r"env_id is Walker2d-v5, but .*policy\.zip was trained in Hopper-v5"):
        collect_episodes(replace(config, env_id="Walker2d-v5"), progress=False)
    for seed, levels, message in (
        (-1, (), "seed is -1 with 0 noise levels; expected 0 to 19000000"),
        (18_000_001, (0.0, 0.1), "expected 0 to 18000000"),
        (0, tuple(0.01 * i for i in range(21)), "expected 20 levels at most"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, seed=seed, noise_levels=levels)
    with pytest.raises(ConfigError, match="no environment 'Hoper-v5'"):
        collect_episodes(replace(config, env_id="Hoper-v5"), progress=False)
    with pytest.raises(ConfigError, match="noise_levels"):
        replace(config, noise_levels=(0.1, 0.1))
    with pytest.raises(ConfigError, match="timesteps is 0"):
        replace(config, timesteps=0)
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(ConfigError, match=r"pip install 'namm-transfer\[minari\]'"):
        collect_episodes(config, progress=False)


def episode(number: int, length: int, reward: float) -> Episode:
    draw = np.random.default_rng(number).standard_normal
    observations, actions = draw((length, 11), np.float32), draw((length, 3), np.float32)
    return Episode(number, observations, actions, np.full(length, reward), terminated=True, truncated=False)


REPLAYED = [episode(0, 70, 0.1), episode(1, 5, 4.0), episode(2, 15, 2.0), episode(3, 10, 1.0)]  # returns 7, 20, 30, 10


def test_the_best_episodes_are_those_that_hold_a_share_of_the_timesteps() -> None:
    assert best_return(REPLAYED, 0.1) == 30.0
    assert best_return(REPLAYED, 0.16) == 25.0
    assert best_return(REPLAYED, 1.0) == pytest.approx(67 / 4)
    with pytest.raises(DataError, match="no episodes"):
        best_return([], 0.1)


def test_a_run_says_what_it_lacks(behaviour: Path, tmp_path: Path) -> None:
    assert environment_of(behaviour) == ENV_ID
    with pytest.raises(DataError, match="holds no run of `train behaviour`"):
        data_of(tmp_path, "expert", 30)
    with pytest.raises(DataError, match=r"has no medium-replay\.npz: .*medium_return"):
        data_of(behaviour, "medium-replay", 30)
    with pytest.raises(ConfigError, match="data is 'good'; expected one of expert, medium, medium-replay"):
        data_of(behaviour, "good", 30)
    (behaviour / "policy.zip").unlink()
    with pytest.raises(DataError, match=r"has no policy\.zip: .*first evaluation"):
        data_of(behaviour, "expert", 30)


def training(behaviour: Path, kind: str) -> TrainingConfig:
    return TrainingConfig(
        behaviour=behaviour,
        folder=behaviour.parent / f"run-{kind}",
        host=behaviour.parent / f"host-{kind}",
        data=kind,
        data_timesteps=30,
        steps=2,
        contexts=((4, 0.5), (16, 0.5)),
        timesteps_per_step=64,
        hidden_size=16,
        layers=1,
        checkpoint_every=2,
        evaluation_episodes=2,
    )


@pytest.mark.parametrize("kind", data.DATA)
def test_one_command_makes_a_host_of_a_behaviour_run(behaviour: Path, kind: str) -> None:
    save_episodes(behaviour / "medium-replay.npz", REPLAYED)
    before = {path.name: path.stat().st_mtime_ns for path in behaviour.iterdir()}
    config = training(behaviour, kind)
    for _ in range(2):  # the second time all is there
        train_decision_transformer(config, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in behaviour.iterdir()} == before
    _, normalisation = load_host(config.host)
    record = json.loads((config.host / "training.json").read_text())
    assert (normalisation.env_id, record["data"]["files"]) == (ENV_ID, [kind])
    assert normalisation.behaviour.n == normalisation.random.n == 2
    wanted = 30.0 if kind == "medium-replay" else normalisation.behaviour.mean
    assert normalisation.target_return == record["settings"]["target_return"] == pytest.approx(wanted)
    assert "behaviour" not in record["settings"]  # no places of a machine


def test_a_second_run_of_an_environment_takes_another_id(behaviour: Path) -> None:
    config = training(behaviour, "expert")
    train_decision_transformer(config, progress=False)
    (behaviour / "policy.zip").write_bytes(b"of another run")
    config = replace(config, folder=behaviour.parent / "second", host=behaviour.parent / "second-host")
    with pytest.raises(ConfigError, match=r"'namm-transfer/hopper-v5/expert-v0' is there.*another id \(dataset=ID\)"):
        train_decision_transformer(config, progress=False)
    config = replace(config, dataset="namm-transfer/hopper-v5/second-v0")
    train_decision_transformer(config, progress=False)
    assert read_episodes("minari:namm-transfer/hopper-v5/second-v0")
    assert "dataset" not in json.loads((config.host / "training.json").read_text())["settings"]
    assert "dataset" not in torch.load(config.folder / "checkpoint.pt")["settings"]  # as before there was one


def test_a_medium_host_is_asked_for_what_its_policy_earns(behaviour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earned = {"policy.zip": 3000.0, "medium.zip": 1200.0}
    monkeypatch.setattr(data, "measure_policy", lambda path, *args, **more: SimpleNamespace(mean=earned[path.name]))
    assert return_to_ask(behaviour, "medium", REPLAYED, [0], 1) == 1200.0
    assert return_to_ask(behaviour, "expert", REPLAYED, [0], 1) == 3000.0


def test_an_absent_policy_is_told(config: CollectionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="no behaviour policy"):
        collect_episodes(replace(config, policy=Path("nowhere.zip")), progress=False)
