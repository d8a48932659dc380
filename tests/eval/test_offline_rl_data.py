"""D4RL's HDF5 files and Minari's data sets give the same typed episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.episodes import Episode, save_episodes
from namm_transfer.eval.offline_rl.sources import read_episodes

STEPS, O, A = 12, 4, 2


def arrays() -> dict[str, np.ndarray]:
    """Three episodes of 4, 5 and 3 timesteps: terminated, timed out, both; the last observation names the timestep."""
    generator = np.random.default_rng(0)
    observations = generator.standard_normal((STEPS, O), np.float32)
    observations[:, -1] = np.arange(STEPS)
    return {
        "observations": observations,
        "actions": generator.standard_normal((STEPS, A), np.float32),
        "rewards": np.arange(STEPS, dtype=np.float32),
        "terminals": np.isin(np.arange(STEPS), (3, 11)),
        "timeouts": np.isin(np.arange(STEPS), (8, 11)),
    }


def write(path: Path, stored: dict[str, np.ndarray]) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in stored.items():
            file.create_dataset(name, data=values, compression="gzip" if values.ndim else None)
        file.create_dataset("infos/qpos", data=np.zeros((STEPS, 3)))
        file.create_dataset("metadata/algorithm", data=np.bytes_("SAC"))
    return path


def test_terminals_and_timeouts_are_told_apart(tmp_path: Path) -> None:
    stored = arrays()
    episodes = read_episodes(write(tmp_path / "hopper_medium-v2.hdf5", stored))
    assert [e.length for e in episodes] == [4, 5, 3]
    assert [(e.terminated, e.truncated) for e in episodes] == [(True, False), (False, True), (True, True)]
    assert [e.seed for e in episodes] == [0, 1, 2]
    assert [e.return_raw for e in episodes] == [6.0, 4 + 5 + 6 + 7 + 8, 9 + 10 + 11]
    assert [e.observations[0, -1] for e in episodes] == [0, 4, 9]
    np.testing.assert_array_equal(np.concatenate([e.actions for e in episodes]), stored["actions"])
    assert {e.observations.dtype for e in episodes} == {np.dtype(np.float32)}
    assert {e.rewards.dtype for e in episodes} == {np.dtype(np.float64)}


def test_a_last_episode_that_was_cut_off_is_left_out_and_told(tmp_path: Path) -> None:
    stored = arrays()
    stored["terminals"][11] = stored["timeouts"][11] = False
    path = write(tmp_path / "data.hdf5", stored)
    with pytest.warns(UserWarning, match="its last 3 timesteps are of an episode cut off"):
        assert [e.length for e in read_episodes(path)] == [4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"observations": (5, np.nan)},
            "observations holds 4 values that are NaN or infinite, the first at timestep 5",
        ),
        ({"rewards": (7, np.inf)}, "rewards holds 1 values.*timestep 7"),
        ({"actions": (2, -np.inf)}, "actions holds 2 values"),
    ],
)
def test_values_that_are_not_finite_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stored = arrays()
    for name, (step, value) in change.items():
        stored[name][step] = value
    with pytest.raises(DataError, match=message):
        read_episodes(write(tmp_path / "data.hdf5", stored))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stored = arrays()
    with pytest.raises(DataError, match="lacks timeouts; it holds actions, infos"):
        read_episodes(write(tmp_path / "v0.hdf5", {k: v for k, v in stored.items() if k != "timeouts"}))
    with pytest.raises(DataError, match=r"actions has shape \(11, 2\); expected 2 axes and 12"):
        read_episodes(write(tmp_path / "short.hdf5", {**stored, "actions": stored["actions"][1:]}))
    with pytest.raises(DataError, match=r"observations has shape \(12,\)"):
        read_episodes(write(tmp_path / "flat.hdf5", {**stored, "observations": stored["rewards"]}))
    with pytest.raises(DataError, match="has shape.*and 0 > 0 timesteps"):
        read_episodes(write(tmp_path / "empty.hdf5", {k: v[:0] for k, v in stored.items()}))
    never = {**stored, "terminals": np.zeros(STEPS, bool), "timeouts": np.zeros(STEPS, bool)}
    with pytest.raises(DataError, match="none of its 12 timesteps ends an episode"):
        read_episodes(write(tmp_path / "endless.hdf5", never))
    with pytest.raises(DataError, match="no D4RL file at"):
        read_episodes(tmp_path / "absent.hdf5")
    with pytest.raises(DataError, match="no source of episodes"):
        read_episodes(tmp_path / "episodes.pkl")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "data.hdf5", arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="truncated or no HDF5"):
        read_episodes(path)


def test_our_own_files_come_through_the_same_interface(tmp_path: Path) -> None:
    episode = Episode(7, np.zeros((2, O), np.float32), np.zeros((2, A), np.float32), np.ones(2), True, False)
    save_episodes(tmp_path / "own.npz", [episode])
    assert [e.seed for e in read_episodes(tmp_path / "own.npz")] == [7]


# -- Minari ------------------------------------------------------------------------------------------------------------

ENV_ID = "InvertedPendulum-v5"
LIMIT = 10


@pytest.fixture
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return module


def collect(minari: Any, name: str, forces: tuple[float, ...], **settings: Any) -> list[list[tuple]]:
    """Make a data set with Minari's own functions, an episode for each force; returns what was seen and done."""
    from minari.data_collector import EpisodeBuffer

    env, played, buffers = gymnasium.make(ENV_ID, max_episode_steps=LIMIT), [], []
    for force in forces:
        observation, _ = env.reset(seed=0)
        steps, done = [], False
        while not done:
            action = np.array([force], np.float32)
            after, reward, terminated, truncated, _ = env.step(action)
            steps.append((observation, action, reward, terminated, truncated))
            observation, done = after, terminated or truncated
        observations, *rest = (list(values) for values in zip(*steps, strict=True))
        buffers.append(EpisodeBuffer(len(buffers), 0, None, [*observations, observation], *rest))
        played.append(steps)
    minari.create_dataset_from_buffers(name, buffers, env=env, **settings)
    env.close()
    return played


