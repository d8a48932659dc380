"""Tiny randomly initialised hosts: one builder for each architecture of the test matrix.

Every model is float32, in evaluation mode, and drawn from its own seed, so a test sees the same weights whatever ran
before it. The weights are wider than at a usual initialisation: attention that is not uniform has something to lose.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 120
SPECIAL = 20
"""Ids below this stand for padding and for placeholders of images and videos; prompts are drawn from the rest."""
IMAGE, VIDEO, VISION_START, VISION_END = 10, 11, 12, 13

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 512}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

_LLAMA4 = {
    "attention_chunk_size": 40,
    "no_rope_layers": [1, 0],
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
}

CAUSAL_LMS: dict[str, tuple[str, dict[str, Any]]] = {
    # name -> (model type, settings that differ from the base): each brings something of its own
    "llama": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", _GPT2),  # learned positions
    "gpt-bigcode": ("gpt_bigcode", _GPT2 | {"multi_query": True}),  # one KV head, learned positions
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5}),  # RoPE on half of the width
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # positions from the attention mask
    "mistral": ("mistral", {"sliding_window": 24}),  # sliding window in every layer
    "mixtral": ("mixtral", _EXPERTS),  # experts
    "qwen2": ("qwen2", {}),  # biased projections
    "qwen3": ("qwen3", {"head_dim": 16}),  # normalised queries and keys, a head width of its own
    "gemma2": ("gemma2", _ALTERNATING | {"head_dim": 8, "attn_logit_softcapping": 2.0}),  # capped logits
    "gemma3": ("gemma3_text", _ALTERNATING | {"head_dim": 8, "query_pre_attn_scalar": 8}),  # RoPE differs by layer
    "phi3": ("phi3", {"sliding_window": None}),  # fused projections
    "starcoder2": ("starcoder2", {"num_key_value_heads": 1, "sliding_window": 40}),
    "olmo2": ("olmo2", {}),  # normalised after attention
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),  # a layer without positions
    "cohere2": ("cohere2", _ALTERNATING | {"head_dim": 8}),  # a layer without positions, parallel block
    "gpt-oss": ("gpt_oss", _ALTERNATING | _EXPERTS | {"head_dim": 8, "rope_parameters": ROPE}),  # learned sinks
    "llama4": ("llama4_text", _LLAMA4 | {"attn_temperature_tuning": False}),  # chunked attention
    "llama4-tuned": ("llama4_text", _LLAMA4 | {"attn_temperature_tuning": True, "floor_scale": 32}),
}

LEARNED_POSITIONS = {"gpt2", "gpt-bigcode"}
"""A forward call with left padding must be told the position ids (``generate`` works them out)."""
PADDING_COUNTS = {"llama4-tuned": "the model itself counts padding in the temperature of its attention"}
"""Models that treat a left-padded row otherwise than the row alone, memory or not."""


def seeded(build: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval().float()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    wide = parameter.shape[-1] ** -0.5 if "embed_tokens" not in name else 1.0
                    parameter.normal_(0.0, 1.2 * wide, generator=generator)
                elif name.endswith("bias"):  # zero as initialised: a biased model would be an unbiased one
                    parameter.normal_(0.0, 0.3, generator=generator)
                elif "sink" in name:
                    parameter.normal_(0.0, 1.0, generator=generator)
    return model.requires_grad_(False)


@cache
def causal_lm(name: str) -> PreTrainedModel:
    """A tiny causal LM; the same object at every call."""
    kind, settings = CAUSAL_LMS[name]
    config = AutoConfig.for_model(kind, **(BASE | settings))
    return seeded(lambda: AutoModelForCausalLM.from_config(config), seed=7)


def prompt(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """[rows, tokens] ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL, VOCABULARY, (rows, tokens), generator=generator)


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Prompts [1, n] of different lengths as a batch."""
    width = max(x.shape[1] for x in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[1] :] = row
        mask[i, width - row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}
