"""A whole evolution: normaliser, imitation, descent, search, choice of what is deployed, calibration of its threshold.

Shape legend: P candidates, S samples, D = 4172 parameters.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution.calibration import calibrate, with_vector
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.curves import draw_curves
from namm_transfer.evolution.descent import descend
from namm_transfer.evolution.fitness import agreement, kept_by_threshold, samples_due, standardised, utilities
from namm_transfer.evolution.imitation import imitate
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.loop import Evaluation, Search, run_search
from namm_transfer.evolution.readers import Job, LocalReaders, Outcome, Readers
from namm_transfer.files import read_yaml, write_atomically
from namm_transfer.network import NAMM, NUM_PARAMETERS
from namm_transfer.policies import FeatureStatistics

__all__ = ["choose", "evolve", "recorded_normaliser", "run_evolution", "stored_settings"]

CONFIG = "config.yaml"
_HOPELESS = 100.0
"""Nats an answer token that no memory loses."""
BEST = "best"
"""Folder of the best NAMM validated so far, its threshold as evolved."""

# First entries of the keys that samples are made from: what one purpose draws, no other draws (3: calibration,
# 5: descent, 6: imitation).
_SEARCH, _VALIDATION, _NORMALISER = 1, 2, 4


def evolve(
    settings: Mapping[str, Any],
    resume: Path | None,
    console: Console,
    provenance: Callable[[Path, EvolutionConfig], None] | None = None,
) -> NAMM:
    """The command `evolve`.

    Args:
        settings: resolved; `evolution` as `EvolutionConfig` takes it, `executor`, and `out`, a folder or None for a
            new one.
        resume: folder of a run to go on with.
        console: shows the progress and where the result lies.
        provenance: called with the folder before anything is read, to write down by what it is made.

    Raises:
        ConfigError: a setting does not fit, or `resume` was begun with others.
        DataError: a file could not be written.
        KeyboardInterrupt: on Ctrl-C, saying how to go on; every finished generation is kept.
    """
    config = EvolutionConfig.from_mapping(settings["evolution"])
    folder = resume or Path(settings["out"] or f"results/evolve-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    try:
        namm = run_evolution(config, folder, console, settings.get("executor", {}), provenance)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; go on with: namm-transfer evolve --resume {folder}") from None
    except OSError as error:  # a full disk, above all
        raise DataError(
            f"cannot go on: {error}; every finished generation is kept, go on with: "
            f"namm-transfer evolve --resume {folder}"
        ) from error
    console.print(f"evolved: {folder / 'namm'} (NAMM.from_pretrained takes this folder)")
    return namm


def stored_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings `evolution` and `executor` that a folder was begun (or last resumed) with.

    Raises:
        DataError: the folder holds no run.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise DataError(f"{folder} holds no run to go on with: there is no {CONFIG}")
    stored = read_yaml(file)
    if not isinstance(stored.get("evolution"), dict):
        raise DataError(f"{file} does not hold the settings of an evolution")
    return {"evolution": stored["evolution"], "executor": stored.get("executor") or {}}


def run_evolution(
    config: EvolutionConfig,
    folder: Path,
    console: Console | None = None,
    executor: Mapping[str, Any] | None = None,
    provenance: Callable[[Path, EvolutionConfig], None] | None = None,
) -> NAMM:
    """Run or resume an evolution in a folder, and save its result as `folder/namm`.

    Args:
        config: settings; those that matter must be the ones that the folder was begun with.
        folder: for `config.yaml`, `journal.jsonl`, curves, the best NAMM so far (`best`) and the result (`namm`).
        console: shows the progress.
        executor: where samples are read: `device`, for processes of this machine; or `name: ray` and what `RayReaders`
            takes. Processes and Ray give the same values; a GPU rounds otherwise than a CPU.
        provenance: as of `evolve`.

    Returns:
        What did best in validation, its threshold calibrated if `config.kept_fraction` asks for it.

    Raises:
        ConfigError: the folder was begun with other settings.
    """
    with _readers(config, executor or {}) as readers:
        journal = _begin(config, folder, executor or {})
        if provenance is not None:
            provenance(folder, config)
        normaliser = _normaliser(config, readers, journal)
        search = Search(_start(config, readers, normaliser, folder, journal, console), config)

        def evaluate(generation: int, candidates: np.ndarray) -> Evaluation:
            done = journal.of("generation")
            count = samples_due(config, [record["agreement"] for record in done])
            first = sum(record["samples"] for record in done)
            kinds = _kinds_at(config, generation)
            jobs = [Job("train", (_SEARCH, i), i, kinds) for i in range(first, first + count)]
            outcomes = readers.read(jobs, normaliser, candidates)
            worth = utilities(outcomes, config.price)
            return Evaluation(
                fitness=standardised(worth),
                difference=utilities(outcomes, price=0.0).mean(0),
                kept=kept_by_threshold(outcomes),
                detail={
                    "samples": count,
                    "agreement": agreement(worth),
                    "full": float(np.mean([outcome.full for outcome in outcomes])),
                    "not_finite": int(sum((~np.isfinite(outcome.difference)).sum() for outcome in outcomes)),
                },
            )

        def validate(generation: int, centres: np.ndarray) -> list[Mapping[str, Any]]:
            draw_curves(journal, folder)
            kinds = len(config.kinds)
            jobs = [Job("validation", (_VALIDATION, i), i, kinds) for i in range(config.validation_samples)]
            outcomes = [_told(outcome) for outcome in readers.read(jobs, normaliser, centres)]
            worth, kept = utilities(outcomes, config.price).mean(0), kept_by_threshold(outcomes)
            return [
                _validation(outcomes, row) | {"utility": float(worth[row]), "kept": float(kept[row])} for row in (0, 1)
            ]

        centres: dict[int, np.ndarray] = {}

        def keep(generation: int, found: np.ndarray) -> None:
            centres[generation] = found
            best, centre = choose(journal)
            if best in centres:  # while an interrupted search is told again, it may still lie ahead
                with_vector(normaliser, centres[best][centre]).save_pretrained(folder / BEST)

        run_search(search, evaluate, validate, keep, journal, config, console)
        draw_curves(journal, folder)
        generation, centre = choose(journal)
        namm = with_vector(normaliser, centres[generation][centre])
        if (finished := _finished(journal, folder, generation, centre)) is not None:
            return finished
        kept = None
        if config.kept_fraction is not None:
            try:
                namm, kept = calibrate(namm, config, config.kept_fraction, readers)
            except DataError as error:
                raise DataError(
                    f"{error}; the NAMM as evolved is in {folder / BEST}: by rank (with a budget) it is whole"
                ) from error
        journal.append(
            "result",
            generation=generation,
            centre=("mean", "average")[centre],
            threshold_kept=kept,
            fingerprint=namm.fingerprint(),
        )
    namm.save_pretrained(folder / "namm")
    return namm


def _finished(journal: Journal, folder: Path, generation: int, centre: int) -> NAMM | None:
    """The result, if it is there already."""
    chosen = {"generation": generation, "centre": ("mean", "average")[centre]}
    for record in journal.of("result")[-1:]:
        if chosen.items() <= record.items() and (folder / "namm").is_dir():
            namm = NAMM.from_pretrained(folder / "namm")
            if namm.fingerprint() == record["fingerprint"]:
                return namm
    return None


def _readers(config: EvolutionConfig, executor: Mapping[str, Any]) -> Readers:
    if executor.get("name", "local") == "ray":
        from namm_transfer.evolution.ray_readers import RayReaders

        return RayReaders(config, executor)
    if executor.get("workers", 1) != 1 or executor.get("threads") is not None:
        raise ConfigError(
            f"an evolution reads in evolution.workers processes ({config.workers} now) of one thread each; "
            f"executor.workers={executor.get('workers', 1)} and executor.threads={executor.get('threads')} would do "
            "nothing"
        )
    return LocalReaders(config, executor.get("device", "cpu"))


def choose(journal: Journal) -> tuple[int, int]:
    """What did best in validation: the generation, and 0 for its mean or 1 for the average of means up to it.

    Raises:
        DataError: nothing was validated.
    """
    found = [
        (record["utility"], -record["generation"], centre)
        for centre, event in enumerate(("validation", "validation_of_average"))
        for record in journal.of(event)
    ]
    if not found:
        raise DataError(f"{journal.path}: nothing was validated, so nothing can be chosen")
    _, generation, centre = max(found)
    return -generation, centre


def _begin(config: EvolutionConfig, folder: Path, executor: Mapping[str, Any]) -> Journal:
    """The journal of a run, and beside it the settings that `--resume` takes."""
    given = {"evolution": asdict(config), "executor": dict(executor)}
    path, settings = folder / "journal.jsonl", OmegaConf.to_yaml(OmegaConf.create(given))
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is no folder; choose another with out=...")
    if not path.exists():  # the settings first: a run that is killed in between can be resumed
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, settings)
    journal = Journal(path, config.identity())
    write_atomically(folder / CONFIG, settings)
    return journal


def _normaliser(config: EvolutionConfig, readers: Readers, journal: Journal) -> NAMM:
    """A NAMM that carries the frozen feature normaliser, measured once under candidates of the first generation."""
    if not journal.of("normaliser"):
        kinds = len(config.kinds)
        jobs = [Job("train", (_NORMALISER, i), i, kinds) for i in range(config.normaliser_samples)]
        candidates = Search(np.zeros(NUM_PARAMETERS), config).ask()[:4]
        measured = sum(readers.measure(jobs, candidates), FeatureStatistics())
        if not measured.count:
            raise DataError(
                f"no token was scored in {len(jobs)} samples, so there is nothing to normalise features by: they are "
                f"shorter than the update intervals of {config.lengths}"
            )
        journal.append("normaliser", mean=measured.mean.tolist(), var=measured.var.tolist(), count=measured.count)
    return recorded_normaliser(journal)


def recorded_normaliser(journal: Journal) -> NAMM:
    """A NAMM of zeros under the feature normaliser that a journal tells of."""
    record = journal.of("normaliser")[0]
    return NAMM.from_vector(
        torch.zeros(NUM_PARAMETERS),
        feature_mean=torch.tensor(record["mean"]),
        feature_var=torch.tensor(record["var"]),
    )


def _start(
    config: EvolutionConfig, readers: Readers, namm: NAMM, folder: Path, journal: Journal, console: Console | None
) -> np.ndarray:
    """[4172] where the search begins: at zero, or where imitation and descent end."""
    start = None
    if config.imitation_samples:
        start = imitate(config, readers, namm, folder, journal, console)
    if config.descent_steps:
        return descend(config, readers, namm, folder, journal, console, start)
    return np.zeros(NUM_PARAMETERS) if start is None else start.double().numpy()


def _told(outcome: Outcome) -> Outcome:
    """A centre whose value is not finite has lost as much as can be, whatever the other one is worth."""
    return replace(outcome, difference=np.where(np.isfinite(outcome.difference), outcome.difference, -_HOPELESS))


def _validation(outcomes: Sequence[Outcome], row: int) -> dict[str, Any]:
    """What one centre lost, in all and by sort of sample."""
    by_kind: dict[str, list[float]] = {}
    by_budget: dict[str, list[float]] = {}
    for outcome in outcomes:
        difference = float(outcome.difference[row])
        by_kind.setdefault(outcome.kind, []).append(difference)
        by_budget.setdefault("threshold" if outcome.budget is None else str(outcome.budget), []).append(difference)
    return {
        "difference": float(np.mean([outcome.difference[row] for outcome in outcomes])),
        "by_kind": {kind: float(np.mean(found)) for kind, found in sorted(by_kind.items())},
        "by_budget": {budget: float(np.mean(found)) for budget, found in sorted(by_budget.items())},
    }


def _kinds_at(config: EvolutionConfig, generation: int) -> int:
    """How many of the kinds take part in a generation."""
    if config.stage_generations is None:
        return len(config.kinds)
    return min(1 + generation // config.stage_generations, len(config.kinds))
