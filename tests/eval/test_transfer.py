"""The tasks on tiny random hosts and real files: clips decoded from mp4, episodes played in MuJoCo."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from namm_transfer import policy
from namm_transfer.configs import compose
from namm_transfer.errors import CacheError, CheckpointError, ConfigError, DataError
from namm_transfer.eval.offline_rl.host import load_host
from namm_transfer.eval.offline_rl.rollout import make_envs, rollout
from namm_transfer.eval.offline_rl.window import WindowAgent
from namm_transfer.eval.results import RunFolder
from namm_transfer.eval.transfer import transfer
from namm_transfer.eval.video import decode, write_mp4
from namm_transfer.eval.video_classification import host as encoder_host
from namm_transfer.eval.video_qa import host as llm_host
from namm_transfer.eval.video_qa.evaluate import answer


def test_full_memory_answers_as_the_unmodified_video_llm(qa, tiny_hosts):
    clip = next(iter(qa._clips.values()))
    frames, questions = decode(clip.path).frames, clip.questions[:3]
    model, processor = llm_host.load_host(tiny_hosts / "video_llm")
    expected = answer(model, processor, frames, questions)
    assert [reply for reply, _ in qa.ask(frames, questions, policy("full"))] == expected


def test_questions_are_asked_of_forks_of_one_memory(qa):
    outcomes = list(qa.evaluate(qa.units(0), policy("h2o", budget=0.25), 0))
    assert [o.detail["family"] for o in outcomes] == ["colour", "shape", "direction"], (
        "a few questions cover the families"
    )
    assert all(o.kept_at_updates == pytest.approx(0.25, abs=0.002) for o in outcomes)
    assert len({o.unit.cluster for o in outcomes}) == 1
    (alone,) = qa.evaluate(qa.units(0)[2:], policy("h2o", budget=0.25), 0)
    assert alone == outcomes[2], "a resumed run asks only what is left, with the same result"


def test_full_memory_classifies_as_the_unmodified_encoder(motion, tiny_hosts):
    from namm_transfer.eval.video_classification.evaluate import classify

    model, processor = encoder_host.load_host(tiny_hosts / "video_encoder")
    expected = [
        model.config.id2label[classify(model, processor, decode(c.path).frames)]
        for c in list(motion._clips.values())[:2]
    ]
    outcomes = list(motion.evaluate(motion.units(0), policy("full"), 0))
    assert [o.detail["reply"] for o in outcomes] == expected
    evicted = list(motion.evaluate(motion.units(0), policy("tova", budget=0.5), 0))
    assert all(o.kept_at_updates == pytest.approx(0.5, abs=0.01) for o in evicted)


def test_full_memory_plays_as_the_window_that_never_forgets(episodes, tiny_hosts):
    units = episodes.units(0)
    outcomes = {o.unit.id: o for o in episodes.evaluate(units, policy("full"), 0)}
    model, normalisation = load_host(tiny_hosts / "dt")
    agent = WindowAgent(model, normalisation, 3, window=1000)
    records = rollout(agent, make_envs("Hopper-v5", 3), [int(u.id) for u in units])
    for record in records:
        found = outcomes[str(record.seed)]
        assert found.score == pytest.approx(record.return_raw, rel=1e-3)
        assert found.detail["length"] == record.length


def test_an_encoder_too_short_for_a_decision_is_refused(motion):
    task = replace(motion, model={**motion.model, "update_interval": 16384})
    assert {outcome.kept_at_updates for outcome in task.evaluate(task.units(0), policy("full"), 0)} == {1.0}
    with pytest.raises(CacheError, match="with update_interval=16384 no decision falls within them"):
        list(task.evaluate(task.units(0), policy("h2o", budget=0.25), 0))


@pytest.mark.parametrize("name", ["qa", "episodes"])
def test_units_too_short_for_a_decision_have_no_kept_fraction(request, name):
    task = request.getfixturevalue(name)
    task = replace(task, model={**task.model, "update_interval": 16384})
    for rule, kept in ((policy("h2o", budget=0.25), None), (policy("full"), 1.0)):
        outcomes = list(task.evaluate(task.units(0), rule, 0))
        assert outcomes and {outcome.kept_at_updates for outcome in outcomes} == {kept}
        assert all(outcome.kept_fraction == 1.0 and 0 < outcome.tokens_seen < 16384 for outcome in outcomes)


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(motion):
    with pytest.raises(ConfigError, match="device is 'foo'"):
        replace(motion, model={**motion.model, "device": "foo"})


def test_each_episode_is_measured_when_it_ends_whatever_the_others_do(episodes):
    rule = policy("streaming", budget=0.5)
    together = {o.unit.id: o for o in episodes.evaluate(episodes.units(0), rule, 0)}
    for unit in episodes.units(0):
        (alone,) = episodes.evaluate([unit], rule, 0)
        assert alone.score == pytest.approx(together[unit.id].score, rel=1e-3)
        assert alone.kept_at_updates == pytest.approx(together[unit.id].kept_at_updates)
        assert alone.kept_fraction == pytest.approx(together[unit.id].kept_fraction)
    assert all(0.4 < o.kept_at_updates < 0.6 for o in together.values())


def test_many_episodes_are_played_some_at_a_time(episodes, monkeypatch):
    from namm_transfer.eval import rl_tasks

    rule, opened = policy("streaming", budget=0.5), []
    together = list(episodes.evaluate(episodes.units(0), rule, 0))
    monkeypatch.setattr(rl_tasks, "ROWS", 2)
    plain = rl_tasks.make_envs
    monkeypatch.setattr(rl_tasks, "make_envs", lambda env_id, rows: opened.append(rows) or plain(env_id, rows))
    apart = list(episodes.evaluate(episodes.units(0), rule, 0))
    assert opened == [2, 1]
    assert {o.unit: o.detail["length"] for o in apart} == {o.unit: o.detail["length"] for o in together}


def test_an_episode_that_ends_before_a_decision_has_no_kept_fraction_at_updates(episodes):
    """A rule that is to match must not be given a memory that nothing was evicted from."""
    long = replace(episodes, model=episodes.model | {"update_interval": 4096})
    outcomes = list(long.evaluate(long.units(0), policy("streaming", budget=0.5), 0))
    assert [o.kept_at_updates for o in outcomes] == [None] * 3
    assert [o.kept_fraction for o in outcomes] == [1.0] * 3


def test_seeds_of_episodes_are_common_to_policies_and_differ_between_seeds(episodes):
    assert episodes.units(0) == episodes.units(0)
    assert not {u.id for u in episodes.units(0)} & {u.id for u in episodes.units(1)}
    window = list(episodes.evaluate(episodes.units(0), "window", 0))
    assert {o.unit for o in window} == set(episodes.units(0))
    assert window[0].kept_at_updates is None


def test_an_environment_that_ends_at_once_is_refused_and_what_finished_is_kept(episodes, monkeypatch):
    from namm_transfer.eval import rl_tasks

    units = episodes.units(0)
    good = rl_tasks.EpisodeRecord(int(units[0].id), 50.0, 20, True, False)

    def play(agent, envs, seeds):
        yield good
        yield replace(good, seed=int(units[1].id), length=1)

    monkeypatch.setattr(rl_tasks, "rollout", play)
    kept = []
    with pytest.raises(DataError, match=f"Hopper-v5 ended the episode of seed {units[1].id} at its first step"):
        for outcome in episodes.evaluate(units, "window", 0):
            kept.append(outcome.unit.id)
    assert kept == [units[0].id]


def test_a_truncated_and_a_missing_clip_are_undecodable_not_answered(qa, motion, tmp_path):
    for task in (qa, motion):
        source = list(task._clips.values())[:2]
        folder = tmp_path / task.name
        folder.mkdir()
        manifest = json.loads((source[0].path.parent / "manifest.json").read_text())
        manifest["clips"] = manifest["clips"][:2]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / source[0].path.name).write_bytes(source[0].path.read_bytes()[:1500])
        broken = replace(task, videos=str(folder), clips=2)
        outcomes = list(broken.evaluate(broken.units(0), policy("full"), 0))
        assert len(outcomes) == len(broken.units(0))
        assert all(o.status == "undecodable" and o.score is None and o.error for o in outcomes)
        assert not any(str(tmp_path) in o.error for o in outcomes), "results carry no path of the machine"


def test_a_video_of_another_size_is_refused_before_it_is_shown_to_the_model(qa, tmp_path):
    from namm_transfer.errors import DataError

    write_mp4(tmp_path / "wide.mp4", np.zeros((8, 32, 64, 3), np.uint8), 8)
    with pytest.raises(DataError, match=r"expected uint8 frames"):
        qa.retained(decode(tmp_path / "wide.mp4").frames, policy("full"))


def test_settings_are_checked_before_anything_runs(qa, motion, episodes):
    with pytest.raises(ConfigError, match="clips is 999; expected an integer from 1 to 16"):
        replace(qa, clips=999)
    with pytest.raises(ConfigError, match="multiple of 16"):
        replace(motion, model={**motion.model, "update_interval": 100})
    with pytest.raises(CheckpointError, match="no host model in nowhere"):
        replace(episodes, model={**episodes.model, "path": "nowhere"})


def test_the_main_job_runs_every_column_of_every_task(tiny_hosts, tmp_path):
    from omegaconf import OmegaConf

    paths = {"video_qa": "video_llm", "video_classification": "video_encoder", "offline_rl": "dt"}
    overrides = [f"tasks.{task}.model.path={tiny_hosts / host}" for task, host in paths.items()]
    overrides += [
        f"policies.namm.namm={tiny_hosts / 'namm'}",
        "experiment=quick",
        "tasks.offline_rl.model.update_interval=16",
    ]
    config = OmegaConf.to_container(compose("transfer", overrides), resolve=True)
    console = Console(file=io.StringIO(), width=200)
    summary = transfer(config, tmp_path / "run", console)
    rows = RunFolder(tmp_path / "run").rows()
    assert {task: len(cells) for task, cells in summary.items()} == {
        "video_qa/shapes": 9,
        "video_classification/motion": 9,
        "offline_rl/hopper": 10,
    }
    for task, cells in summary.items():
        kept = cells["namm"]["kept_at_updates"]
        assert kept == pytest.approx(0.5, abs=0.03), f"the NAMM never decided on {task}"
        assert 0 < cells["namm_threshold"]["kept_at_updates"] < 1
        for rule in ("streaming", "h2o", "key_norm", "tova", "snapkv", "random"):
            assert cells[rule]["budget"] == pytest.approx(kept)
            assert cells[rule]["kept_at_updates"] == pytest.approx(kept, abs=0.03), (task, rule)
        assert cells["full"]["kept_fraction"] == 1.0
        assert all(cell["bytes_total"] > 0 for name, cell in cells.items() if name != "window")
    assert all(row.status == "ok" for row in rows)
    assert len(rows) == 2 * 9 + 2 * 9 + 10
