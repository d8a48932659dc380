"""The language task: what a memory still knows of held-out essays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from namm_transfer.errors import ConfigError
from namm_transfer.eval.executor import check_device
from namm_transfer.eval.language_model import language_model
from namm_transfer.eval.task import Outcome, Unit, measured
from namm_transfer.evolution.hosts import LanguageHost, load_host
from namm_transfer.evolution.kinds import KINDS
from namm_transfer.evolution.page import Sample
from namm_transfer.evolution.population import read_sample
from namm_transfer.evolution.tasks import SampleMaker
from namm_transfer.evolution.text import Split, load_documents
from namm_transfer.layer import check_interval
from namm_transfer.policies import Policy

__all__ = ["LanguageSamples"]

_PURPOSE = 100
"""First entry of the keys of samples; evolution uses others."""


@dataclass(frozen=True)
class LanguageSamples:
    """How likely the right answers are under a pruned memory, in nats a token, on held-out documents.

    A unit is a sample, its cluster the document. The answers stand in the input (teacher forcing), so the score is the
    same function of the memory that evolution optimises; `detail` holds the fraction of answer tokens that the model
    would have written itself.

    Attributes:
        name: names its rows.
        model: `path`, see `load_host`; `update_interval` in tokens; `device`.
        kinds: names of `KINDS`, one sample each per document and repeat.
        repeats: samples of a kind per document.
        context_tokens: tokens before the first question; shorter documents are left out.
        questions: asked in a sample of needles.
        split: which documents.
    """

    name: str
    model: Mapping[str, Any]
    kinds: Sequence[str]
    repeats: int
    context_tokens: int
    questions: int
    split: Split = "heldout"
    metric: str = "log_likelihood_per_token"
    baselines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("repeats", "context_tokens", "questions"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.name}: {key} is {value!r}; expected an integer of at least 1")
        check_interval(self.model["update_interval"])
        check_device(self.model["device"])
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ConfigError(f"{self.name}: kinds {unknown} are unknown; known are {tuple(KINDS)}")

    def units(self, seed: int) -> list[Unit]:
        """One unit per repeat, kind and document."""
        return [
            Unit(f"{document}/{kind}/{repeat}", document)
            for repeat in range(self.repeats)
            for kind in self.kinds
            for document in self._maker.documents
        ]

    def inputs(self) -> dict[str, str]:
        """What the host is, and the documents (fetched at a pinned version)."""
        return {"host": language_model(str(self.model["path"])), "documents": ", ".join(self._maker.documents)}

    def sample(self, unit: Unit, seed: int) -> Sample:
        """The sample of a unit, a function of unit and seed alone."""
        document, kind, repeat = unit.id.split("/")
        place = (self._maker.documents.index(document), list(KINDS).index(kind), int(repeat))
        return self._maker.draw(kind, np.random.default_rng([seed, _PURPOSE, *place]), document)

    def evaluate(self, units: Sequence[Unit], policy: Policy | str, seed: int) -> Iterator[Outcome]:
        """Read one sample after the other.

        Raises:
            ConfigError: `policy` names a baseline; the host has none.
        """
        if isinstance(policy, str):
            raise ConfigError(f"{self.name} has no baseline {policy!r}")
        for unit in units:
            reading = read_sample(self.host.model, self.sample(unit, seed), policy, self.model["update_interval"])
            yield Outcome(
                unit,
                score=float(reading.log_likelihood),
                detail={"kind": unit.id.split("/")[1], "token_accuracy": float(reading.accuracy)},
                **measured(reading.stats, policy),
            )

    @cached_property
    def host(self) -> LanguageHost:
        """The model, with the attention of memories, and its tokenizer."""
        host = load_host(self.model["path"])
        host.model.to(self.model["device"]).set_attn_implementation("namm")  # type: ignore[arg-type]
        return host

    @cached_property
    def _maker(self) -> SampleMaker:
        return SampleMaker(load_documents(self.split), self.host.tokenizer, self.context_tokens, self.questions)
