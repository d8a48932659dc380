"""A pretrained language model as the decoder of a video LLM: frozen, with low-rank adapters
(LoRA, https://arxiv.org/abs/2106.09685).

The folder of such a host holds what is its own, in float16: vision tower, projector and adapters. The language model is
named in it, and fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerBase

from namm_transfer.errors import CheckpointError, DataError
from namm_transfer.evolution.hosts import LanguageHost, load_host

__all__ = ["ADAPTERS", "add_adapters", "load_adapted", "own_parameters", "put_decoder", "read_adapted", "save_adapted"]

ADAPTERS = "adapter_config.json"
"""The file, peft's own, that tells the folder of such a host from others."""
EYES = "vision.safetensors"
_DECODER = "language_model."


def put_decoder(model: LlavaNextVideoForConditionalGeneration, language: LanguageHost) -> None:
    """Give a model the weights, and their type, of a language model, which do not learn."""
    decoder = model.model.language_model
    # Assigned, not copied: to cast the module would round the frequencies of its rotary positions, too.
    decoder.load_state_dict(language.model.get_decoder().state_dict(), assign=True)
    decoder.requires_grad_(False)
    model.tie_weights()


def add_adapters(model: LlavaNextVideoForConditionalGeneration, base: str, rank: int, seed: int) -> Any:
    """Adapters in every linear layer of the decoder; peft's model around it, whose own parameters are the adapters'.

    Args:
        base: name of the language model, for the folder that is saved.
    """
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model.model.language_model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def own_parameters(adapted: Any) -> nn.ParameterList:
    """The adapters' parameters, which are all that learns in the decoder."""
    return nn.ParameterList([parameter for parameter in adapted.parameters() if parameter.requires_grad])


def save_adapted(model: LlavaNextVideoForConditionalGeneration, adapted: Any, folder: Path) -> None:
    """Write what is the host's own, and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = model.model.state_dict()
    own = {key: value.half().contiguous() for key, value in weights.items() if not key.startswith(_DECODER)}
    save_file(own, folder / EYES)
    adapted.peft_config["default"].save_pretrained(folder)
    state = {
        key: value.half().contiguous()
        for key, value in _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read_adapted(model: LlavaNextVideoForConditionalGeneration, adapted: Any, folder: Path) -> None:
    """Give a model, and peft's model around its decoder, the weights that `save_adapted` wrote.

    Raises:
        CheckpointError: a file is missing or unreadable, or the weights do not fit.
    """
    try:
        own, state = load_file(folder / EYES), load_file(folder / "adapter_model.safetensors")
        report = model.model.load_state_dict(own, strict=False)
        wrong = [key for key in report.missing_keys if not key.startswith(_DECODER)] + report.unexpected_keys
        expected = _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)
        wrong += sorted(set(expected) ^ set(state))
        _peft().set_peft_model_state_dict(adapted, state)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be read, or do not fit: {error}") from error
    if wrong:
        raise CheckpointError(f"the weights of {folder} do not fit config.json: {wrong}")


def load_adapted(folder: Path) -> tuple[LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerBase]:
    """The host in evaluation mode, its adapters merged, in the type of the language model; and that model's tokenizer.

    Raises:
        CheckpointError: a file is missing or unreadable, or the weights do not fit the configuration.
        DataError: peft is missing, or the language model cannot be fetched.
    """
    try:
        told = json.loads((folder / ADAPTERS).read_text())
        base, rank = told["base_model_name_or_path"], told["r"]
        model = LlavaNextVideoForConditionalGeneration(LlavaNextVideoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable video LLM on a language model: {error}") from error
    language = load_host(base)
    try:
        put_decoder(model, language)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} was made on another language model than {base}: {error}") from error
    adapted = add_adapters(model, base, rank, seed=0)
    read_adapted(model, adapted, folder)
    model.model.language_model = adapted.merge_and_unload()
    for name, part in model.model.named_children():
        if f"{name}." != _DECODER:
            part.to(language.model.dtype)
    return model.eval().requires_grad_(False), language.tokenizer


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DataError(
            f"a video LLM on a language model needs peft, which cannot be imported ({error}): "
            "pip install 'namm-transfer[language]'"
        ) from error
    return peft
