"""A NAMM evolved on returns themselves: an upper bound of what one from language can be worth to a policy that acts.

    python -P -m namm_transfer.eval.offline_rl.returns --host hopper-v5-medium-replay --out results/returns
    namm-transfer study task=offline_rl/v5/hopper-medium-replay +namms.returns=results/returns/namm

The search is that of `namm-transfer evolve` (CMA-ES, the mean is deployed, the best in validation kept); a candidate's
worth is the return of the episodes that it plays, all candidates the same ones. Killed, it goes on bit for bit.

Shape legend: P candidates, S conditions (a budget and an episode's seed), D = 4172 parameters, E environments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from namm_transfer.adapters import adapt
from namm_transfer.cli import plain_errors
from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.errors import ConfigError
from namm_transfer.eval.offline_rl.host import check_fits, load_host, packaged_hosts
from namm_transfer.eval.offline_rl.rollout import make_envs
from namm_transfer.eval.provenance import digest, record
from namm_transfer.eval.task import host_folder
from namm_transfer.evolution.calibration import with_vector
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.fitness import agreement, standardised
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.loop import Evaluation, Search, run_search
from namm_transfer.evolution.run import choose, recorded_normaliser
from namm_transfer.network import NAMM, NUM_PARAMETERS
from namm_transfer.policies import FeatureStatistics, Policy, policy

__all__ = ["ReturnsConfig", "evolve_on_returns", "returns_of"]

SEARCH_SEEDS, VALIDATION_SEEDS = 70_000_000, 75_000_000
"""First seeds of the environment; nothing else has them."""


@dataclass(frozen=True)
class ReturnsConfig:
    """Settings of a search on returns.

    Attributes:
        host: a packaged decision transformer's name, or a folder.
        update_interval: tokens between two decisions.
        budgets: fractions of the tokens that a candidate may keep, by rank; each plays every episode.
        allocation: of the budgets, as of a policy.
        episodes: of a generation, under each budget, new ones every time.
        validation_episodes: fixed ones.
        start: a packaged NAMM's name or a folder, where the search begins, with its feature normaliser; None: at zero,
            as published, with a normaliser measured on episodes.
        population, sigma, generations, validate_every, seed: as of `EvolutionConfig`.
    """

    host: str
    update_interval: int = 48
    budgets: tuple[float, ...] = (0.25, 0.5)
    allocation: str = "per_layer"
    episodes: int = 2
    validation_episodes: int = 16
    start: str | None = None
    population: int = 16
    sigma: float = 0.065
    generations: int = 60
    validate_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(self, "episodes", "validation_episodes")
        if len(self.budgets) * self.episodes < 2:
            raise ConfigError(
                f"a generation needs at least two episodes, to tell signal from noise; got {self.episodes} under the "
                f"budgets {self.budgets}"
            )

    @property
    def search(self) -> EvolutionConfig:
        """What the search itself is told."""
        return EvolutionConfig(
            population=self.population,
            sigma=self.sigma,
            generations=self.generations,
            validate_every=self.validate_every,
            seed=self.seed,
        )


def returns_of(
    model: Any, normalisation: Any, memory: Policy, seeds: Sequence[int], update_interval: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Play an episode of each of E seeds, which may repeat; row e has the memory that the policy gives to row e.

    Returns:
        [E] returns and [E] mean fractions kept just after decisions (1 where there was none).
    """
    rows = len(seeds)
    with (
        closing(make_envs(normalisation.env_id, rows)) as envs,
        adapt(model, memory, update_interval, normalisation=normalisation) as host,
    ):
        check_fits(model, envs, normalisation.env_id)
        given: Any = list(seeds)
        observations, _ = envs.reset(seed=given)
        host.reset(rows)
        total, kept, rewards = np.zeros(rows), np.ones(rows), np.zeros(rows)
        playing = np.ones(rows, np.bool_)
        while playing.any():
            observations, rewards, terminated, truncated, _ = envs.step(host.act(observations, rewards))
            total += np.where(playing, rewards, 0.0)
            ended = terminated | truncated
            if (now := playing & ended).any():
                of_rows = host.stats().kept_by_row
                kept[now] = [1.0 if of_rows[row] is None else of_rows[row] for row in np.flatnonzero(now)]
                playing &= ~ended
            if ended.any() and playing.any():  # what these rows do from here on is dropped; they only stay in step
                idle: Any = [0] * rows
                observations, _ = envs.reset(seed=idle, options={"reset_mask": ended})
                rewards = np.where(ended, 0.0, rewards)
        return total, kept