@pytest.mark.filterwarnings("ignore")
def test_minari_data_sets_give_the_same_type(minari: Any) -> None:
    played = collect(minari, "namm/pendulum-v0", (3.0, 0.0, -3.0))
    episodes = read_episodes("minari:namm/pendulum-v0")
    assert {(e.terminated, e.truncated) for e in episodes} == {(True, False), (False, True)}
    for episode, steps in zip(episodes, played, strict=True):
        observations, actions, rewards, terminated, truncated = zip(*steps, strict=True)
        np.testing.assert_array_equal(episode.observations, np.float32(observations))  # none after the last action
        np.testing.assert_array_equal(episode.actions, actions)
        np.testing.assert_allclose(episode.rewards, rewards)
        assert (episode.terminated, episode.truncated) == (terminated[-1], truncated[-1])
        assert isinstance(episode, Episode)


@pytest.mark.filterwarnings("ignore")
def test_a_minari_data_set_tells_its_environment(minari: Any) -> None:
    from namm_transfer.eval.offline_rl.sources import check_environment

    collect(minari, "namm/pendulum-v0", (3.0,))
    episodes = read_episodes("minari:namm/pendulum-v0")
    check_environment("minari:namm/pendulum-v0", episodes, ENV_ID)
    with pytest.raises(DataError, match="episodes of InvertedPendulum-v5; expected InvertedPendulum-v4"):
        check_environment("minari:namm/pendulum-v0", episodes, "InvertedPendulum-v4")


@pytest.mark.filterwarnings("ignore")
def test_minari_references_are_of_their_environment_only(minari: Any) -> None:
    from namm_transfer.eval.offline_rl.minari_data import minari_references
    from namm_transfer.eval.offline_rl.scores import score_percent

    collect(minari, "namm/scored-v0", (3.0,), ref_min_score=2.0, ref_max_score=12.0)
    references = minari_references("namm/scored-v0")
    assert score_percent(7.0, ENV_ID, references) == 50.0
    with pytest.raises(DataError, match="different rewards"):
        score_percent(7.0, "InvertedPendulum-v4", references)
    collect(minari, "namm/unscored-v0", (3.0,))
    with pytest.raises(DataError, match="no ref_min_score"):
        minari_references("namm/unscored-v0")


@pytest.mark.filterwarnings("ignore")
def test_minari_data_sets_that_are_absent_or_damaged_are_refused(minari: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the Minari data set 'namm/absent-v0'"):
        read_episodes("minari:namm/absent-v0")
    collect(minari, "namm/damaged-v0", (3.0, -3.0))
    (file,) = (tmp_path / "minari" / "namm" / "damaged-v0").rglob("*.hdf5")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot read the Minari data set"):
        read_episodes("minari:namm/damaged-v0")
