"""Settings are checked when made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import namm_transfer.configs
from namm_transfer.errors import ConfigError
from namm_transfer.evolution.config import EvolutionConfig


def test_the_yaml_has_every_setting() -> None:
    path = Path(namm_transfer.configs.__file__).parent / "evolution" / "default.yaml"
    values = yaml.safe_load(path.read_text())
    assert set(values) == set(EvolutionConfig.__dataclass_fields__)
    EvolutionConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("population", 3),
        ("population", 16.0),
        ("sigma", 0.0),
        ("sigma", float("nan")),
        ("seed", -1),
        ("minutes", 0),
        ("kinds", ()),
        ("kinds", ("needle",)),
        ("budgets", (0.2, 1.0)),
        ("update_intervals", (64, 100)),
        ("update_intervals", 64),
        ("context_tokens", (256.5,)),
        ("kept_fraction", 1.0),
        ("workers", True),
        ("sigma", "abc"),
        ("sigma", True),
        ("minutes", "abc"),
        ("kept_fraction", "half"),
        ("budgets", ("0.2",)),
        ("kinds", (["needles"],)),
        ("host", None),
        ("diagonal", "no"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EvolutionConfig.from_mapping({name: value})


def test_every_sample_must_meet_a_decision() -> None:
    EvolutionConfig(context_tokens=(128, 512), update_intervals=(64, 128))
    with pytest.raises(ConfigError, match=r"update_intervals must be at most 128, .*got \(64, 144\)"):
        EvolutionConfig(context_tokens=(128, 512), update_intervals=(64, 144))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="popsize"):
        EvolutionConfig.from_mapping({"popsize": 16})


def test_lists_become_tuples() -> None:
    config = EvolutionConfig.from_mapping({"budgets": [0.5]})
    assert config.budgets == (0.5,)
    assert config.identity()["budgets"] == [0.5]
