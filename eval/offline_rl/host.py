"""The packaged decision transformer: weights, and the numbers its inputs have to be normalised with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import DecisionTransformerModel

from namm_transfer.errors import CheckpointError
from namm_transfer.eval.checkpoint import load_weights
from namm_transfer.eval.offline_rl.scores import ReferenceReturns, ReturnSummary
from namm_transfer.files import write_atomically

PACKAGED_HOST = Path(__file__).parents[1] / "assets" / "hosts" / "dt_hopper"


@dataclass(frozen=True)
class Normalisation:
    """How to feed a decision transformer, and what its returns are measured against.

    Attributes:
        env_id: the environment, version included, that its data came from.
        state_mean, state_std: one value an observation dimension; the model sees (observation − mean) / std.
        return_scale: returns-to-go are divided by it.
        window: K, the timesteps that the wrapper recomputes at every step.
        target_return: the raw return to ask for at timestep 0.
        random, behaviour: returns of the uniform random policy and of the behaviour policy without noise.

    Raises:
        CheckpointError: lengths differ, a value is not finite, or a scale is not positive.
    """

    env_id: str
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    return_scale: float
    window: int
    target_return: float
    random: ReturnSummary
    behaviour: ReturnSummary

    def __post_init__(self) -> None:
        if len(self.state_mean) != len(self.state_std):
            raise CheckpointError(
                f"state_mean has {len(self.state_mean)} values and state_std {len(self.state_std)}; "
                "expected one of each for every observation dimension"
            )
        if not all(math.isfinite(v) for v in (*self.state_mean, self.target_return)):
            raise CheckpointError("state_mean or target_return holds a value that is not finite")
        if not all(math.isfinite(v) and v > 0 for v in (*self.state_std, self.return_scale)):
            raise CheckpointError("state_std and return_scale have to be finite and positive")
        if self.window < 1:
            raise CheckpointError(f"window is {self.window}; expected at least 1 timestep")

    @property
    def references(self) -> ReferenceReturns:
        """The host's own references: scores of its environment version, never to be mixed with D4RL's."""
        return ReferenceReturns(self.env_id, self.random.mean, self.behaviour.mean, "the host's own")


def load_host(path: Path | str | None = None) -> tuple[DecisionTransformerModel, Normalisation]:
    """Load a decision transformer in float32, in evaluation mode; without `path`, the packaged Hopper-v5 one.

    Raises:
        CheckpointError: a file is missing or unreadable, the weights do not fit the configuration, or the
            normalisation does not fit the model.
    """
    folder = PACKAGED_HOST if path is None else Path(path)
    for name in ("config.json", "model.safetensors", "normalisation.json"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; expected the folder of a trained decision transformer "
                "(config.json, model.safetensors, normalisation.json)"
            )
    normalisation = read_normalisation(folder / "normalisation.json")
    model = load_weights(DecisionTransformerModel, folder, "decision transformer")
    if model.config.state_dim != len(normalisation.state_mean):
        raise CheckpointError(
            f"{folder}: the model takes {model.config.state_dim} observation values, normalisation.json has "
            f"{len(normalisation.state_mean)}"
        )
    return model, normalisation


def save_host(path: Path, model: DecisionTransformerModel, normalisation: Normalisation) -> None:
    """Write a host's folder: weights as float16 safetensors, configuration, normalisation."""
    path.mkdir(parents=True, exist_ok=True)
    copy = DecisionTransformerModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(path)
    write_atomically(path / "normalisation.json", json.dumps(asdict(normalisation), indent=2) + "\n")


def read_normalisation(path: Path) -> Normalisation:
    """Read `normalisation.json`.

    Raises:
        CheckpointError: it is no JSON object, or its entries are not those of `Normalisation`.
    """
    try:
        stored = json.loads(path.read_text())
        for name in ("state_mean", "state_std"):
            stored[name] = tuple(stored[name])
        for name in ("random", "behaviour"):
            stored[name] = ReturnSummary(**stored[name])
        return Normalisation(**stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no normalisation record: {error!r}") from error
