"""Learn from attention itself what will be needed, before anything is evicted.

Reading on without evicting shows which tokens later queries attend to. Of every token of every head the network learns
to tell the highest attention that it will yet get: thousands of examples from one sample, where a search gets one
number per candidate. Kept by the true values, a fifth of the tokens costs nothing; what the network cannot foresee from
the attention of the past is the loss that remains. Heads count by how much the answers depend on them.

Not in the published method: `imitation_samples=0`.

Shape legend: J heads, N tokens, F = 25 features.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.loop import progress_bar
from namm_transfer.evolution.readers import Job, Readers
from namm_transfer.files import replacing
from namm_transfer.network import NAMM, NUM_PARAMETERS, scores, unflatten

__all__ = ["begun", "imitate"]

_IMITATION = 6
"""First entry of the keys of samples; see `run`."""
_RESULT, _NOTES = "imitation.safetensors", "foresight"
_AT_ONCE = 8
_RATE, _WARM_UP = 5e-3, 20
_SAMPLES, _HEADS = 6, 6
"""Of a step."""
_BALANCE = 10.0
"""Of the expected attention against its order: about equal in size."""


def imitate(
    config: EvolutionConfig,
    readers: Readers,
    namm: NAMM,
    folder: Path,
    journal: Journal,
    console: Console | None = None,
) -> Tensor:
    """Note what samples needed, and learn to foresee it; goes on with what `folder` holds.

    Args:
        config: of the evolution.
        readers: where samples are read.
        namm: gives the feature normaliser.
        folder: for `imitation.safetensors`, the result; and until then the notes, a file a sample in `foresight`.
        journal: gets the course of the loss.
        console: shows the progress.

    Returns:
        [4172] parameters; half of the scores are above zero.

    Raises:
        DataError: a file cannot be read, or no sample had a decision before its answers.
    """
    done, notes = folder / _RESULT, folder / _NOTES
    if not done.exists():
        _note(config, readers, namm, notes, console)
        vector, losses = _learn(config, sorted(notes.glob("*.safetensors")), console)
        with replacing(done) as partial:
            save_file({"vector": vector, "losses": torch.tensor(losses, dtype=torch.float64)}, partial)
    found = _load(done)
    if not journal.of("imitation"):
        journal.append("imitation", losses=found["losses"].tolist())
    shutil.rmtree(notes, ignore_errors=True)
    return found["vector"]


def begun(config: EvolutionConfig) -> Tensor:
    """[4172] small random weights: at zero the network's layers multiply to nothing, and most gradients with them."""
    generator = torch.Generator().manual_seed(config.seed)
    vector = torch.zeros(NUM_PARAMETERS)
    weights = unflatten(vector.unsqueeze(0))
    for part, deviation in ((weights.w_qkv, 0.2), (weights.w, 0.1), (weights.w_o, 0.05)):
        part.copy_(torch.randn(part.shape, generator=generator) * deviation)
    return vector


def _note(config: EvolutionConfig, readers: Readers, namm: NAMM, notes: Path, console: Console | None) -> None:
    """A file for each sample that has a decision before its answers."""
    notes.mkdir(exist_ok=True)
    with progress_bar(console) as progress:
        task = progress.add_task("noting what was needed", total=config.imitation_samples, status="")
        for first in range(0, config.imitation_samples, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, config.imitation_samples))
            last = notes / f"{numbers[-1]:06d}"
            if not last.exists():  # of samples without a decision nothing else would tell that they were read
                jobs = [Job("train", (_IMITATION, i), i, len(config.kinds)) for i in numbers]
                for i, found in zip(numbers, readers.foresee(jobs, namm), strict=True):
                    if found is not None:
                        with replacing(notes / f"{i:06d}.safetensors") as partial:
                            save_file(
                                {"features": found.features, "needed": found.needed, "weight": found.weight}, partial
                            )
                last.touch()
            progress.update(task, completed=numbers[-1] + 1)


def _learn(config: EvolutionConfig, files: Sequence[Path], console: Console | None) -> tuple[Tensor, list[float]]:
    """The parameters [4172], and the mean loss of every tenth of the steps."""
    if not files:
        raise DataError(f"none of {config.imitation_samples} samples has a decision before half of its answers")
    samples = [_load(file) for file in files]
    rng = np.random.default_rng([config.seed, _IMITATION])
    vector = nn.Parameter(begun(config))
    adam = torch.optim.Adam([vector], betas=(0.9, 0.99))
    steps, losses = config.imitation_steps, []
    with progress_bar(console) as progress, _one_thread():
        task = progress.add_task("imitation", total=steps, status="")
        for step in range(steps):
            features, needed, weight, valid = _batch(samples, rng)
            loss = _loss(_scores(vector, features, valid), needed, weight, valid)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([vector], 1.0)
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            adam.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / _WARM_UP) * (0.02 + 0.98 * cosine)
            adam.step()
            losses.append(float(loss.detach()))
            progress.update(task, completed=step + 1, status=f"loss {losses[-1]:.2f}")
    found = vector.detach()
    with torch.no_grad():
        middle = [
            _scores(found, features, valid)[valid].median()
            for features, _, _, valid in (_batch(samples, rng) for _ in range(20))
        ]
        found[-1] -= torch.stack(middle).mean()
    return found, [float(np.mean(part)) for part in np.array_split(losses, min(10, steps))]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums have other bits on other numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch(samples: Sequence[dict[str, Tensor]], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [J, N, F], what was needed [J, N], weights [J] and which places hold tokens [J, N], of some heads."""
    chosen = [samples[i] for i in rng.choice(len(samples), min(_SAMPLES, len(samples)), replace=False)]
    width = max(sample["needed"].shape[1] for sample in chosen)
    parts: list[tuple[Tensor, ...]] = []
    for sample in chosen:
        heads = torch.from_numpy(rng.permutation(len(sample["weight"]))[:_HEADS])
        room = width - sample["needed"].shape[1]
        parts.append(
            (
                F.pad(sample["features"][heads].float(), (0, 0, 0, room)),
                F.pad(sample["needed"][heads].float(), (0, room)),
                sample["weight"][heads],
                F.pad(torch.ones_like(sample["needed"][heads], dtype=torch.bool), (0, room)),
            )
        )
    features, needed, weight, valid = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, needed, weight, valid


def _scores(vector: Tensor, features: Tensor, valid: Tensor) -> Tensor:
    """[J, N]"""
    return scores(unflatten(vector.unsqueeze(0)), features.unsqueeze(1), valid.sum(-1, keepdim=True)).squeeze(1)


def _loss(found: Tensor, needed: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """How far scores [J, N] are from what was needed.

    Twice the score is the logarithm of the attention to come but for a constant of the head's, and the score the logit
    of its root: the first says in what order a head should keep its tokens, the second how heads compare.
    """
    share = needed / needed.sum(-1, keepdim=True).clamp_min(1e-9)
    order = -(share * (2 * found).masked_fill(~valid, -1e4).log_softmax(-1)).sum(-1)
    level = F.binary_cross_entropy_with_logits(found, needed.clamp(0, 1).sqrt(), reduction="none")
    level = (level * valid).sum(-1) / valid.sum(-1)
    return ((order + _BALANCE * level) * weight).mean()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot go on with the imitation of {path}: {type(error).__name__}: {error}") from error
