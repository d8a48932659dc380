"""The nine hosts of the Hub: their packaged numbers, and folders of the form that the Hub gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DecisionTransformerConfig, DecisionTransformerModel
from typer.testing import CliRunner

from namm_transfer import policy
from namm_transfer.cli import app
from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.offline_rl import hub
from namm_transfer.eval.offline_rl.host import load_host
from namm_transfer.eval.offline_rl.rollout import make_envs
from namm_transfer.eval.rl_tasks import Episodes

SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6)}
DATA = ("medium", "medium-replay", "expert")

CARD = """\
---
tags:
- reinforcement-learning
- decision-transformer
- gym-continous-control
pipeline_tag: reinforcement-learning
---
# Decision Transformer model trained on {data} trajectories sampled from the Gym {environment} environment

The following normlization coeficients are required to use this model:

mean = [{mean}]

std = [{std} ]
See our [Blog Post](https://example.org) for usage.
"""


def write_host(folder: Path, state_dim: int, act_dim: int, *, card: str | None, old: bool = False) -> Path:
    """Random weights of the Hub's shapes; `old`: in the format of old versions of transformers, masks included."""
    config = DecisionTransformerConfig(
        state_dim=state_dim, act_dim=act_dim, hidden_size=128, n_layer=3, n_head=1, max_ep_len=1000, n_positions=1024
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DecisionTransformerModel(config)
    model.save_pretrained(folder)
    if old:
        (folder / "model.safetensors").unlink()
        weights = dict(model.state_dict())
        for layer in range(3):
            weights[f"encoder.h.{layer}.attn.bias"] = torch.ones(1, 1, 1024, 1024, dtype=torch.uint8).tril()
            weights[f"encoder.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        torch.save(weights, folder / "pytorch_model.bin")
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"n_embd": 768, "n_ctx": 1024, "summary_type": "x"}))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def numbers(count: int, start: float = 0.25) -> str:
    return ", ".join(f"{start + i / 8}" for i in range(count))


def test_the_nine_hosts_are_packaged_with_numbers_for_every_dimension() -> None:
    assert list(hub.hub_hosts()) == [f"{name}-{data}" for name in SIZES for data in DATA]
    for name, host in hub.hub_hosts().items():
        state_dim, act_dim = SIZES[name.split("-")[0]]
        assert (len(host.state_mean), len(host.state_std), host.act_dim) == (state_dim, state_dim, act_dim)
        assert min(host.state_std) > 0
        assert (host.return_scale, host.window) == (1000.0, 20)
        assert host.repository == f"edbeeching/decision-transformer-gym-{name}"
    targets = {name.split("-")[0]: host.target_returns for name, host in hub.hub_hosts().items()}
    assert targets == {"hopper": (3600, 1800), "halfcheetah": (12000, 6000), "walker2d": (5000, 2500)}
    means = {host.state_mean for host in hub.hub_hosts().values()}
    assert len(means) == 9


@pytest.mark.parametrize("name", [f"{name}-expert" for name in SIZES])
def test_a_v4_environment_shows_what_the_host_was_trained_on(name: str) -> None:
    """The first observations of an episode are near the data's: height above all, which another version could move."""
    host = hub.hub_host(name)
    envs = make_envs(host.env_id, 4)
    observations, _ = envs.reset(seed=[1, 2, 3, 4])
    assert envs.single_action_space.shape == (host.act_dim,)
    envs.close()
    standard = (observations - np.array(host.state_mean)) / np.array(host.state_std)
    assert observations.shape == (4, len(host.state_mean))
    assert np.abs(standard).max() < 15


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_the_hub_loads_by_its_card(tmp_path: Path, old: bool) -> None:
    card = CARD.format(data="medium", environment="Hopper", mean=numbers(11), std=numbers(11, 0.5))
    model, normalisation = load_host(write_host(tmp_path, 11, 3, card=card, old=old))
    assert not model.training
    assert normalisation.state_mean == tuple(0.25 + i / 8 for i in range(11))
    assert normalisation.state_std == tuple(0.5 + i / 8 for i in range(11))
    assert (normalisation.env_id, normalisation.window, normalisation.return_scale) == ("Hopper-v4", 20, 1000.0)
    assert normalisation.target_return == 3600.0
    assert normalisation.references.source == "D4RL"


