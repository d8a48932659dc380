"""A pretrained language model as the decoder of a video LLM: frozen, with low-rank adapters
(LoRA, https://arxiv.org/abs/2106.09685).

The folder of such a host holds what is its own, in float16: vision tower, projector and adapters. The language model is
named in it, and fetched.
"""

from __future__ import annotations

import copy
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

__all__ = [
    "ADAPTERS",
    "add_adapters",
    "base_of",
    "end_with",
    "load_adapted",
    "load_language",
    "low_rank",
    "own_parameters",
    "put_decoder",
    "read_adapted",
    "save_adapted",
]

ADAPTERS = "adapter_config.json"
"""The file, peft's own, that tells the folder of such a host from others."""
EYES, WEIGHTS = "vision.safetensors", "adapter_model.safetensors"
_DECODER = "language_model."


def load_language(name: str) -> LanguageHost:
    """A language model that a video LLM can be put on.

    Raises:
        DataError: peft is missing, or the model cannot be fetched.
        CheckpointError: it is of a kind that training does not know.
    """
    _peft()  # before anything is fetched
    language = load_host(name)
    config = language.model.config
    if language.model.get_output_embeddings().weight is not language.model.get_input_embeddings().weight:
        raise CheckpointError(f"{name} reads out with other weights than its embeddings; expected tied ones")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise CheckpointError(f"{name} has layers {sorted(set(config.layer_types))}; expected full_attention only")
    if getattr(config, "sliding_window", None) or getattr(config, "attn_logit_softcapping", None):
        raise CheckpointError(f"{name} has a sliding window or capped scores; expected plain attention")
    return language


def put_decoder(model: LlavaNextVideoForConditionalGeneration, language: LanguageHost) -> None:
    """Give a model the weights, and their type, of a language model, which do not learn."""
    decoder = model.model.language_model
    # Assigned, not copied: to cast the module would round the frequencies of its rotary positions, too.
    decoder.load_state_dict(language.model.get_decoder().state_dict(), assign=True)
    decoder.requires_grad_(False)
    model.tie_weights()


def end_with(model: LlavaNextVideoForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation begin, end and pad with the tokenizer's tokens, whatever the text configuration has."""
    chosen = model.generation_config
    chosen.bos_token_id, chosen.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    chosen.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def low_rank(base: str, rank: int) -> Any:
    """Settings of adapters in every linear layer of the decoder.

    Args:
        base: name or folder of the language model, for the folder that is saved.
    """
    place = str(Path(base).resolve()) if Path(base).is_dir() else base
    return _peft().LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", base_model_name_or_path=place)


def add_adapters(model: LlavaNextVideoForConditionalGeneration, settings: Any, seed: int) -> Any:
    """peft's model around the decoder, whose own parameters are the adapters'."""
    base, settings.base_model_name_or_path = settings.base_model_name_or_path, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = _peft().get_peft_model(model.model.language_model, settings)
    settings.base_model_name_or_path = base  # peft writes over it, and warns where there was another
    return adapted


def own_parameters(adapted: Any) -> nn.ParameterList:
    """The adapters' parameters, which are all that learns in the decoder."""
    return nn.ParameterList([parameter for parameter in adapted.parameters() if parameter.requires_grad])


def save_adapted(model: LlavaNextVideoForConditionalGeneration, adapted: Any, folder: Path) -> None:
    """Write what is the host's own, and the configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.get_text_config().name_or_path = ""  # where the language model lies on this machine
    config.save_pretrained(folder)
    weights = model.model.state_dict()
    own = {key: value.half().contiguous() for key, value in weights.items() if not key.startswith(_DECODER)}
    save_file(own, folder / EYES)
    adapted.peft_config["default"].save_pretrained(folder)
    told = json.loads((folder / ADAPTERS).read_text())
    told["target_modules"] = sorted(told["target_modules"])  # a set: in another order in every run
    (folder / ADAPTERS).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    state = {key: value.half().contiguous() for key, value in _state(adapted).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapted(model: LlavaNextVideoForConditionalGeneration, adapted: Any, folder: Path) -> None:
    """Give a model, and peft's model around its decoder, the weights that `save_adapted` wrote.

    Raises:
        CheckpointError: a file is missing or unreadable, or they are adapters of another language model, or of
            another shape.
    """
    settings, expected = settings_of(folder), adapted.peft_config["default"]
    for name in ("base_model_name_or_path", "r", "lora_alpha"):
        came, wanted = getattr(settings, name), getattr(expected, name)
        if came != wanted:
            raise CheckpointError(f"{folder / ADAPTERS}: {name} is {came!r}; expected {wanted!r}")
    try:
        own, state = load_file(folder / EYES), load_file(folder / WEIGHTS)
        report = model.model.load_state_dict(own, strict=False)
        wrong = [key for key in report.missing_keys if not key.startswith(_DECODER)] + report.unexpected_keys
        wrong += sorted(set(_state(adapted)) ^ set(state))
        _peft().set_peft_model_state_dict(adapted, state)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be read, or do not fit: {error}") from error
    if wrong:
        raise CheckpointError(f"the weights of {folder} do not fit config.json: {wrong}")


def settings_of(folder: Path) -> Any:
    """The adapters' settings in a folder.

    Raises:
        CheckpointError: one of a host's files is missing, or the settings cannot be read.
    """
    for name in ("config.json", ADAPTERS, WEIGHTS, EYES):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}: expected a folder written by `train video_llm language=...`")
    try:
        settings = _peft().LoraConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTERS} cannot be read: {error}") from error
    if not settings.base_model_name_or_path:
        raise CheckpointError(f"{folder / ADAPTERS} names no language model (base_model_name_or_path)")
    return settings


def base_of(folder: Path) -> str:
    """Name or folder of the language model that a host is on.

    Raises:
        CheckpointError: as `settings_of`.
    """
    return str(settings_of(folder).base_model_name_or_path)


def load_adapted(folder: Path) -> tuple[LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerBase]:
    """The host in evaluation mode, its adapters merged, in the type of the language model; and that model's tokenizer.

    Raises:
        CheckpointError: a file is missing or unreadable, or the weights do not fit the configuration.
        DataError: peft is missing, or the language model cannot be fetched.
    """
    settings = settings_of(folder)
    language = load_language(settings.base_model_name_or_path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = LlavaNextVideoForConditionalGeneration(LlavaNextVideoConfig.from_pretrained(folder))
        put_decoder(model, language)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit {language.name}: {error}") from error
    end_with(model, language.tokenizer)
    adapted = add_adapters(model, settings, seed=0)
    read_adapted(model, adapted, folder)
    model.model.language_model = adapted.merge_and_unload()
    for name, part in model.model.named_children():
        if f"{name}." != _DECODER:
            part.to(language.model.dtype)
    model.model.image_newline.data = model.model.image_newline.data.to(language.model.dtype)
    return model.eval().requires_grad_(False), language.tokenizer


def _state(adapted: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return state


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DataError(
            f"a video LLM on a language model needs peft, which cannot be imported ({error}): "
            "pip install 'namm-transfer[language]'"
        ) from error
    return peft
