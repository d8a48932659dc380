"""The offline-RL task: episodes that a decision transformer plays in MuJoCo.

Shape letters: E environments (rows).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from namm_transfer.adapters import adapt
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.agent import MemoryAgent, WatchedAgent, WatchedEpisode
from namm_transfer.eval.offline_rl.host import PACKAGED_HOST, check_fits, load_host, packaged_hosts
from namm_transfer.eval.offline_rl.hub import fetch, hub_host
from namm_transfer.eval.offline_rl.rollout import EpisodeRecord, make_envs, play, rollout
from namm_transfer.eval.offline_rl.scores import score_percent
from namm_transfer.eval.offline_rl.window import WindowAgent
from namm_transfer.eval.provenance import digest
from namm_transfer.eval.task import Outcome, Unit, check_settings, host_folder
from namm_transfer.policies import Policy

__all__ = ["Episodes"]

FIRST_SEED = 40_000_000
"""No episode of the training data or of the measurements made in training has these seeds."""
SEEDS = 10_000
ROWS = 128
"""Episodes that are played at once: what memories are held together, and what an interruption costs at most."""


@dataclass(frozen=True)
class Episodes:
    """Episodes in the environment that the host was trained for; the same environment seeds under every policy.

    The baseline `window` is the host's wrapper, which recomputes its last K timesteps at every step.

    Attributes:
        model: `path` (a folder; `packaged`, or a packaged host's name; `hub`, with `host` naming which), `device`,
            `update_interval`; `host`, the known host whose numbers a folder without any takes; and, where they are to
            differ from the host's own, `normalisation` (a file), `target_return`, and `window`, the K of the baseline.
            A memory has no window: it holds what it retained of the whole episode.
    """

    name: str
    model: Mapping[str, Any]
    episodes: int
    metric: str = "return_raw"
    baselines: tuple[str, ...] = ("window",)

    def __post_init__(self) -> None:
        given = {key: self.model[key] for key in ("host", "normalisation") if self.model.get(key) is not None}
        for key, value in given.items():
            if not isinstance(value, str | Path):
                raise ConfigError(f"{self.name}: {key} is {value!r}; expected text, or null")
        check_settings(self, self._named, episodes=SEEDS)
        window = self.model.get("window")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ConfigError(f"{self.name}: window is {window!r}; expected an integer of at least 1, or null")
        target = self.model.get("target_return")
        if target is not None and (
            isinstance(target, bool) or not isinstance(target, int | float) or not math.isfinite(target)
        ):
            raise ConfigError(f"{self.name}: target_return is {target!r}; expected a finite number, or null")
        if self.model["path"] != "packaged" or given:
            _ = self._host  # what is wrong with it is said before another task spends hours

    def units(self, seed: int) -> list[Unit]:
        """`episodes` seeds of the environment, none shared between two values of `seed`."""
        first = FIRST_SEED + seed * SEEDS
        return [Unit(str(number), str(number)) for number in range(first, first + self.episodes)]

    def inputs(self) -> dict[str, str]:
        """Digest of the host."""
        return {"host": digest(self._folder)}

    def evaluate(self, units: Sequence[Unit], policy: Policy | str, seed: int) -> Iterator[Outcome]:
        """Up to `ROWS` episodes at once, one a row; each as soon as it ends.

        Raises:
            ConfigError: the environment's observations or actions have other sizes than the host's.
            DataError: an observation is not finite, or an episode ended at its first step; what had finished is kept.
        """
        for first in range(0, len(units), ROWS):
            yield from self._play(units[first : first + ROWS], policy)

    def _play(self, units: Sequence[Unit], policy: Policy | str) -> Iterator[Outcome]:
        """All episodes at once, as `evaluate`."""
        model, normalisation = self._host
        by_seed = {int(unit.id): (row, unit) for row, unit in enumerate(units)}
        with ExitStack() as stack:
            envs = stack.enter_context(closing(make_envs(normalisation.env_id, len(units))))
            check_fits(model, envs, normalisation.env_id)
            agent: WindowAgent | MemoryAgent
            if isinstance(policy, str):
                agent = WindowAgent(model, normalisation, len(units))
            else:
                interval = self.model["update_interval"]
                host = stack.enter_context(adapt(model, policy, interval, normalisation=normalisation))
                agent = MemoryAgent(host, len(units), once=True)
            for record in rollout(agent, envs, by_seed):
                self._refuse_ended_at_once(record, normalisation.env_id)
                row, unit = by_seed[record.seed]
                memory = agent.measured(row) if isinstance(agent, MemoryAgent) else {}
                yield Outcome(unit, score=record.return_raw, detail=self._detail(record), **memory)

    def watch(self, units: Sequence[Unit], policy: Policy, *, bodies: bool = False) -> Iterator[WatchedEpisode]:
        """Play units as `evaluate` does, and yield each episode with what the memory held of it.

        Args:
            units: of this task.
            policy: of the memory.
            bodies: note where the robot's bodies are, too.

        Raises:
            ConfigError, DataError: as `evaluate`.
        """
        model, normalisation = self._host
        rows = {int(unit.id): row for row, unit in enumerate(units)}
        with ExitStack() as stack:
            envs = stack.enter_context(closing(make_envs(normalisation.env_id, len(units))))
            check_fits(model, envs, normalisation.env_id)
            interval = self.model["update_interval"]
            host = stack.enter_context(adapt(model, policy, interval, normalisation=normalisation))
            agent = WatchedAgent(host, len(units), envs if bodies else None)
            for episode in play(agent, envs, rows):
                yield agent.watched(rows[episode.seed], episode)

    @property
    def env_id(self) -> str:
        """The environment that its host plays in."""
        return str(self._host[1].env_id)

    def _detail(self, record: EpisodeRecord) -> dict[str, Any]:
        detail = {"length": record.length, "terminated": record.terminated, "truncated": record.truncated}
        normalisation = self._host[1]
        if (references := normalisation.references) is None:
            return detail
        percent = score_percent(record.return_raw, normalisation.env_id, references)
        return detail | {"score_percent": percent, "references": references.source}

    def _refuse_ended_at_once(self, record: EpisodeRecord, env_id: str) -> None:
        if record.terminated and record.length == 1:
            raise DataError(
                f"{self.name}: {env_id} ended the episode of seed {record.seed} at its first step, before the host "
                "could do anything; the environment is broken, or not the one that the host was trained for"
            )

    @cached_property
    def _named(self) -> dict[str, Path]:
        """The folders of what the settings may name instead of a folder."""
        named = {"packaged": PACKAGED_HOST} | packaged_hosts()
        if self.model["path"] == "hub":
            if self.model.get("host") is None:
                raise ConfigError(
                    f"{self.name}: the path hub needs to be told which host: task.model.host=ENVIRONMENT-DATA, such as "
                    "hopper-medium"
                )
            named["hub"] = fetch(hub_host(self.model["host"]).repository)
        return named

    @property
    def _folder(self) -> Path:
        return host_folder(self.model, self._named)

    @cached_property
    def _host(self) -> tuple[Any, Any]:
        model, normalisation = load_host(
            self._folder, host=self.model.get("host"), normalisation=self.model.get("normalisation")
        )
        given = {key: self.model.get(key) for key in ("target_return", "window")}
        normalisation = replace(normalisation, **{key: value for key, value in given.items() if value is not None})
        return model.to(self.model["device"]), normalisation