def test_lists_over_several_lines_and_in_scientific_notation_are_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mean = [ 1.2384834e+00,  -1.0475016e-01,\n   3]\n\nstd=[1,2.5,\n 0.5e1]\n")
    assert hub.read_card(tmp_path / "README.md", 3) == ((1.2384834, -0.10475016, 3.0), (1.0, 2.5, 5.0))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (numbers(17), numbers(18), "17 means and 18 standard deviations.*takes 17"),
        (numbers(16), numbers(16), "16 means and 16"),
        (numbers(17), "1.0, two", "std lists 'two'"),
    ],
)
def test_a_card_whose_lists_do_not_fit_is_refused(tmp_path: Path, mean: str, std: str, message: str) -> None:
    write_host(tmp_path, 17, 6, card=CARD.format(data="medium-replay", environment="HalfCheetah", mean=mean, std=std))
    with pytest.raises(CheckpointError, match=message):
        load_host(tmp_path)
    _, normalisation = load_host(tmp_path, host="halfcheetah-medium-replay")  # whose numbers are packaged
    assert normalisation.state_std[-1] == 7.253004


def test_a_named_host_that_the_folder_does_not_hold_is_refused(tmp_path: Path) -> None:
    card = CARD.format(data="expert", environment="HalfCheetah", mean=numbers(17), std=numbers(17, 0.5))
    folder = write_host(tmp_path, 17, 6, card=card)
    for host in ("walker2d-medium", "halfcheetah-medium"):
        with pytest.raises(CheckpointError, match=f"is of halfcheetah-expert, but model.host names {host}"):
            load_host(folder, host=host)
    assert load_host(folder, host="halfcheetah-expert")[1].env_id == "HalfCheetah-v4"
    with pytest.raises(CheckpointError, match=r"is of Hopper-v5, but model.host names hopper-medium, of Hopper-v4"):
        load_host("hopper-v5-medium", host="hopper-medium")


def test_a_card_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_host(tmp_path, 11, 3, card=None)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    for host in (None, "hopper-medium"):
        with pytest.raises(CheckpointError, match=r"README\.md cannot be read"):
            load_host(tmp_path, host=host)


