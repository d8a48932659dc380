"""What a memory keeps of an episode is counted as it was kept, and drawn where it happened."""

from __future__ import annotations

import io
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from namm_transfer import policy
from namm_transfer.cli import app
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.inspect import inspect
from namm_transfer.eval.offline_rl import kept as kept_module
from namm_transfer.eval.offline_rl.agent import KINDS, WatchedEpisode
from namm_transfer.eval.offline_rl.drawing import Robot, robot_of
from namm_transfer.eval.offline_rl.episode_pictures import strips
from namm_transfer.eval.offline_rl.episodes import Episode
from namm_transfer.eval.offline_rl.falls import HEALTHY, margin, near_falls
from namm_transfer.eval.offline_rl.kept import AROUND, kept_of, measure_kept, summarise
from namm_transfer.eval.offline_rl.kept_report import draw, table
from namm_transfer.eval.rl_tasks import Episodes
from namm_transfer.eval.video import decode
from namm_transfer.eval.workers import build_policy

NOTHING = np.zeros((0, 0, 4), np.float32)


def episode(heights: list[float], *, terminated: bool = False) -> Episode:
    observations = np.zeros((len(heights), 11), np.float32)
    observations[:, 0] = heights
    return Episode(0, observations, np.zeros((len(heights), 3), np.float32), np.ones(len(heights)), terminated, True)


def watched(length: int, decisions: list[np.ndarray], interval: int = 48) -> WatchedEpisode:
    return WatchedEpisode(episode([1.25] * length), interval, tuple(decisions), decisions[0].shape[:2], NOTHING)


def test_streaming_keeps_its_sinks_and_the_newest(episodes) -> None:
    units = episodes.units(0)
    played = list(episodes.watch(units, policy("streaming", budget=20, sinks=4)))
    assert sorted(one.episode.seed for one in played) == [int(unit.id) for unit in units]
    outcomes = {outcome.unit.id: outcome for outcome in episodes.evaluate(units, policy("streaming", budget=20), 0)}
    for one in played:
        assert one.episode.return_raw == outcomes[str(one.episode.seed)].score  # the episode that is evaluated
        assert len(one.decisions) == (3 * one.episode.length - 1) // 16 > 0
        for index, kept in enumerate(one.decisions):
            seen = 16 * (index + 1)
            assert kept.shape == (2, 1, seen)
            expected = (
                np.ones(seen, bool) if seen <= 20 else np.isin(np.arange(seen), [*range(4), *range(seen - 16, seen)])
            )
            np.testing.assert_array_equal(kept, np.broadcast_to(expected, kept.shape))
        last = one.episode.length - 1
        retained = one.retained(last).reshape(2, 1, -1)
        decided = 16 * len(one.decisions)
        assert retained[..., decided:].all()
        np.testing.assert_array_equal(retained[..., :decided], one.decisions[-1])
    (whole,) = episodes.watch(units[:1], policy("full"))
    assert whole.decisions == ()
    assert whole.retained(3).shape == (2, 1, 4, 3)
    assert whole.retained(3).all()


def test_kinds_and_ages_are_counted_token_by_token() -> None:
    kept = np.zeros((2, 2, 48), bool)
    kept[0, 0, 1] = kept[0, 1, 1] = True  # the state of timestep 0, in two heads
    kept[1, 0, 45] = True  # the return of timestep 15, the newest
    kept[1, 1, 14] = True  # the action of timestep 4
    (found,) = kept_of([watched(20, [kept])], "HalfCheetah-v5")
    np.testing.assert_array_equal(found.kinds, [[1, 2, 1], [64, 64, 64]])
    assert dict(enumerate(found.ages[0])) == {age: {15: 2, 0: 1, 11: 1}.get(age, 0) for age in range(20)}
    assert found.ages[1].tolist() == [12.0] * 16 + [0.0] * 4
    assert found.near_falls is None
    summary = summarise([found, found])
    assert {kind: summary["share_of_kept_by_kind"][kind]["value"] for kind in KINDS} == {
        "return": 0.25,
        "state": 0.5,
        "action": 0.25,
    }
    assert summary["kept_fraction"]["value"] == pytest.approx(4 / 192)
    assert summary["age_of_kept"]["0.5"] == 11
    assert summary["return_so_far"][-1] == 20
    with pytest.raises(DataError, match="no episode was long enough"):
        kept_of([WatchedEpisode(episode([1.25] * 4), 48, (), (1, 1), NOTHING)], "Hopper-v5")


