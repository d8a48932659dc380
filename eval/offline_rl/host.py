"""Decision-transformer hosts: weights, and the numbers that their inputs have to be normalised with."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gymnasium.vector import VectorEnv
from transformers import DecisionTransformerModel

from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.checkpoint import load_weights
from namm_transfer.eval.offline_rl.hub import GIVE_NUMBERS, NAME_HOST, HubHost, card_text, hub_host, read_card
from namm_transfer.eval.offline_rl.scores import D4RL_REFERENCES, ReferenceReturns, ReturnSummary
from namm_transfer.files import write_atomically

HOSTS = Path(__file__).parents[1] / "assets" / "hosts" / "dt"
"""A packaged host is a folder in it: ENVIRONMENT-DATA."""
PACKAGED_HOST = HOSTS / "hopper-v5-noise"
"""The one that is meant where none is named: of an expert's episodes at four levels of noise."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OLD_BUFFERS = r"encoder\.h\.\d+\.attn\.(masked_)?bias"
"""Causal masks that files of old versions of transformers carry; they are no weights."""


@dataclass(frozen=True)
class Normalisation:
    """How to feed a decision transformer, and what its returns are measured against.

    Attributes:
        env_id: the environment, version included, that its data came from.
        state_mean, state_std: one value an observation dimension; the model sees (observation − mean) / std.
        return_scale: returns-to-go are divided by it.
        window: K, the timesteps that the wrapper recomputes at every step.
        target_return: the raw return to ask for at timestep 0.
        random, behaviour: returns of the uniform random policy and of the behaviour policy without noise; None where
            they were not measured (hosts of the Hub: D4RL's references serve).

    Raises:
        CheckpointError: lengths differ, a value is not finite, or a scale is not positive.
    """

    env_id: str
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    return_scale: float
    window: int
    target_return: float
    random: ReturnSummary | None = None
    behaviour: ReturnSummary | None = None

    def __post_init__(self) -> None:
        if len(self.state_mean) != len(self.state_std):
            raise CheckpointError(
                f"state_mean has {len(self.state_mean)} values and state_std {len(self.state_std)}; "
                "expected one of each for every observation dimension"
            )
        if not isinstance(self.env_id, str) or isinstance(self.window, bool) or not isinstance(self.window, int):
            raise CheckpointError(f"env_id is {self.env_id!r} and window {self.window!r}; expected a name and an int")
        if not all(math.isfinite(v) for v in (*self.state_mean, self.target_return)):
            raise CheckpointError("state_mean or target_return holds a value that is not finite")
        if not all(math.isfinite(v) and v > 0 for v in (*self.state_std, self.return_scale)):
            raise CheckpointError("state_std and return_scale have to be finite and positive")
        if self.window < 1:
            raise CheckpointError(f"window is {self.window}; expected at least 1 timestep")
        if not all(math.isfinite(known.mean) for known in (self.random, self.behaviour) if known is not None):
            raise CheckpointError("the mean return of random or behaviour is not finite")

    @property
    def references(self) -> ReferenceReturns | None:
        """What scores are measured against: the host's own references, or D4RL's where they are of its environment."""
        if self.random is None or self.behaviour is None:
            return D4RL_REFERENCES.get(self.env_id)
        if not self.behaviour.mean > self.random.mean:
            return None  # nothing lies between them
        return ReferenceReturns(self.env_id, self.random.mean, self.behaviour.mean, "the host's own")


def packaged_hosts() -> dict[str, Path]:
    """The packaged decision transformers: their folders by name."""
    return {folder.name: folder for folder in sorted(HOSTS.iterdir()) if folder.is_dir()}


