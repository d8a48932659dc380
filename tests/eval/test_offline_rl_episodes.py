"""Episodes: what they refuse, and that a file gives back what was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.episodes import Episode, load_episodes, save_episodes


def make_episode(length: int, seed: int = 0, *, terminated: bool = False) -> Episode:
    generator = np.random.default_rng(seed)
    return Episode(
        seed,
        generator.standard_normal((length, 4), np.float32),
        generator.standard_normal((length, 2), np.float32),
        generator.standard_normal(length),
        terminated,
        not terminated,
    )


def test_return_and_returns_to_go() -> None:
    episode = replace(make_episode(3), rewards=np.array([1.0, 2.0, 4.0]))
    assert episode.length == 3
    assert episode.return_raw == 7.0
    np.testing.assert_array_equal(episode.returns_to_go(), [7.0, 6.0, 4.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.zeros((2, 2), np.float32)}, "actions has shape"),
        ({"observations": np.zeros(3, np.float32)}, "observations has shape"),
        ({"rewards": np.array([0.0, np.nan, 0.0])}, "rewards holds a value that is not finite"),
        ({"terminated": False, "truncated": False}, "neither terminated nor truncated"),
    ],
)
def test_malformed_episode_is_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(make_episode(3), **change)


def test_empty_episode_is_refused() -> None:
    with pytest.raises(DataError, match="T = 0"):
        Episode(0, np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32), np.zeros(0), True, False)


def test_file_round_trip(tmp_path: Path) -> None:
    episodes = [make_episode(3, 7), make_episode(1, 8, terminated=True), make_episode(5, 9)]
    path = tmp_path / "data" / "episodes.npz"
    save_episodes(path, episodes)
    loaded = load_episodes(path)
    assert [e.seed for e in loaded] == [7, 8, 9]
    assert [e.terminated for e in loaded] == [False, True, False]
    assert [e.truncated for e in loaded] == [True, False, True]
    for before, after in zip(episodes, loaded, strict=True):
        for name in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert [p.name for p in path.parent.iterdir()] == ["episodes.npz"], "a partial file was left behind"


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no episodes at"):
        load_episodes(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", rewards=np.zeros(3))
    with pytest.raises(DataError, match="lacks actions, length"):
        load_episodes(tmp_path / "other.npz")
    save_episodes(tmp_path / "short.npz", [make_episode(3)])
    with np.load(tmp_path / "short.npz") as file:
        stored = dict(file)
    np.savez(tmp_path / "short.npz", **{**stored, "length": np.array([4])})
    with pytest.raises(DataError, match="do not add up"):
        load_episodes(tmp_path / "short.npz")
    for change, message in (
        ({"seed": np.zeros(0, np.int64)}, "seeds or flags of another number"),
        ({"length": np.array([3.0])}, "length is float64 with 1 axes"),
        ({"rewards": np.array(3.0)}, "rewards is float64 with 0 axes"),
        ({"rewards": np.array(["a"] * 3)}, "rewards is <U1"),
        ({"rewards": np.full(3, np.nan)}, r"short\.npz: episode of seed .*not finite"),
    ):
        np.savez(tmp_path / "short.npz", **{**stored, **change})
        with pytest.raises(DataError, match=message):
            load_episodes(tmp_path / "short.npz")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.npz"
    save_episodes(path, [make_episode(3)])
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match=r"cut\.npz is truncated or no file of save_episodes"):
        load_episodes(path)
