"""The offline-RL task: episodes that a decision transformer plays in MuJoCo.

Shape letters: E environments (rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from namm_transfer.adapters import adapt
from namm_transfer.adapters.decision_transformer import DecisionTransformerHost
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.host import PACKAGED_HOST, check_fits, load_host, packaged_hosts
from namm_transfer.eval.offline_rl.hub import fetch, hub_host
from namm_transfer.eval.offline_rl.rollout import EpisodeRecord, make_envs, rollout
from namm_transfer.eval.offline_rl.scores import score_fraction
from namm_transfer.eval.offline_rl.window import WindowAgent
from namm_transfer.eval.provenance import digest
from namm_transfer.eval.task import Outcome, Unit, check_settings, host_folder, kept_at_updates
from namm_transfer.policies import Policy

__all__ = ["Episodes", "MemoryAgent"]

FIRST_SEED = 40_000_000
"""No episode of the training data or of the measurements made in training has these seeds."""
SEEDS = 10_000


class MemoryAgent:
    """An `Agent` (see `rollout`) with a memory: each timestep is computed once, nothing is computed again."""

    def __init__(self, host: DecisionTransformerHost, num_envs: int) -> None:
        self.host, self.num_envs = host, num_envs
        host.reset(num_envs)

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Forget the episodes of `rows`."""
        self.host.reset_rows(rows)

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Actions [E, A] for observations [E, O] and the rewards [E] of the previous actions."""
        actions: NDArray[np.float32] = self.host.act(observations, rewards)
        return actions

    def measured(self, row: int) -> dict[str, Any]:
        """What the memory holds of a row's first episode, as fields of an outcome; asked before it is forgotten."""
        whole = self.host.stats()
        return {
            "kept_fraction": whole.kept_fraction_by_row[row],
            "kept_at_updates": kept_at_updates(whole.kept_by_row[row], self.host.policy),
            "tokens_seen": whole.seen[row],
            # Rows are allocated together, each as wide as the fullest.
            "bytes_kv": whole.bytes["kv"] // self.num_envs,
            "bytes_total": whole.bytes["total"] // self.num_envs,
        }


@dataclass(frozen=True)
class Episodes:
    """Episodes in the environment that the host was trained for; the same environment seeds under every policy.

    The baseline `window` is the host's wrapper, which recomputes its last K timesteps at every step.

    Attributes:
        model: `path` (a folder; `packaged`, or a packaged host's name; `hub`, with `host` naming which), `device`,
            `update_interval`; and, where they are to differ from the host's own, `normalisation` (a file),
            `target_return`, and `window`, the K of the baseline. A memory has no window: it holds what it retained of
            the whole episode.
    """

    name: str
    model: Mapping[str, Any]
    episodes: int
    metric: str = "return_raw"
    baselines: tuple[str, ...] = ("window",)

    def __post_init__(self) -> None:
        check_settings(self, self._named, episodes=SEEDS)
        window = self.model.get("window")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ConfigError(f"{self.name}: window is {window!r}; expected an integer of at least 1, or null")
        if self.model["path"] != "packaged":
            _ = self._host  # what is wrong with it is said before another task spends hours

    def units(self, seed: int) -> list[Unit]:
        """`episodes` seeds of the environment, none shared between two values of `seed`."""
        first = FIRST_SEED + seed * SEEDS
        return [Unit(str(number), str(number)) for number in range(first, first + self.episodes)]

    def inputs(self) -> dict[str, str]:
        """Digest of the host."""
        return {"host": digest(self._folder)}

    def evaluate(self, units: Sequence[Unit], policy: Policy | str, seed: int) -> Iterator[Outcome]:
        """All episodes at once, one a row; each as soon as it ends.

        Raises:
            ConfigError: the environment's observations or actions have other sizes than the host's.
            DataError: an observation is not finite, or an episode ended at its first step; what had finished is kept.
        """
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
                agent = MemoryAgent(host, len(units))
            for record in rollout(agent, envs, by_seed):
                self._refuse_ended_at_once(record, normalisation.env_id)
                row, unit = by_seed[record.seed]
                memory = agent.measured(row) if isinstance(agent, MemoryAgent) else {}
                yield Outcome(unit, score=record.return_raw, detail=self._detail(record), **memory)

    def _detail(self, record: EpisodeRecord) -> dict[str, Any]:
        detail = {"length": record.length, "terminated": record.terminated, "truncated": record.truncated}
        normalisation = self._host[1]
        if (references := normalisation.references) is None:
            return detail
        fraction = score_fraction(record.return_raw, normalisation.env_id, references)
        return detail | {"score_percent": 100 * fraction, "references": references.source}

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
            named["hub"] = fetch(hub_host(str(self.model.get("host"))).repository)
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
