"""A study has every NAMM and every rule at every budget, and another NAMM joins for its own price."""

import io
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from namm_transfer.errors import BudgetError, ConfigError
from namm_transfer.eval.study import study
from namm_transfer.network import NAMM, NUM_PARAMETERS

HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("FAKE_TASK_LOG", str(tmp_path / "log"))
    for name, value in (("one", 0.1), ("two", 0.2)):
        NAMM.from_vector(torch.full((NUM_PARAMETERS,), value)).save_pretrained(tmp_path / name)
    return {
        "task": {"_target_": "fake_task.FakeTask", "name": "fake", "clips": 4},
        "namms": {"namm": str(tmp_path / "one")},
        "ahead": "namm",
        "thresholds": [],
        "rules": ["h2o", "random"],
        "variants": {},
        "matched": True,
        "budgets": [0.25, 0.5],
        "seed": 0,
        "executor": {"threads": None},
    }


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=300)


def test_every_column_is_there_and_reported(config, console, tmp_path):
    rows = study(config, tmp_path / "out", ["task=fake", "out=out"], console)
    ranked = {f"{name}-{budget}" for name in ("h2o", "random", "namm") for budget in (0.25, 0.5)}
    matched = {"h2o-matched", "random-matched"}
    assert {row.policy for row in rows} == {"full", "window", "namm", *ranked, *matched}
    assert len(rows) == 8 * 11
    assert [row.budget for row in rows if row.policy in matched] == [pytest.approx(0.25)] * 16
    table = (tmp_path / "out" / "table.md").read_text()
    assert "8 units in 4 clusters" in table
    assert "Made by `namm-transfer study task=fake out=out`." in table
    lines = {line["policy"]: line for line in json.loads((tmp_path / "out" / "table.json").read_text())["lines"]}
    assert lines["h2o-0.25"]["ahead"] is not None
    assert lines["h2o-matched"]["ahead"]["value"] == pytest.approx(
        lines["namm"]["score"]["value"] - lines["h2o-matched"]["score"]["value"]
    )
    assert lines["namm"]["ahead"] is lines["window"]["ahead"] is lines["full"]["ahead"] is None
    assert (tmp_path / "out" / "curves.png").is_file()


def test_rules_are_matched_on_demand_only(config, console, tmp_path):
    rows = study(config | {"matched": False}, tmp_path / "out", [], console)
    assert {row.policy for row in rows} >= {"namm", "h2o-0.25"}
    assert not [row.policy for row in rows if row.policy.endswith("matched")]


def test_rules_share_a_layers_budget_where_asked(config, console, tmp_path):
    rows = study(
        config | {"variants": {"shared": {"rules": ["h2o"], "allocation": "per_layer"}}}, tmp_path / "out", [], console
    )
    assert {row.policy for row in rows if "shared" in row.policy} == {"h2o_shared-0.25", "h2o_shared-0.5"}
    columns = OmegaConf.load(tmp_path / "out" / "rules_shared" / "config.yaml").policies
    assert {(column["name"], column["allocation"]) for column in columns.values()} == {("h2o", "per_layer")}
    lines = {line["policy"]: line for line in json.loads((tmp_path / "out" / "table.json").read_text())["lines"]}
    assert lines["h2o_shared-0.5"]["ahead"] is not None


@pytest.mark.parametrize("option", ["kinds", "segment"])
def test_a_budget_is_divided_where_asked(config, console, tmp_path, option):
    config["namms"]["divided"] = {"namm": str(tmp_path / "two"), option: 2}
    rows = study(config | {"variants": {"divided": {option: 2}}}, tmp_path / "out", [], console)
    of_rules = {f"{rule}_divided-{budget}" for rule in ("h2o", "random") for budget in (0.25, 0.5)}
    assert {row.policy for row in rows if "_divided" in row.policy} == of_rules
    for part, count in (("rules_divided", 4), ("divided", 2)):  # by threshold it would be the NAMM undivided
        columns = OmegaConf.load(tmp_path / "out" / part / "config.yaml").policies
        assert [column[option] for column in columns.values()] == [2] * count


def test_a_reference_by_kind_has_no_threshold_to_match(config, console, tmp_path):
    config["namms"]["namm"] = {"namm": config["namms"]["namm"], "kinds": 2}
    rows = study(config, tmp_path / "out", [], console)
    assert {row.policy for row in rows} >= {"namm-0.25", "namm-0.5", "full"}
    assert not [row.policy for row in rows if row.policy == "namm" or row.policy.endswith("matched")]


