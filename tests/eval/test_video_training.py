"""The training loop: an interrupted run ends where an uninterrupted one does."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval import video_training
from namm_transfer.eval.video_classification.train import TrainConfig as EncoderConfig
from namm_transfer.eval.video_qa.train import TrainConfig as LLMConfig
from namm_transfer.eval.video_training import Stage, Trainer, is_finished, learning_rate

STAGES = (Stage("first", steps=6, batch=4, learning_rate=0.1), Stage("second", steps=5, batch=4, learning_rate=0.05))


def _run(folder: Path, *, stop_at: tuple[int, int] | None = None, resume: bool = True) -> torch.Tensor:
    """Fit a line; raise `KeyboardInterrupt` at (stage, step) when asked to."""
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    trainer = Trainer({"model": model}, folder / "checkpoint.pt", {"seed": 0}, resume=resume)
    for number, stage in enumerate(STAGES):

        def loss_at(step: int, number: int = number, stage: Stage = stage) -> tuple[torch.Tensor, dict[str, float]]:
            if stop_at == (number, step):
                raise KeyboardInterrupt
            inputs = torch.randn(stage.batch, 3, generator=torch.Generator().manual_seed(100 * number + step))
            loss = (model(inputs) - inputs.sum(-1, keepdim=True)).square().mean()
            return loss, {"loss": loss.item()}

        trainer.run(number, stage, model.parameters(), loss_at)
    return model.weight.detach().clone()


@pytest.mark.parametrize("stop_at", [(0, 3), (1, 0), (1, 4)])
def test_resuming_equals_never_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: tuple) -> None:
    monkeypatch.setattr(video_training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole = _run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "parts", stop_at=stop_at)
    assert torch.equal(_run(tmp_path / "parts"), whole)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    _run(tmp_path)
    with pytest.raises(CheckpointError, match="remove it, or train into another folder"):
        Trainer({"model": nn.Linear(3, 1)}, tmp_path / "checkpoint.pt", {"seed": 1}, resume=True)
    Trainer({"model": nn.Linear(3, 1)}, tmp_path / "checkpoint.pt", {"seed": 1}, resume=False)


def test_a_finished_folder_is_neither_trained_again_nor_overwritten(tmp_path: Path) -> None:
    config = {"seed": 0, "stages": [{"name": "first"}], "out": ("a", "b")}
    assert not is_finished(tmp_path, config, {})
    (tmp_path / "training.json").write_text(json.dumps({"config": config}))
    assert is_finished(tmp_path, config, {})
    with pytest.raises(CheckpointError, match="trained with another seed: train into another folder"):
        is_finished(tmp_path, config | {"seed": 1}, {})
    assert is_finished(tmp_path, config | {"rank": 8}, {"rank": 8}), "trained before there was such a setting"
    with pytest.raises(CheckpointError, match="trained with another rank"):
        is_finished(tmp_path, config | {"rank": 4}, {"rank": 8, "seed": 3})
    (tmp_path / "checkpoint.pt").touch()
    assert not is_finished(tmp_path, config, {}), "a run that goes on"


@pytest.mark.parametrize("text", ["", '{"config": ', "[]", "{}", "3", '{"config": 3}'])
def test_a_finished_folder_that_cannot_be_read_is_not_overwritten(text: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"training\.json does not say how its host was trained"):
        is_finished(tmp_path, {"seed": 0}, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "Stage.steps is 0; expected at least 1"),
        ({"batch": -1}, "Stage.batch is -1"),
        ({"learning_rate": 0.0}, "Stage.learning_rate is 0.0; expected a positive number"),
        ({"name": "motoin"}, r"stages\[0\].name is 'motoin'; expected one of motion"),
        ({"goal": 0.5}, r"stages\[0\].figure is ''; expected one of accuracy"),
        ({"goal": 0.5, "figure": "loss"}, r"stages\[0\].figure is 'loss'; expected one of accuracy"),
    ],
)
def test_impossible_stages_are_refused(settings: dict, message: str) -> None:
    usual = {"name": "motion", "steps": 1, "batch": 1, "learning_rate": 0.1}
    with pytest.raises(ConfigError, match=message):
        EncoderConfig(stages=(Stage(**usual | settings),))
    with pytest.raises(ConfigError, match=r"stages\[0\].goal is 0.5; a stage 'told' has no goal: expected null"):
        LLMConfig(stages=(Stage("told", 1, 1, 0.1, frames=16, goal=0.5, figure="frame"),))
    with pytest.raises(ConfigError, match="TrainConfig.threads is 0"):
        EncoderConfig(threads=0)


def test_a_goal_ends_a_stage_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_training, "GOAL_STEPS", 3)
    weight, steps = nn.Parameter(torch.zeros(1)), []

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        steps.append(step)
        return weight.square().sum(), {"accuracy": step / 10}

    stage = Stage("only", steps=50, batch=1, learning_rate=0.1, goal=0.5, figure="accuracy")
    Trainer({}, tmp_path / "checkpoint.pt", {}, resume=True).run(0, stage, [weight], loss_at)
    # The mean of 0.4, 0.5 and 0.6 is the first to reach 0.5.
    assert steps == list(range(7))


def test_learning_rate_warms_up_then_decays_or_stays() -> None:
    decaying = Stage("decaying", steps=200, batch=1, learning_rate=1.0)
    constant = Stage("constant", steps=200, batch=1, learning_rate=1.0, goal=0.9, figure="accuracy")
    assert learning_rate(0, decaying) < 0.05 and learning_rate(199, decaying) < 0.06
    assert max(learning_rate(step, decaying) for step in range(200)) > 0.85
    assert learning_rate(39, constant) == learning_rate(199, constant) == 1.0
