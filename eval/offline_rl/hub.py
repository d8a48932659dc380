"""The decision transformers on the Hugging Face Hub that were trained on D4RL's data, and what to feed them with.

Their repositories hold weights, `config.json` and a model card; the states' means and standard deviations stand in
the card's text. Those of the nine known hosts are packaged (`assets/hosts/d4rl.yaml`), those of others are read from
their card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from namm_transfer.configs import nearest
from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.files import read_yaml

__all__ = ["HubHost", "card_text", "fetch", "hub_host", "hub_hosts", "read_card"]

TABLE = Path(__file__).parents[1] / "assets" / "hosts" / "d4rl.yaml"
FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "README.md")
GIVE_NUMBERS = "give the numbers as model.normalisation=FILE (of a task: task.model.normalisation=FILE)"
NAME_HOST = "name a known host as model.host (task.model.host=hopper-medium)"
_NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class HubHost:
    """One of the known hosts.

    Attributes:
        name: `ENVIRONMENT-DATA`, as in D4RL: `hopper-medium`.
        env_id: the environment whose rewards its data have.
        state_mean, state_std: one value an observation dimension.
        return_scale: returns-to-go are divided by it.
        window: K.
        target_returns: raw returns that such hosts are asked for; the first is the default.
        act_dim: actions' width.
    """

    name: str
    env_id: str
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    return_scale: float
    window: int
    target_returns: tuple[float, ...]
    act_dim: int

    @property
    def repository(self) -> str:
        """Its id on the Hub."""
        return f"edbeeching/decision-transformer-gym-{self.name}"


@cache
def hub_hosts() -> dict[str, HubHost]:
    """The nine known hosts by name."""
    table = read_yaml(TABLE)
    hosts = {}
    for name, numbers in table["hosts"].items():
        environment = table["environments"][name.split("-")[0]]
        for key in ("state_mean", "state_std"):
            if len(numbers[key]) != environment["state_dim"]:
                raise CheckpointError(f"{TABLE.name}: {name} has {len(numbers[key])} values of {key}")
        hosts[name] = HubHost(
            name=name,
            env_id=environment["env_id"],
            state_mean=tuple(numbers["state_mean"]),
            state_std=tuple(numbers["state_std"]),
            return_scale=table["return_scale"],
            window=table["window"],
            target_returns=tuple(environment["target_returns"]),
            act_dim=environment["act_dim"],
        )
    return hosts


def hub_host(name: str) -> HubHost:
    """A known host by its short name or its id on the Hub.

    Raises:
        ConfigError: there is none of this name; the nearest is named.
    """
    short = name.removeprefix("edbeeching/decision-transformer-gym-")
    if short not in hub_hosts():
        raise ConfigError(
            f"no decision transformer {name!r} is known: the nearest is {nearest(short, [*hub_hosts()])!r}"
        )
    return hub_hosts()[short]


def fetch(repository: str) -> Path:
    """The folder of a repository on the Hub, downloaded unless it is in the cache.

    Raises:
        CheckpointError: it is not in the cache and cannot be downloaded; says what is missing.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        fault = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repository} is not on this machine and cannot be fetched from the Hugging Face Hub ({fault}). Missing: "
            "config.json, README.md (the model card) and model.safetensors or pytorch_model.bin. Download that "
            "repository where the Hub can be reached, and give its folder as model.path (task.model.path=FOLDER)"
        ) from error


def card_text(card: Path) -> str:
    """A model card.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{card} cannot be read: {error}") from error


def read_card(card: Path, state_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The states' means and standard deviations from a model card: the lists after `mean =` and `std =`.

    Raises:
        CheckpointError: the card has no such lists, or not of `state_dim` numbers each.
    """
    text, found = card_text(card), []
    for name in ("mean", "std"):
        match = re.search(rf"\b{name}\s*=\s*\[([^\]]*)\]", text)
        if match is None:
            raise CheckpointError(f"{card} has no list `{name} = [...]`; {GIVE_NUMBERS}")
        entries = [entry.strip() for entry in match[1].split(",") if entry.strip()]
        if bad := [entry for entry in entries if not re.fullmatch(_NUMBER, entry)]:
            raise CheckpointError(f"{card}: {name} lists {bad[0]!r}; expected numbers")
        found.append(tuple(float(entry) for entry in entries))
    mean, std = found
    if (len(mean), len(std)) != (state_dim, state_dim):
        raise CheckpointError(
            f"{card} lists {len(mean)} means and {len(std)} standard deviations, but the model takes {state_dim} "
            f"observation values: which of them are meant cannot be known; {GIVE_NUMBERS}, or {NAME_HOST}"
        )
    return mean, std
