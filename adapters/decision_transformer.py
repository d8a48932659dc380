"""Decision transformers: three tokens a timestep, streamed through the model's own encoder with a memory.

The Hugging Face wrapper recomputes a window of K timesteps at every step and never uses its cache. Here each
timestep is computed once. With nothing evicted the actions equal the wrapper's over the whole episode.

Shape legend: B rows (environments), M chosen rows, T timesteps, O observation width, A action width.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import PreTrainedModel

from namm_transfer.adapters.base import Host, use_namm_attention
from namm_transfer.adapters.gpt2_blocks import Blocks
from namm_transfer.attention import NAME
from namm_transfer.errors import CacheError, ConfigError, DataError
from namm_transfer.memory import MemoryCache
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats

__all__ = ["DecisionTransformerHost", "Normalisation"]

_PARTS = ("embed_state", "embed_action", "embed_return", "embed_timestep", "embed_ln", "encoder", "predict_action")
_NUMBERS = ("state_mean", "state_std", "return_scale", "target_return")


class Normalisation(Protocol):
    """How a decision transformer was fed when it was trained: what `act` has to know beside the weights.

    Attributes:
        state_mean, state_std: O values each; the model sees (observation − mean) / std.
        return_scale: returns-to-go are divided by it.
        target_return: the raw return to ask for at timestep 0.
    """

    @property
    def state_mean(self) -> Sequence[float]: ...
    @property
    def state_std(self) -> Sequence[float]: ...
    @property
    def return_scale(self) -> float: ...
    @property
    def target_return(self) -> float: ...


class DecisionTransformerHost(Host):
    """A decision transformer under a policy.

    ``host(**inputs)`` is the model's own call over a whole sequence, its encoder under a new memory. ``host.reset``,
    ``host.act`` and ``host.reset_rows`` play any number of environments whose episodes end independently, each
    timestep computed once::

        with adapt(model, policy, normalisation=normalisation) as host:
            host.reset(8)
            observation, reward = envs.reset()[0], None
            while playing:
                observation, reward, terminated, truncated, _ = envs.step(host.act(observation, reward))
                if (done := terminated | truncated).any():
                    observation, _ = envs.reset(options={"reset_mask": done})
                    host.reset_rows(done)

    A row that was reset must be shown the first observation of its new episode next. That is how gymnasium's vector
    environments behave with ``AutoresetMode.DISABLED`` and the loop above, and with ``SAME_STEP`` without its
    ``envs.reset``. With ``NEXT_STEP``, gymnasium's default, the step after the end ignores the action and only then
    returns that observation. Reset such a row twice: at the end, since an episode as long as the model has timesteps
    leaves no room for another, and again after that step, to forget it::

        done = np.zeros(8, bool)
        while playing:
            observation, reward, terminated, truncated, _ = envs.step(host.act(observation, reward))
            ignored, done = done, terminated | truncated
            host.reset_rows(ignored | done)

    Args:
        model, policy: as for every host.
        update_interval: tokens between two decisions, a multiple of 16; by default 16 timesteps.
        normalisation: how to feed it raw observations and rewards; only :meth:`act` needs it.

    Raises:
        ConfigError: the normalisation does not fit the model.
    """

    default_interval = 48
    cache: MemoryCache | None = None
    _before: str | None = None
    _blocks: Blocks | None = None
    """The encoder without its modules' calls, where they can be left out; as it was at the last reset."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        update_interval: int = default_interval,
        normalisation: Normalisation | None = None,
    ) -> None:
        super().__init__(model, policy, update_interval)
        self.normalisation = normalisation
        if normalisation is not None:
            if lacking := [name for name in _NUMBERS if not hasattr(normalisation, name)]:
                raise ConfigError(
                    f"the normalisation is {type(normalisation).__name__} without {', '.join(lacking)}; expected an "
                    "object that has them, such as the one that load_host returns beside the model"
                )
            sizes = (len(normalisation.state_mean), len(normalisation.state_std))
            if sizes != (self.model.config.state_dim,) * 2:
                raise ConfigError(
                    f"the normalisation has {sizes[0]} means and {sizes[1]} standard deviations, but the model takes "
                    f"{self.model.config.state_dim} observation values"
                )
            numbers = (*normalisation.state_mean, *normalisation.state_std, normalisation.return_scale)
            if not np.isfinite(numbers).all() or min(*normalisation.state_std, normalisation.return_scale) <= 0:
                raise ConfigError("the normalisation's means must be finite, its deviations and scale positive too")

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        missing = [part for part in _PARTS if not hasattr(model, part)]
        if missing:
            return f"a decision transformer's parts; {type(model).__name__} lacks {', '.join(missing)}"
        if not isinstance(model, PreTrainedModel):
            return f"a transformers model; found {type(model).__module__}.{type(model).__name__}"
        return None

    def attach(self) -> None:
        self._before = self.model.config._attn_implementation
        use_namm_attention(self.model, NAME)

    def detach(self) -> None:
        if self._before is not None:
            use_namm_attention(self.model, self._before)
            self._before = None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's own call: states [B, T, O], actions [B, T, A], returns_to_go [B, T, 1], timesteps [B, T]."""
        self._check_attached()
        self.cache = cache = MemoryCache(self.policy, self.update_interval)
        self._ages = np.zeros(0, np.int64)  # what was being played is over

        def give_memory(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"past_key_values": cache, "use_cache": True}

        hook = self.model.encoder.register_forward_pre_hook(give_memory, with_kwargs=True)
        try:
            out = self.model(*args, **inputs)
        finally:
            hook.remove()
        self._check_used()
        return out

    # -- playing ---------------------------------------------------------------------------------------------

    def reset(self, rows: int, target_return: float | ArrayLike | None = None) -> None:
        """Start an episode in each of ``rows`` = B environments.

        Args:
            target_return: raw return to ask for, one or [B]; by default the normalisation's.
        """
        try:
            count = 0 if isinstance(rows, bool) else operator.index(rows)  # of NumPy, too
        except TypeError:
            count = 0
        if count < 1:
            raise ConfigError(f"reset: rows must be an int of at least 1; got {rows!r}")
        device, wanted = self.model.device, self._wanted(count, target_return)
        self.cache = MemoryCache(self.policy, self.update_interval)
        self._blocks = Blocks.of(self.model.encoder)
        self._ages = np.zeros(count, np.int64)  # timesteps that each row has acted in
        self._action = torch.zeros(count, self.model.config.act_dim, dtype=self.model.dtype, device=device)
        self._to_go = wanted
        if self.normalisation is not None:
            stored = (self.normalisation.state_mean, self.normalisation.state_std)
            self._mean, self._std = (torch.tensor(x, dtype=torch.float32, device=device) for x in stored)

    def reset_rows(self, rows: ArrayLike | Tensor, target_return: float | ArrayLike | None = None) -> None:
        """Start a new episode in some environments; the others go on.

        Args:
            rows: their numbers [M], each once, or a mask [B] of bool.
            target_return: raw return to ask for, one or [M]; by default the normalisation's.

        Raises:
            CacheError: reset was not called.
            DataError: there are no such rows.
        """
        cache = self._playing("reset_rows")
        try:
            chosen = np.asarray(rows.detach().cpu() if isinstance(rows, Tensor) else rows)
        except ValueError:  # a ragged list
            chosen = np.empty(0, object)
        if chosen.dtype == np.bool_ and chosen.shape == self._ages.shape:
            chosen = np.flatnonzero(chosen)
        if chosen.shape == (0,) and chosen.dtype != object:
            return
        known = chosen.ndim == 1 and chosen.dtype.kind in "iu"
        if not known or len({*chosen} & {*range(len(self._ages))}) < len(chosen):
            raise DataError(
                f"reset_rows needs numbers of its {len(self._ages)} rows, each once, or a mask of bool (not of 0 and "
                f"1); got {rows!r}"
            )
        index = torch.from_numpy(chosen.astype(np.int64))
        self._to_go[index] = self._wanted(len(chosen), target_return)
        cache.clear_rows(index)
        self._ages[chosen] = 0

    def act(self, observation: Any, reward: Any = None) -> Any:
        """Act in every environment on what it shows; nothing has changed if an input is refused.

        Args:
            observation: [B, O], as the environment gives it, an array or a tensor.
            reward: [B], what each row's last action earned; not read of rows that begin an episode.

        Returns:
            Actions [B, A]: an array if the observation is one, else a tensor.

        Raises:
            CacheError: reset was not called, or the host is used outside of its `with` block.
            ConfigError: the host has no normalisation.
            DataError: a shape is wrong, a value is not finite or too large for the model, or an episode is longer than
                the model's timesteps; or the model's weights lead to actions that are not finite.
        """
        self._playing("act")
        if self.normalisation is None:
            raise ConfigError(
                "act takes raw observations and rewards, so it needs adapt(..., normalisation=...): means and standard "
                "deviations of the states, the scale of the returns, the return to ask for (step takes them scaled)"
            )
        rows, device, to_go = len(self._ages), self._action.device, self._to_go
        shown = self._numbers("observations", observation, torch.float32)
        self._check_shape("observations", shown, (rows, self.model.config.state_dim))
        if (begun := self._ages > 0).any():
            if reward is None:
                raise DataError("act needs the rewards of the last actions: some rows are in the midst of an episode")
            earned = self._numbers("rewards", reward, torch.float32)
            self._check_shape("rewards", earned, (rows,))
            going_on = torch.from_numpy(begun).to(device)
            to_go = torch.where(going_on, to_go - earned / self.normalisation.return_scale, to_go)
        action = self.step((shown - self._mean) / self._std, to_go).float()
        self._to_go = to_go
        return action.cpu().numpy() if isinstance(observation, np.ndarray) else action

    @torch.no_grad()
    def step(self, states: Tensor, returns_to_go: Tensor) -> Tensor:
        """Act in every environment, on inputs that are scaled as the model was trained.

        The tokens of a step are the action of the step before, the return to go and the state; the state's output
        predicts the action, as in the wrapper.

        Args:
            states: [B, O].
            returns_to_go: [B].

        Returns:
            Actions [B, A].

        Raises:
            CacheError: reset was not called, or the host is used outside of its `with` block.
            DataError: a shape is wrong, a state is not finite or too large for the model, or an episode is longer than
                the model's timesteps.
        """
        cache = self._playing("step")
        self._check_attached()
        states = self._numbers("states", states, self._action.dtype)
        returns_to_go = self._numbers("returns_to_go", returns_to_go, self._action.dtype)
        self._check_inputs(states, returns_to_go)
        model, begun = self.model, self._ages > 0
        ages = torch.from_numpy(self._ages).to(states.device)
        now = model.embed_timestep(ages)
        tokens = [model.embed_return(returns_to_go.unsqueeze(-1)) + now, model.embed_state(states) + now]
        mask = None
        if begun.any():
            before = model.embed_timestep((ages - 1).clamp_min(0))
            tokens.insert(0, model.embed_action(self._action) + before)
            if not begun.all():  # a row that begins an episode has no action behind it: its first token is padding
                mask = torch.ones(len(begun), 3, dtype=torch.bool)
                mask[:, 0] = torch.from_numpy(begun)
                mask = mask.to(states.device)
        embeds = model.embed_ln(torch.stack(tokens, dim=1))
        # Here and not later: what has gone into the memory cannot be taken back. A finite sum has finite summands.
        if not math.isfinite(float(embeds.sum())):
            given = torch.cat([states, returns_to_go.unsqueeze(-1)], dim=1)
            self._check_finite(given, "hold values that are NaN or infinite")
            self._check_finite(embeds, "are too large for the model: its tokens would be NaN or infinite")
        if self._blocks is not None and self._blocks.current:
            last = self._blocks.last(embeds, cache, mask)
        else:
            hidden = model.encoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                # the wrapper gives every token position 0: time is told by the timestep embedding alone
                position_ids=torch.zeros(len(begun), len(tokens), dtype=torch.long, device=states.device),
                past_key_values=cache,
                use_cache=True,
            )[0]
            last = hidden[:, -1]
        self._check_used()
        cache.forget_padding()
        action = model.predict_action(last)
        if not math.isfinite(float(action.sum())) and not torch.isfinite(action).all():
            self._ages = np.zeros(0, np.int64)  # the memory holds what led to them
            raise DataError("the model's actions are NaN or infinite: its episodes are over; look at its weights")
        self._action = action
        self._ages += 1
        return self._action

    def stats(self) -> MemoryStats:
        if self.cache is None:
            raise CacheError("no call yet: stats() tells of the memory of the last call")
        return self.cache.stats()

    def _check_attached(self) -> None:
        if self._before is None:
            raise CacheError("the memory is not laid over the model: use the host inside its with block")

    def _playing(self, call: str) -> MemoryCache:
        if self.cache is None or not len(self._ages):
            raise CacheError(f"no episode yet: call reset(rows) before {call}")
        return self.cache

    def _wanted(self, rows: int, target_return: float | ArrayLike | None) -> Tensor:
        """The scaled returns that M = ``rows`` rows are to ask for, [M]."""
        if self.normalisation is None:
            if target_return is not None:
                raise ConfigError("a target_return is raw: scaling it needs adapt(..., normalisation=...)")
            return torch.zeros(rows, device=self.model.device)
        if isinstance(target_return, Tensor):  # NumPy reads none with a graph, of another device or in bfloat16
            target_return = target_return.detach().double().cpu()
        try:
            wanted = np.asarray(self.normalisation.target_return if target_return is None else target_return, float)
        except (TypeError, ValueError):
            wanted = np.full((), np.nan)
        if wanted.shape not in ((), (rows,)) or not np.isfinite(wanted).all():
            raise DataError(
                f"expected a finite target_return, one or one for each of {rows} rows; got {target_return!r}"
            )
        scaled = np.full(rows, wanted / self.normalisation.return_scale, np.float32)
        return torch.from_numpy(scaled).to(self.model.device)

    def _numbers(self, name: str, value: Any, dtype: torch.dtype) -> Tensor:
        """What an environment gave, as a tensor without a graph, where the last actions are: the model's own
        properties walk through its parameters."""
        try:
            found = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            raise DataError(f"expected {name} as an array of numbers; got {type(value).__name__}: {error}") from error
        if found.is_complex():
            raise DataError(f"expected {name} as real numbers; got {found.dtype}")
        return found.detach().to(self._action.device, dtype)

    @staticmethod
    def _check_shape(name: str, found: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(found.shape) != expected:
            raise DataError(f"expected {name} {expected}, a row for each environment; got {tuple(found.shape)}")

    @staticmethod
    def _check_finite(values: Tensor, fault: str) -> None:
        """Raise DataError if a row of values [B, ...] holds one that is not finite."""
        fine = torch.isfinite(values).flatten(1).all(1)
        if not fine.all():
            rows = (~fine).nonzero().flatten().tolist()
            raise DataError(f"the observations or rewards of rows {rows} {fault}")

    def _check_inputs(self, states: Tensor, returns_to_go: Tensor) -> None:
        self._check_shape("states", states, (len(self._ages), self.model.config.state_dim))
        self._check_shape("returns_to_go", returns_to_go, (len(self._ages),))
        if (oldest := int(self._ages.max())) >= self.model.config.max_ep_len:
            raise DataError(
                f"an episode reached timestep {oldest}, but the model embeds only {self.model.config.max_ep_len} "
                "(max_ep_len)"
            )

    def _check_used(self) -> None:
        if self.cache is None or not self.cache.layers:
            raise CacheError(
                f"{type(self.model.encoder).__name__} put no token into the memory: the policy did nothing"
            )
        self.cache.check_consumed()
