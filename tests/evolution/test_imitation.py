"""What was needed is what attention says, it is learned from features alone, and an interrupted run loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.imitation import imitate
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.page import Sample
from namm_transfer.evolution.readers import Job, LocalReaders, Readers
from namm_transfer.evolution.relaxed import Foresight, foresee
from namm_transfer.evolution.run import run_evolution
from namm_transfer.network import NAMM, scores, unflatten

CONFIG = EvolutionConfig(imitation_samples=12, imitation_heads=6, imitation_steps=120)
LENGTH, SEEN = 150, 128


def sample(first_target: int = 140) -> Sample:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 256, LENGTH))
    return Sample("needles", "none", ids, torch.arange(first_target, LENGTH, 3))


def test_what_was_needed_is_the_highest_attention(llama: Callable[..., PreTrainedModel]) -> None:
    model = llama().requires_grad_(False)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    every = layers * heads
    found = foresee(model, sample(), 64, NAMM(), every, np.random.default_rng(0))
    assert found is not None
    assert found.features.shape == (every, SEEN, 25)
    attentions = llama(attention="eager")(sample().input_ids[None], output_attentions=True).attentions
    expected = torch.cat(
        [part[0, :, SEEN:, :SEEN].reshape(heads, -1, LENGTH - SEEN, SEEN).amax((1, 2)) for part in attentions]
    )
    order = np.random.default_rng(0).permutation(every)
    torch.testing.assert_close(found.needed.float(), expected[order], atol=2e-4, rtol=2e-3)
    assert found.weight.mean() == pytest.approx(1.0, abs=1e-5)
    assert (found.weight > 0).all()
    some = foresee(model, sample(), 64, NAMM(), 2, np.random.default_rng(0))
    assert some is not None
    torch.testing.assert_close(some.needed, found.needed[:2])


def test_no_decision_before_the_answers(llama: Callable[..., PreTrainedModel]) -> None:
    assert foresee(llama(), sample(20), 96, NAMM(), 2, np.random.default_rng(0)) is None


class Notes:
    """Samples in which what is needed follows from one feature of a token; every third has no decision."""

    def __init__(self, die_at: int | None = None) -> None:
        self.jobs: list[Job] = []
        self.die_at = die_at

    def foresee(self, jobs: Sequence[Job], namm: NAMM) -> list[Foresight | None]:
        if self.die_at is not None and len(self.jobs) >= self.die_at:
            raise RuntimeError("killed")
        self.jobs.extend(jobs)
        return [None if job.number % 3 == 2 else foresight(job.key) for job in jobs]


def foresight(key: Sequence[int]) -> Foresight:
    rng = np.random.default_rng(key)
    features = torch.from_numpy(rng.normal(size=(6, int(rng.integers(40, 60)), 25))).half()
    needed = torch.sigmoid(1.5 * features[..., 12].float() - 4)
    return Foresight(features, needed.half(), torch.from_numpy(rng.uniform(0.5, 1.5, 6)).float())


def run(folder: Path, readers: object, config: EvolutionConfig = CONFIG) -> torch.Tensor:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "journal.jsonl", config.identity())
    return imitate(config, cast(Readers, readers), NAMM(), folder, journal)


def test_it_learns_what_will_be_needed(tmp_path: Path) -> None:
    vector = run(tmp_path, Notes())
    unseen = foresight([99])
    found = scores(unflatten(vector.unsqueeze(0)), unseen.features.float().unsqueeze(1))[:, 0]
    for of_head, needed in zip(found, unseen.needed, strict=True):
        assert spearmanr(of_head, needed).statistic > 0.9
    assert 0.3 < float((found >= 0).float().mean()) < 0.7
    (record,) = Journal(tmp_path / "journal.jsonl", CONFIG.identity()).of("imitation")
    assert record["losses"][-1] < record["losses"][0]
    assert not (tmp_path / "foresight").exists()


@pytest.mark.parametrize("die_at", [1, 8])
def test_interrupted_it_reads_no_sample_twice(tmp_path: Path, die_at: int) -> None:
    whole = run(tmp_path / "whole", Notes())
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "part", Notes(die_at))
    rest = Notes()
    torch.testing.assert_close(run(tmp_path / "part", rest), whole, rtol=0, atol=0)
    assert len(rest.jobs) == 4
    again = Notes()
    torch.testing.assert_close(run(tmp_path / "part", again), whole, rtol=0, atol=0)
    assert not again.jobs


def test_no_sample_with_a_decision(tmp_path: Path) -> None:
    class Empty:
        def foresee(self, jobs: Sequence[Job], namm: NAMM) -> list[Foresight | None]:
            return [None] * len(jobs)

    with pytest.raises(DataError, match="none of 12 samples"):
        run(tmp_path, Empty())


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    run(tmp_path, Notes(), replace(CONFIG, imitation_steps=1))
    (tmp_path / "imitation.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(DataError, match=r"imitation\.safetensors"):
        run(tmp_path, Notes(), replace(CONFIG, imitation_steps=1))


def test_the_search_begins_where_it_ended(tmp_path: Path, offline: EvolutionConfig) -> None:
    config = replace(
        offline, generations=1, validate_every=1, sigma=1e-9, imitation_samples=4, imitation_heads=2, imitation_steps=5
    )
    namm = run_evolution(config, tmp_path / "run")
    journal = Journal(tmp_path / "run" / "journal.jsonl", config.identity())
    with LocalReaders(config) as readers:
        start = imitate(config, readers, namm, tmp_path / "run", journal)
    assert start.any()
    torch.testing.assert_close(namm.to_vector(), start, atol=1e-6, rtol=0)
