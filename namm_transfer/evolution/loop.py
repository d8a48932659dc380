"""CMA-ES over NAMM parameters: ask, evaluate, tell, until it is time to stop.

The state of the search is never pickled (at 4,172 dimensions its covariance alone takes 139 MB): telling a fresh
search of the same seed the logged fitness values again restores it bit for bit.

Shape legend: P candidates, D parameters.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cma
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.journal import Journal

__all__ = ["Evaluation", "Search", "progress_bar", "run_search"]


@dataclass(frozen=True)
class Evaluation:
    """What a generation was found to be worth.

    Attributes:
        fitness: [P] float64, higher is better; the search sees its order alone.
        difference: [P] mean answer log-likelihood minus the full cache's, in nats a token.
        kept: [P] mean fraction of tokens kept.
        detail: anything else worth logging, as JSON takes it.
    """

    fitness: np.ndarray
    difference: np.ndarray
    kept: np.ndarray
    detail: Mapping[str, Any] = field(default_factory=dict)


class Search:
    """CMA-ES that maximises; everything random in it comes from one generator of its own.

    Args:
        start: [D] the first mean.
        config: `population`, `sigma`, `sigma_max`, `diagonal` and `seed` are read.
    """

    def __init__(self, start: np.ndarray, config: EvolutionConfig) -> None:
        generator = np.random.default_rng([config.seed, 0])
        self._es = cma.CMAEvolutionStrategy(
            start.astype(np.float64),
            config.sigma,
            {
                "popsize": config.population,
                "CMA_diagonal": config.diagonal,
                "randn": lambda *shape: generator.standard_normal(shape),
                "seed": math.nan,  # pycma must not seed numpy's global generator
                "verbose": -9,
            },
        )
        self._sigma_max = math.inf if config.sigma_max is None else config.sigma_max
        self.generation = 0
        self._means: list[np.ndarray] = []

    def ask(self) -> np.ndarray:
        """New candidates, [P, D] float64."""
        with threadpool_limits(1, "blas"):  # an eigendecomposition has other bits on other numbers of threads
            self._asked = self._es.ask()
        return np.stack(self._asked)

    def tell(self, fitness: np.ndarray) -> None:
        """Report the fitness [P] of the candidates last asked for.

        Raises:
            DataError: a value is not finite, or their number is not P.
        """
        fitness = np.asarray(fitness, dtype=np.float64)
        if fitness.shape != (len(self._asked),) or not np.isfinite(fitness).all():
            raise DataError(f"expected {len(self._asked)} finite fitness values; got {fitness!r}")
        with threadpool_limits(1, "blas"):
            self._es.tell(self._asked, (-fitness).tolist())
        self._es.sigma = min(self._es.sigma, self._sigma_max)
        self._means.append(self.mean)
        self.generation += 1

    @property
    def mean(self) -> np.ndarray:
        """The mean of the search distribution, [D] float64."""
        return np.array(self._es.mean)

    @property
    def average(self) -> np.ndarray:
        """The average of the means of the newer half of all generations, [D] float64.

        The mean also takes random steps, in all the directions that its few candidates could not tell apart; they
        average out, and the common trend stays.
        """
        return np.asarray(np.mean(self._means[len(self._means) // 2 :] or [self.mean], axis=0))

    @property
    def sigma(self) -> float:
        """The overall standard deviation."""
        return float(self._es.sigma)


def run_search(
    search: Search,
    evaluate: Callable[[int, np.ndarray], Evaluation],
    validate: Callable[[int, np.ndarray], Sequence[Mapping[str, Any]]],
    keep: Callable[[int, np.ndarray], None],
    journal: Journal,
    config: EvolutionConfig,
    console: Console | None = None,
) -> None:
    """Run or resume a search until `config.generations` or `config.minutes` is reached.

    Args:
        search: a fresh one; the journal's generations are told to it again.
        evaluate: (generation, candidates [P, D]) to their worth; the same arguments must give the same answer.
        validate: (generations done, centres [2, D]: the mean and the average of means) to a record of each one's worth.
        keep: takes the centres of every validated generation, also of those that the journal tells of.
        journal: where everything told is kept.
        config: when to stop and how often to validate.
        console: shows the progress.

    Raises:
        DataError: told the journal's generations again, the search asked for other candidates than it did then.
    """
    began = time.monotonic()
    validated = {record["generation"] for record in journal.of("validation")}

    def keep_if_validated() -> None:
        if search.generation in validated:
            keep(search.generation, np.stack([search.mean, search.average]))

    keep_if_validated()
    for record in journal.of("generation"):
        asked = _digest(search.ask())
        if record.get("candidates", asked) != asked:
            raise DataError(
                f"{journal.path}: generation {record['generation']} had other candidates than the search asks for now "
                "(another processor, or other versions of numpy or pycma?): told its fitness, it would go astray"
            )
        search.tell(np.array(record["fitness"]))
        keep_if_validated()

    with progress_bar(console) as progress:
        task = progress.add_task("evolution", total=config.generations, completed=search.generation, status="")

        def out_of_time() -> bool:
            return config.minutes is not None and time.monotonic() - began > 60 * config.minutes

        while True:
            due = search.generation % config.validate_every == 0 or search.generation >= config.generations
            if due and search.generation not in validated:
                of_mean, of_average = validate(search.generation, np.stack([search.mean, search.average]))
                if search.generation not in {record["generation"] for record in journal.of("validation_of_average")}:
                    journal.append("validation_of_average", generation=search.generation, **of_average)
                journal.append("validation", generation=search.generation, **of_mean)
                validated.add(search.generation)
                keep_if_validated()
            if search.generation >= config.generations or out_of_time():
                return
            started = time.monotonic()
            candidates = search.ask()
            found = evaluate(search.generation, candidates)
            search.tell(found.fitness)
            journal.append(
                "generation",
                generation=search.generation,
                fitness=found.fitness.tolist(),
                difference=np.asarray(found.difference).tolist(),
                kept=np.asarray(found.kept).tolist(),
                candidates=_digest(candidates),
                sigma=search.sigma,
                seconds=round(time.monotonic() - started, 2),
                **found.detail,
            )
            difference, kept = found.difference, float(np.mean(found.kept))
            status = f"best {difference.max():+.3f}  mean {difference.mean():+.3f}  kept {kept:.2f}"
            progress.update(task, completed=search.generation, status=status)


def _digest(candidates: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(candidates).tobytes()).hexdigest()[:16]


def progress_bar(console: Console | None) -> Progress:
    """A bar with steps done, a task's `status`, and the time passed and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