def load_host(
    path: Path | str | None = None, *, host: str | None = None, normalisation: Path | str | None = None
) -> tuple[DecisionTransformerModel, Normalisation]:
    """Load a decision transformer in float32, in evaluation mode; without `path`, the packaged `hopper-v5-noise`.

    Args:
        path: name of a packaged host, or a folder with `config.json` and the weights. A `Path` is a folder.
        host: the known host of the Hub (see `hub`) that the folder holds, whose numbers are packaged.
        normalisation: file to feed it by; by default `normalisation.json` of the folder, then the numbers of `host`,
            then those of the folder's model card.

    Raises:
        ConfigError: a name is that of a folder here, too.
        CheckpointError: a file is missing or unreadable, the weights do not fit the configuration, or the
            normalisation does not fit the model.
    """
    packaged = packaged_hosts()
    folder = PACKAGED_HOST if path is None else Path(path)
    if isinstance(path, str) and path in packaged:
        if folder.is_dir():
            raise ConfigError(f"{path!r} is a packaged decision transformer and a folder: for that, write ./{path}")
        folder = packaged[path]
    if not folder.is_dir():
        raise CheckpointError(f"no decision transformer {str(path)!r}: no folder, and packaged are {[*packaged]}")
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        lacking = " or ".join(WEIGHTS) if (folder / "config.json").is_file() else "config.json"
        raise CheckpointError(
            f"{folder} has no {lacking}; expected the folder of a trained decision transformer "
            "(config.json, model.safetensors, normalisation.json)"
        )
    model = load_weights(DecisionTransformerModel, folder, "decision transformer", ignored=_OLD_BUFFERS)
    found = _find_normalisation(folder, model.config.state_dim, host, normalisation)
    if model.config.state_dim != len(found.state_mean):
        raise CheckpointError(
            f"{folder}: the model takes {model.config.state_dim} observation values, its normalisation has "
            f"{len(found.state_mean)}"
        )
    return model, found


def check_fits(model: DecisionTransformerModel, envs: VectorEnv, env_id: str) -> None:
    """Make sure that a model can play an environment, before it is asked to.

    Raises:
        ConfigError: its observations or actions have other sizes.
    """
    found = (envs.single_observation_space.shape, envs.single_action_space.shape)
    expected = ((model.config.state_dim,), (model.config.act_dim,))
    if found != expected:
        raise ConfigError(
            f"{env_id} has observations {found[0]} and actions {found[1]}, but the model takes {expected[0]} and gives "
            f"{expected[1]}"
        )


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
            if stored.get(name) is not None:
                stored[name] = ReturnSummary(**stored[name])
        return Normalisation(**stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no normalisation record: {error!r}") from error


def _find_normalisation(
    folder: Path, state_dim: int, host: str | None, normalisation: Path | str | None
) -> Normalisation:
    known, card = None if host is None else hub_host(host), folder / "README.md"
    if normalisation is not None or (folder / "normalisation.json").is_file():
        found = read_normalisation(Path(normalisation or folder / "normalisation.json"))
        if known is not None and found.env_id != known.env_id:
            raise CheckpointError(
                f"{normalisation or folder} is of {found.env_id}, but model.host names {known.name}, of {known.env_id}"
            )
        return found
    if known is not None:
        _check_card(card, known)
        return _of_hub(known)
    if card.is_file():
        mean, std = read_card(card, state_dim)
        return replace(_of_hub(_like(card)), state_mean=mean, state_std=std)
    raise CheckpointError(
        f"{folder} has no normalisation.json and no model card (README.md): what the states' means and standard "
        f"deviations are is unknown; {GIVE_NUMBERS}, or {NAME_HOST}"
    )


def _check_card(card: Path, known: HubHost) -> None:
    """Raise CheckpointError if a folder's card tells of another host than the one it is said to hold."""
    text = card_text(card).lower() if card.is_file() else ""
    if (environment := _environment(text)) is None:
        return
    data = re.search(r"trained on (\S+) trajectories", text)
    name = f"{environment}-{data[1]}" if data else environment
    if name not in (known.name, known.name.split("-")[0]):
        raise CheckpointError(f"{card} is of {name}, but model.host names {known.name}")


def _of_hub(host: HubHost) -> Normalisation:
    return Normalisation(
        host.env_id, host.state_mean, host.state_std, host.return_scale, host.window, host.target_returns[0]
    )


def _like(card: Path) -> HubHost:
    """A known host of the environment that a card names: what a card does not tell is common to all of them."""
    if (environment := _environment(card_text(card).lower())) is not None:
        return hub_host(f"{environment}-medium")
    raise CheckpointError(f"{card} does not tell its environment (Gym Hopper, HalfCheetah or Walker2d); {GIVE_NUMBERS}")


def _environment(text: str) -> str | None:
    """The environment that a card's text in small letters names."""
    return next((name for name in ("hopper", "halfcheetah", "walker2d") if f"gym {name}" in text), None)
