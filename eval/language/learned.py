"""What a NAMM learned, as pictures: where it keeps tokens, which, and what its scores listen to.

    python -P -m namm_transfer.eval.language.learned --namm default --out docs/results/learned

Shape legend: L layers, K KV heads, N tokens, F = 25 features.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

from namm_transfer import network
from namm_transfer.cli import plain_errors
from namm_transfer.configs import composed
from namm_transfer.errors import DataError
from namm_transfer.eval.language.samples import LanguageSamples
from namm_transfer.eval.task import Unit
from namm_transfer.eval.workers import build_task
from namm_transfer.files import replacing, write_atomically
from namm_transfer.memory import MemoryCache
from namm_transfer.network import FEATURES, NAMM
from namm_transfer.policies import NAMMPolicy
from namm_transfer.scoring import LayerView
from namm_transfer.spectrogram import BINS

__all__ = ["SORTS", "Learned", "learn", "sort_of"]

SORTS = ("first", "special", "line break", "punctuation", "number", "capitalised", "short word", "other")
"""Sorts of tokens; a token belongs to the first that fits."""
_AGES = np.array([0, 16, 32, 64, 128, 256, 512, 1024])


def sort_of(text: str, position: int, special: bool) -> str:
    """The sort of a token, of `SORTS`."""
    word = text.strip()
    if position == 0:
        return "first"
    if special:
        return "special"
    if not word:
        return "line break"
    if not re.search(r"\w", word):
        return "punctuation"
    if word[0].isdigit():
        return "number"
    if word[0].isupper():
        return "capitalised"
    return "short word" if text[:1].isspace() and len(word) <= 3 else "other"


@dataclass
class Learned:
    """Sums over decisions.

    Attributes:
        kept, seen: [L, K] tokens just after decisions.
        by_sort: (kept, seen) of each sort of token, over layers and heads.
        response: [F] sum over tokens of the change of the score when all tokens' feature grows by 1; of a spectral
            feature that is one standard deviation.
        by_age: per bin of tokens' age, (sum of scores, tokens).
        scores: (sum, sum of squares, count).
    """

    kept: Tensor
    seen: Tensor
    by_sort: dict[str, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.zeros(2)))
    response: Tensor = field(default_factory=lambda: torch.zeros(FEATURES, dtype=torch.float64))
    by_age: Tensor = field(default_factory=lambda: torch.zeros(len(_AGES), 2, dtype=torch.float64))
    scores: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def summary(self) -> dict[str, Any]:
        """As JSON takes it; sensitivities in standard deviations of the score."""
        count = self.scores[2]
        mean = self.scores[0] / count
        spread = (self.scores[1] / count - mean**2).sqrt()
        response = self.response / count / spread
        ages = (self.by_age[:, 0] / self.by_age[:, 1].clamp_min(1) - mean) / spread
        return {
            "kept_by_layer_and_head": (self.kept / self.seen).tolist(),
            "kept_by_sort": {sort: float(k / n) for sort, (k, n) in self.by_sort.items()},
            "tokens_by_sort": {sort: int(n) for sort, (_, n) in self.by_sort.items()},
            "sensitivity_by_frequency": response[-BINS:].tolist(),
            "sensitivity_by_recency_feature": response[:-BINS].tolist(),
            "score_by_age": {int(age): float(ages[i]) for i, age in enumerate(_AGES) if self.by_age[i, 1]},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watched(NAMMPolicy):
    """A NAMM that notes what its scores depend on."""

    learned: Learned

    def scores(self, view: LayerView) -> Tensor:
        found, valid = super().scores(view), view.valid()
        lengths = None if view.tokens.even else view.tokens.lengths
        weights, x = self.namm.weights(), self.features(view)
        for index in range(FEATURES):
            moved = x.clone()
            moved[..., index] += 1
            change = network.scores(weights, moved, lengths) - found
            self.learned.response[index] += change[valid].double().sum()
        chosen = found[valid].double()
        self.learned.scores += torch.stack([chosen.sum(), chosen.square().sum(), torch.tensor(float(len(chosen)))])
        age = (view.seen - 1 - view.tokens["positions"])[valid].long()
        bins = torch.bucketize(age, torch.from_numpy(_AGES), right=True) - 1
        self.learned.by_age[:, 0].index_add_(0, bins, chosen)
        self.learned.by_age[:, 1].index_add_(0, bins, torch.ones_like(chosen))
        return found


@torch.inference_mode()
def learn(task: LanguageSamples, namm: NAMM, units: Sequence[Unit], seed: int, console: Console) -> Learned:
    """Read samples up to their last decision before the answers, and sum up what was kept, and why.

    Args:
        task: gives samples, host and update interval.
        namm: by threshold.
        units: of the task.
        seed: of the samples.
        console: shows the progress.
    """
    model, tokenizer = task.host.model, task.host.tokenizer
    learned: Learned | None = None
    for unit in track(units, "samples", console=console):
        sample = task.sample(unit, seed)
        interval = int(task.model["update_interval"])
        count = int(sample.targets[0]) // interval * interval
        if not count:
            continue
        if learned is None:
            shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
            learned = Learned(torch.zeros(shape), torch.zeros(shape))
        cache = MemoryCache(_Watched(namm=namm, learned=learned), update_interval=interval)
        model(input_ids=sample.input_ids[None, :count].to(model.device), past_key_values=cache, logits_to_keep=1)
        times = torch.zeros(count)  # heads that kept each token
        for layer in cache.layers:
            lengths = layer.tokens.lengths.cpu()
            learned.kept[layer.index] += lengths[0]
            learned.seen[layer.index] += count
            valid = torch.arange(layer.tokens["positions"].shape[-1]) < lengths[..., None]
            kept = layer.tokens["positions"].cpu()[valid].long()
            times.index_add_(0, kept, torch.ones(len(kept)))
        heads = learned.kept.numel()
        ids = sample.input_ids[:count].tolist()
        for position, (number, text) in enumerate(zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True)):
            sort = sort_of(text, position, number in tokenizer.all_special_ids)
            learned.by_sort[sort] += torch.tensor([float(times[position]), heads])
    if learned is None:
        shortest = task.model["update_interval"]
        raise DataError(f"none of {len(units)} samples is as long as the update interval, {shortest} tokens")
    return learned


def draw(found: dict[str, Any], path: Path) -> None:
    """Four panels: by layer and head, by sort of token, by frequency, by age."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (where, which), (frequency, age) = figure.subplots(2, 2)
    image = where.imshow(np.array(found["kept_by_layer_and_head"]).T, aspect="auto", vmin=0, vmax=1)
    figure.colorbar(image, ax=where, label="kept")
    where.set(xlabel="layer", ylabel="KV head", title="kept fraction")
    sorts = [sort for sort in SORTS if sort in found["kept_by_sort"]]
    which.barh(sorts[::-1], [found["kept_by_sort"][sort] for sort in sorts[::-1]])
    which.set(xlabel="kept fraction over all layers and heads", title="sorts of tokens")
    frequency.bar(range(BINS), found["sensitivity_by_frequency"])
    frequency.set(
        xlabel="frequency, cycles per 32 queries", ylabel="change of score, its std", title="+1 std of spectrum"
    )
    age.plot(np.array(list(found["score_by_age"])) + 1, list(found["score_by_age"].values()), marker="o")
    age.set(xscale="log", xlabel="age of the token, from this on", ylabel="mean score, its std", title="recency")
    for axes in (which, frequency, age):
        axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="Folder for learned.json and learned.png.")],
    namm: Annotated[str, typer.Option(help="Packaged name or folder.")] = "default",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """What a NAMM learned, on held-out essays."""
    config = composed("eval", ["task=language/essays", *(overrides or [])])
    task = build_task(config["task"])
    if not isinstance(task, LanguageSamples):
        raise typer.BadParameter(f"{task.name} is no language task")
    console = Console()
    learned = learn(task, NAMM.from_pretrained(namm), task.units(config["seed"]), config["seed"], console)
    command = ["python -P -m namm_transfer.eval.language.learned --namm", namm, "--out FOLDER", *(overrides or [])]
    found = {"namm": namm, "command": " ".join(command)}
    found |= learned.summary()
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "learned.json", json.dumps(found, indent=1) + "\n")
    draw(found, out / "learned.png")
    console.print(f"{out / 'learned.png'}")


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