def evolve_on_returns(config: ReturnsConfig, out: Path, console: Console | None = None) -> NAMM:
    """Search, or go on searching, and save what did best in validation as `out/namm`.

    Raises:
        ConfigError: the folder was begun with other settings.
        CheckpointError: there is no such host, or no such NAMM to begin with.
    """
    model, normalisation = load_host(config.host)
    free = ("generations",)
    header = {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(config).items() if key not in free}
    journal = Journal(out / "journal.jsonl", header)
    record(out / "provenance.json", {"host": digest(host_folder({"path": config.host}, packaged_hosts()))}, config.seed)
    normaliser = _normaliser(config, model, normalisation, journal)

    def played(candidates: np.ndarray, first: int, episodes: int) -> tuple[np.ndarray, np.ndarray]:
        """[S, P] returns and fractions kept, all candidates of an episode in one batch."""
        seeds, count = range(first, first + episodes), len(candidates)
        vectors = torch.from_numpy(np.repeat(candidates, episodes, 0)).float()
        found = [
            returns_of(
                model,
                normalisation,
                policy("namm", namm=normaliser, vectors=vectors, budget=budget, allocation=config.allocation),
                list(seeds) * count,
                config.update_interval,
            )
            for budget in config.budgets
        ]
        worth, kept = (
            np.concatenate([part.reshape(count, episodes).T for part in parts]) for parts in zip(*found, strict=True)
        )
        return worth, kept

    def evaluate(generation: int, candidates: np.ndarray) -> Evaluation:
        worth, kept = played(candidates, SEARCH_SEEDS + generation * config.episodes, config.episodes)
        return Evaluation(standardised(worth), worth.mean(0), kept.mean(0), {"agreement": agreement(worth)})

    def validate(generation: int, centres: np.ndarray) -> list[Mapping[str, Any]]:
        worth, kept = played(centres, VALIDATION_SEEDS, config.validation_episodes)
        by_budget = worth.reshape(len(config.budgets), -1, len(centres)).mean(1)
        return [
            {
                "utility": float(worth[:, row].mean()),
                "kept": float(kept[:, row].mean()),
                "by_budget": dict(zip(map(str, config.budgets), by_budget[:, row].tolist(), strict=True)),
            }
            for row in range(len(centres))
        ]

    centres: dict[int, np.ndarray] = {}
    start = np.zeros(NUM_PARAMETERS) if config.start is None else normaliser.to_vector().double().numpy()
    search = Search(start, config.search)
    run_search(search, evaluate, validate, centres.__setitem__, journal, config.search, console)
    generation, centre = choose(journal)
    namm = with_vector(normaliser, centres[generation][centre])
    namm.save_pretrained(out / "namm")
    return namm


def _normaliser(config: ReturnsConfig, model: Any, normalisation: Any, journal: Journal) -> NAMM:
    """The NAMM that the search begins with, or one of zeros whose normaliser was measured on episodes."""
    if config.start is not None:
        return NAMM.from_pretrained(config.start)
    if not journal.of("normaliser"):
        statistics = FeatureStatistics()
        watching = policy("namm", namm=NAMM(), budget=config.budgets[0], statistics=statistics)
        seeds = range(SEARCH_SEEDS - 8, SEARCH_SEEDS)
        returns_of(model, normalisation, watching, seeds, config.update_interval)
        journal.append("normaliser", mean=statistics.mean.tolist(), var=statistics.var.tolist())
    return recorded_normaliser(journal)


def main(
    host: Annotated[str, typer.Option(help="A packaged decision transformer's name, or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the journal and of the result; goes on if begun.")],
    start: Annotated[str | None, typer.Option(help="NAMM to begin with; by default at zero.")] = None,
    generations: Annotated[int, typer.Option(help="Stop after so many.", min=1)] = 60,
    population: Annotated[int, typer.Option(help="Candidates.", min=4)] = 16,
    sigma: Annotated[float, typer.Option(help="First standard deviation.")] = 0.065,
    episodes: Annotated[int, typer.Option(help="Of a generation, under each budget.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
) -> None:
    """Evolve a NAMM on the returns of a decision transformer."""
    console = Console()
    config = ReturnsConfig(
        host=host,
        start=start,
        generations=generations,
        population=population,
        sigma=sigma,
        episodes=episodes,
        seed=seed,
    )
    evolve_on_returns(config, out, console)
    console.print(f"evolved: {out / 'namm'} (NAMM.from_pretrained takes this folder)")


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
