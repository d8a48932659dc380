"""How much faster a population is read as rows of a batch than member by member, in one run.

    python -P -m namm_transfer.eval.language.throughput --out docs/results/evolution

Both read the same samples under the same candidates; the two ways take turns. Member by member is what an evaluation
without batches does: each candidate reads the whole sample, with a memory of its own, one row at a time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from namm_transfer.cli import plain_errors
from namm_transfer.configs import composed
from namm_transfer.eval.provenance import record
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.population import read_population, read_sample
from namm_transfer.evolution.readers import Job, Reader
from namm_transfer.files import write_atomically
from namm_transfer.network import NAMM, NUM_PARAMETERS
from namm_transfer.policies import policy

__all__ = ["throughput"]

_KEY = 200
"""First entry of the keys of samples; evolution uses others."""


def throughput(config: EvolutionConfig, samples: int, threads: int, console: Console) -> dict[str, Any]:
    """Seconds per sample of both ways, their ratio, and how far their log-likelihoods differ.

    Args:
        config: of the evolution, which says what samples are read and by how many candidates.
        samples: how many.
        threads: of the host.
        console: shows the progress.
    """
    reader = Reader(config)
    torch.set_num_threads(threads)
    rng = np.random.default_rng([config.seed, _KEY])
    vectors = torch.from_numpy(rng.normal(0, config.sigma, (config.population, NUM_PARAMETERS))).float()
    namm, taken, differences = NAMM(), [], []
    sample, condition, host = reader.draw(Job("train", (_KEY, samples), 0, len(config.kinds)))
    read_population(host.model, sample, condition, namm, vectors[:2], 2)  # kernels and memory are there for both
    for number in track(range(samples), "samples", console=console):
        sample, condition, host = reader.draw(Job("train", (_KEY, number), number, len(config.kinds)))
        began = time.perf_counter()
        together = read_population(host.model, sample, condition, namm, vectors, config.rows_at_once)
        between = time.perf_counter()
        alone = []
        for vector in vectors:
            member = policy("namm", namm=namm, vectors=vector[None], budget=condition.budget)
            alone.append(read_sample(host.model, sample, member, condition.update_interval).log_likelihood)
        taken.append((between - began, time.perf_counter() - between))
        differences.append(float((torch.cat(alone) - together.log_likelihood).abs().median()))
    batched, single = np.array(taken).T
    return {
        "population": config.population,
        "samples": samples,
        "lengths": config.lengths,
        "questions": config.questions,
        "threads": threads,
        "batched_seconds": batched.tolist(),
        "member_by_member_seconds": single.tolist(),
        "ratio": float(single.sum() / batched.sum()),
        "ratio_least": float((single / batched).min()),
        "ratio_most": float((single / batched).max()),
        "median_difference_nats": float(np.median(differences)),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for throughput.json and its provenance.")],
    samples: Annotated[int, typer.Option(help="How many samples.", min=1)] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads; evolution's own processes have one.", min=1)] = 1,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Samples per second of a population as rows of a batch, beside member by member."""
    config, console = EvolutionConfig.from_mapping(composed("evolve", overrides or [])["evolution"]), Console()
    found = throughput(config, samples, threads, console)
    out.mkdir(parents=True, exist_ok=True)
    record(out / "throughput_provenance.json", {}, config.seed)
    write_atomically(out / "throughput.json", json.dumps(found, indent=1) + "\n")
    console.print(
        f"{config.population} candidates as rows of a batch: {found['ratio']:.1f} "
        f"[{found['ratio_least']:.1f}, {found['ratio_most']:.1f}] times as many samples per second as one by one"
    )


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
