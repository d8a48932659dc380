"""The baseline everyone knows: a decision transformer that recomputes its last K timesteps at every step.

Shapes: E environments (rows), K window in timesteps, O observation width, A action width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DecisionTransformerModel

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.host import Normalisation


class WindowAgent:
    """An `Agent` (see `rollout`) over the model's own forward call; no cache.

    Each row has an episode, a clock and returns-to-go of its own. Rows are aligned at their newest timestep:
    a row younger than K is padded on the left, and the attention mask hides the padding.

    Args:
        model: a decision transformer in evaluation mode.
        normalisation: how to feed it.
        num_envs: E.
        window: K in timesteps; by default the host's.
        target_return: raw return to ask for; by default the host's.

    Raises:
        ConfigError: `num_envs` or `window` is less than 1.
    """

    def __init__(
        self,
        model: DecisionTransformerModel,
        normalisation: Normalisation,
        num_envs: int,
        *,
        window: int | None = None,
        target_return: float | None = None,
    ) -> None:
        self.window = normalisation.window if window is None else window
        if num_envs < 1 or self.window < 1:
            raise ConfigError(f"num_envs is {num_envs} and window {self.window}; expected at least 1")
        self.model = model
        self.return_scale = normalisation.return_scale
        target = normalisation.target_return if target_return is None else target_return
        self.target = target / self.return_scale
        self.mean = torch.tensor(normalisation.state_mean, device=model.device)
        self.std = torch.tensor(normalisation.state_std, device=model.device)
        shape = (num_envs, self.window)
        self.states = torch.zeros(*shape, model.config.state_dim, device=model.device)
        self.actions = torch.zeros(*shape, model.config.act_dim, device=model.device)
        self.returns_to_go = torch.zeros(*shape, 1, device=model.device)
        self.timesteps = torch.zeros(shape, dtype=torch.long, device=model.device)
        self.ages = torch.zeros(num_envs, dtype=torch.long, device=model.device)  # timesteps seen by each row

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Forget the episodes of `rows`."""
        index = torch.as_tensor(rows, device=self.model.device)
        for buffer in (self.states, self.actions, self.returns_to_go, self.timesteps, self.ages):
            buffer[index] = 0

    @torch.inference_mode()
    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return actions [E, A] for observations [E, O] and the rewards [E] of the previous actions.

        Raises:
            DataError: an episode is longer than the model has timestep embeddings.
        """
        oldest = int(self.ages.max())
        if oldest >= self.model.config.max_ep_len:
            raise DataError(
                f"an episode reached timestep {oldest}; the model knows the first "
                f"{self.model.config.max_ep_len} timesteps only"
            )
        device = self.model.device
        state = (torch.as_tensor(observations, dtype=torch.float32, device=device) - self.mean) / self.std
        reward = torch.as_tensor(rewards, dtype=torch.float32, device=device)
        going_on = self.returns_to_go[:, -1, 0] - reward / self.return_scale
        to_go = torch.where(self.ages > 0, going_on, self.target)
        # The newest action is unknown yet; its placeholder follows the state, which therefore never sees it.
        for buffer, newest in (
            (self.states, state),
            (self.actions, torch.zeros_like(self.actions[:, 0])),
            (self.returns_to_go, to_go[:, None]),
            (self.timesteps, self.ages),
        ):
            buffer.copy_(buffer.roll(-1, dims=1))
            buffer[:, -1] = newest
        self.ages += 1
        span = min(oldest + 1, self.window)  # columns that are padding in every row are not computed
        columns = torch.arange(self.window - span, self.window, device=device)
        mask = (columns >= self.window - self.ages[:, None]).long()
        predictions = self.model(
            states=self.states[:, -span:],
            actions=self.actions[:, -span:],
            returns_to_go=self.returns_to_go[:, -span:],
            timesteps=self.timesteps[:, -span:],
            attention_mask=mask,
        )
        self.actions[:, -1] = predictions.action_preds[:, -1]
        return self.actions[:, -1].cpu().numpy()
