"""Video LLMs: the text decoder gets the memory; the vision tower keeps its own attention, or gets a policy too."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from namm_transfer.adapters.causal_lm import CausalLMHost
from namm_transfer.adapters.video_encoder import attention_modules, special_tokens
from namm_transfer.encoder import EncoderMemory
from namm_transfer.errors import CacheError, ConfigError
from namm_transfer.layer import check_interval
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats

__all__ = ["VideoLLMHost"]


class VideoLLMHost(CausalLMHost):
    """A language model with one or more vision towers.

    Args:
        vision: a policy for the towers: within each of their sequences (a frame, or a clip) later queries see less.
            None leaves the towers alone.
        vision_interval: queries between two decisions in a tower, a multiple of 16; None for ``update_interval``.
    """

    vision_memory: EncoderMemory | None = None
    """The towers' memory in the last call that had images or videos."""

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        update_interval: int = 512,
        *,
        vision: Policy | None = None,
        vision_interval: int | None = None,
    ) -> None:
        super().__init__(model, policy, update_interval)
        if vision is not None and not isinstance(vision, Policy):
            raise ConfigError(f"vision must be a policy, e.g. namm_transfer.policy('full'); got {vision!r}")
        if vision is None and vision_interval is not None:
            raise ConfigError("vision_interval has no effect without vision, a policy for the vision tower")
        self.vision = vision
        self.vision_interval = check_interval(update_interval if vision_interval is None else vision_interval)

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        misfit = CausalLMHost.misfit(model)
        if misfit is None and isinstance(model, PreTrainedModel) and not vision_towers(model):
            return f"a vision tower beside the text decoder; found none in {type(model).__name__}"
        return misfit

    def attach(self) -> None:
        towers = vision_towers(self.model) if self.vision is not None else []
        self._use_namm(self.model.get_decoder(), *towers)

    def _run(self, call: Any, inputs: dict[str, Any]) -> Any:
        if self.vision is None or not any(name.startswith("pixel_values") for name in inputs):
            return super()._run(call, inputs)
        modules = {
            module: special_tokens(tower) for tower in vision_towers(self.model) for module in attention_modules(tower)
        }
        self.vision_memory = EncoderMemory(self.vision, self.vision_interval, modules)
        with self.vision_memory.listening():
            out = super()._run(call, inputs)
        self.vision_memory.check_used(vision_towers(self.model)[0])
        return out

    def vision_stats(self) -> MemoryStats:
        """What the vision tower's layers retained after their last decision.

        Raises:
            CacheError: no call with images or videos yet, or no policy for the tower.
        """
        if self.vision_memory is None:
            raise CacheError("no call with images or videos under a vision policy yet")
        return self.vision_memory.stats()


def vision_towers(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The outermost models inside ``model`` that attend bidirectionally to patches, apart from its text decoder."""
    decoder = set(model.get_decoder().modules())
    towers: list[PreTrainedModel] = []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module in decoder or not hasattr(module.config, "patch_size"):
            continue
        inside = any(module in set(tower.modules()) for tower in towers)
        if not inside and module._can_set_attn_implementation() and attention_modules(module):
            towers.append(module)
    return towers