def test_another_namm_is_what_the_others_are_compared_with(config, console, tmp_path):
    config["namms"]["other"] = str(tmp_path / "two")
    study(config | {"ahead": "other"}, tmp_path / "out", [], console)
    assert "| other ahead by |" in (tmp_path / "out" / "table.md").read_text()
    lines = {line["policy"]: line for line in json.loads((tmp_path / "out" / "table.json").read_text())["lines"]}
    assert lines["other-0.25"]["ahead"] is None
    for column in ("namm-0.25", "h2o-0.25"):
        lead = lines["other-0.25"]["score"]["value"] - lines[column]["score"]["value"]
        assert lines[column]["ahead"]["value"] == pytest.approx(lead)
        assert lead != pytest.approx(0)
    assert lines["h2o-matched"]["ahead"] is None  # it was given what `namm` keeps, not `other`


def test_another_namm_joins_for_its_own_price(config, console, tmp_path):
    study(config, tmp_path / "out", [], console)
    (tmp_path / "log").unlink()
    config["namms"]["other"] = str(tmp_path / "two")
    rows = study(config, tmp_path / "out", [], console)
    asked = (tmp_path / "log").read_text().splitlines()
    assert len(asked) == 3
    assert all("'namm'" in line for line in asked)
    assert {"other", "other-0.25", "other-0.5", "namm", "full"} <= {row.policy for row in rows}


def test_a_namm_is_given_options_and_thresholds(config, console, tmp_path):
    config["namms"]["alike"] = {"namm": str(tmp_path / "two"), "allocation": "per_head"}
    rows = study(config | {"thresholds": [-0.5, 0.5]}, tmp_path / "out", [], console)
    columns = {name: OmegaConf.load(tmp_path / "out" / name / "config.yaml").policies for name in ("namm", "alike")}
    assert list(columns["alike"]) == ["alike", "alike@-0.5", "alike@0.5", "alike-0.25", "alike-0.5"]
    assert {column["allocation"] for column in columns["alike"].values()} == {"per_head"}
    assert {column["allocation"] for name, column in columns["namm"].items() if "matched" not in name} == {"per_layer"}
    assert [column.get("threshold") for column in columns["alike"].values()] == [None, -0.5, 0.5, None, None]
    lines = {line["policy"]: line for line in json.loads((tmp_path / "out" / "table.json").read_text())["lines"]}
    assert lines["alike@0.5"]["budget"] is lines["alike@0.5"]["ahead"] is None
    assert len(rows) == 8 * 18


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budgets": [3]}, BudgetError, "budgets are fractions"),
        ({"budgets": [1.5]}, BudgetError, "must lie in"),
        ({"namms": {"full": "default"}}, ConfigError, r"namms has the columns \['full'\]"),
        ({"namms": {"a-b": "default"}}, ConfigError, r"namms has the columns \['a-b'\]"),
        ({"rules": ["h3o"]}, ConfigError, "h3o"),
        ({"ahead": "other"}, ConfigError, "ahead is 'other'; expected one of the columns namm"),
        ({"namms": {"rules_x": "default"}, "variants": {"x": {"kinds": 3}}}, ConfigError, r"columns \['rules_x'\]"),
        ({"variants": {"a-b": {"kinds": 3}}}, ConfigError, r"variants has the columns \['a-b'\]"),
        ({"variants": {"x": {"kind": 3}}}, ConfigError, "'kind'"),
        ({"variants": {"x": None}}, ConfigError, "variants.x is None; expected options"),
        ({"variants": {"x": {"rules": "h2o", "kinds": 3}}}, ConfigError, "variants.x is"),
        ({"variants": {"x": {"rules": [], "kinds": 3}}}, ConfigError, "variants.x is"),
        ({"variants": {"x": {"budget": 0.9, "kinds": 3}}}, ConfigError, "variants.x is"),
        ({"namms": {"namm": "default", "h2o": "default"}}, ConfigError, "h2o-0.25, h2o-0.5: more than one column"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_run(config, console, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        study(config | change, tmp_path / "out", [], console)
    assert not (tmp_path / "log").exists()
