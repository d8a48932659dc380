"""A NAMM that learned nothing, to tell what is learned from what the architecture alone does.

    python -P -m namm_transfer.eval.language.control --namm default --kept 0.5 --out random

Its parameters are those of a trained one, shuffled within each layer: the same values, so scores of the same scale, in
meaningless places. Normaliser and kept fraction are the trained one's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from namm_transfer.cli import plain_errors
from namm_transfer.configs import composed
from namm_transfer.evolution.calibration import calibrate, with_vector
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.readers import LocalReaders
from namm_transfer.network import NAMM, unflatten

__all__ = ["shuffled"]


def shuffled(namm: NAMM, seed: int) -> NAMM:
    """The NAMM with the entries of each weight and bias in another order."""
    vector, generator = namm.to_vector(), torch.Generator().manual_seed(seed)
    for part in unflatten(vector.unsqueeze(0)):  # views of the vector
        flat = part.view(-1)
        flat.copy_(flat[torch.randperm(len(flat), generator=generator)])
    return with_vector(namm, vector.numpy())


def main(
    out: Annotated[Path, typer.Option(help="Folder of the result.")],
    kept: Annotated[float, typer.Option(help="Fraction to keep by threshold on training documents.")],
    namm: Annotated[str, typer.Option(help="Packaged name or folder of the trained one.")] = "default",
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Shuffle a NAMM and calibrate its threshold, on samples as the command `evolve` makes them."""
    config = EvolutionConfig.from_mapping(composed("evolve", overrides or [])["evolution"])
    console = Console()
    with LocalReaders(config) as readers, console.status("calibrating"):
        control, found = calibrate(shuffled(NAMM.from_pretrained(namm), seed), config, kept, readers)
    control.save_pretrained(out)
    console.print(f"{out}: keeps {found:.3f} by threshold")


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
