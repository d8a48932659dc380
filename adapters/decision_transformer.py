"""Decision transformers: three tokens a timestep, streamed through the model's own encoder with a memory.

The Hugging Face wrapper recomputes a window of K timesteps at every step and never uses its cache. Here each
timestep is computed once. With nothing evicted the actions equal the wrapper's over the whole episode.

Shape legend: B rows (environments), T timesteps, O observation width, A action width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from namm_transfer.adapters.base import Host, use_namm_attention
from namm_transfer.attention import NAME
from namm_transfer.errors import CacheError, DataError
from namm_transfer.memory import MemoryCache
from namm_transfer.stats import MemoryStats

__all__ = ["DecisionTransformerHost"]

_PARTS = ("embed_state", "embed_action", "embed_return", "embed_timestep", "embed_ln", "encoder", "predict_action")


class DecisionTransformerHost(Host):
    """A decision transformer under a policy.

    ``host(**inputs)`` is the model's own call over a whole sequence, its encoder under a new memory; ``host.reset``
    and ``host.step`` play, a timestep at a time, any number of environments whose episodes end independently.
    """

    cache: MemoryCache | None = None
    _before: str | None = None

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
        self.cache = cache = MemoryCache(self.policy, self.update_interval)

        def give_memory(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"past_key_values": cache, "use_cache": True}

        hook = self.model.encoder.register_forward_pre_hook(give_memory, with_kwargs=True)
        try:
            out = self.model(*args, **inputs)
        finally:
            hook.remove()
        self._check_used()
        return out

    def reset(self, rows: int) -> None:
        """Start an episode in each of ``rows`` environments."""
        device = self.model.device
        self.cache = MemoryCache(self.policy, self.update_interval)
        self._age = torch.zeros(rows, dtype=torch.long, device=device)
        self._action = torch.zeros(rows, self.model.config.act_dim, device=device)
        self._mask = torch.zeros(rows, 0, dtype=torch.bool, device=device)

    def reset_rows(self, rows: Tensor) -> None:
        """Start a new episode in the environments ``rows`` [M]; the others go on."""
        if self.cache is None:
            raise CacheError("no episode yet: call reset(rows) before reset_rows")
        self.cache.clear_rows(rows)
        self._age[rows] = 0
        self._mask[rows] = False

    @torch.no_grad()
    def step(self, states: Tensor, returns_to_go: Tensor) -> Tensor:
        """Act in every environment.

        The tokens of a step are the action of the step before, the return to go and the state; the state's output
        predicts the action, as in the wrapper.

        Args:
            states: [B, O], normalised as the model was trained.
            returns_to_go: [B], scaled as the model was trained.

        Returns:
            Actions [B, A].

        Raises:
            CacheError: reset was not called.
            DataError: a shape is wrong, a state is not finite, or an episode is longer than the model's timesteps.
        """
        if self.cache is None:
            raise CacheError("no episode yet: call reset(rows) before step")
        expected = (len(self._age), self.model.config.state_dim)
        if tuple(states.shape) != expected or tuple(returns_to_go.shape) != expected[:1]:
            raise DataError(
                f"expected states {expected} and returns_to_go {expected[:1]}; got {tuple(states.shape)} and "
                f"{tuple(returns_to_go.shape)}"
            )
        if not (torch.isfinite(states).all() and torch.isfinite(returns_to_go).all()):
            raise DataError("states or returns_to_go hold values that are NaN or infinite")
        if int(self._age.max()) >= self.model.config.max_ep_len:
            raise DataError(
                f"an episode reached timestep {int(self._age.max())}, but the model embeds only "
                f"{self.model.config.max_ep_len} (max_ep_len)"
            )
        model, began = self.model, self._age > 0
        now = model.embed_timestep(self._age)
        before = model.embed_timestep((self._age - 1).clamp_min(0))
        tokens = torch.stack(
            [
                model.embed_action(self._action) + before,
                model.embed_return(returns_to_go.unsqueeze(-1)) + now,
                model.embed_state(states) + now,
            ],
            dim=1,
        )
        # a row that begins an episode has no action behind it: its first token is padding
        new = torch.stack([began, torch.ones_like(began), torch.ones_like(began)], dim=1)
        self._mask = torch.cat([self._mask, new], dim=1)
        hidden = model.encoder(
            inputs_embeds=model.embed_ln(tokens),
            attention_mask=self._mask,
            # the wrapper gives every token position 0: time is told by the timestep embedding alone
            position_ids=torch.zeros(new.shape, dtype=torch.long, device=states.device),
            past_key_values=self.cache,
            use_cache=True,
        )[0]
        self._check_used()
        self._action = model.predict_action(hidden[:, -1])
        self._age += 1
        return self._action

    def _check_used(self) -> None:
        if self.cache is None or not self.cache.layers:
            raise CacheError(
                f"{type(self.model.encoder).__name__} put no token into the memory: the policy did nothing"
            )
        self.cache.check_consumed()

    def stats(self) -> MemoryStats:
        if self.cache is None:
            raise CacheError("no call yet: stats() tells of the memory of the last call")
        return self.cache.stats()