def test_what_a_folder_lacks_is_told(tmp_path: Path) -> None:
    write_host(tmp_path, 11, 3, card=None)
    with pytest.raises(CheckpointError, match="no normalisation.json and no model card"):
        load_host(tmp_path)
    (tmp_path / "README.md").write_text("# A model\n")
    with pytest.raises(CheckpointError, match=r"no list `mean"):
        load_host(tmp_path)
    (tmp_path / "README.md").write_text(f"mean = [{numbers(11)}]\nstd = [{numbers(11)}]\n")
    with pytest.raises(CheckpointError, match="does not tell its environment"):
        load_host(tmp_path)
    with pytest.raises(CheckpointError, match="the model takes 11 observation values, its normalisation has 17"):
        load_host(tmp_path, host="walker2d-medium")
    record = {"env_id": "Hopper-v4", "state_mean": [0.0] * 11, "state_std": [1.0] * 11}
    record |= {"return_scale": 1000.0, "window": 20, "target_return": 1800.0}
    (tmp_path / "mine.json").write_text(json.dumps(record))
    assert load_host(tmp_path, host="hopper-medium", normalisation=tmp_path / "mine.json")[1].target_return == 1800.0
    with pytest.raises(CheckpointError, match="no normalisation record"):
        load_host(tmp_path, normalisation=tmp_path / "absent.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        load_host(tmp_path)


def test_unknown_names_are_told_the_nearest() -> None:
    assert hub.hub_host("edbeeching/decision-transformer-gym-hopper-medium").name == "hopper-medium"
    with pytest.raises(ConfigError, match="nearest is 'hopper-medium'"):
        hub.hub_host("hopper-medum")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(repository: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)


SETTINGS = {"host": "hopper-medium", "device": "cpu", "update_interval": 48}


def test_offline_it_is_said_what_is_missing(offline: None) -> None:
    with pytest.raises(CheckpointError, match=r"gym-hopper-medium is not on this machine.*config\.json.*model\.path"):
        Episodes("hopper", {**SETTINGS, "path": "hub"}, 1)


def test_a_local_folder_plays_and_is_scored_by_d4rl(offline: None, tmp_path: Path) -> None:
    folder = write_host(tmp_path, 11, 3, card=None, old=True)
    task = Episodes("hopper", {**SETTINGS, "path": str(folder), "target_return": 1800.0}, 2)
    for chosen in ("window", policy("h2o", budget=0.5)):
        outcomes = list(task.evaluate(task.units(0), chosen, 0))
        assert len(outcomes) == 2
        for outcome in outcomes:
            percent = 100 * (outcome.score + 20.272305) / (3234.3 + 20.272305)
            assert outcome.detail["score_percent"] == pytest.approx(percent)
            assert outcome.detail["references"] == "D4RL"
    assert task._host[1].target_return == 1800.0


def test_what_does_not_fit_is_said_before_anything_is_played(tmp_path: Path) -> None:
    folder = write_host(tmp_path, 17, 6, card=None)
    with pytest.raises(CheckpointError, match="the model takes 17"):
        Episodes("hopper", {**SETTINGS, "path": str(folder)}, 1)
    with pytest.raises(ConfigError, match="nearest"):
        Episodes("hopper", {**SETTINGS, "path": str(folder), "host": "walker-medium"}, 1)
    record = {"env_id": "Hopper-v4", "state_mean": [0.0] * 17, "state_std": [1.0] * 17}
    record |= {"return_scale": 1000.0, "window": 20, "target_return": 1800.0}
    (folder / "normalisation.json").write_text(json.dumps(record))
    task = Episodes("hopper", {**SETTINGS, "path": str(folder)}, 1)
    with pytest.raises(ConfigError, match=r"Hopper-v4 has observations \(11,\) and actions \(3,\).*takes \(17,\)"):
        list(task.evaluate(task.units(0), policy("full"), 0))


COMMAND = ("eval", "task=offline_rl/hopper-medium", "policy=h2o", "policy.budget=0.5", "task.episodes=2")


def test_the_command_line(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, list(COMMAND))
    assert refused.exit_code == 2
    for text in ("decision-transformer-gym-hopper-medium", "config.json", "task.model.path=FOLDER"):
        assert text in refused.output
    misspelt = CliRunner().invoke(app, [*COMMAND, "task=offline_rl/hopper-medum"])
    assert misspelt.exit_code == 2
    assert "the nearest is 'offline_rl/hopper-medium'" in misspelt.output
    folder = write_host(tmp_path / "host", 11, 3, card=None, old=True)
    bare = CliRunner().invoke(app, ["eval", "task=offline_rl/hopper", f"task.model.path={folder}", "policy=full"])
    assert bare.exit_code == 2
    assert "name a known host as model.host (task.model.host=hopper-medium)" in bare.output
    told = (
        "eval",
        "task=offline_rl/hopper",
        "task.episodes=1",
        "task.model.host=hopper-medium",
        "policy=full",
        "out=a",
    )
    assert CliRunner().invoke(app, [*told, f"task.model.path={folder}"]).exit_code == 0
    done = CliRunner().invoke(app, [*COMMAND, f"task.model.path={folder}", "task.model.update_interval=16", "out=run"])
    assert done.exit_code == 0, done.output
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| offline_rl/hopper-medium, score_percent | " in summary
    stored = json.loads((tmp_path / "run" / "offline_rl.json").read_text())
    assert stored["tasks"]["offline_rl/hopper-medium"]["h2o"]["iqm_return_raw"]["units"] == 2