@pytest.mark.parametrize("name", HEALTHY)
def test_the_limits_are_the_environments_own(name: str) -> None:
    healthy = HEALTHY[name]
    with gymnasium.make(f"{name}-v5") as env:
        env.reset(seed=0)
        assert env.unwrapped._healthy_z_range == (healthy.lowest, healthy.highest)
        assert env.unwrapped._healthy_angle_range == (-healthy.angle, healthy.angle)
        assert env.unwrapped.init_qpos[1] == healthy.height
        assert env.unwrapped.observation_structure["skipped_qpos"] == 1  # so that height and angle come first


def test_near_falls_are_those_that_did_not_end_the_episode() -> None:
    hopper = HEALTHY["Hopper"]
    assert margin(np.array([[1.25, 0.0], [0.7, 0.0], [1.25, -0.2], [0.975, 0.05]]), hopper).tolist() == pytest.approx(
        [1, 0, 0, 0.5]
    )
    assert margin(np.array([[2.0, 0.0]]), HEALTHY["Walker2d"])[0] == pytest.approx(0)
    heights = [1.2] * 5 + [0.82, 0.75, 0.8] + [1.2] * 5 + [0.8, 0.71]
    assert near_falls(episode(heights, terminated=True), "Hopper-v5") == [6]
    assert near_falls(episode(heights), "Hopper-v5") == [6, 14]
    assert near_falls(episode(heights), "HalfCheetah-v5") is None


def test_what_is_kept_around_near_falls_is_compared_with_tokens_as_old() -> None:
    heights = [1.25] * 100
    heights[40] = 0.75
    decisions = []
    for seen in (240, 288):  # timesteps 0 to 79, 0 to 95
        kept = np.zeros((1, 1, seen), bool)
        kept[..., 40 * 3 : 41 * 3] = True
        decisions.append(kept)
    one = WatchedEpisode(episode(heights), 48, tuple(decisions), (1, 1), NOTHING)
    found = kept_of([one], "Hopper-v5")[0]
    assert found.near_falls == 1
    assert found.around[0].tolist() == [0.0] * AROUND + [6.0] + [0.0] * AROUND
    # Tokens 39 and 55 timesteps old are kept once each of the two times that there are any
    assert found.around[1, AROUND] == pytest.approx(3 * 0.5 + 3 * 0.5)
    near = summarise([found])["near_falls"]
    assert near["by_offset"][AROUND] == 2.0
    assert near["kept_against_others_as_old"]["before"]["value"] == 0


def settings(task, **more) -> dict:
    return {"_target_": "namm_transfer.eval.rl_tasks.Episodes", **asdict(task), **more}


def test_measured_and_drawn(episodes, tiny_hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "task": settings(episodes, episodes=2),
        "namms": {"namm": str(tiny_hosts / "namm")},
        "rules": ["streaming"],
        "seed": 0,
    }
    found = measure_kept(config, Console(file=io.StringIO()))
    assert [*found] == ["namm", "streaming"]
    task, namm = Episodes(**{key: x for key, x in config["task"].items() if key != "_target_"}), found["namm"]["policy"]
    outcomes = list(task.evaluate(task.units(0), build_policy(namm), 0))
    assert found["streaming"]["policy"]["budget"] == pytest.approx(np.mean([o.kept_at_updates for o in outcomes]))
    assert sum(share["value"] for share in found["namm"]["share_of_kept_by_kind"].values()) == pytest.approx(1)
    assert len(table(found).splitlines()) > 4
    draw(found, AROUND, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    config["rules"], config["namms"]["by_kind"] = [], {"namm": str(tiny_hosts / "namm"), "kinds": 3}
    ranked = measure_kept(config, Console(file=io.StringIO()), budget=0.5)
    assert {column["policy"]["budget"] for column in ranked.values()} == {0.5}
    with pytest.raises(ConfigError, match="divide a budget, and there is none"):
        measure_kept(config, Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="needs a column 'namm'"):
        measure_kept(config | {"namms": {}}, Console())
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="h20"):
        patch.setattr(Episodes, "watch", None)  # nothing is played
        measure_kept(config | {"rules": ["streaming", "h20"]}, Console())


