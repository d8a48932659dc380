"""The language task and the table of policies at equal budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from namm_transfer import NAMM, policy
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval import language_model
from namm_transfer.eval.language import samples
from namm_transfer.eval.language.learned import SORTS, draw, learn, sort_of
from namm_transfer.eval.language.samples import LanguageSamples
from namm_transfer.evolution.hosts import LanguageHost
from namm_transfer.evolution.kinds import KINDS
from namm_transfer.evolution.text import Document
from namm_transfer.network import FEATURES, NUM_PARAMETERS

MODEL = {"path": "tiny", "update_interval": 32, "device": "cpu"}
SETTINGS: dict[str, Any] = {
    "name": "language/test",
    "model": MODEL,
    "kinds": tuple(KINDS),
    "repeats": 1,
    "context_tokens": 300,
    "questions": 1,
}


@pytest.fixture
def task(
    monkeypatch: pytest.MonkeyPatch,
    llama: Callable[..., PreTrainedModel],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> LanguageSamples:
    rng = np.random.default_rng(0)
    documents = tuple(
        Document(f"d{i}", " ".join(f"The {w} came {n} times." for w, n in zip(words, range(60), strict=True)))
        for i, words in enumerate(rng.choice(["stone", "river", "market", "paper"], (2, 60)))
    )
    monkeypatch.setattr(samples, "load_host", lambda path: LanguageHost(path, llama(), make_tokenizer()))
    monkeypatch.setattr(samples, "load_documents", lambda split: documents)
    return LanguageSamples(**SETTINGS)


def test_units_cover_documents_and_kinds(task: LanguageSamples) -> None:
    units = task.units(0)
    assert len(units) == len({unit.id for unit in units}) == 2 * len(KINDS)
    assert {unit.cluster for unit in units} == {"d0", "d1"}
    one, same, other = (task.sample(units[0], seed).input_ids for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_outcomes_are_the_models_own_likelihoods(task: LanguageSamples, llama: Callable[..., PreTrainedModel]) -> None:
    units = task.units(0)
    for unit, outcome in zip(units, task.evaluate(units, policy("full"), 0), strict=True):
        sample = task.sample(unit, 0)
        logits = llama(attention="eager")(sample.input_ids[None]).logits[0].log_softmax(-1)
        expected = logits[sample.targets - 1, sample.input_ids[sample.targets]].mean()
        assert outcome.score == pytest.approx(float(expected), abs=1e-5)
        assert outcome.kept_fraction == 1.0


def test_a_budget_is_kept(task: LanguageSamples) -> None:
    outcomes = list(task.evaluate(task.units(0)[:2], policy("h2o", budget=0.25), 0))
    assert all(outcome.kept_at_updates == pytest.approx(0.25, abs=0.02) for outcome in outcomes)


def test_settings_are_checked(task: LanguageSamples) -> None:
    with pytest.raises(ConfigError, match="needle'"):
        LanguageSamples(**SETTINGS | {"kinds": ("needle",)})
    with pytest.raises(ConfigError, match="multiple of 16"):
        LanguageSamples(**SETTINGS | {"model": MODEL | {"update_interval": 100}})
    with pytest.raises(ConfigError, match="repeats"):
        LanguageSamples(**SETTINGS | {"repeats": 0})
    with pytest.raises(ConfigError, match="window"):
        list(task.evaluate(task.units(0), "window", 0))


def test_the_host_is_known_by_what_it_holds(task: LanguageSamples, tmp_path: Path) -> None:
    def host(path: str) -> str:
        return replace(task, model=MODEL | {"path": path}).inputs()["host"]

    assert host("smollm2-135m-instruct") == "smollm2-135m-instruct"  # of a pinned version
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = host(str(tmp_path))
    assert str(tmp_path) not in one
    assert host(str(tmp_path)) == one
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert host(str(tmp_path)) != one


def test_a_host_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, commit = tmp_path / "models--owner--name", "0a1b2c" + "0" * 34
    for file, text in {"refs/main": commit, f"snapshots/{commit}/config.json": "{}"}.items():
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(text)
    monkeypatch.setattr(
        language_model, "cached_file", partial(language_model.cached_file, cache_dir=tmp_path, local_files_only=True)
    )
    assert language_model.language_model("owner/name") == f"owner/name@{commit}"
    with pytest.raises(DataError, match=r"'owner/other' is none of \['gemma3-270m', .*config.json could not be read"):
        language_model.language_model("owner/other")


def linear_namm(feature: int, bias: float) -> NAMM:
    """Scores a token by one of its features alone: the backward attention is zero."""
    vector = torch.zeros(NUM_PARAMETERS)
    vector[-1 - FEATURES + feature] = 1.0
    vector[-1] = bias
    return NAMM.from_vector(vector)


@pytest.mark.parametrize("feature", [3, 8, 20])
def test_what_a_score_listens_to_is_found(task: LanguageSamples, tmp_path: Path, feature: int) -> None:
    units, quiet = task.units(0)[:3], Console(quiet=True)
    found = learn(task, linear_namm(feature, bias=100.0), units, 0, quiet).summary()
    response = found["sensitivity_by_recency_feature"] + found["sensitivity_by_frequency"]
    assert np.argmax(response) == feature
    np.testing.assert_allclose(np.delete(response, feature), 0, atol=1e-4)
    assert np.min(found["kept_by_layer_and_head"]) == 1.0
    assert set(found["kept_by_sort"].values()) == {1.0}
    draw(found, tmp_path / "learned.png")
    assert (tmp_path / "learned.png").stat().st_size > 10_000


def test_a_preference_for_the_new_shows_in_ages(task: LanguageSamples) -> None:
    # the cosine of the slowest recency frequency falls with age over the first thousand tokens
    found = learn(task, linear_namm(7, bias=-0.9999), task.units(0)[:3], 0, Console(quiet=True)).summary()
    by_age = list(found["score_by_age"].values())
    assert len(by_age) == 4  # evicted above an age of 47, so none is older than 79 at a decision: the bins from 64 on
    assert by_age == sorted(by_age, reverse=True)
    assert 0.0 < np.mean(found["kept_by_layer_and_head"]) < 1.0


@pytest.mark.parametrize(
    ("text", "position", "special", "sort"),
    [
        ("The", 0, False, "first"),
        ("<|im_start|>", 3, True, "special"),
        ("\n\n", 3, False, "line break"),
        (" ,", 3, False, "punctuation"),
        (" 42", 3, False, "number"),
        (" Anna", 3, False, "capitalised"),
        (" of", 3, False, "short word"),
        ("ing", 3, False, "other"),
        (" window", 3, False, "other"),
    ],
)
def test_sorts_of_tokens(text: str, position: int, special: bool, sort: str) -> None:
    assert sort_of(text, position, special) == sort
    assert sort in SORTS
