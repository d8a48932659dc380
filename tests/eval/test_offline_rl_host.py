"""The packaged decision transformer loads, plays, and a damaged one is refused with a clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from namm_transfer import adapt, policy
from namm_transfer.errors import CheckpointError, ConfigError, NammTransferError
from namm_transfer.eval.offline_rl import host as hosts
from namm_transfer.eval.offline_rl.agent import MemoryAgent
from namm_transfer.eval.offline_rl.host import PACKAGED_HOST, load_host, packaged_hosts, save_host
from namm_transfer.eval.offline_rl.measure import measure_agent
from namm_transfer.eval.offline_rl.rollout import RandomAgent, make_envs, rollout
from namm_transfer.eval.offline_rl.window import WindowAgent
from namm_transfer.eval.rl_tasks import Episodes


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED_HOST, tmp_path / "host"))


def test_packaged_host_is_complete_and_small() -> None:
    model, normalisation = load_host()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert normalisation.env_id == "Hopper-v5"
    assert model.config.max_ep_len >= 1000
    assert normalisation.behaviour.n >= 50
    assert normalisation.random.n >= 50
    assert sum(file.stat().st_size for file in PACKAGED_HOST.iterdir()) < 3e6


@pytest.mark.parametrize("name", packaged_hosts())
def test_every_packaged_host_loads_by_its_name(name: str) -> None:
    _, normalisation = load_host(name)
    assert normalisation.env_id.lower() == "-".join(name.split("-")[:2])
    assert normalisation.references.source == "the host's own"


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(CheckpointError, match=r"no decision transformer 'hoper'.*packaged are \[.*'hopper-v5-noise'"):
        load_host("hoper")
    settings = {"path": "hoper", "device": "cpu", "update_interval": 48}
    with pytest.raises(CheckpointError, match=r"no host model in hoper.*model\.path=hopper-v5-noise"):
        Episodes("hopper", settings, 1)


def test_a_name_that_is_a_folder_too_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = copy.rename(copy.with_name("hopper-v5-medium"))
    (own / "normalisation.json").write_text((own / "normalisation.json").read_text().replace("Hopper-v5", "Mine-v0"))
    monkeypatch.chdir(own.parent)
    with pytest.raises(ConfigError, match=r"'hopper-v5-medium' is a packaged .*write \./hopper-v5-medium"):
        load_host("hopper-v5-medium")
    for path in ("./hopper-v5-medium", Path("hopper-v5-medium"), own):
        assert load_host(path)[1].env_id == "Mine-v0"
    monkeypatch.chdir(own)
    assert load_host("hopper-v5-medium")[1].env_id == "Hopper-v5"
    with pytest.raises(CheckpointError, match="no decision transformer 'hopper-v5-medium'"):
        load_host(Path("hopper-v5-medium"))


def test_settings_of_the_packaged_host_are_checked_before_a_run(tmp_path: Path) -> None:
    settings = {"path": "packaged", "device": "cpu", "update_interval": 48, "host": None, "normalisation": None}
    Episodes("hopper", settings, 1)
    for change, message in (
        ({"target_return": float("nan")}, "target_return is nan; expected a finite number"),
        ({"target_return": float("inf")}, "target_return is inf; expected a finite number"),
        ({"normalisation": 5}, "normalisation is 5; expected text"),
        ({"normalisation": str(tmp_path / "absent.json")}, "no normalisation record"),
        ({"host": "walker2d-medium"}, "is of Hopper-v5, but model.host names walker2d-medium"),
        ({"path": "hub"}, "the path hub needs to be told which host: task.model.host="),
    ):
        with pytest.raises(NammTransferError, match=message):
            Episodes("hopper", settings | change, 1)


def test_a_task_names_its_host_and_the_window_of_the_baseline(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "HOSTS", copy.parent)
    settings = {"path": "host", "device": "cpu", "update_interval": 48}
    task = Episodes("hopper", settings, 1)
    assert task.inputs() == Episodes("hopper", settings | {"path": "packaged"}, 1).inputs()  # the same files
    assert task._host[1].window == 20
    long = Episodes("hopper", settings | {"window": 64, "target_return": 9.0}, 1)
    assert (long._host[1].window, long._host[1].target_return) == (64, 9.0)
    for window in (0, True, "64"):
        with pytest.raises(ConfigError, match="window is .*expected an integer of at least 1"):
            Episodes("hopper", settings | {"window": window}, 1)


def test_recorded_return_is_at_least_seventy_percent_of_the_behaviour_policys() -> None:
    recorded = json.loads((PACKAGED_HOST / "training.json").read_text())["return_raw"]
    assert recorded["window"]["n"] >= 50
    assert recorded["window"]["mean"] >= 0.7 * recorded["behaviour"]["mean"]
    _, normalisation = load_host()
    assert normalisation.behaviour.mean == recorded["behaviour"]["mean"]


def test_packaged_host_beats_the_random_policy() -> None:
    model, normalisation = load_host()
    seeds = [1, 2]
    env_id = normalisation.env_id
    agents = (
        WindowAgent(model, normalisation, 2),
        RandomAgent(make_envs(env_id, 2), np.random.default_rng(0)),
    )
    host, random = (measure_agent(agent, env_id, seeds, 2, progress=False) for agent in agents)
    for ours, floor in zip(host, random, strict=True):
        assert ours.seed == floor.seed
        assert ours.return_raw > 5 * floor.return_raw
        assert ours.length > floor.length


def test_saved_host_loads_again(tmp_path: Path) -> None:
    model, normalisation = load_host()
    save_host(tmp_path / "again", model, normalisation)
    again, same = load_host(tmp_path / "again")
    assert same == normalisation
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "normalisation.json"])
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load_host(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no readable decision transformer"):
        load_host(copy)


def test_absent_tensor_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["embed_state.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_state\.weight"):
        load_host(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_std": [1.0] * 10}, "11 values and state_std 10"),
        ({"state_std": [0.0] * 11}, "finite and positive"),
        ({"state_mean": [0.0] * 17, "state_std": [1.0] * 17}, "the model takes 11"),
        ({"window": 0}, "window is 0"),
        ({"random": {"mean": 1.0}}, "no normalisation record"),
        ({"random": 5}, "no normalisation record"),
        ({"random": {"mean": "high", "std": 1.0, "n": 2}}, "no normalisation record"),
        ({"behaviour": {"mean": float("nan"), "std": 1.0, "n": 2}}, "the mean return of random or behaviour"),
        ({"unit": "cm"}, "no normalisation record"),
    ],
)
def test_wrong_normalisation_is_refused(copy: Path, change: dict, message: str) -> None:
    path = copy / "normalisation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_host(copy)


def test_normalisation_that_is_no_json_is_refused(copy: Path) -> None:
    (copy / "normalisation.json").write_text("state_mean:")
    with pytest.raises(CheckpointError, match="no normalisation record"):
        load_host(copy)


def test_rows_that_stay_in_step_play_the_same_episodes() -> None:
    """What a row does behind the end of its only episode is dropped, whether its memory was cleared or not."""
    model, normalisation = load_host("hopper-v5-medium-replay")
    seeds, played = [41, 42, 43, 44], {}
    for once in (True, False):
        envs = make_envs("Hopper-v5", len(seeds))
        with adapt(model, policy("h2o", budget=0.4), 48, normalisation=normalisation) as host:
            agent = MemoryAgent(host, len(seeds), once=once)
            played[once] = {}
            for record in rollout(agent, envs, seeds):
                memory = agent.measured(seeds.index(record.seed))
                played[once][record.seed] = (record.length, round(record.return_raw, 1), memory["tokens_seen"])
        envs.close()
    assert played[True] == played[False]
    assert len({length for length, *_ in played[True].values()}) > 1, "they have to end at different steps"