def test_the_command_says_what_is_wrong_before_it_plays(
    tiny_hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["task=offline_rl/hopper", f"task.model.path={tiny_hosts / 'dt'}", "task.episodes=1", "rules=[]"]
    app = typer.Typer()
    app.command()(kept_module.main)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(kept_module, "measure_kept", None)  # nothing is played
        for out, more, message in (
            ("out", "thresholds=[0.5]", "thresholds is a setting of a study and is not read here"),
            ("out", "budgets=[0.5]", "not read here: give --budget"),
            ("file/out", "seed=0", "Not a directory"),
        ):
            failed = CliRunner().invoke(app, ["--out", str(tmp_path / out), *arguments, more])
            assert message in str(failed.exception)
    arguments += [f"namms.namm={tiny_hosts / 'namm'}", "task.model.update_interval=16"]
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"kept.json", "kept.png", "table.md", "provenance.json"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", ["kept", "returns", "speed"])
def test_a_module_that_is_run_tells_an_error_as_one_message(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    more = ["--host", "hopper-v5-medium", "--start", "default"] if module == "returns" else []
    monkeypatch.setattr(sys, "argv", [module, "--out", str(tmp_path / "file" / "out"), *more])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"namm_transfer.eval.offline_rl.{module}", run_name="__main__")
    assert left.value.code == 2
    assert "error: [Errno 20] Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_every_robot_is_drawn_where_its_bodies_are(env_id: str) -> None:
    robot = robot_of(env_id)
    with gymnasium.make(env_id) as env:
        env.reset(seed=0)
        data = env.unwrapped.data
        bodies = np.concatenate([data.geom_xpos[:, [0, 2]], data.geom_xmat[:, [2, 8]]], axis=1)
        names = [env.unwrapped.model.geom(i).name for i in range(env.unwrapped.model.ngeom)]
    assert "floor" not in {names[i] for i in robot.numbers}
    assert len(robot.numbers) == len(names) - 1
    frame = robot.draw(bodies, 240, 320)
    drawn = (np.abs(frame.astype(int) - frame[0, 0].astype(int)).sum(-1) > 60)[: int(240 * (1 - 0.25 / 2.4)) - 20]
    rows, columns = np.nonzero(drawn)
    metre = 240 / 2.4
    tops = [
        bodies[i, 1] + h * abs(bodies[i, 3]) + r
        for i, h, r in zip(robot.numbers, robot.halves, robot.radii, strict=True)
    ]
    assert (240 - rows.min()) / metre - 0.25 == pytest.approx(max(tops), abs=0.03)
    assert columns.min() > 0 and columns.max() < 319


def test_what_has_no_robot_of_capsules_is_refused() -> None:
    for env_id, message in (("CartPole-v1", "no environment of MuJoCo"), ("Pusher-v5", "of capsules and spheres")):
        with pytest.raises(DataError, match=message):
            robot_of(env_id)


def test_strips_show_what_is_retained_and_leave_out_what_is_to_come() -> None:
    kept = np.zeros((2, 2, 48), bool)
    kept[0, 0, 1] = True
    shares = strips(watched(30, [kept]), 20)
    assert shares.shape == (2, 3, 30)
    assert np.isnan(shares[:, :, 21:]).all()
    assert (shares[:, :, 16:21] == 1).all()
    assert shares[0, 1, 0] == 0.5
    assert shares[:, :, :16].sum() == 0.5


def test_inspect_writes_pictures_of_an_episode(episodes, tmp_path: Path) -> None:
    base = {"task": settings(episodes), "policy": {"name": "streaming", "budget": 0.25, "sinks": 4}, "seed": 0}
    console = Console(file=io.StringIO())
    out = inspect(base | {"clip": 1, "frames": 4}, tmp_path / "out", console)
    counts = json.loads((out / "retained.json").read_text())
    assert counts["seed_of_environment"] == int(episodes.units(0)[1].id)
    assert len(counts["retained_by_layer_and_timestep"][0]) == counts["length"]
    assert (out / "retained.png").read_bytes().startswith(b"\x89PNG")
    video = decode(out / "retained.mp4")
    assert len(video.frames) == len({*range(0, counts["length"], 4), counts["length"] - 1})
    assert video.timestamps[1] - video.timestamps[0] == pytest.approx(4 * 0.008)
    assert (out / "retained.html").read_text().count("data:image/jpeg;base64,") == counts["length"]
    for change, message in [
        ({"clip": 3}, "clip is 3; expected the number of an episode, 0 to 2"),
        ({"frames": 0}, "frames is 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            inspect(base | {"clip": 0, "frames": 4} | change, tmp_path / "other", console)


def test_the_command_line_inspects_an_episode(tiny_hosts, tmp_path: Path) -> None:
    arguments = ["task=offline_rl/hopper", f"task.model.path={tiny_hosts / 'dt'}", "task.model.update_interval=16"]
    done = CliRunner().invoke(
        app, ["inspect", *arguments, "policy=h2o", "policy.budget=0.5", f"out={tmp_path / 'out'}"]
    )
    assert done.exit_code == 0, done.output
    assert "layer 1:" in done.output


def test_a_robot_moves_with_its_picture() -> None:
    robot = Robot((1,), (0.1,), (0.2,), frozenset(), 0.01)
    bodies = np.array([[0, 0, 0, 1], [0.0, 1.0, 0, 1]])
    moved = bodies + np.array([3.0, 0, 0, 0])
    np.testing.assert_array_equal(robot.draw(bodies, 120, 160), robot.draw(moved, 120, 160))
